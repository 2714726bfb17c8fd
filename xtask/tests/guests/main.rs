//! Stories with real guests: Debian as users run it, its kernels with a small root of the test's own, and what goes wrong
//! while they run. `cargo xtask test` runs them one at a time with a release build.

mod accidents;
mod commands;
mod disks;
mod kernels;
mod network;
mod nodes;
mod patched;
mod stays;
mod switch;
mod watched;
