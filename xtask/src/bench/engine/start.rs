//! How soon a small guest runs, how many run soon, and what the process of one takes beside the guest's own memory.

use crate::story::Home;
use std::fmt::Write;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

/// Whole lives of a guest that ends with its first instructions.
const LIVES: usize = 40;
/// Guests at once.
const MANY: usize = 100;

/// mov dx, 0xf4; mov al, 0; out dx, al: isa-debug-exit ends the machine with code 1.
const ENDS: &[u8] = b"\x66\xba\xf4\x00\xb0\x00\xee\xf4\xeb\xfd";
/// Says "up" on the serial port and halts for ever.
const UP: &[u8] = b"\x66\xba\xf8\x03\xb0u\xee\xb0p\xee\xb0\n\xee\xf4\xeb\xfd";

/// What is known of one engine.
pub struct Start {
    /// Milliseconds until a guest has said something, ascending.
    words: Vec<f64>,
    /// Milliseconds of whole lives, ascending: in the sandbox, and without.
    lives: [Vec<f64>; 2],
    /// Seconds until all of [`MANY`] guests have answered.
    many: f64,
    /// KiB of one of them: its own, and with its part of what it shares.
    own: u64,
    proportional: u64,
}

/// Measures on one engine.
pub fn measure(yado: &Path, engine: &str) -> anyhow::Result<Start> {
    let home = Home::fresh_for(yado);
    let kernel = home.bare_kernel(ENDS);
    let kernel = kernel.to_string_lossy();
    let mut lives = [Vec::new(), Vec::new()];
    for _ in 0..LIVES {
        for (list, sandbox) in lives.iter_mut().zip(["on", "off"]) {
            let line =
                ["run", "-q", "--engine", engine, "--sandbox", sandbox, "--net", "none", "--test-devices"];
            let began = Instant::now();
            let status = home.command(&[&line[..], &["--kernel", &kernel]].concat()).status()?;
            list.push(began.elapsed().as_secs_f64() * 1e3);
            anyhow::ensure!(status.code() == Some(1), "{engine}: the guest ended with {status}");
        }
    }
    lives.iter_mut().for_each(|list| list.sort_by(f64::total_cmp));
    let mut words = (0..LIVES)
        .map(|_| crowd(yado, engine, 1).map(|(took, ..)| took * 1e3))
        .collect::<Result<Vec<_>, _>>()?;
    words.sort_by(f64::total_cmp);
    let (many, own, proportional) = crowd(yado, engine, MANY)?;
    Ok(Start { words, lives, many, own, proportional })
}

/// Guests that go with this value.
struct Guests(Vec<Child>);

impl Drop for Guests {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|child| drop(child.kill()));
        self.0.iter_mut().for_each(|child| drop(child.wait()));
    }
}

/// Starts so many at once: seconds until all have answered, and what one takes in KiB.
fn crowd(yado: &Path, engine: &str, count: usize) -> anyhow::Result<(f64, u64, u64)> {
    let home = Home::fresh_for(yado);
    let kernel = home.bare_kernel(UP);
    let kernel = kernel.to_string_lossy();
    let mut guests = Guests(Vec::new());
    let began = Instant::now();
    for _ in 0..count {
        let line = ["run", "-q", "--engine", engine, "--net", "none", "-m", "8M", "--kernel", &kernel];
        guests.0.push(home.command(&line).stderr(Stdio::null()).spawn()?);
    }
    for guest in &mut guests.0 {
        let mut said = [0; 2];
        let output = guest.stdout.as_mut().ok_or_else(|| anyhow::anyhow!("a guest without a console"))?;
        output.read_exact(&mut said)?;
        anyhow::ensure!(&said == b"up", "{engine}: a guest said {said:?}");
    }
    let took = began.elapsed().as_secs_f64();
    let one = guests.0.first().map_or(0, Child::id);
    let account = std::fs::read_to_string(format!("/proc/{one}/smaps_rollup"))?;
    let kib = |field: &str| {
        let line = account.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    Ok((took, kib("Private_Dirty:") + kib("Private_Clean:"), kib("Pss:")))
}

/// A column for each engine.
pub fn table(columns: &[(&str, Start)]) -> String {
    let names: Vec<_> = columns.iter().map(|(engine, _)| *engine).collect();
    let mut text = format!("| | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
    let mut row = |name: &str, cell: &dyn Fn(&Start) -> String| {
        let cells: Vec<_> = columns.iter().map(|(_, start)| cell(start)).collect();
        let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
    };
    let life = |list: &[f64]| {
        let at = |part: usize| list.get(list.len() * part / 10).copied().unwrap_or(f64::NAN);
        format!("{:.1} ms, median {:.1} ms", at(0), at(5))
    };
    row("`yado run` until the guest's first word is on standard output: least of 40", &|start| {
        life(&start.words)
    });
    row("`yado run`, a guest that ends with its fourth instruction, and its end: least of 40", &|start| {
        life(&start.lives[0])
    });
    row("the same with `--sandbox off`", &|start| life(&start.lives[1]));
    row("100 guests started at once, until all have said something", &|start| format!("{:.2} s", start.many));
    row("memory that only one of these has, its 8 MiB guest's among it", &|start| {
        format!("{:.1} MiB", start.own as f64 / 1024.0)
    });
    row("the same with its part of what they share", &|start| {
        format!("{:.1} MiB", start.proportional as f64 / 1024.0)
    });
    text
}
