//! What signals do: before a guest command runs they cancel; while one runs they are the command's.

use crate::terminal;
use machine::control::protocol::{Kind, write};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Set when the user wants the whole run to end.
pub static CANCELLED: AtomicBool = AtomicBool::new(false);
static CANCELLED_BY: AtomicI32 = AtomicI32::new(SIGINT);
static SINK: Mutex<Option<Sink>> = Mutex::new(None);

/// See [`install_for_jobs`].
static JOBS: Mutex<Option<Jobs>> = Mutex::new(None);

/// What a signal meets in a command that works on files.
#[derive(Default)]
struct Jobs {
    /// Those who look whether the user wants an end.
    watching: usize,
    /// Files that are nobody's yet.
    unfinished: Vec<PathBuf>,
}

/// Who hears of signals.
enum Sink {
    /// A command runs: they are its own.
    Command {
        stream: Arc<Mutex<UnixStream>>,
        /// The command has a terminal: it hears of window sizes.
        resizes: bool,
    },
    /// Somebody looks at a console: the look ends.
    Console(UnixStream),
}

/// Signals that ask a command to end, so many in so short a time, end this: it may not hear them.
const INSISTED: usize = 3;
const INSISTENCE: Duration = Duration::from_secs(3);
/// When such signals came.
static ASKED: Mutex<Vec<Instant>> = Mutex::new(Vec::new());

/// The thread that handles signals; it answers their source when it is asked to end.
static THREAD: Mutex<Option<thread::JoinHandle<Signals>>> = Mutex::new(None);
static END: AtomicBool = AtomicBool::new(false);

/// Starts to catch signals. Nothing terminates yado silently from here on.
pub fn install() -> std::io::Result<()> {
    listen(Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH])?)
}

/// As [`install`], for commands of which only some parts look for signals: where none does, a signal ends yado at once.
pub fn install_for_jobs() -> std::io::Result<()> {
    *jobs() = Some(Jobs::default());
    install()
}

fn jobs() -> MutexGuard<'static, Option<Jobs>> {
    JOBS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Somebody looks at [`cancelled`] as long as the result lives.
#[must_use = "a signal ends yado at once when this is dropped"]
pub fn watching() -> Watching {
    if let Some(jobs) = jobs().as_mut() {
        jobs.watching += 1;
    }
    Watching(())
}

/// See [`watching`].
pub struct Watching(());

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(jobs) = jobs().as_mut() {
            jobs.watching = jobs.watching.saturating_sub(1);
        }
    }
}

/// A file that is removed if a signal ends yado as long as the result lives.
#[must_use = "the file is left alone when this is dropped"]
pub fn unfinished(file: &Path) -> Unfinished {
    if let Some(jobs) = jobs().as_mut() {
        jobs.unfinished.push(file.to_path_buf());
    }
    Unfinished(file.to_path_buf())
}

/// See [`unfinished`].
pub struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(jobs) = jobs().as_mut() {
            jobs.unfinished.retain(|file| *file != self.0);
        }
    }
}

/// Ends yado now.
fn end(signal: i32) -> ! {
    // Held to the end: what is not whole now does not become so after it was removed.
    let jobs = jobs();
    for file in jobs.iter().flat_map(|jobs| &jobs.unfinished) {
        let _ = std::fs::remove_file(file);
    }
    terminal::restore();
    std::process::exit(128 + signal);
}

fn listen(mut signals: Signals) -> std::io::Result<()> {
    let thread = thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            signals.wait().for_each(handle);
            if END.load(Ordering::Acquire) {
                return signals;
            }
        }
    })?;
    *THREAD.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
    Ok(())
}

/// Does something while no thread handles signals; those that come are handled afterwards.
pub fn aside<R>(act: impl FnOnce() -> R) -> std::io::Result<R> {
    let thread = THREAD.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(thread) = thread else { return Ok(act()) };
    END.store(true, Ordering::Release);
    // One that is of no consequence makes it look.
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::WINCH)?;
    let signals =
        thread.join().map_err(|_| std::io::Error::other("the thread that handles signals failed"))?;
    END.store(false, Ordering::Release);
    let result = act();
    listen(signals)?;
    Ok(result)
}

fn handle(signal: i32) {
    let sink = SINK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Sink::Command { stream, resizes }) = sink.as_ref() {
        let ends = matches!(signal, SIGINT | SIGTERM);
        if ends && insists(&mut ASKED.lock().unwrap_or_else(PoisonError::into_inner), Instant::now()) {
            terminal::restore();
            eprintln!("yado: the command does not end; leaving it");
            std::process::exit(128 + signal);
        }
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        // If the machine is gone, the reader of the stream says so.
        let _ = match signal {
            SIGWINCH if *resizes => {
                let (rows, columns) = terminal::size();
                write(&mut *stream, Kind::Resize, &[rows.to_le_bytes(), columns.to_le_bytes()].concat())
            }
            SIGWINCH => Ok(()),
            other => write(&mut *stream, Kind::Signal, &[other as u8]),
        };
        return;
    }
    if signal == SIGWINCH || signal == SIGUSR1 || signal == SIGUSR2 {
        return;
    }
    if let Some(Sink::Console(stream)) = sink.as_ref() {
        // Whoever waits for the console's next bytes sees its end.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    drop(sink);
    CANCELLED_BY.store(signal, Ordering::Release);
    let unwatched = jobs().as_ref().is_some_and(|jobs| jobs.watching == 0);
    if CANCELLED.swap(true, Ordering::AcqRel) || unwatched {
        // The second time, or where nobody would look, nothing is waited for: every format survives that.
        end(signal);
    }
}

/// Whether a signal that comes now is one too many.
fn insists(asked: &mut Vec<Instant>, now: Instant) -> bool {
    asked.retain(|at| now.saturating_duration_since(*at) < INSISTENCE);
    asked.push(now);
    asked.len() >= INSISTED
}

/// Whether the user wants the run to end.
pub fn cancelled() -> bool {
    CANCELLED.load(Ordering::Acquire)
}

/// The exit code of a cancelled run: 128 and the signal.
pub fn cancelled_code() -> u8 {
    (128 + CANCELLED_BY.load(Ordering::Acquire)) as u8
}

/// Signals go to the command at the other end of `stream` as long as the result lives.
#[must_use = "signals cancel again when this is dropped"]
pub fn forward(stream: Arc<Mutex<UnixStream>>, resizes: bool) -> Forwarding {
    *SINK.lock().unwrap_or_else(PoisonError::into_inner) = Some(Sink::Command { stream, resizes });
    Forwarding(())
}

/// A signal ends the console at the other end of `stream` as long as the result lives.
#[must_use = "signals no longer end the console when this is dropped"]
pub fn end_console(stream: UnixStream) -> Forwarding {
    *SINK.lock().unwrap_or_else(PoisonError::into_inner) = Some(Sink::Console(stream));
    Forwarding(())
}

/// See [`forward`] and [`end_console`].
pub struct Forwarding(());

impl Drop for Forwarding {
    fn drop(&mut self) {
        *SINK.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn who_asks_often_and_soon_insists() {
        let begin = Instant::now();
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        let mut asked = Vec::new();
        let slowly = [0, 2000, 4000, 6000].map(|time| insists(&mut asked, at(time)));
        assert_eq!(slowly, [false; 4]);
        let soon = [20_000, 20_500, 21_000].map(|time| insists(&mut asked, at(time)));
        assert_eq!(soon, [false, false, true]);
    }
}
