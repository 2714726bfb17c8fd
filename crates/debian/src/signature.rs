//! Who signed an InRelease file: clearsigned OpenPGP messages (RFC 9580 section 7) against the Debian archive's keys.
//!
//! The cryptography is the `pgp` crate's. This module decides which keys count: the embedded ones (`keys/README.md`), the host's
//! Debian keyrings and those that the caller adds, each only while it is neither revoked nor expired. Only the text that the
//! signature covers is handed out, never the file around it.

use pgp::composed::{CleartextSignedMessage, Deserializable, SignedPublicKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType};
use pgp::types::{KeyDetails, Tag, VerifyingKey};
use std::io::Cursor;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Why a signed file was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a clearsigned message at all.
    #[error(
        "it is no clearsigned OpenPGP message ({0}); the mirror serves something else under this address"
    )]
    Malformed(String),
    /// No signature by a key that we trust is good.
    #[error(
        "no good signature by a Debian archive key ({0}); the mirror, or something before it, changed the file"
    )]
    Untrusted(String),
    /// A keyring that the caller named cannot be used.
    #[error(
        "keyring {path} has no readable OpenPGP certificate ({reason}); give a file made by `gpg --export`"
    )]
    Keyring {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

const EMBEDDED: [&[u8]; 6] = [
    include_bytes!("../keys/archive-trixie.pgp"),
    include_bytes!("../keys/security-trixie.pgp"),
    include_bytes!("../keys/release-trixie.pgp"),
    include_bytes!("../keys/archive-bookworm.pgp"),
    include_bytes!("../keys/security-bookworm.pgp"),
    include_bytes!("../keys/release-bookworm.pgp"),
];

/// Signatures of a file that are looked at: Debian signs with three keys or four, and each costs a pass over the text.
const SIGNATURES_MAX: usize = 16;
/// Largest keyring file read.
const KEYRING_BYTES_MAX: u64 = 4 << 20;

/// The certificates whose signatures are believed.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    certificates: Vec<SignedPublicKey>,
}

impl Keyring {
    /// The keys of the Debian archive that are part of the program.
    pub fn embedded() -> Self {
        let mut keyring = Keyring::default();
        for bytes in EMBEDDED {
            // A broken embedded key shows in the tests; here it only trusts less.
            let _ = keyring.add(bytes);
        }
        keyring
    }

    /// Adds the host's Debian keyrings, if there are any (`debian-archive-*` in /usr/share/keyrings and apt's own directory).
    pub fn add_host(&mut self) {
        for directory in ["/usr/share/keyrings", "/etc/apt/trusted.gpg.d"] {
            let Ok(entries) = std::fs::read_dir(directory) else { continue };
            for path in entries.flatten().map(|entry| entry.path()) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let wanted = name.starts_with("debian-archive-") && !name.contains("removed");
                if wanted && (name.ends_with(".gpg") || name.ends_with(".pgp")) {
                    // The host's keyrings only add trust: one that cannot be read is no reason to stop.
                    let _ = self.add_file(&path);
                }
            }
        }
    }

    /// Adds a keyring file, binary or armoured.
    pub fn add_file(&mut self, path: &Path) -> Result<(), Error> {
        let refuse = |reason: String| Error::Keyring { path: path.display().to_string(), reason };
        let length = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?.len();
        if length > KEYRING_BYTES_MAX {
            return Err(refuse(format!("it is larger than {KEYRING_BYTES_MAX} bytes")));
        }
        let bytes = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        self.add(&bytes).map_err(refuse)
    }

    /// Adds the certificates in `bytes`. Those already known are not added twice.
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), String> {
        let (keys, _) =
            SignedPublicKey::from_reader_many(Cursor::new(bytes)).map_err(|error| error.to_string())?;
        let mut found = false;
        for key in keys {
            let key = key.map_err(|error| error.to_string())?;
            found = true;
            if !self.certificates.iter().any(|known| known.fingerprint() == key.fingerprint()) {
                self.certificates.push(key);
            }
        }
        if found { Ok(()) } else { Err("it is empty".to_owned()) }
    }

    /// Verifies a clearsigned file at time `now` and returns the text that the signature covers, with `\n` line ends.
    ///
    /// One good signature by any trusted key is enough: Debian signs with the old and the new release's key at once.
    pub fn verify(&self, file: &[u8], now: SystemTime) -> Result<String, Error> {
        let text = std::str::from_utf8(file).map_err(|error| Error::Malformed(error.to_string()))?;
        let (message, _) =
            CleartextSignedMessage::from_string(text).map_err(|error| Error::Malformed(error.to_string()))?;
        let signed = message.signed_text();
        let mut reasons = Vec::new();
        for signature in message.signatures().iter().take(SIGNATURES_MAX) {
            match self.check(signature, signed.as_bytes(), now) {
                Ok(()) => return Ok(signed.replace("\r\n", "\n")),
                Err(reason) => reasons.push(reason),
            }
        }
        if reasons.is_empty() {
            reasons.push("it carries no signature".to_owned());
        }
        Err(Error::Untrusted(reasons.join("; ")))
    }

    /// Checks one signature against every key that it may be by.
    fn check(&self, signature: &Signature, data: &[u8], now: SystemTime) -> Result<(), String> {
        if !matches!(signature.typ(), Some(SignatureType::Text | SignatureType::Binary)) {
            return Err("a signature is not one over a document".to_owned());
        }
        let strong = [HashAlgorithm::Sha256, HashAlgorithm::Sha384, HashAlgorithm::Sha512];
        if !signature.hash_alg().is_some_and(|hash| strong.contains(&hash)) {
            return Err("a signature uses a hash that is too weak".to_owned());
        }
        let lapsed =
            expired(signature.created().map(SystemTime::from), signature.signature_expiration_time(), now);
        if lapsed {
            return Err("a signature has expired".to_owned());
        }
        let mut reason = "made by a key that is not trusted here".to_owned();
        for certificate in &self.certificates {
            if names(signature, certificate) {
                match usable_primary(certificate, now) {
                    Ok(()) if signature.verify(&certificate.primary_key, data).is_ok() => return Ok(()),
                    Ok(()) => {
                        reason =
                            format!("the signature by {} does not match the text", certificate.fingerprint())
                    }
                    Err(why) => reason = why,
                }
            }
            for subkey in certificate.public_subkeys.iter().filter(|subkey| names(signature, &subkey.key)) {
                let bound = subkey.verify_bindings(&certificate.primary_key).is_ok();
                let lapsed = subkey.signatures.iter().any(|binding| {
                    expired(Some(subkey.key.created_at().into()), binding.key_expiration_time(), now)
                        || binding.typ() == Some(SignatureType::SubkeyRevocation)
                });
                match usable_primary(certificate, now) {
                    Ok(()) if bound && !lapsed && signature.verify(&subkey.key, data).is_ok() => {
                        return Ok(());
                    }
                    Ok(()) if lapsed => reason = format!("key {} has expired", subkey.key.fingerprint()),
                    Ok(()) => {
                        reason =
                            format!("the signature by {} does not match the text", subkey.key.fingerprint())
                    }
                    Err(why) => reason = why,
                }
            }
        }
        Err(reason)
    }
}

/// True if the signature says that it is by this key.
fn names(signature: &Signature, key: &impl VerifyingKey) -> bool {
    signature.issuer_fingerprint().iter().any(|fingerprint| **fingerprint == key.fingerprint())
        || signature.issuer_key_id().iter().any(|id| **id == key.legacy_key_id())
}

/// Says whether a certificate's primary key is neither revoked nor expired.
fn usable_primary(certificate: &SignedPublicKey, now: SystemTime) -> Result<(), String> {
    if !certificate.details.revocation_signatures.is_empty() {
        return Err(format!("key {} is revoked", certificate.fingerprint()));
    }
    let key = &certificate.primary_key;
    // The newest self-signature says when the key ends (RFC 9580 section 5.2.3.10).
    let newest = certificate
        .details
        .users
        .iter()
        .flat_map(|user| user.signatures.iter().map(move |signature| (user, signature)))
        .filter(|(user, signature)| {
            names(signature, key) && signature.verify_certification(key, Tag::UserId, &user.id).is_ok()
        })
        .max_by_key(|(_, signature)| signature.created().map(SystemTime::from));
    let Some((_, newest)) = newest else {
        return Err(format!("key {} has no valid self-signature", certificate.fingerprint()));
    };
    if expired(Some(key.created_at().into()), newest.key_expiration_time(), now) {
        return Err(format!("key {} has expired", certificate.fingerprint()));
    }
    Ok(())
}

/// True once `lifetime` (zero: forever) after `start` is over.
fn expired(start: Option<SystemTime>, lifetime: Option<pgp::types::Duration>, now: SystemTime) -> bool {
    let Some(lifetime) = lifetime.map(Duration::from).filter(|lifetime| !lifetime.is_zero()) else {
        return false;
    };
    start.and_then(|start| start.checked_add(lifetime)).is_none_or(|end| end < now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_keys_are_those_that_the_readme_names() {
        let keyring = Keyring::embedded();
        let readme = include_str!("../keys/README.md").replace(' ', "");
        assert_eq!(keyring.certificates.len(), EMBEDDED.len());
        for certificate in &keyring.certificates {
            let fingerprint = certificate.fingerprint().to_string().to_uppercase();
            assert!(readme.contains(&fingerprint), "{fingerprint} is not in keys/README.md");
            assert_eq!(usable_primary(certificate, certificate.primary_key.created_at().into()), Ok(()));
            let end = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
            assert!(usable_primary(certificate, end).is_err(), "{fingerprint} never expires");
        }
    }

    #[test]
    fn nonsense_is_no_signature() {
        for text in ["", "x", "-----BEGIN PGP SIGNED MESSAGE-----\n\nx\n"] {
            assert!(matches!(
                Keyring::embedded().verify(text.as_bytes(), SystemTime::now()),
                Err(Error::Malformed(_))
            ));
        }
        assert!(Keyring::default().add(b"nonsense").is_err());
    }
}
