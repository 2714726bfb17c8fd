//! Which trees of control groups a host has, and where this process is in them (proc(5), `/proc/self/mountinfo` and
//! `/proc/self/cgroup`).

use super::Error;
use super::limits::Controller;
use std::fs;
use std::path::{Path, PathBuf};

/// Which kind of tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// What the kernel says of its trees.
pub(super) struct Host {
    pub(super) mounts: String,
    pub(super) own: String,
}

/// Where a guest's group is to be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tree {
    pub(super) version: Version,
    pub(super) parent: PathBuf,
}

impl Tree {
    /// Whether groups below the parent have the controller already (version 2).
    pub(super) fn passes_on(&self, controller: Controller) -> bool {
        has_word(&self.parent.join("cgroup.subtree_control"), controller.name(Version::Two))
    }
}

/// A mounted tree: where, and which group of the tree is there.
struct Mount<'a> {
    place: PathBuf,
    root: &'a str,
}

fn has_word(file: &Path, word: &str) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.split_whitespace().any(|one| one == word))
}

impl Host {
    pub(super) fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self { mounts: read("/proc/self/mountinfo"), own: read("/proc/self/cgroup") }
    }

    /// The tree that has `controller`, with the group in it that is the parent.
    pub(super) fn tree(&self, controller: Controller, parent: Option<&Path>) -> Result<Tree, Error> {
        self.of_version_one(controller, parent)
            .or_else(|| self.of_version_two(controller, parent))
            .ok_or_else(|| self.missing(controller))
    }

    fn of_version_one(&self, controller: Controller, parent: Option<&Path>) -> Option<Tree> {
        let name = controller.name(Version::One);
        let listed = |list: &str| list.split(',').any(|one| one == name);
        let (_, own) = self.memberships().find(|(controllers, _)| listed(controllers))?;
        let mount = self.mounts("cgroup").find_map(|(mount, options)| listed(options).then_some(mount))?;
        Some(Tree { version: Version::One, parent: within(&mount, own, parent) })
    }

    fn of_version_two(&self, controller: Controller, parent: Option<&Path>) -> Option<Tree> {
        let (_, own) = self.memberships().find(|(controllers, _)| controllers.is_empty())?;
        let (mount, _) = self.mounts("cgroup2").next()?;
        let parent = within(&mount, own, parent);
        let has = has_word(&parent.join("cgroup.controllers"), controller.name(Version::Two));
        has.then_some(Tree { version: Version::Two, parent })
    }

    /// Controllers of each tree (none: version 2's), and this process's group.
    fn memberships(&self) -> impl Iterator<Item = (&str, &str)> {
        self.own.lines().filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.split_once(':')
        })
    }

    /// Mounted trees of a kind, with their options.
    fn mounts<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (Mount<'a>, &'a str)> {
        self.mounts.lines().filter_map(move |line| {
            let (front, back) = line.split_once(" - ")?;
            let mut back = back.split(' ');
            if back.next()? != kind {
                return None;
            }
            let mut front = front.split(' ').skip(3);
            let (root, place) = (front.next()?, front.next()?);
            Some((Mount { place: PathBuf::from(place), root }, back.nth(1)?))
        })
    }

    fn missing(&self, controller: Controller) -> Error {
        let (what, name) = (controller.what(), controller.name(Version::Two));
        let two = self.mounts("cgroup2").next().is_some();
        let hint = if two {
            ", passed on to the group that yado is in (systemd-run --user --scope -p Delegate=yes yado run ...)"
        } else {
            ""
        };
        Error::Missing { what, controller: name, hint: hint.to_owned() }
    }
}

/// The directory of a group: the parent that was asked for, or this process's own.
fn within(mount: &Mount<'_>, own: &str, parent: Option<&Path>) -> PathBuf {
    let group = match parent {
        Some(parent) => parent,
        // In a container the mount may show only a part of the tree.
        None => Path::new(own).strip_prefix(mount.root).unwrap_or(Path::new(own)),
    };
    // Whole paths are taken too, as a shell completes them.
    let group = group.strip_prefix(&mount.place).unwrap_or(group);
    mount.place.join(group.strip_prefix("/").unwrap_or(group))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_group_is_found_below_what_the_mount_shows() {
        let at = |root, own| within(&Mount { place: "/cg".into(), root }, own, None);
        assert_eq!(at("/", "/a/b"), Path::new("/cg/a/b"));
        assert_eq!(at("/a", "/a/b"), Path::new("/cg/b"));
        assert_eq!(
            at("/a", "/ab/c"),
            Path::new("/cg/ab/c"),
            "another group, whose name only begins the same"
        );
        let parent = Some(Path::new("/cg/x"));
        assert_eq!(within(&Mount { place: "/cg".into(), root: "/" }, "/a", parent), Path::new("/cg/x"));
    }
}
