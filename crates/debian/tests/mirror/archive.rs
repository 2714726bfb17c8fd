//! A Debian archive of two packages, signed with a key made for the test.

use pgp::composed::{ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedSecretKey};
use pgp::types::Password;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::sync::OnceLock;

pub struct Key {
    secret: SignedSecretKey,
    pub public: String,
}

impl Key {
    pub fn new() -> Self {
        let parameters = SecretKeyParamsBuilder::default()
            .key_type(KeyType::Ed25519Legacy)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("Test Archive <test@example.org>".into())
            .build()
            .unwrap();
        let secret = parameters.generate(rand::thread_rng()).unwrap();
        let public = secret.to_public_key().to_armored_string(ArmorOptions::default()).unwrap();
        Key { secret, public }
    }
}

/// The archive's key.
pub fn key() -> &'static Key {
    static KEY: OnceLock<Key> = OnceLock::new();
    KEY.get_or_init(Key::new)
}

pub fn sign(key: &Key, text: &str) -> Vec<u8> {
    let message =
        CleartextSignedMessage::sign(rand::thread_rng(), text, &key.secret.primary_key, &Password::empty())
            .unwrap();
    message.to_armored_string(ArmorOptions::default()).unwrap().into_bytes()
}

/// A text with a signature of another, so often.
pub fn sign_wrongly(key: &Key, text: &str, times: usize) -> Vec<u8> {
    let other = String::from_utf8(sign(key, "another text\n")).unwrap();
    let (other, _) = CleartextSignedMessage::from_string(&other).unwrap();
    let signature = other.signatures()[0].clone();
    let message = CleartextSignedMessage::new_many(text, |_| Ok(vec![signature; times])).unwrap();
    message.to_armored_string(ArmorOptions::default()).unwrap().into_bytes()
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub struct Package {
    name: String,
    pub files: Vec<(String, Vec<u8>)>,
    pub links: Vec<(String, String)>,
    /// What the index says instead of the right path.
    pub filename: Option<String>,
}

impl Package {
    pub fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect();
        Package { name: name.to_owned(), files, links: Vec::new(), filename: None }
    }

    fn control(&self) -> String {
        let essential = if self.name == "base-files" { "Essential: yes\n" } else { "" };
        format!("Package: {}\nVersion: 1\nArchitecture: amd64\n{essential}Description: test\n", self.name)
    }

    fn deb(&self) -> Vec<u8> {
        let control = tar(&[("./control".to_owned(), self.control().into_bytes())], &[]);
        let data = tar(&self.files, &self.links);
        let mut deb = b"!<arch>\n".to_vec();
        for (name, bytes) in
            [("debian-binary", b"2.0\n".as_slice()), ("control.tar", &control), ("data.tar", &data)]
        {
            writeln!(deb, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, bytes.len()).unwrap();
            deb.extend(bytes);
            deb.resize(deb.len().next_multiple_of(2), b'\n');
        }
        deb
    }

    fn path(&self) -> String {
        format!("pool/{}_1_amd64.deb", self.name)
    }

    fn entry(&self) -> String {
        let deb = self.deb();
        let filename = self.filename.clone().unwrap_or_else(|| self.path());
        format!("{}Filename: {filename}\nSize: {}\nSHA256: {}\n\n", self.control(), deb.len(), hash(&deb))
    }
}

fn tar(files: &[(String, Vec<u8>)], links: &[(String, String)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let header = |kind, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header
    };
    for (path, target) in links {
        let mut header = header(tar::EntryType::Symlink, 0);
        builder.append_link(&mut header, path, target).unwrap();
    }
    for (path, bytes) in files {
        let mut header = header(tar::EntryType::Regular, bytes.len() as u64);
        // Written past the library's own check of names.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        builder.append(&header, bytes.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

pub struct Archive {
    pub packages: Vec<Package>,
    pub date: String,
    pub valid_until: Option<String>,
}

impl Archive {
    pub fn small() -> Self {
        let packages = vec![
            Package::new("base-files", &[("usr/share/base-files/nsswitch.conf", "passwd: files\n")]),
            Package::new("linux-image-cloud-amd64", &[("boot/vmlinuz-1", "kernel")]),
        ];
        Archive { packages, date: "Wed, 01 Jan 2020 00:00:00 UTC".to_owned(), valid_until: None }
    }

    pub fn deb(&self, name: &str) -> (String, Vec<u8>) {
        let package = self.packages.iter().find(|package| package.name == name).unwrap();
        (format!("/{}", package.path()), package.deb())
    }

    pub fn index(&self) -> Vec<u8> {
        let text: String = self.packages.iter().map(Package::entry).collect();
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
        writer.write_all(text.as_bytes()).unwrap();
        writer.finish().unwrap()
    }

    pub fn release(&self) -> String {
        let index = self.index();
        let valid_until =
            self.valid_until.as_ref().map_or(String::new(), |date| format!("Valid-Until: {date}\n"));
        format!(
            "Origin: Test\nSuite: stable\nCodename: inn\nVersion: 1\nDate: {}\n{valid_until}SHA256:\n {} {} main/binary-amd64/Packages.xz\n",
            self.date,
            hash(&index),
            index.len()
        )
    }

    /// Everything that the mirror serves.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = self.packages.iter().map(|package| self.deb(&package.name)).collect();
        files.push(("/dists/inn/main/binary-amd64/Packages.xz".to_owned(), self.index()));
        let signed = sign(key(), &self.release());
        files.push(("/dists/inn/InRelease".to_owned(), signed.clone()));
        files.push(("/dists/stable/InRelease".to_owned(), signed));
        files
    }
}
