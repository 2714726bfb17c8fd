//! Every development command of the project, `cargo xtask ...`, as a library so that tests can call it too.
#![forbid(unsafe_code)]

pub mod bench;
pub mod fuzz;
pub mod guest_files;
pub mod initramfs;
pub mod setup;
pub mod story;
pub mod test;
pub mod tidy;

/// Where cargo builds to.
pub fn target_directory() -> std::path::PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(set) => tidy::root().join(set),
        None => tidy::root().join("target"),
    }
}
