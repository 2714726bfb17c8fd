//! Which packages make up a guest: the wanted ones, everything essential, and all that they depend on.
//!
//! A greedy solver, like debootstrap's but with versions, alternatives and virtual packages: dependencies with one answer are taken first,
//! those with a choice last, when the choice is often already made. It never takes back a choice; what it cannot solve it refuses by
//! name. `Recommends` are not followed.

use crate::index::{Catalogue, Package, Priority};
use crate::relation::Atom;
use std::collections::{BTreeMap, HashSet, VecDeque};

/// Why there is no set of packages.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A package that was asked for does not exist.
    #[error("there is no package {0} in this suite; check its name")]
    Unknown(String),
    /// A dependency that nothing satisfies.
    #[error(
        "package {package} needs {needs}, which nothing in this suite satisfies; leave the package out or choose another suite"
    )]
    Unsatisfiable {
        /// Who needs it.
        package: String,
        /// What it needs.
        needs: String,
    },
    /// Two packages that cannot be together.
    #[error("packages {0} and {1} cannot be installed together; leave one out")]
    Conflict(String, String),
}

/// A dependency still to be met.
struct Need<'a> {
    package: &'a str,
    group: Vec<Atom<'a>>,
}

struct Solver<'c, 'a> {
    catalogue: &'c Catalogue<'a>,
    /// Virtual packages that the builder itself provides.
    given: &'c [&'c str],
    selected: BTreeMap<&'a str, usize>,
    /// Names provided by selected packages.
    provided: HashSet<&'a str>,
    /// What selected packages cannot be together with.
    enemies: Vec<(&'a str, Atom<'a>)>,
    direct: VecDeque<Need<'a>>,
    choices: VecDeque<Need<'a>>,
}

/// Chooses packages: all essential and required ones, the `wanted`, and their dependencies, sorted by name.
///
/// `given` names virtual packages that need no package because the builder brings them itself.
pub fn resolve(catalogue: &Catalogue<'_>, wanted: &[String], given: &[&str]) -> Result<Vec<usize>, Error> {
    let mut solver = Solver {
        catalogue,
        given,
        selected: BTreeMap::new(),
        provided: HashSet::new(),
        enemies: Vec::new(),
        direct: VecDeque::new(),
        choices: VecDeque::new(),
    };
    for place in catalogue.newest() {
        let basic = catalogue
            .get(place)
            .is_some_and(|package| package.essential || package.priority == Priority::Required);
        if basic {
            solver.select(place)?;
        }
    }
    for name in wanted {
        let place = catalogue.versions(name).first().ok_or_else(|| Error::Unknown(name.clone()))?;
        let selected =
            catalogue.get(*place).is_some_and(|package| solver.selected.contains_key(package.name));
        if !selected {
            solver.select(*place)?;
        }
    }
    while let Some(need) = solver.direct.pop_front().or_else(|| solver.choices.pop_front()) {
        solver.meet(&need)?;
    }
    Ok(solver.selected.into_values().collect())
}

impl<'a> Solver<'_, 'a> {
    fn select(&mut self, place: usize) -> Result<(), Error> {
        let Some(package) = self.catalogue.get(place) else { return Ok(()) };
        if let Some(other) = self.conflicting(package) {
            return Err(Error::Conflict(package.name.to_owned(), other.to_owned()));
        }
        self.selected.insert(package.name, place);
        self.enemies.extend(enemies(package).into_iter().map(|atom| (package.name, atom)));
        for provided in package.relations("Provides").into_iter().flatten() {
            self.provided.insert(provided.name);
        }
        for group in ["Pre-Depends", "Depends"].into_iter().flat_map(|field| package.relations(field)) {
            let need = Need { package: package.name, group };
            let single = need.group.len() == 1
                && need.group.first().is_some_and(|atom| !self.catalogue.versions(atom.name).is_empty());
            if single { self.direct.push_back(need) } else { self.choices.push_back(need) }
        }
        Ok(())
    }

    fn meet(&mut self, need: &Need<'a>) -> Result<(), Error> {
        if need.group.iter().any(|atom| self.is_met(atom)) {
            return Ok(());
        }
        let mut alternatives: Vec<_> = need.group.iter().collect();
        // usrmerge converts a running system; the image is merged from the start and usr-is-merged just says so.
        alternatives.sort_by_key(|atom| atom.name == "usrmerge");
        let choice = alternatives.into_iter().flat_map(|atom| self.candidates(atom)).find(|place| {
            self.catalogue.get(*place).is_some_and(|package| {
                !self.selected.contains_key(package.name) && self.conflicting(package).is_none()
            })
        });
        match choice {
            Some(place) => self.select(place),
            None => {
                let needs = need.group.iter().map(Atom::to_string).collect::<Vec<_>>().join(" or ");
                Err(Error::Unsatisfiable { package: need.package.to_owned(), needs })
            }
        }
    }

    fn is_met(&self, atom: &Atom<'_>) -> bool {
        if atom.version.is_none() && self.given.contains(&atom.name) {
            return true;
        }
        if let Some(package) = self.selected.get(atom.name).and_then(|place| self.catalogue.get(*place))
            && package.satisfies(atom)
        {
            return true;
        }
        self.provided.contains(atom.name)
            && self
                .selected
                .values()
                .filter_map(|place| self.catalogue.get(*place))
                .any(|package| package.provides(atom))
    }

    /// Packages that would meet the atom: its own versions, newest first, then providers by priority and name.
    fn candidates(&self, atom: &Atom<'_>) -> Vec<usize> {
        let accepts =
            |place: &&usize| self.catalogue.get(**place).is_some_and(|package| package.satisfies(atom));
        let mut found: Vec<usize> =
            self.catalogue.versions(atom.name).iter().filter(accepts).copied().collect();
        let mut providers: Vec<usize> =
            self.catalogue.providers(atom.name).iter().filter(accepts).copied().collect();
        providers
            .sort_by_key(|place| self.catalogue.get(*place).map(|package| (package.priority, package.name)));
        found.extend(providers);
        found
    }

    /// The selected package that cannot stand beside `package`.
    fn conflicting(&self, package: &Package<'a>) -> Option<&'a str> {
        let own = enemies(package);
        let selected = self.selected.values().filter_map(|place| self.catalogue.get(*place));
        let by_own = selected
            .filter(|other| other.name != package.name)
            .find(|other| own.iter().any(|atom| other.satisfies(atom)));
        let by_theirs =
            self.enemies.iter().find(|(other, atom)| *other != package.name && package.satisfies(atom));
        by_own.map(|other| other.name).or(by_theirs.map(|(other, _)| *other))
    }
}

/// What a package cannot be together with.
fn enemies<'a>(package: &Package<'a>) -> Vec<Atom<'a>> {
    ["Conflicts", "Breaks"].into_iter().flat_map(|field| package.relations(field)).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str, wanted: &[&str]) -> Result<Vec<String>, Error> {
        let catalogue = Catalogue::new([text]);
        let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        let places = resolve(&catalogue, &wanted, &["linux-initramfs-tool"])?;
        Ok(places
            .into_iter()
            .map(|place| catalogue.get(place).unwrap())
            .map(|p| format!("{}={}", p.name, p.version))
            .collect())
    }

    #[test]
    fn follows_versions_alternatives_and_virtual_packages() {
        let text = "Package: base\nVersion: 1\nEssential: yes\nDepends: awk, usrmerge | usr-is-merged\n\n\
            Package: gawk\nVersion: 1\nProvides: awk\n\nPackage: mawk\nVersion: 1\nPriority: important\nProvides: awk\n\n\
            Package: usrmerge\nVersion: 1\n\nPackage: usr-is-merged\nVersion: 1\n\n\
            Package: kernel\nVersion: 2\nDepends: initramfs-tools (>= 9) | linux-initramfs-tool, lib (<< 2)\n\n\
            Package: initramfs-tools\nVersion: 9\n\nPackage: lib\nVersion: 2\n\nPackage: lib\nVersion: 1\n";
        assert_eq!(
            names(text, &["kernel"]).unwrap(),
            ["base=1", "kernel=2", "lib=1", "mawk=1", "usr-is-merged=1"]
        );
    }

    #[test]
    fn says_what_cannot_be() {
        assert_eq!(names("", &["x"]), Err(Error::Unknown("x".into())));
        let text = "Package: a\nVersion: 1\nDepends: b (>= 2) | c\n\nPackage: b\nVersion: 1\n";
        assert_eq!(
            names(text, &["a"]),
            Err(Error::Unsatisfiable { package: "a".into(), needs: "b (>= 2) or c".into() })
        );
        let text = "Package: a\nVersion: 1\nConflicts: b\n\nPackage: b\nVersion: 1\n";
        assert_eq!(names(text, &["a", "b"]), Err(Error::Conflict("b".into(), "a".into())));
        let text = "Package: a\nVersion: 1\nDepends: b (= 1)\n\nPackage: b\nVersion: 2\nDepends: a\n\nPackage: b\nVersion: 1\nDepends: b (= 2)\n";
        assert!(names(text, &["a"]).is_err(), "a knot ends");
    }

    #[test]
    fn a_conflicting_alternative_is_passed_over() {
        let text = "Package: a\nVersion: 1\nDepends: b | c\nConflicts: b\n\nPackage: b\nVersion: 1\n\nPackage: c\nVersion: 1\n";
        assert_eq!(names(text, &["a"]).unwrap(), ["a=1", "c=1"]);
    }
}
