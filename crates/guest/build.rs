//! Builds the agent that runs in guests, so that it can be embedded: `rustc` with nothing but `core` and `alloc`, no libc,
//! always optimised for size whatever the profile, because its size is part of every guest's boot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const SHARED: [&str; 4] = ["kernel_line.rs", "message.rs", "peer.rs", "wire.rs"];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// FNV-1a over all sources: names a build of the agent.
fn fingerprint(files: &[PathBuf]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in files {
        for byte in fs::read(file).unwrap_or_default() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("agent");
    let mut files = Vec::new();
    sources(&root.join("agent"), &mut files);
    files.extend(SHARED.iter().map(|name| root.join("src").join(name)));
    files.sort();
    println!("cargo::rerun-if-changed=agent");
    println!("cargo::rerun-if-changed=build.rs");
    for name in SHARED {
        println!("cargo::rerun-if-changed=src/{name}");
    }
    let build = fingerprint(&files).to_string();
    println!("cargo::rustc-env=YADO_AGENT_BUILD={build}");

    let mut command = Command::new(env::var_os("RUSTC").expect("cargo sets RUSTC"));
    command.arg(root.join("agent/main.rs")).arg("-o").arg(&out).env("YADO_AGENT_BUILD", &build);
    command.args(["--crate-name", "agent", "--crate-type", "bin", "--edition", "2024"]);
    command.arg("--target").arg(env::var_os("TARGET").expect("cargo sets TARGET"));
    for option in [
        "opt-level=s",
        "lto=fat",
        "codegen-units=1",
        "panic=abort",
        "strip=symbols",
        "relocation-model=static",
        "target-feature=+crt-static",
        "link-args=-nostartfiles -nostdlib -static -Wl,--build-id=none -Wl,-z,noexecstack",
    ] {
        command.args(["-C", option]);
    }
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        command.arg("-C").arg(option);
    }
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("rustc could not build the agent for guests ({status}): its messages are above"),
        Err(error) => panic!("rustc could not be started to build the agent for guests: {error}"),
    }
}
