//! Where packages come from: the host's APT configuration (sources.list(5)) or mirrors named by the user.
//!
//! Only the base addresses are taken from the host. The suite is the guest's own, so a bookworm host builds a trixie guest from the same
//! mirror. Whether an address really serves Debian is decided by the signature of what it serves, not by its name.

use crate::control;
use std::path::Path;

/// A place that may have a Debian archive.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Base {
    /// URL without a trailing slash; `dists/` and `pool/` lie under it.
    pub url: String,
    /// The host uses it for a security suite.
    pub security: bool,
}

/// Why there is nothing to fetch from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The host names no Debian archive.
    #[error("this host's APT configuration names no Debian archive; give one: --mirror http://MIRROR/debian")]
    None,
    /// A mirror that is no HTTP address.
    #[error(
        "--mirror {0} is not an http:// or https:// address; give the directory that contains dists/ and pool/"
    )]
    Address(String),
}

/// Turns `--mirror` values into bases. Each may serve the main archive, the security archive, or both.
pub fn from_mirrors(mirrors: &[String]) -> Result<Vec<Base>, Error> {
    let mut bases = Vec::new();
    for mirror in mirrors {
        let url = base_url(mirror).ok_or_else(|| Error::Address(mirror.clone()))?;
        let sibling = security_sibling(&url);
        push(&mut bases, Base { url, security: false });
        // Mirrors keep the security archive beside the main one; where it is not there, it is just not used.
        if let (Some(url), 1) = (sibling, mirrors.len()) {
            push(&mut bases, Base { url, security: true });
        }
    }
    Ok(bases)
}

/// Reads the host's APT sources under `root` (normally `/`).
pub fn from_host(root: &Path) -> Result<Vec<Base>, Error> {
    let apt = root.join("etc/apt");
    let release = std::fs::read_to_string(root.join("etc/os-release")).unwrap_or_default();
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'));
    let mut files = vec![apt.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(apt.join("sources.list.d")) {
        let mut parts: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut bases = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let found = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_list(&text),
            Some("sources") => parse_sources(&text),
            _ => continue,
        };
        found.iter().filter_map(|entry| entry.base(codename)).for_each(|base| push(&mut bases, base));
    }
    if bases.iter().any(|base| !base.security) { Ok(bases) } else { Err(Error::None) }
}

fn push(bases: &mut Vec<Base>, base: Base) {
    if !bases.contains(&base) {
        bases.push(base);
    }
}

/// One address and suite of a source entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address as written.
    pub uri: String,
    /// The suite as written.
    pub suite: String,
    /// The components.
    pub components: Vec<String>,
}

impl Entry {
    /// The base, if this looks like a Debian archive: `main` of a suite of Debian's, reached by HTTP.
    fn base(&self, codename: Option<&str>) -> Option<Base> {
        let names = [
            "stable",
            "oldstable",
            "oldoldstable",
            "testing",
            "unstable",
            "sid",
            "bookworm",
            "trixie",
            "forky",
        ];
        let suite = self.suite.trim_end_matches('/');
        let (stem, kind) = suite.split_once(['-', '/']).unwrap_or((suite, ""));
        let known = names.contains(&stem) || codename == Some(stem);
        let security = matches!(kind, "security" | "updates") && (kind == "security" || suite.contains('/'));
        if !known || !self.components.iter().any(|component| component == "main") {
            return None;
        }
        if !(kind.is_empty() || security || matches!(kind, "updates" | "proposed-updates")) {
            return None; // Backports and the like come from the same place as the suite itself.
        }
        Some(Base { url: base_url(&self.uri)?, security })
    }
}

/// Normalises an archive address; `None` if it is not HTTP.
fn base_url(uri: &str) -> Option<String> {
    let uri = uri.trim().trim_end_matches('/');
    let rest = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://"))?;
    let plain = uri.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'<>\\^`{|}#?".contains(&byte));
    (plain && !rest.is_empty() && !rest.starts_with('/')).then(|| uri.to_owned())
}

/// Where a mirror that keeps `debian` keeps the security archive.
fn security_sibling(url: &str) -> Option<String> {
    url.strip_suffix("/debian").map(|parent| format!("{parent}/debian-security"))
}

/// Parses the one-line format: `deb [option=value ...] uri suite component...`.
pub fn parse_list(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t', '['])) else {
            continue;
        };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').unwrap_or((inner, "")),
            None => ("", rest),
        };
        let foreign = options
            .split_whitespace()
            .filter_map(|option| option.strip_prefix("arch=").or_else(|| option.strip_prefix("arch+=")))
            .any(|list| !list.split(',').any(|architecture| architecture == crate::ARCHITECTURE));
        let mut words = rest.split_whitespace().map(str::to_owned);
        if let (false, Some(uri), Some(suite)) = (foreign, words.next(), words.next()) {
            entries.push(Entry { uri, suite, components: words.collect() });
        }
    }
    entries
}

/// Parses the deb822 format.
pub fn parse_sources(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for paragraph in control::paragraphs(text) {
        let words = |name: &str| {
            let value = paragraph.field(name).unwrap_or_default();
            value
                .lines()
                .filter(|line| !line.trim_start().starts_with('#'))
                .flat_map(str::split_whitespace)
                .collect::<Vec<_>>()
        };
        let disabled = paragraph
            .field("Enabled")
            .is_some_and(|value| matches!(value, "no" | "false" | "0" | "off" | "without" | "disable"));
        let architectures = words("Architectures");
        let foreign = !architectures.is_empty() && !architectures.contains(&crate::ARCHITECTURE);
        if disabled || foreign || !words("Types").contains(&"deb") {
            continue;
        }
        let components: Vec<String> = words("Components").into_iter().map(str::to_owned).collect();
        for uri in words("URIs") {
            for suite in words("Suites") {
                entries.push(Entry {
                    uri: uri.to_owned(),
                    suite: suite.to_owned(),
                    components: components.clone(),
                });
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn reads_both_formats_and_leaves_others_alone() {
        let root = host(&[
            ("etc/os-release", "VERSION_CODENAME=bookworm\n"),
            (
                "etc/apt/sources.list",
                "# x\ndeb [arch=amd64 signed-by=/k] http://a.example/debian/ bookworm main contrib # y\n\
                deb-src http://src.example/debian bookworm main\ndeb [arch=arm64] http://arm.example/debian bookworm main\n\
                deb cdrom:[x]/ bookworm main\ndeb http://apps.example/apt tools-bookworm main\n",
            ),
            (
                "etc/apt/sources.list.d/s.sources",
                "Types: deb\nURIs: https://b.example/debian-security\nSuites: bookworm-security\nComponents: main\n\
                Signed-By:\n -----BEGIN PGP\n .\n\nEnabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n",
            ),
            ("etc/apt/sources.list.d/old.save", "deb http://saved.example/debian bookworm main\n"),
        ]);
        let bases = from_host(root.path()).unwrap();
        assert_eq!(
            bases,
            [
                Base { url: "http://a.example/debian".into(), security: false },
                Base { url: "https://b.example/debian-security".into(), security: true },
            ]
        );
    }

    #[test]
    fn a_host_without_debian_is_told_what_to_do() {
        let root = host(&[("etc/apt/sources.list", "deb http://u.example/ubuntu noble main\n")]);
        assert_eq!(from_host(root.path()), Err(Error::None));
        assert!(Error::None.to_string().contains("--mirror"));
        assert_eq!(from_host(Path::new("/nonexistent")), Err(Error::None));
    }

    #[test]
    fn mirrors_are_checked() {
        assert!(from_mirrors(&["ftp://x/debian".into()]).is_err());
        assert!(from_mirrors(&["http://".into()]).is_err());
        assert!(from_mirrors(&["http://x/a\nb".into()]).is_err());
        let bases = from_mirrors(&["http://m.example/debian/".into()]).unwrap();
        assert_eq!(bases[1].url, "http://m.example/debian-security");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(deb |\\[|\\]|arch=|URIs:|Suites:|Types:|[a-z/:#\\n \u{e9}]){0,24}") {
            parse_list(&text);
            parse_sources(&text);
        }
    }
}
