//! What runs inside a guest: yado's agent and init, embedded here as a static program ([`AGENT`]), and the host's half of the
//! protocol they speak ([`Client`]).
//!
//! # The agent
//! A small program without libc (`agent/` beside this crate's sources, built by `build.rs`). In a Debian guest it is a systemd
//! service ([`UNIT`] at [`UNIT_PATH`], the program at [`AGENT_PATH`]); in a small initramfs it is `/init`. It finds the stream
//! to the host (the virtio-console port [`PORT_NAME`], else the second serial port), greets, and runs commands.
//!
//! # The protocol
//! One stream of bytes, reliable in order but with no message boundaries, that either side may join at any time and that may
//! carry bytes of others before (boot messages). On it are checksummed, delimited frames ([`wire`]) with typed messages
//! ([`message`]):
//!
//! 1. The agent says `Announce` when it has opened the stream, and once a second until greeted.
//! 2. The host says `Hello(version, nonce)`: at first, on `Announce`, and whenever it wants to start over. The agent ends what
//!    runs and answers `Ready(version, nonce, build, window)`. Everything before the answer to the newest nonce is void.
//! 3. `Exec` opens a session (the host chooses its number). The agent answers `Started` or `Failed`; then `Output` and, last,
//!    `Exit`, after all that the command had written when it ended. The host sends `Stdin`, `StdinEof`, `Resize`, `Signal`.
//! 4. Flow control is by credit, per session and stream: nobody sends more than the receiver has granted, so that a slow
//!    reader delays only its own command, and both sides' memory is bounded.
//! 5. Bytes that are no frame, or a frame against these rules, break an established link: both sides end all sessions (in the
//!    guest by SIGHUP, then SIGKILL, to each process group) and start at 1.
//!
//! Exit codes follow `docker run`: the command's own, 128 + n for signal n ([`Ending::exit_code`]), 126 and 127 when it could
//! not be started ([`Failure::exit_code`]).
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

extern crate alloc;

#[cfg(test)]
#[path = "../agent/account.rs"]
mod account;
mod client;
#[cfg(test)]
mod coupled;
mod fuzz;
pub mod kernel_line;
pub mod message;
pub mod peer;
pub mod wire;

pub use client::{Client, Event, LostReason, OUTPUT_WINDOW, RequestError, SessionId, terminal};
pub use fuzz::fuzz_client;
pub use message::{Ending, Exec, Failure, Poweroff, Stream, Terminal};
pub use peer::SESSIONS_MAX;

/// The agent: a static x86-64 Linux program.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent"));
/// Which build of the agent [`AGENT`] is.
pub const AGENT_BUILD: u64 = decimal(env!("YADO_AGENT_BUILD"));
/// Where the agent lives in a Debian guest (mode 0755).
pub const AGENT_PATH: &str = "/usr/lib/yado/agent";
/// Where [`UNIT`] lives in a Debian guest (mode 0644).
pub const UNIT_PATH: &str = "/usr/lib/systemd/system/yado-agent.service";
/// The symbolic link that enables the unit; its target is [`UNIT_PATH`].
pub const UNIT_WANT_PATH: &str = "/usr/lib/systemd/system/sysinit.target.wants/yado-agent.service";
/// The name of the virtio-console port that carries the stream.
pub const PORT_NAME: &str = "org.yado.agent.0";

/// The systemd unit that starts the agent as one of the first services, long before the guest has booted. The root file system
/// must be mounted for writing by the kernel (`rw` on its command line); `/tmp` is waited for. It has no dependency on shutdown
/// either: commands run until systemd's last step.
///
/// `Nice=-1` is for the order of start: of the services that could start, systemd takes the least nice first, else the first
/// by name. The agent gives it back before it runs a command. A command that is killed for want of memory ends alone
/// (`OOMPolicy`).
pub const UNIT: &str = "\
[Unit]
Description=yado agent: runs commands for the host
DefaultDependencies=no
After=tmp.mount
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/lib/yado/agent
Restart=always
RestartSec=100ms
IgnoreSIGPIPE=no
Nice=-1
TasksMax=infinity
LimitNOFILE=1024:524288
OOMPolicy=continue

[Install]
WantedBy=sysinit.target
";

#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // Evaluated by the compiler only.
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
