//! Package indices: the `Packages` files of all suites in use, as one catalogue.

use crate::control::{Paragraph, is_package_name, is_version, paragraphs};
use crate::relation::{self, Atom};
use crate::release::is_sha256;
use crate::version;
use std::collections::HashMap;

/// Largest unpacked `Packages` file.
pub const INDEX_BYTES_MAX: u64 = 512 << 20;
/// Largest package file.
const DEB_BYTES_MAX: u64 = 2 << 30;

/// Why an index entry cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A field is missing or unsafe.
    #[error(
        "the index entry of package {package} has a missing or unsafe {field}; the mirror's index is broken"
    )]
    Field {
        /// The package.
        package: String,
        /// The field.
        field: &'static str,
    },
}

/// How much a package belongs to every system (Debian Policy 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Needed for the system to work.
    Required,
    /// Expected on any Unix-like system.
    Important,
    /// Part of a default installation.
    Standard,
    /// Anything else.
    Optional,
}

/// One version of one package.
#[derive(Clone, Debug)]
pub struct Package<'a> {
    /// Name.
    pub name: &'a str,
    /// Version.
    pub version: &'a str,
    /// Which of the catalogue's texts it is from.
    pub archive: usize,
    /// `Essential: yes`.
    pub essential: bool,
    /// Priority.
    pub priority: Priority,
    /// All of its fields.
    pub paragraph: Paragraph<'a>,
}

/// Where a package file is, and how it is known to be the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// Path under the archive's base.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

impl<'a> Package<'a> {
    /// The groups of alternatives in a relationship field.
    pub fn relations(&self, field: &str) -> Vec<Vec<Atom<'a>>> {
        relation::parse(self.paragraph.field(field).unwrap_or_default())
    }

    /// True if the package itself or something that it provides satisfies the atom (Debian Policy 7.5).
    pub fn satisfies(&self, atom: &Atom<'_>) -> bool {
        if self.name == atom.name {
            return atom.accepts(self.version);
        }
        self.provides(atom)
    }

    /// True if the package provides what the atom asks for, by its `Provides` alone.
    pub fn provides(&self, atom: &Atom<'_>) -> bool {
        let text = self.paragraph.field("Provides").unwrap_or_default();
        relation::parse(text).into_iter().flatten().filter(|provided| provided.name == atom.name).any(
            |provided| match (atom.version, provided.version) {
                (None, _) => true,
                (Some(_), Some((_, version))) => atom.accepts(version),
                (Some(_), None) => false,
            },
        )
    }

    /// Where to fetch it; refuses entries whose names could lead out of the archive or the cache.
    pub fn location(&self) -> Result<Location, Error> {
        let refuse = |field| Error::Field { package: self.name.chars().take(64).collect(), field };
        if !is_package_name(self.name) {
            return Err(refuse("Package"));
        }
        if !is_version(self.version) {
            return Err(refuse("Version"));
        }
        let filename = self
            .paragraph
            .field("Filename")
            .filter(|name| is_archive_path(name))
            .ok_or(refuse("Filename"))?;
        let size = self
            .paragraph
            .field("Size")
            .and_then(|size| size.parse().ok())
            .filter(|size| *size <= DEB_BYTES_MAX);
        let sha256 = self.paragraph.field("SHA256").filter(|hash| is_sha256(hash)).ok_or(refuse("SHA256"))?;
        Ok(Location {
            filename: filename.to_owned(),
            size: size.ok_or(refuse("Size"))?,
            sha256: sha256.to_ascii_lowercase(),
        })
    }
}

/// True for a relative path of plain characters that stays below its start.
fn is_archive_path(path: &str) -> bool {
    path.len() <= 1024
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._+-~:%".contains(&byte))
}

/// All packages of all suites, found by name and by what they provide.
#[derive(Debug, Default)]
pub struct Catalogue<'a> {
    packages: Vec<Package<'a>>,
    by_name: HashMap<&'a str, Vec<usize>>,
    providers: HashMap<&'a str, Vec<usize>>,
}

impl<'a> Catalogue<'a> {
    /// Reads the texts of `Packages` files; each package remembers the number of its text.
    pub fn new(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut catalogue = Catalogue::default();
        for (archive, text) in texts.into_iter().enumerate() {
            for paragraph in paragraphs(text) {
                catalogue.add(archive, paragraph);
            }
        }
        let packages = &catalogue.packages;
        for versions in catalogue.by_name.values_mut() {
            let version_of = |place: &usize| packages.get(*place).map_or("", |package| package.version);
            versions.sort_by(|left, right| version::compare(version_of(right), version_of(left)));
        }
        catalogue
    }

    fn add(&mut self, archive: usize, paragraph: Paragraph<'a>) {
        let (mut name, mut version, mut provides, mut essential) = ("", "", "", false);
        let mut priority = Priority::Optional;
        for (field, value) in paragraph.fields() {
            match field {
                "Package" => name = value,
                "Version" => version = value,
                "Provides" => provides = value,
                "Essential" => essential = value == "yes",
                "Architecture" if value != "all" && value != crate::ARCHITECTURE => return,
                "Priority" => {
                    priority = match value {
                        "required" => Priority::Required,
                        "important" => Priority::Important,
                        "standard" => Priority::Standard,
                        _ => Priority::Optional,
                    }
                }
                _ => {}
            }
        }
        if name.is_empty() || version.is_empty() {
            return;
        }
        let place = self.packages.len();
        self.packages.push(Package { name, version, archive, essential, priority, paragraph });
        self.by_name.entry(name).or_default().push(place);
        for atom in relation::parse(provides).into_iter().flatten() {
            self.providers.entry(atom.name).or_default().push(place);
        }
    }

    /// How many package versions there are.
    pub fn len(&self) -> usize {
        self.packages.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.packages.is_empty()
    }

    /// The package with this number.
    pub fn get(&self, place: usize) -> Option<&Package<'a>> {
        self.packages.get(place)
    }

    /// Numbers of the versions of a package, highest version first.
    pub fn versions(&self, name: &str) -> &[usize] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
    }

    /// Numbers of the packages that provide a name.
    pub fn providers(&self, name: &str) -> &[usize] {
        self.providers.get(name).map_or(&[], Vec::as_slice)
    }

    /// Numbers of the highest version of each package, sorted by name.
    pub fn newest(&self) -> Vec<usize> {
        let mut all: Vec<_> =
            self.by_name.iter().filter_map(|(name, versions)| Some((*name, *versions.first()?))).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, place)| place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn newest_version_of_any_suite_first() {
        let main = "Package: a\nVersion: 1\nArchitecture: amd64\nProvides: v (= 3), w\n\nPackage: a\nVersion: 9\nArchitecture: arm64\n";
        let catalogue = Catalogue::new([main, "Package: a\nVersion: 1+deb1\nArchitecture: all\n"]);
        let versions: Vec<_> =
            catalogue.versions("a").iter().map(|place| catalogue.get(*place).unwrap().version).collect();
        assert_eq!(versions, ["1+deb1", "1"]);
        let old = catalogue.get(catalogue.providers("v")[0]).unwrap();
        assert!(old.satisfies(&relation::parse_atom("v (>= 2)").unwrap()));
        assert!(!old.satisfies(&relation::parse_atom("v (>> 3)").unwrap()));
        assert!(
            !old.satisfies(&relation::parse_atom("w (>= 1)").unwrap()),
            "unversioned Provides satisfy no version"
        );
    }

    #[test]
    fn unsafe_entries_are_refused() {
        let entry = |name: &str, filename: &str, size: &str| {
            let text =
                format!("Package: {name}\nVersion: 1\nFilename: {filename}\nSize: {size}\nSHA256: {HASH}\n");
            Catalogue::new([text.as_str()]).get(0).unwrap().location().map(|_| ()).map_err(
                |error| match error {
                    Error::Field { field, .. } => field,
                },
            )
        };
        assert_eq!(entry("aa", "pool/a_1.deb", "5"), Ok(()));
        assert_eq!(entry("../aa", "pool/a_1.deb", "5"), Err("Package"));
        for path in ["../a.deb", "/etc/passwd", "pool//a.deb", "pool/../../a.deb", "a b", "a?x"] {
            assert_eq!(entry("aa", path, "5"), Err("Filename"), "{path}");
        }
        assert_eq!(entry("aa", "pool/a_1.deb", "-5"), Err("Size"));
        assert_eq!(entry("aa", "pool/a_1.deb", "99999999999999"), Err("Size"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(Package: |Version: |Provides: |[a-z0-9 ,|().\\n:]){0,32}") {
            let catalogue = Catalogue::new([text.as_str()]);
            for place in catalogue.newest() {
                let _ = catalogue.get(place).unwrap().location();
            }
        }
    }
}
