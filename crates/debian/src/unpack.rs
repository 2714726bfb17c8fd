//! All packages into the tree: decompressed by several threads, put in by one, in a fixed order.
//!
//! Each package has a bounded channel. Workers take packages in order and fill their channels; the caller's thread
//! empties the channels in the
//! same order, so the image does not depend on timing, memory stays bounded, and the lowest unfinished package is always being served
//! (no deadlock). Dropping the channels ends the workers.

use crate::archive;
use crate::deb::{self, ControlFile};
use crate::tree::{Package, Root};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Why unpacking ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A package file is broken.
    #[error("package {package}: {source}; the mirror's file is damaged, try another --mirror")]
    Deb {
        /// The package.
        package: String,
        /// What is wrong with it.
        source: deb::Error,
    },
    /// A package's files have no place.
    #[error("package {package}: {source}")]
    Archive {
        /// The package.
        package: String,
        /// What is wrong.
        source: archive::Error,
    },
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
}

/// What a worker sends of a package.
enum Piece {
    Control(Vec<ControlFile>),
    Data(Vec<u8>),
    End,
    Failed(deb::Error),
}

/// Bytes in one piece of data, and pieces that may wait per package.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_WAITING: usize = 48;

/// A package to unpack.
#[derive(Clone, Debug)]
pub struct Job {
    /// Name of the package.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Numbers of the jobs whose files it leaves alone.
    pub yields: Vec<usize>,
}

/// What unpacking a package gave.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// Its control files.
    pub control: Vec<ControlFile>,
    /// Its configuration files, as listed in `conffiles`.
    pub conffiles: Vec<String>,
    /// Its paths, for dpkg's `.list`.
    pub list: Vec<String>,
}

/// Unpacks the jobs in order; `advanced` hears the number of each package that is done.
pub fn unpack(
    root: &mut Root<'_>,
    jobs: &[Job],
    stop: &AtomicBool,
    advanced: &mut dyn FnMut(usize),
) -> Result<Vec<Unpacked>, Error> {
    let (senders, receivers): (Vec<_>, Vec<_>) = jobs
        .iter()
        .map(|_| {
            let (sender, receiver) = sync_channel(PIECES_WAITING);
            (Mutex::new(Some(sender)), receiver)
        })
        .unzip();
    let next = AtomicUsize::new(0);
    let names: Vec<String> = jobs.iter().map(|job| job.name.clone()).collect();
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 8));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((job, sender)) = take_job(&next, jobs, &senders) {
                    send_package(&job.path, &sender);
                }
            });
        }
        let mut unpacked = Vec::with_capacity(jobs.len());
        // Moved in here so that an early return drops the receivers and so ends the workers.
        for (number, (job, receiver)) in jobs.iter().zip(receivers).enumerate() {
            if stop.load(Ordering::SeqCst) {
                return Err(Error::Stopped);
            }
            unpacked.push(put_package(root, number, job, &names, &receiver, stop)?);
            advanced(number);
        }
        Ok(unpacked)
    })
}

fn take_job<'j>(
    next: &AtomicUsize,
    jobs: &'j [Job],
    senders: &[Mutex<Option<SyncSender<Piece>>>],
) -> Option<(&'j Job, SyncSender<Piece>)> {
    let number = next.fetch_add(1, Ordering::SeqCst);
    let sender = senders.get(number)?.lock().ok()?.take()?;
    Some((jobs.get(number)?, sender))
}

/// Reads one package file and sends its pieces; ends quietly when nobody listens any more.
fn send_package(path: &Path, sender: &SyncSender<Piece>) {
    let failed = |error: deb::Error| sender.send(Piece::Failed(error));
    let opened = File::open(path).map_err(deb::Error::from);
    let (control, mut data) =
        match opened.and_then(|file| deb::open(BufReader::with_capacity(128 << 10, file))) {
            Ok(parts) => parts,
            Err(error) => {
                let _ = failed(error);
                return;
            }
        };
    if sender.send(Piece::Control(control)).is_err() {
        return;
    }
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let read = data.by_ref().take(u64::try_from(PIECE_BYTES).unwrap_or(u64::MAX)).read_to_end(&mut piece);
        let (sent, last) = match read {
            Ok(0) => (sender.send(Piece::End), true),
            Ok(_) => (sender.send(Piece::Data(piece)), false),
            Err(error) => (failed(error.into()), true),
        };
        if last || sent.is_err() {
            return;
        }
    }
}

fn put_package(
    root: &mut Root<'_>,
    number: usize,
    job: &Job,
    names: &[String],
    receiver: &Receiver<Piece>,
    stop: &AtomicBool,
) -> Result<Unpacked, Error> {
    let broken = |source| Error::Deb { package: job.name.clone(), source };
    let control = match receiver.recv() {
        Ok(Piece::Control(control)) => control,
        Ok(Piece::Failed(error)) => return Err(broken(error)),
        _ => return Err(broken(deb::Error::Broken("it ends early"))),
    };
    let conffiles = conffiles(&control);
    let package = Package { number, name: &job.name, yields: &job.yields, names, digests: &conffiles };
    let mut stream = Stream { receiver, piece: Vec::new(), at: 0, state: State::Open, stop };
    let result = archive::put_in(root, &package, &mut stream);
    // After the archive the rest must be read too: it ends with the compressor's check.
    let drained = result.is_err() || io::copy(&mut stream, &mut io::sink()).is_ok();
    match (stream.state, result) {
        (State::Failed(error), _) => Err(broken(error)),
        (State::Stopped, _) => Err(Error::Stopped),
        (_, Err(source)) => Err(Error::Archive { package: job.name.clone(), source }),
        (State::Ended, Ok(list)) if drained => Ok(Unpacked { control, conffiles, list }),
        (_, Ok(_)) => Err(broken(deb::Error::Broken("it ends early"))),
    }
}

/// The configuration files of a package, without those to be removed (deb-conffiles(5)).
fn conffiles(control: &[ControlFile]) -> Vec<String> {
    let Some(file) = control.iter().find(|file| file.name == "conffiles") else { return Vec::new() };
    let text = String::from_utf8_lossy(&file.bytes);
    text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(str::to_owned).collect()
}

enum State {
    Open,
    Ended,
    Stopped,
    Failed(deb::Error),
}

/// The pieces of a package as a reader.
struct Stream<'a> {
    receiver: &'a Receiver<Piece>,
    piece: Vec<u8>,
    at: usize,
    state: State,
    stop: &'a AtomicBool,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.piece.len() {
            if !matches!(self.state, State::Open) {
                return match self.state {
                    State::Ended => Ok(0),
                    _ => Err(io::Error::other("the package file is broken")),
                };
            }
            if self.stop.load(Ordering::SeqCst) {
                self.state = State::Stopped;
                continue;
            }
            match self.receiver.recv() {
                Ok(Piece::Data(piece)) => (self.piece, self.at) = (piece, 0),
                Ok(Piece::End) => self.state = State::Ended,
                Ok(Piece::Failed(error)) => self.state = State::Failed(error),
                Ok(Piece::Control(_)) | Err(_) => {
                    self.state = State::Failed(deb::Error::Broken("it ends early"))
                }
            }
        }
        let rest = self.piece.get(self.at..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.at = self.at.saturating_add(count);
        Ok(count)
    }
}
