//! On trees that are directories of the test's own: what is written where. Limits that hold are shown by `yado`'s tests.

use super::*;

/// A host with these trees, in a directory: lines of `/proc/self/mountinfo` and `/proc/self/cgroup` with `@` for the directory.
fn host(directory: &Path, mounts: &str, own: &str) -> Host {
    let place = directory.to_str().unwrap();
    Host { mounts: mounts.replace('@', place), own: own.replace('@', place) }
}

const ONE: &str = "32 31 0:29 / @/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                   33 31 0:30 / @/memory rw - cgroup cgroup rw,memory\n\
                   34 31 0:31 / @/blkio rw - cgroup cgroup rw,blkio\n";

fn quiet(_: &Path) -> io::Result<()> {
    Ok(())
}

fn cpu(thousandths: u64) -> Limits {
    Limits { cpu_thousandths: Some(thousandths), ..Limits::default() }
}

#[test]
fn version_one_has_a_group_in_each_tree_that_is_needed() {
    let directory = tempfile::tempdir().unwrap();
    for tree in ["cpu/me", "memory/me/deep", "blkio"] {
        fs::create_dir_all(directory.path().join(tree)).unwrap();
    }
    let host = host(directory.path(), ONE, "9:blkio:/\n3:memory:/me/deep\n1:cpu,cpuacct:/me\n0::/\n");
    let limits = Limits { cpu_weight: Some(50), memory_bytes: Some(1 << 30), ..cpu(1500) };
    let mut told = Vec::new();
    let announce = |directory: &Path| {
        assert!(!directory.exists());
        told.push(directory.to_owned());
        Ok(())
    };
    let groups = Groups::enter_on(&host, "g", &limits, None, &[], announce).unwrap();
    assert_eq!(groups.directories, told, "before they are made");
    let name = format!("yado-g.{}", std::process::id());
    let places: Vec<_> =
        ["cpu/me", "memory/me/deep"].map(|tree| directory.path().join(tree).join(&name)).into();
    assert_eq!(groups.directories, places);
    let told = |group: usize, file: &str| fs::read_to_string(places[group].join(file)).unwrap();
    assert_eq!(told(0, "cpu.cfs_quota_us"), "150000");
    assert_eq!(told(0, "cpu.cfs_period_us"), "100000");
    assert_eq!(told(0, "cpu.shares"), "512");
    assert_eq!(told(1, "memory.limit_in_bytes"), "1073741824");
    assert_eq!((told(0, "cgroup.procs"), told(1, "cgroup.procs")), ("0".into(), "0".into()));
    assert!(fs::read_dir(directory.path().join("blkio")).unwrap().next().is_none());
}

#[test]
fn version_two_has_one_group_whose_parent_passes_controllers_on() {
    let directory = tempfile::tempdir().unwrap();
    let parent = directory.path().join("user/scope");
    fs::create_dir_all(&parent).unwrap();
    fs::write(parent.join("cgroup.controllers"), "cpu memory pids").unwrap();
    fs::write(parent.join("cgroup.subtree_control"), "memory").unwrap();
    let host = host(directory.path(), "40 31 0:40 / @ rw - cgroup2 cgroup2 rw", "0::/user/scope\n");
    let limits = Limits { cpu_weight: Some(300), ..cpu(1) };
    let groups = Groups::enter_on(&host, "g", &limits, None, &[], quiet).unwrap();
    assert_eq!(groups.directories, [parent.join(format!("yado-g.{}", std::process::id()))]);
    assert_eq!(fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap(), "+cpu");
    let expected = [("cpu.max", "1000 100000"), ("cpu.weight", "300")];
    assert_eq!(groups.limits, expected.map(|(file, value)| (file.to_owned(), value.to_owned())));
    let memory = host.tree(Controller::Memory, None).unwrap();
    assert_eq!((memory.version, memory.parent), (Version::Two, parent));
    assert_eq!(Setting::Memory(4096).lines(Version::Two), [("memory.max", "4096".to_owned())]);
    // No controller of disks was passed on to this group.
    let io = IoLimits { reads: Some(10), ..IoLimits::default() };
    let disk = Setting::Io((8, 16), IoLimits { write_bytes: Some(5), ..io.clone() });
    assert_eq!(disk.lines(Version::Two), [("io.max", "8:16 wbps=5 riops=10".to_owned())]);
    let lines = disk.lines(Version::One);
    assert_eq!(lines[0], ("blkio.throttle.write_bps_device", "8:16 5".to_owned()));
    let missing = host.tree(Controller::Io, None).unwrap_err().to_string();
    assert!(missing.contains("Delegate=yes"), "{missing}");
}

#[test]
fn who_is_in_the_way_of_a_parent_that_passes_controllers_on_gets_a_group_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let parent = directory.path();
    fs::write(parent.join("cgroup.controllers"), "cpu memory").unwrap();
    fs::write(parent.join("cgroup.subtree_control"), "").unwrap();
    fs::write(parent.join("cgroup.procs"), "70\n71\n").unwrap();
    let host = host(parent, "40 31 0:40 / @ rw - cgroup2 cgroup2 rw", "0::/\n");
    let limits = Limits { memory_bytes: Some(1 << 30), ..cpu(1) };
    let mut told = Vec::new();
    let announce = |directory: &Path| {
        told.push(directory.to_owned());
        Ok(())
    };
    let groups = Groups::enter_on(&host, "g", &limits, None, &[71, 70, 7], announce).unwrap();
    let own = parent.join(format!("yado-g.{}", std::process::id()));
    let theirs = parent.join(format!("yado-g.{}.keeper", std::process::id()));
    assert_eq!((groups.directories, told), (vec![own.clone(), theirs.clone()], vec![own]));
    assert!(fs::read_to_string(theirs.join("cgroup.procs")).unwrap().starts_with("71\n70\n"));
    // Whoever passes controllers on already has nobody.
    fs::write(parent.join("cgroup.subtree_control"), "cpu memory").unwrap();
    let groups = Groups::enter_on(&host, "h", &limits, None, &[71], quiet).unwrap();
    assert_eq!(groups.directories.len(), 1);
}

#[test]
fn a_parent_may_be_named_and_containers_show_part_of_a_tree() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir_all(directory.path().join("cpu/machines")).unwrap();
    let mounts = "32 31 0:29 /docker/1 @/cpu rw - cgroup cgroup rw,cpu\n";
    let host = host(directory.path(), mounts, "1:cpu:/docker/1\n");
    let at = |parent: Option<&str>| host.tree(Controller::Cpu, parent.map(Path::new)).unwrap().parent;
    assert_eq!(at(None), directory.path().join("cpu"));
    assert_eq!(at(Some("/machines")), directory.path().join("cpu/machines"));
    assert_eq!(at(Some("machines")), directory.path().join("cpu/machines"));
    let whole = directory.path().join("cpu/machines");
    assert_eq!(at(whole.to_str()), whole);
    let only =
        Groups::enter_on(&host, "g", &Limits::default(), Some(Path::new("machines")), &[], quiet).unwrap();
    assert_eq!((only.directories.len(), only.limits.len()), (1, 0));
}

#[test]
fn without_a_wish_nothing_is_made_and_without_a_tree_it_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let none = host(directory.path(), "", "");
    assert_eq!(
        Groups::enter_on(&none, "g", &Limits::default(), None, &[], quiet).unwrap(),
        Groups::default()
    );
    let error = Groups::enter_on(&none, "g", &cpu(1000), None, &[], quiet).unwrap_err().to_string();
    assert!(error.contains("no control groups for cpu"), "{error}");
    let gone = host(directory.path(), ONE, "1:cpu,cpuacct:/not/there\n");
    let error = Groups::enter_on(&gone, "g", &cpu(1000), None, &[], quiet).unwrap_err().to_string();
    assert!(error.contains("cannot be made") && error.contains("--cgroup"), "{error}");
}

#[test]
fn a_file_system_without_a_device_cannot_be_limited() {
    let io = IoLimits { reads: Some(10), ..IoLimits::default() };
    let limits = Limits { io, files: vec!["/proc/self/status".into()], ..Limits::default() };
    assert!(matches!(limits.settings(), Err(Error::NoDevice(_))));
}

#[test]
fn only_guests_groups_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (ours, others) = (make("yado-g.1"), make("system.slice"));
    assert!(!remove(&[others.clone(), ours.clone()], Duration::ZERO));
    assert!(!ours.exists() && others.exists());
    assert!(remove(&[ours], Duration::ZERO), "what is gone is gone");
}
