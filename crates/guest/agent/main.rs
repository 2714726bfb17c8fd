//! yado's agent: runs inside a guest and carries out what the host asks for over one stream of bytes (see the crate's
//! documentation for the protocol). Without standard library or libc, so that it is small, static and builds with nothing but
//! rustc and a linker.
//!
//! ```text
//! agent                 as a service: find the stream (virtio port or serial) and serve it for ever
//! agent --device PATH   the same over this device
//! agent --fd N          the same over an inherited descriptor, until its end
//! /init                 as process 1: load /modules; with root=/dev/... go on there; else mount what programs need, run
//!                       yado.exec=... and power off, or serve
//! ```
#![no_std]
#![no_main]
#![deny(unsafe_code)]

extern crate alloc;

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;

mod account;
mod device;
mod disks;
mod init;
#[path = "../src/kernel_line.rs"]
#[allow(dead_code)] // Shared with the host, which uses the other half.
mod kernel_line;
#[path = "../src/message.rs"]
#[allow(dead_code)]
mod message;
mod modules;
mod network;
#[path = "../src/peer.rs"]
mod peer;
mod root;
mod session;
mod spawn;
mod supervisor;
#[allow(unsafe_code)]
mod sys;
#[path = "../src/wire.rs"]
#[allow(dead_code)]
mod wire;

use device::Source;
use supervisor::Supervisor;

const EXIT_USAGE: i32 = 2;
const EXIT_FAILED: i32 = 1;

/// Identifies the sources that this agent was built from.
const BUILD: u64 = decimal(env!("YADO_AGENT_BUILD"));

const fn decimal(text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut value = 0;
    let mut index = 0;
    while index < bytes.len() {
        value = value * 10 + (bytes[index] - b'0') as u64;
        index += 1;
    }
    value
}

/// Says something on standard error: the journal of a guest with systemd, the console as init.
fn report(parts: &[&[u8]]) {
    let mut line = b"yado-agent: ".to_vec();
    for part in parts {
        line.extend_from_slice(part);
    }
    line.push(b'\n');
    let stderr = core::mem::ManuallyDrop::new(sys::Fd::inherited(2));
    let _ = sys::write(&stderr, &line);
}

/// What the program does; returns its exit code.
fn run(arguments: &[&CStr]) -> i32 {
    let is_init = sys::getpid() == 1;
    if is_init {
        init::prepare(arguments);
    } else {
        sys::open_standard_files(c"/dev/null");
    }
    sys::close_others_on_exec();
    let Ok(children) = sys::child_signals() else {
        report(&[b"cannot watch child processes"]);
        return EXIT_FAILED;
    };
    if is_init {
        init::run_kernel_line_command();
    }
    let words: Vec<&[u8]> = arguments.iter().skip(1).map(|argument| argument.to_bytes()).collect();
    let source = match words.as_slice() {
        [b"--device", path] => CString::new(*path).ok().map(Source::Path),
        [b"--fd", number] => descriptor(number).map(|fd| Source::Inherited(Some(fd))),
        [] => {
            if !is_init {
                disks::wait();
                network::prepare();
            }
            Some(Source::from_kernel_line())
        }
        // The kernel hands init whatever words of its command line it does not know.
        _ if is_init => Some(Source::from_kernel_line()),
        _ => None,
    };
    let Some(source) = source else {
        report(&[b"usage: agent [--device PATH | --fd NUMBER]"]);
        return EXIT_USAGE;
    };
    Supervisor::new(source, children).run();
    0
}

fn descriptor(number: &[u8]) -> Option<sys::Fd> {
    let number: i32 = core::str::from_utf8(number).ok()?.parse().ok()?;
    (number >= 0).then(|| sys::Fd::inherited(number))
}
