//! Every development command of the project, `cargo xtask ...`, as a library so that tests can call it too.
#![forbid(unsafe_code)]

pub mod bench;
pub mod guest_files;
pub mod initramfs;
pub mod setup;
pub mod test;
pub mod tidy;
