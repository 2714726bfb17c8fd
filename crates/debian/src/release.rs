//! Release files: what an archive says of a suite, and whether that is still current.

use crate::control::Paragraph;
use crate::date;
use std::collections::HashMap;
use std::time::{Duration, SystemTime};

/// Why a Release file is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A field that every Release file has is missing or wrong.
    #[error("its field {0} is missing or unreadable; the mirror's copy is broken")]
    Field(&'static str),
    /// It is past its `Valid-Until`.
    #[error(
        "it expired on {valid_until}; the mirror no longer follows Debian (or this host's clock is wrong). Use another --mirror"
    )]
    Stale {
        /// The date as written.
        valid_until: String,
    },
    /// An older file than one already seen from this suite.
    #[error(
        "it is dated {date}, but a newer one was seen before: the mirror went back in time. Use another --mirror, or wait until it has caught up"
    )]
    RolledBack {
        /// The date as written.
        date: String,
    },
    /// It is dated in the future.
    #[error("it is dated {date}, which is in the future; set this host's clock right")]
    Future {
        /// The date as written.
        date: String,
    },
    /// Another suite than the one that was asked for.
    #[error("it describes {found}, not {wanted}; the mirror is set up wrongly")]
    OtherSuite {
        /// What was asked for.
        wanted: String,
        /// What it says.
        found: String,
    },
}

/// One file that the Release file vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexFile {
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
    /// Size in bytes.
    pub size: u64,
}

/// A parsed Release file.
#[derive(Clone, Debug)]
pub struct Release {
    /// `Origin`, `Debian` in Debian's own archive.
    pub origin: String,
    /// `Suite`, for example `stable`.
    pub suite: String,
    /// `Codename`, for example `trixie`.
    pub codename: String,
    /// `Version`, empty where the suite has none.
    pub version: String,
    /// `Date` as written.
    pub date: String,
    /// `Date` as a time.
    pub time: SystemTime,
    /// `Valid-Until` as written, if given.
    pub valid_until: Option<String>,
    /// `Acquire-By-Hash`: index files are also found under their hash, which survives a mirror's update.
    pub by_hash: bool,
    /// Path under the suite's directory to hash and size.
    pub files: HashMap<String, IndexFile>,
}

/// How far ahead of the host's clock a Release may be dated.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(24 * 3600);

impl Release {
    /// Parses the text of a Release file.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let paragraph = Paragraph::new(text.trim_start());
        let field = |name: &'static str| {
            paragraph.field(name).filter(|value| !value.is_empty()).ok_or(Error::Field(name))
        };
        let date = field("Date")?.to_owned();
        let time = date::parse(&date).ok_or(Error::Field("Date"))?;
        let codename = field("Codename")?.to_owned();
        if !is_suite_name(&codename) {
            return Err(Error::Field("Codename"));
        }
        let mut files = HashMap::new();
        for line in field("SHA256")?.lines() {
            let mut words = line.split_whitespace();
            let (Some(sha256), Some(size), Some(path), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            let size = size.parse().map_err(|_| Error::Field("SHA256"))?;
            if !is_sha256(sha256) {
                return Err(Error::Field("SHA256"));
            }
            files.insert(path.to_owned(), IndexFile { sha256: sha256.to_ascii_lowercase(), size });
        }
        Ok(Release {
            origin: paragraph.field("Origin").unwrap_or_default().to_owned(),
            suite: paragraph.field("Suite").unwrap_or_default().to_owned(),
            codename,
            version: paragraph.field("Version").unwrap_or_default().to_owned(),
            date,
            time,
            valid_until: paragraph.field("Valid-Until").map(str::to_owned),
            by_hash: paragraph.field("Acquire-By-Hash") == Some("yes"),
            files,
        })
    }

    /// Refuses a Release that is stale at `now`, older than `newest_seen`, or of another suite than `wanted`.
    ///
    /// `accept_stale` lets an expired one through (a frozen archive), but never one that went back in time.
    pub fn check(
        &self,
        wanted: &str,
        now: SystemTime,
        newest_seen: Option<SystemTime>,
        accept_stale: bool,
    ) -> Result<(), Error> {
        if wanted != self.codename && wanted != self.suite {
            let found = format!("{} ({})", self.codename, self.suite);
            return Err(Error::OtherSuite { wanted: wanted.to_owned(), found });
        }
        if now.checked_add(CLOCK_SKEW_MAX).is_some_and(|limit| self.time > limit) {
            return Err(Error::Future { date: self.date.clone() });
        }
        if newest_seen.is_some_and(|newest| self.time < newest) {
            return Err(Error::RolledBack { date: self.date.clone() });
        }
        if let Some(valid_until) = &self.valid_until {
            let end = date::parse(valid_until).ok_or(Error::Field("Valid-Until"))?;
            if end < now && !accept_stale {
                return Err(Error::Stale { valid_until: valid_until.clone() });
            }
        }
        Ok(())
    }
}

/// True for 64 hexadecimal digits.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// True for a name that can stand in a URL path and a file name: `trixie`, `bookworm-security`.
pub fn is_suite_name(text: &str) -> bool {
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "Origin: Debian\nSuite: stable\nCodename: trixie\nVersion: 13.7\nDate: Sat, 12 Sep 2026 07:55:41 UTC\n\
        Valid-Until: Sat, 19 Sep 2026 07:55:41 UTC\nAcquire-By-Hash: yes\nSHA256:\n \
        e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0 main/binary-amd64/Packages\n";

    fn at(text: &str) -> SystemTime {
        date::parse(text).unwrap()
    }

    #[test]
    fn accepts_only_what_is_current() {
        let release = Release::parse(TEXT).unwrap();
        assert_eq!(release.codename, "trixie");
        assert_eq!(release.files["main/binary-amd64/Packages"].size, 0);
        let now = at("Sun, 13 Sep 2026 00:00:00 UTC");
        assert_eq!(release.check("trixie", now, None, false), Ok(()));
        assert_eq!(release.check("stable", now, Some(release.time), false), Ok(()));
        assert!(matches!(release.check("bookworm", now, None, false), Err(Error::OtherSuite { .. })));
        let later = at("Sun, 20 Sep 2026 00:00:00 UTC");
        assert!(matches!(release.check("trixie", later, None, false), Err(Error::Stale { .. })));
        assert_eq!(release.check("trixie", later, None, true), Ok(()));
        assert!(matches!(release.check("trixie", now, Some(now), true), Err(Error::RolledBack { .. })));
        let earlier = at("Tue, 01 Sep 2026 00:00:00 UTC");
        assert!(matches!(release.check("trixie", earlier, None, false), Err(Error::Future { .. })));
    }

    #[test]
    fn broken_files_are_named() {
        assert_eq!(Release::parse("").unwrap_err(), Error::Field("Date"));
        assert_eq!(Release::parse(&TEXT.replace("trixie", "../x")).unwrap_err(), Error::Field("Codename"));
        assert_eq!(Release::parse(&TEXT.replace("e3b0", "zzzz")).unwrap_err(), Error::Field("SHA256"));
        assert_eq!(Release::parse(&TEXT.replace("855 0 ", "855 -1 ")).unwrap_err(), Error::Field("SHA256"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(cut in 0usize..TEXT.len(), junk in "[\\n :a-f0-9]{0,16}") {
            let _ = Release::parse(&format!("{}{junk}{}", &TEXT[..cut], &TEXT[cut..]));
        }
    }
}
