//! dpkg's database for packages that were unpacked without dpkg (dpkg(1), deb-triggers(5)).
//!
//! Every package is recorded as `install ok unpacked`, exactly as dpkg leaves it between unpacking and configuring, so that
//! `dpkg --configure -a` inside the guest runs the maintainer scripts. One entry is ours: the package `yado-guest` owns what the
//! builder adds, and provides `linux-initramfs-tool`, because the guest's kernel is started without an initramfs.

use crate::control::Paragraph;
use crate::deb::ControlFile;
use crate::unpack::Unpacked;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;

/// Name of the builder's own package in the guest.
pub const OWN_PACKAGE: &str = "yado-guest";
/// Virtual packages that it provides.
pub const OWN_PROVIDES: [&str; 1] = ["linux-initramfs-tool"];

/// A file of the builder's package: absolute path, and MD5 digest unless it is a link.
pub type OwnFile = (String, Option<String>);
/// A file of the database: path without leading slash, permission bits, contents.
pub type Record = (String, u16, Vec<u8>);

/// Makes the database's files.
///
/// `digests` has the MD5 digests of all configuration files; `own_files` are the paths of the builder's package; `version` is its
/// version; `automatic` says which packages were not asked for by name.
pub fn database(
    packages: &[Unpacked],
    digests: &HashMap<String, String>,
    own_files: &[OwnFile],
    version: &str,
    automatic: impl Fn(&str) -> bool,
) -> Vec<Record> {
    let mut status = own_entry(version);
    let mut extended = String::new();
    let mut triggers = Triggers::default();
    let mut records = Vec::new();
    for package in packages {
        let control = file(&package.control, "control").unwrap_or_default();
        let paragraph = Paragraph::new(control.trim_matches('\n'));
        let name = paragraph.field("Package").unwrap_or_default();
        let architecture = paragraph.field("Architecture").unwrap_or(crate::ARCHITECTURE);
        let multi = paragraph.field("Multi-Arch") == Some("same");
        let stem = if multi { format!("{name}:{architecture}") } else { name.to_owned() };
        push_status(&mut status, paragraph, &package.conffiles, digests);
        if automatic(name) {
            let _ = write!(extended, "Package: {name}\nArchitecture: {architecture}\nAuto-Installed: 1\n\n");
        }
        for part in package.control.iter().filter(|part| part.name != "control") {
            let mode = if part.mode & 0o111 == 0 { 0o644 } else { 0o755 };
            records.push((format!("var/lib/dpkg/info/{stem}.{}", part.name), mode, part.bytes.clone()));
        }
        records.push((format!("var/lib/dpkg/info/{stem}.list"), 0o644, lines(&package.list)));
        triggers.add(&stem, file(&package.control, "triggers").unwrap_or_default());
    }
    records.extend(own_records(own_files));
    records.extend(triggers.records());
    for (path, bytes) in [
        ("var/lib/dpkg/status", status.into_bytes()),
        ("var/lib/dpkg/available", Vec::new()),
        ("var/lib/dpkg/diversions", Vec::new()),
        ("var/lib/dpkg/statoverride", Vec::new()),
        ("var/lib/dpkg/info/format", b"1\n".to_vec()),
        ("var/lib/apt/extended_states", extended.into_bytes()),
    ] {
        records.push((path.to_owned(), 0o644, bytes));
    }
    records
}

fn file<'a>(control: &'a [ControlFile], name: &str) -> Option<&'a str> {
    control.iter().find(|file| file.name == name).and_then(|file| std::str::from_utf8(&file.bytes).ok())
}

fn lines(paths: &[String]) -> Vec<u8> {
    paths.iter().flat_map(|path| [path.as_bytes(), b"\n"].concat()).collect()
}

/// The list and the digests of the builder's package.
fn own_records(files: &[OwnFile]) -> [Record; 2] {
    let mut paths = BTreeSet::from(["/.".to_owned()]);
    let mut digests = String::new();
    for (path, digest) in files {
        let parents = path.match_indices('/').map(|(place, _)| place).filter(|place| *place > 0);
        paths.extend(parents.filter_map(|place| path.get(..place)).map(str::to_owned));
        paths.insert(path.clone());
        if let Some(digest) = digest {
            let _ = writeln!(digests, "{digest}  {}", path.trim_start_matches('/'));
        }
    }
    let paths: Vec<String> = paths.into_iter().collect();
    [
        (format!("var/lib/dpkg/info/{OWN_PACKAGE}.list"), 0o644, lines(&paths)),
        (format!("var/lib/dpkg/info/{OWN_PACKAGE}.md5sums"), 0o644, digests.into_bytes()),
    ]
}

fn own_entry(version: &str) -> String {
    let provides = OWN_PROVIDES.join(", ");
    format!(
        "Package: {OWN_PACKAGE}\nStatus: install ok installed\nPriority: optional\nSection: admin\nInstalled-Size: 16\n\
         Maintainer: the yado project <root@localhost>\nArchitecture: all\nVersion: {version}\nProvides: {provides}\n\
         Description: what yado adds to its Debian guests\n \
         The service that finishes the configuration of packages after the first boot, the settings of\n \
         the console and the network, and yado's agent. It stands for an initramfs tool, which this\n \
         guest does not need: its kernel is started directly and has the root disk's driver built in.\n\n"
    )
}

/// Appends a package's entry to the status file: its control fields with `Status` after the first and `Conffiles` last.
fn push_status(
    status: &mut String,
    paragraph: Paragraph<'_>,
    conffiles: &[String],
    digests: &HashMap<String, String>,
) {
    let name = paragraph.field("Package").unwrap_or_default();
    let _ = write!(status, "Package: {name}\nStatus: install ok unpacked\n");
    for (field, value) in paragraph.fields() {
        if !["package", "status", "conffiles"].contains(&field.to_ascii_lowercase().as_str()) {
            let _ = writeln!(status, "{field}: {value}");
        }
    }
    let known: Vec<_> = conffiles.iter().filter_map(|path| Some((path, digests.get(path)?))).collect();
    if !known.is_empty() {
        status.push_str("Conffiles:\n");
    }
    for (path, digest) in known {
        let _ = writeln!(status, " {path} {digest}");
    }
    status.push('\n');
}

/// Who waits for which trigger.
#[derive(Default)]
struct Triggers {
    files: Vec<String>,
    named: BTreeMap<String, Vec<String>>,
}

impl Triggers {
    /// Records the interests in a package's `triggers` file.
    fn add(&mut self, package: &str, text: &str) {
        for line in text.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let waits = match words.next() {
                Some("interest" | "interest-await") => package.to_owned(),
                Some("interest-noawait") => format!("{package}/noawait"),
                _ => continue,
            };
            match words.next() {
                Some(path) if path.starts_with('/') => self.files.push(format!("{path} {waits}")),
                Some(name) if !name.contains('/') && !name.starts_with('.') => {
                    self.named.entry(name.to_owned()).or_default().push(waits);
                }
                _ => {}
            }
        }
    }

    fn records(self) -> Vec<Record> {
        let named = self
            .named
            .into_iter()
            .map(|(name, waits)| (format!("var/lib/dpkg/triggers/{name}"), 0o644, lines(&waits)));
        let unincorporated = ("var/lib/dpkg/triggers/Unincorp".to_owned(), 0o644, Vec::new());
        let files = ("var/lib/dpkg/triggers/File".to_owned(), 0o644, lines(&self.files));
        named.chain([files, unincorporated]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(name: &str, text: &str) -> ControlFile {
        ControlFile {
            name: name.into(),
            mode: if name == "postinst" { 0o755 } else { 0o644 },
            bytes: text.into(),
        }
    }

    #[test]
    fn writes_what_dpkg_expects() {
        let package = Unpacked {
            control: vec![
                control(
                    "control",
                    "Package: libx\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n y\n",
                ),
                control("postinst", "#!/bin/sh\n"),
                control("triggers", "interest-noawait ldconfig\ninterest /usr/lib/x\nactivate y\n"),
            ],
            conffiles: vec!["/etc/x".into()],
            list: vec!["/.".into(), "/etc".into(), "/etc/x".into()],
        };
        let digests = HashMap::from([("/etc/x".to_owned(), "d41d8cd98f00b204e9800998ecf8427e".to_owned())]);
        let records =
            database(&[package], &digests, &[("/usr/lib/y/a".into(), Some("00".into()))], "1", |_| true);
        let text = |path: &str| {
            let record =
                records.iter().find(|(found, ..)| found == path).unwrap_or_else(|| panic!("no {path}"));
            String::from_utf8(record.2.clone()).unwrap()
        };
        let status = text("var/lib/dpkg/status");
        assert!(status.ends_with(
            "Package: libx\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n y\n\
             Conffiles:\n /etc/x d41d8cd98f00b204e9800998ecf8427e\n\n"
        ));
        assert_eq!(text("var/lib/dpkg/info/libx:amd64.list"), "/.\n/etc\n/etc/x\n");
        assert_eq!(
            text("var/lib/dpkg/info/yado-guest.list"),
            "/.\n/usr\n/usr/lib\n/usr/lib/y\n/usr/lib/y/a\n"
        );
        assert_eq!(text("var/lib/dpkg/info/yado-guest.md5sums"), "00  usr/lib/y/a\n");
        assert_eq!(text("var/lib/dpkg/triggers/ldconfig"), "libx:amd64/noawait\n");
        assert_eq!(text("var/lib/dpkg/triggers/File"), "/usr/lib/x libx:amd64\n");
        assert!(records.iter().any(|(path, mode, _)| path.ends_with(".postinst") && *mode == 0o755));
        assert!(text("var/lib/apt/extended_states").contains("Auto-Installed"));
    }
}
