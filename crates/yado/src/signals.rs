//! What signals do: before a guest command runs they cancel; while one runs they are the command's.

use crate::terminal;
use machine::control::protocol::{Kind, write};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Set when the user wants the whole run to end.
pub static CANCELLED: AtomicBool = AtomicBool::new(false);
static CANCELLED_BY: AtomicI32 = AtomicI32::new(SIGINT);
static SINK: Mutex<Option<Sink>> = Mutex::new(None);

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

/// The thread that handles signals; it answers their source when it is asked to end.
static THREAD: Mutex<Option<thread::JoinHandle<Signals>>> = Mutex::new(None);
static END: AtomicBool = AtomicBool::new(false);

/// Starts to catch signals. Nothing terminates yado silently from here on.
pub fn install() -> std::io::Result<()> {
    listen(Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH])?)
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
    if CANCELLED.swap(true, Ordering::AcqRel) {
        // The second time, nothing is waited for.
        terminal::restore();
        std::process::exit(128 + signal);
    }
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
