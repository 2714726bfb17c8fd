//! Relationship fields: `Depends`, `Provides`, `Conflicts`... (Debian Policy 7.1).

use crate::version;
use std::cmp::Ordering;

/// A comparison in a versioned relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `<<`
    Earlier,
    /// `<=` (and the obsolete `<`)
    EarlierOrEqual,
    /// `=`
    Exactly,
    /// `>=` (and the obsolete `>`)
    LaterOrEqual,
    /// `>>`
    Later,
}

/// One package in a relation, with the version it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atom<'a> {
    /// Package name, without an architecture qualifier.
    pub name: &'a str,
    /// What the version must satisfy.
    pub version: Option<(Comparison, &'a str)>,
}

impl Atom<'_> {
    /// True if a package of this version satisfies the relation.
    pub fn accepts(&self, candidate: &str) -> bool {
        let Some((comparison, wanted)) = self.version else { return true };
        let order = version::compare(candidate, wanted);
        match comparison {
            Comparison::Earlier => order == Ordering::Less,
            Comparison::EarlierOrEqual => order != Ordering::Greater,
            Comparison::Exactly => order == Ordering::Equal,
            Comparison::LaterOrEqual => order != Ordering::Less,
            Comparison::Later => order == Ordering::Greater,
        }
    }
}

impl std::fmt::Display for Atom<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some((comparison, wanted)) = self.version else { return formatter.write_str(self.name) };
        let sign = match comparison {
            Comparison::Earlier => "<<",
            Comparison::EarlierOrEqual => "<=",
            Comparison::Exactly => "=",
            Comparison::LaterOrEqual => ">=",
            Comparison::Later => ">>",
        };
        write!(formatter, "{} ({sign} {wanted})", self.name)
    }
}

/// Parses `a (>= 1) | b, c` into groups (joined by "and") of alternatives (joined by "or").
///
/// Atoms that cannot be read are left out; a group left without any is left out too.
pub fn parse(text: &str) -> Vec<Vec<Atom<'_>>> {
    text.split(',')
        .map(|group| group.split('|').filter_map(parse_atom).collect::<Vec<_>>())
        .filter(|group| !group.is_empty())
        .collect()
}

/// Parses one atom: `name[:arch] [(op version)] [arch list] <profiles>`.
pub fn parse_atom(text: &str) -> Option<Atom<'_>> {
    let text = text.trim();
    let end = text.find(|c: char| c.is_whitespace() || "([<".contains(c)).unwrap_or(text.len());
    let (name, rest) = text.split_at_checked(end)?;
    let name = name.split(':').next().unwrap_or(name);
    if name.is_empty() {
        return None;
    }
    let version = rest
        .split_once('(')
        .and_then(|(_, inner)| inner.split_once(')'))
        .and_then(|(inner, _)| parse_version(inner));
    Some(Atom { name, version })
}

fn parse_version(text: &str) -> Option<(Comparison, &str)> {
    let text = text.trim();
    let signs = [
        ("<<", Comparison::Earlier),
        ("<=", Comparison::EarlierOrEqual),
        (">=", Comparison::LaterOrEqual),
        (">>", Comparison::Later),
        ("=", Comparison::Exactly),
        ("<", Comparison::EarlierOrEqual),
        (">", Comparison::LaterOrEqual),
    ];
    signs.into_iter().find_map(|(sign, comparison)| Some((comparison, text.strip_prefix(sign)?.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_policy_shows() {
        let groups = parse("libc6 (>= 2.36), awk:any | mawk(<<1) [amd64] <!nocheck>, , x");
        assert_eq!(groups.len(), 3);
        assert_eq!(groups[0], [Atom { name: "libc6", version: Some((Comparison::LaterOrEqual, "2.36")) }]);
        assert_eq!(groups[1][0], Atom { name: "awk", version: None });
        assert_eq!(groups[1][1], Atom { name: "mawk", version: Some((Comparison::Earlier, "1")) });
        assert!(groups[0][0].accepts("2.36-9") && !groups[0][0].accepts("2.35"));
        assert_eq!(groups[0][0].to_string(), "libc6 (>= 2.36)");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-c0-9(),|<>=: \u{e9}]{0,48}") {
            for atom in parse(&text).into_iter().flatten() {
                prop_assert!(!atom.name.is_empty());
                atom.accepts("1.0");
            }
        }
    }
}
