//! Images judged by e2fsprogs: `e2fsck` must find nothing, `debugfs` must read back what was written.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::process::{Command, Output};

/// A directory for images, in memory where possible: the tests make many files.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Runs a tool of e2fsprogs, which lives where users' PATH often does not reach.
pub fn run(tool: &str, arguments: &[&str]) -> Output {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new(tool)
        .args(arguments)
        .env("PATH", path)
        .env("TZ", "UTC")
        .output()
        .unwrap_or_else(|error| panic!("{tool} of e2fsprogs is needed to judge the images: {error}"))
}

/// Fails unless `e2fsck` finds the image clean.
pub fn assert_clean(image: &Path) {
    let output = run("e2fsck", &["-fn", image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for line in text.lines().filter(|line| !line.starts_with("Pass ")) {
        assert!(line.contains("files (") && line.contains("blocks"), "e2fsck says: {text}");
    }
}

/// What one `debugfs` command prints.
pub fn debugfs(image: &Path, command: &str) -> String {
    let output = run("debugfs", &["-R", command, image.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Copies the whole tree out of an image.
pub fn dump(image: &Path, to: &Path) {
    let output = run("debugfs", &["-R", &format!("rdump / {}", to.display()), image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    // Its first line is its version; owners can be set only by root.
    let complaints: Vec<&str> =
        text.lines().skip(1).filter(|line| !line.contains("changing ownership")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}
