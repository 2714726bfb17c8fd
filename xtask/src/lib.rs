//! Every development command of the project, `cargo xtask ...`, as a library so that tests can call it too.
#![forbid(unsafe_code)]

pub mod tidy;
