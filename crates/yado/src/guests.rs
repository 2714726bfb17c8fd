//! The commands on guests that exist: ps, console, exec, stop, pause, resume, logs, inspect, rm.

use crate::arguments::{Exec, Logs, Named, Ps, Rm, Stop};
use crate::size::Size;
use crate::{client, exit, registry, signals, terminal};
use anyhow::{Context, bail};
use machine::control::protocol::{ExecRequest, Request};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The longest end of a log in which the last lines are looked for, in bytes.
const TAIL_MAX: u64 = 64 << 20;
/// How often a guest that does not power off is asked again.
pub const PRESS_PERIOD: Duration = Duration::from_secs(5);
/// How long a guest stopped by force may take to vanish.
const FORCE_TIMEOUT: Duration = Duration::from_secs(10);

/// `yado ps`
pub fn ps(options: &Ps) -> anyhow::Result<()> {
    let guests: Vec<_> = registry::list()?.into_iter().filter(|guest| guest.running || options.all).collect();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&guests)?);
    } else if options.quiet {
        for guest in &guests {
            println!("{}", guest.record.name);
        }
    } else {
        let width = guests.iter().map(|guest| guest.record.name.len()).max().unwrap_or(0).max(4);
        println!(
            "{:width$}  {:16}  {:8}  {:>4}  {:>9}  {:6}  STARTED",
            "NAME", "GUEST", "STATE", "CPUS", "MEMORY", "ENGINE"
        );
        for registry::Listed { record, running } in &guests {
            println!(
                "{:width$}  {:16}  {:8}  {:>4}  {:>9}  {:6}  {}",
                record.name,
                record.source,
                if *running { "running" } else { "stopped" },
                record.cpus,
                Size(record.memory).to_string(),
                record.engine,
                ago(record.started)
            );
        }
    }
    Ok(())
}

/// How long ago a time in seconds since 1970 was, for people.
pub fn ago(started: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    match now.saturating_sub(started) {
        seconds @ ..120 => format!("{seconds} seconds ago"),
        seconds @ ..7200 => format!("{} minutes ago", seconds / 60),
        seconds @ ..172_800 => format!("{} hours ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86400),
    }
}

/// `yado console`
pub fn console(named: &Named) -> anyhow::Result<()> {
    let guest = registry::find_running(&named.name)?;
    signals::install()?;
    if terminal::is_interactive() {
        eprintln!("yado: console of {}; Ctrl-] leaves", guest.record.name);
    }
    match client::console(client::connect(&named.name)?)? {
        client::ConsoleEnd::Left => eprintln!("\nyado: left; {} runs on", named.name),
        client::ConsoleEnd::Off => eprintln!("\nyado: {} is off", named.name),
    }
    Ok(())
}

/// The request for a command line; `tty` and `no_tty` as given by the user.
pub fn exec_request(
    argv: Vec<std::ffi::OsString>,
    env: &[String],
    workdir: &str,
    user: &str,
    (tty, no_tty): (bool, bool),
    wait: Duration,
) -> anyhow::Result<ExecRequest> {
    for variable in env {
        anyhow::ensure!(
            variable.split_once('=').is_some_and(|(name, _)| !name.is_empty()),
            exit::with_code(2, format!("--env {variable}: write NAME=VALUE"))
        );
    }
    let terminal = (tty || (!no_tty && terminal::is_interactive())).then(|| {
        let (rows, columns) = terminal::size();
        (rows, columns, std::env::var("TERM").unwrap_or_else(|_| "linux".into()))
    });
    Ok(ExecRequest {
        argv: argv.into_iter().map(OsStringExt::into_vec).collect(),
        env: env.iter().map(|variable| variable.clone().into_bytes()).collect(),
        directory: workdir.to_owned(),
        user: user.to_owned(),
        terminal,
        wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
    })
}

/// `yado exec`
pub fn exec(options: Exec) -> anyhow::Result<u8> {
    registry::find_running(&options.name)?;
    signals::install()?;
    let wait = Duration::from_secs(options.timeout);
    let tty = (options.tty, options.no_tty);
    let request = exec_request(options.argv, &options.env, &options.workdir, &options.user, tty, wait)?;
    client::exec(client::connect(&options.name)?, request)
}

/// `yado stop`
pub fn stop(options: &Stop) -> anyhow::Result<()> {
    each(&options.names, |name| {
        let guest = registry::find(name)?;
        if !guest.running {
            println!("{name}");
            return Ok(());
        }
        let request = if options.force { Request::Stop } else { Request::PowerButton };
        client::ask(name, &request)?;
        let stopped = wait_pressing(name, Duration::from_secs(options.timeout), &request)?;
        if !stopped {
            if !options.force {
                eprintln!(
                    "yado: {name} did not power off within {} s; stopping it by force",
                    options.timeout
                );
                client::ask(name, &Request::Stop)?;
            }
            if !registry::wait_stopped(name, FORCE_TIMEOUT)? {
                bail!("{name} does not stop: kill process {}", guest.record.pid);
            }
        }
        println!("{name}");
        Ok(())
    })
}

/// Does something with each guest: one with which it fails keeps it from no other. The last failure is answered, those before are said.
fn each(names: &[String], act: impl Fn(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut failed: Option<anyhow::Error> = None;
    for name in names {
        if let Err(error) = act(name)
            && let Some(before) = failed.replace(error)
        {
            eprintln!("yado: {}", crate::sentence(&before));
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Waits until the guest has stopped; asks again now and then, since a guest that still boots misses the power button.
fn wait_pressing(name: &str, timeout: Duration, request: &Request) -> anyhow::Result<bool> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if registry::wait_stopped(name, left.min(PRESS_PERIOD))? {
            return Ok(true);
        }
        if left <= PRESS_PERIOD {
            return Ok(false);
        }
        // It may be gone by now.
        let _ = client::ask(name, request);
    }
}

/// `yado pause`, `yado resume`
pub fn tell(named: &Named, request: &Request) -> anyhow::Result<()> {
    registry::find_running(&named.name)?;
    client::ask(&named.name, request)?;
    println!("{}", named.name);
    Ok(())
}

/// `yado inspect`
pub fn inspect(named: &Named) -> anyhow::Result<()> {
    let guest = registry::find(&named.name)?;
    let mut tree = serde_json::to_value(&guest)?;
    if guest.running {
        let live = client::ask(&named.name, &Request::Inspect)?;
        if let Some(tree) = tree.as_object_mut() {
            tree.insert("machine".into(), live);
        }
    }
    println!("{}", serde_json::to_string_pretty(&tree)?);
    Ok(())
}

/// `yado logs`
pub fn logs(options: &Logs) -> anyhow::Result<()> {
    let guest = registry::find(&options.name)?;
    let path = registry::state_directory()?.join("vms").join(&options.name).join("console.log");
    let mut log =
        File::open(&path).with_context(|| format!("{} has no log at {}", options.name, path.display()))?;
    let mut out = io::stdout().lock();
    match options.lines {
        None => {
            io::copy(&mut log, &mut out)?;
        }
        Some(lines) => {
            // A guest may have printed more than is wanted in memory.
            log.seek(SeekFrom::Start(log.metadata()?.len().saturating_sub(TAIL_MAX)))?;
            let mut bytes = Vec::new();
            log.read_to_end(&mut bytes)?;
            out.write_all(last_lines(&bytes, lines))?;
        }
    }
    out.flush()?;
    let mut running = options.follow && guest.running;
    while running {
        let position = log.stream_position()?;
        // A log that was started over is shorter than it was.
        if log.metadata()?.len() < position {
            log.rewind()?;
        }
        if io::copy(&mut log, &mut out)? == 0 {
            running = registry::find(&options.name).is_ok_and(|guest| guest.running);
            std::thread::sleep(Duration::from_millis(100));
        }
        out.flush()?;
    }
    Ok(())
}

fn last_lines(bytes: &[u8], lines: usize) -> &[u8] {
    let end = if bytes.ends_with(b"\n") { bytes.len() - 1 } else { bytes.len() };
    let breaks = bytes.iter().enumerate().take(end).rev().filter(|(_, byte)| **byte == b'\n');
    let start = match lines {
        0 => bytes.len(),
        _ => breaks.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0),
    };
    bytes.get(start..).unwrap_or_default()
}

/// `yado rm`
pub fn rm(options: &Rm) -> anyhow::Result<()> {
    each(&options.names, |name| {
        let guest = match registry::find(name) {
            // What is left of one whose record is lost or damaged goes too, if nobody runs it.
            Err(_) if registry::is_there(name) => {
                registry::Place::take(name)?.remove()?;
                println!("{name}");
                return Ok(());
            }
            found => found?,
        };
        if guest.running {
            anyhow::ensure!(options.force, "{name} is running: stop it first, or use --force");
            client::ask(name, &Request::Stop)?;
            anyhow::ensure!(
                registry::wait_stopped(name, FORCE_TIMEOUT)?,
                "{name} does not stop: kill process {}",
                guest.record.pid
            );
        }
        // A guest without a name may have removed itself.
        match registry::Place::take(name) {
            Ok(place) => place.remove()?,
            Err(_) if guest.record.ephemeral => {}
            Err(error) => return Err(error),
        }
        println!("{name}");
        Ok(())
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn one_that_fails_keeps_it_from_no_other() {
        let names = ["a", "b", "c", "d"].map(str::to_owned);
        let done = std::cell::RefCell::new(Vec::new());
        let error = each(&names, |name| {
            anyhow::ensure!(!matches!(name, "a" | "c"), "not {name}");
            done.borrow_mut().push(name.to_owned());
            Ok(())
        });
        assert_eq!(
            (error.unwrap_err().to_string(), done.into_inner()),
            ("not c".to_owned(), vec!["b".to_owned(), "d".to_owned()])
        );
        assert!(each(&names, |_| Ok(())).is_ok());
    }

    #[test]
    fn the_last_lines_are_found() {
        assert_eq!(last_lines(b"a\nb\nc\n", 2), b"b\nc\n");
        assert_eq!(last_lines(b"a\nb\nc", 1), b"c");
        assert_eq!(last_lines(b"a\n", 9), b"a\n");
        assert_eq!(last_lines(b"a\nb\n", 0), b"");
        assert_eq!(last_lines(b"", 3), b"");
    }
}
