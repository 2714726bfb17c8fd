//! The client against our own server, against other people's, and against servers that lie.

use super::*;
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::{Content, Disk};
use crate::format::Raw;
use crate::job::{ConvertOptions, Progress, Target, convert};
use crate::nbd::server::test::{Serving, export};
use std::path::Path;
use std::process::{Child, Command, Stdio};

fn connect(uri: &str) -> NbdStorage {
    NbdStorage::connect(&uri.parse().unwrap(), false).unwrap()
}

/// One of other people's servers; gone with the value.
pub struct Foreign {
    child: Child,
    directory: tempfile::TempDir,
}

impl Foreign {
    fn start(program: &str, arguments: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let arguments = arguments(directory.path());
        let child = Command::new(program).args(&arguments).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|_| panic!("{program}, which `cargo xtask setup` installs"));
        let until = Instant::now() + Duration::from_secs(20);
        while !listens(&directory.path().join("socket")) {
            assert!(Instant::now() < until, "{program} {arguments:?} does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child, directory }
    }

    pub fn nbdkit(rest: &[&str]) -> Self {
        Self::start("nbdkit", |directory| {
            let socket = directory.join("socket").display().to_string();
            let first = ["-f".to_owned(), "-U".to_owned(), socket];
            first.into_iter().chain(rest.iter().map(|word| (*word).to_owned())).collect()
        })
    }

    pub fn uri(&self, more: &str) -> String {
        format!("nbd+unix:///?socket={}{more}", self.directory.path().join("socket").display())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether somebody accepts connections there: between a socket's name and that there is a moment. Asks the kernel, since some
/// servers take one connection only.
fn listens(socket: &std::path::Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let name = socket.display().to_string();
    sockets.lines().any(|line| line.ends_with(&name) && line.split_whitespace().nth(3) == Some(ACCEPTS))
}

/// Writes, zeroes and reads in odd places, beside a model.
fn exercise(storage: Arc<dyn Storage>, len: usize) {
    let mut model = vec![0u8; len];
    storage.read_bytes(0, &mut model).unwrap();
    let disk = Raw::new(storage);
    let mut random = 7u64;
    for step in 0..120u64 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step);
        let at = (random >> 33) as usize % len;
        let count = ((random >> 20) as usize % 70_000).min(len - at);
        let value = step as u8 | 1;
        match step % 8 {
            0 => {
                disk.write_zeroes(at as u64, count as u64, step & 8 == 0).unwrap();
                model[at..at + count].fill(0);
            }
            1..=4 => {
                disk.write(at as u64, &WriteFrom(&vec![value; count])).unwrap();
                model[at..at + count].fill(value);
            }
            5 => disk.flush().unwrap(),
            _ => {
                let mut bytes = vec![0xee; count];
                disk.read(at as u64, &ReadInto::new(&mut bytes)).unwrap();
                assert!(bytes == model[at..at + count], "{count} bytes at {at}");
            }
        }
        let status = disk.block_status(at as u64, (len - at) as u64).unwrap();
        let told = &model[at..at + status.len as usize];
        assert!(
            status.content == Content::Data || told.iter().all(|byte| *byte == 0),
            "a hole with data at {at}"
        );
    }
    let mut bytes = vec![0xee; len];
    disk.read(0, &ReadInto::new(&mut bytes)).unwrap();
    assert!(bytes == model);
}

#[test]
fn our_server_and_our_client_understand_each_other() {
    let serving = Serving::raw(false);
    let storage = connect(&serving.uri(""));
    assert_eq!(storage.terms.mode, Mode::Extended);
    assert!(storage.extent(0, 9 << 20).unwrap().hole);
    exercise(Arc::new(storage), 4 << 20);
}

#[test]
fn qemus_server_is_understood() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let foreign = Foreign::start("qemu-nbd", |directory| {
        let socket = directory.join("socket").display().to_string();
        ["-t", "-e", "4", "-f", "raw", "-k", &socket, file.path().to_str().unwrap()]
            .map(str::to_owned)
            .to_vec()
    });
    exercise(Arc::new(connect(&foreign.uri(""))), 4 << 20);
}

#[test]
fn servers_of_all_kinds_are_understood() {
    let plain = Foreign::nbdkit(&["memory", "4M"]);
    exercise(Arc::new(connect(&plain.uri(""))), 4 << 20);
    let slow = Foreign::nbdkit(&["memory", "2M", "--filter=delay", "rdelay=1ms", "wdelay=1ms"]);
    exercise(Arc::new(connect(&slow.uri(""))), 2 << 20);
    let old = Foreign::nbdkit(&["--no-sr", "memory", "2M", "--filter=nozero"]);
    exercise(Arc::new(connect(&old.uri(""))), 2 << 20);
    // Whole blocks only, and small requests: a shorter last block cannot be.
    let blocks = Foreign::nbdkit(&[
        "memory",
        "4M",
        "--filter=blocksize-policy",
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ]);
    exercise(Arc::new(connect(&blocks.uri(""))), 4 << 20);
}

#[test]
fn errors_of_a_server_are_told_and_no_more() {
    let foreign =
        Foreign::nbdkit(&["memory", "1M", "--filter=error", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]);
    let storage = connect(&foreign.uri(""));
    assert_eq!(storage.write_bytes(0, &[1; 512]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    storage.read_bytes(0, &mut [0; 512]).unwrap();
    let unknown =
        NbdStorage::connect(&"nbd+unix:///?socket=/nonexistent".parse().unwrap(), true).err().unwrap();
    assert!(unknown.to_string().contains("nonexistent"), "{unknown}");
    let serving = Serving::raw(true);
    let refused = NbdStorage::connect(&serving.uri("").parse().unwrap(), false).err().unwrap();
    assert!(refused.to_string().contains("read-only"), "{refused}");
    let none = NbdStorage::connect(&serving.uri("none").parse().unwrap(), true);
    // A single export is the default one only.
    assert!(none.err().unwrap().to_string().contains("none"));
}

#[test]
fn many_threads_share_connections() {
    let serving = Serving::raw(false);
    let storage = connect(&serving.uri(""));
    std::thread::scope(|scope| {
        for number in 0..8u64 {
            let storage = &storage;
            scope.spawn(move || {
                for step in 0..100u64 {
                    let at = (number * 64 + step % 64) * 8192;
                    storage.write_bytes(at, &[step as u8 + 1; 8192]).unwrap();
                    let mut bytes = [0; 8192];
                    storage.read_bytes(at, &mut bytes).unwrap();
                    assert!(bytes == [step as u8 + 1; 8192]);
                }
            });
        }
    });
}

#[test]
fn whole_images_go_through() {
    let serving = Serving::disks(|image| {
        let base = Arc::new(Raw::open(image, false).unwrap());
        let options = crate::format::qcow2::CreateOptions::new(4 << 20);
        let qcow2 = crate::create_qcow2(&image.with_file_name("q"), &options).unwrap();
        vec![export("raw", base), export("qcow2", qcow2.disk)]
    });
    let bytes: Vec<u8> =
        (0..4usize << 20).map(|at| if at & (1 << 19) == 0 { (at % 251) as u8 } else { 0 }).collect();
    let raw = Raw::new(Arc::new(connect(&serving.uri("raw"))));
    raw.write(0, &WriteFrom(&bytes)).unwrap();
    let qcow2 = Raw::new(Arc::new(connect(&serving.uri("qcow2"))));
    let options = ConvertOptions { threads: 3, sparse: 4096, target_is_zero: false, share: false };
    convert(&raw, Target::Plain(&qcow2), options, &Progress::default()).unwrap();
    let mut back = vec![0; 4 << 20];
    qcow2.read(0, &ReadInto::new(&mut back)).unwrap();
    assert!(back == bytes);
    assert_eq!(qcow2.block_status(1 << 19, 1 << 20).unwrap().content, Content::Zero);
}

/// An nbdkit over a file, which is killed and started again.
struct Mortal {
    file: tempfile::NamedTempFile,
    directory: tempfile::TempDir,
    server: Option<Child>,
}

impl Mortal {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut mortal = Self { file, directory: tempfile::tempdir().unwrap(), server: None };
        mortal.start();
        mortal
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    /// Connects; for so many seconds a server that is away is waited for.
    fn connect(&self, reconnect: u32) -> NbdStorage {
        connect(&format!("nbd+unix:///?socket={}&reconnect={reconnect}", self.socket().display()))
    }

    fn start(&mut self) {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(self.socket()).arg("file").arg(self.file.path()).stderr(Stdio::null());
        self.server = Some(command.spawn().unwrap());
        while !listens(&self.socket()) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
            std::fs::remove_file(self.socket()).unwrap();
        }
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A server that is killed and comes back is not noticed but for the time; one that does not come back is an error.
#[test]
fn a_lost_server_is_found_again() {
    let mut server = Mortal::new();
    let storage = server.connect(20);
    storage.write_bytes(0, &[5; 4096]).unwrap();
    server.kill();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = [0; 4096];
            storage.read_bytes(0, &mut bytes).map(|()| bytes)
        });
        std::thread::sleep(Duration::from_millis(100));
        server.start();
        assert_eq!(reader.join().unwrap().unwrap(), [5; 4096]);
    });
    let impatient = server.connect(0);
    server.kill();
    let error = impatient.read_bytes(0, &mut [0; 512]).unwrap_err();
    assert!(error.to_string().contains("nbd+unix"), "{error}");
}

/// Answers whatever it is asked with given bytes.
fn liar(answer: Vec<u8>) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let uri = format!("nbd+unix:///?socket={}&timeout=1&reconnect=0", socket.display());
    std::thread::spawn(move || {
        use std::io::Write;
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(&answer);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    (directory, uri)
}

/// What a server by hand does with a request.
enum Does {
    /// What is asked, or nothing but this error.
    Answer(u32),
    Nothing,
    /// The connection ends.
    Leave,
}

/// A server of 1 MiB with these flags, in the oldest form of the protocol: `with` hears the number of the connection,
/// kind and place of each request, and says what becomes of it.
fn by_hand(
    flags: u16,
    with: impl Fn(usize, u16, u64) -> Does + Send + 'static,
) -> (tempfile::TempDir, String) {
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let uri = format!("nbd+unix:///?socket={}&timeout=1", socket.display());
    std::thread::spawn(move || {
        let mut disk = vec![0; 1 << 20];
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            stream.write_all(b"NBDMAGICIHAVEOPT\0\0").unwrap();
            // The client's flags, and its choice of the export without a name.
            stream.read_exact(&mut [0; 4 + 16]).unwrap();
            let export = [&(1u64 << 20).to_be_bytes()[..], &flags.to_be_bytes(), &[0; 124]].concat();
            stream.write_all(&export).unwrap();
            let mut request = [0; 28];
            while stream.read_exact(&mut request).is_ok() {
                let kind = crate::endian::be16(&request, 6);
                let at = crate::endian::be64(&request, 16);
                let range = at as usize..at as usize + crate::endian::be32(&request, 24) as usize;
                let mut payload = vec![0; if kind == command::WRITE { range.len() } else { 0 }];
                stream.read_exact(&mut payload).unwrap();
                let error = match with(number, kind, at) {
                    Does::Answer(error) => error,
                    Does::Nothing => continue,
                    Does::Leave => break,
                };
                let mut reply =
                    [&[0x67, 0x44, 0x66, 0x98][..], &error.to_be_bytes(), &request[8..16]].concat();
                match kind {
                    _ if error != 0 => {}
                    command::READ => reply.extend_from_slice(&disk[range]),
                    command::WRITE => disk[range].copy_from_slice(&payload),
                    command::WRITE_ZEROES => disk[range].fill(0),
                    _ => {}
                }
                if stream.write_all(&reply).is_err() {
                    break;
                }
            }
        }
    });
    (directory, uri)
}

/// Loses a connection that had unflushed writes, and one that had none.
#[test]
fn a_flush_says_once_that_writes_may_be_lost() {
    // The first connection ends at a read, the second at a flush, the third at a read.
    let (_directory, uri) =
        by_hand(flag::HAS_FLAGS | flag::SEND_FLUSH, |number, kind, _| match (number, kind) {
            (0 | 2, command::READ) | (1, command::FLUSH) => Does::Leave,
            _ => Does::Answer(0),
        });
    let storage = connect(&uri);
    let read = || storage.read_bytes(0, &mut [0; 512]).unwrap();
    // Nothing was written, nothing can be lost.
    read();
    storage.write_bytes(0, &[1; 512]).unwrap();
    let error = storage.flush().unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    storage.flush().unwrap();
    storage.write_bytes(0, &[2; 512]).unwrap();
    storage.flush().unwrap();
    // All was stable when this one was lost.
    read();
    storage.flush().unwrap();
}

/// A server with several connections that comes back has lost what it had not made stable, once.
#[test]
fn connections_that_end_together_are_one_loss() {
    let mut server = Mortal::new();
    let storage = server.connect(20);
    assert_eq!(storage.places.len(), CONNECTIONS, "nbdkit lets several connections be");
    // A thread keeps its connection: each does one thing after the other, when it is told.
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let (ask, asked) = std::sync::mpsc::channel::<bool>();
                let (answer, answered) = std::sync::mpsc::channel();
                let storage = &storage;
                scope.spawn(move || {
                    for flush in asked {
                        let done = if flush { storage.flush() } else { storage.write_bytes(0, &[7; 512]) };
                        answer.send(done).unwrap();
                    }
                });
                move |flush: bool| {
                    ask.send(flush).unwrap();
                    answered.recv().unwrap()
                }
            })
            .collect();
        threads.iter().for_each(|thread| thread(false).unwrap());
        server.kill();
        server.start();
        threads[0](false).unwrap();
        assert!(threads[0](true).unwrap_err().to_string().contains("may be lost"));
        for thread in &threads {
            thread(false).unwrap();
            thread(true).unwrap();
            // This is acknowledged by the new server, and lost by none.
            thread(false).unwrap();
        }
    });
}

#[test]
fn zeroes_that_a_server_declines_are_written() {
    // ENOTSUP to all that are zeroed by its own means.
    let (_directory, uri) = by_hand(flag::HAS_FLAGS | flag::SEND_WRITE_ZEROES, |_, kind, _| match kind {
        command::WRITE_ZEROES => Does::Answer(95),
        _ => Does::Answer(0),
    });
    let storage = connect(&uri);
    storage.write_bytes(0, &[7; 4096]).unwrap();
    storage.zero_range(512, 1024).unwrap();
    let mut bytes = [0; 4096];
    storage.read_bytes(0, &mut bytes).unwrap();
    assert!(bytes[..512] == [7; 512] && bytes[512..1536] == [0; 1024] && bytes[1536..] == [7; 2560]);
    assert_eq!(storage.punch_hole(0, 512).unwrap_err().kind(), io::ErrorKind::Unsupported);
    // A guest that writes beyond the end hears of an error, and waits for no space.
    assert_eq!(storage.write_bytes(1 << 20, &[1; 512]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_request_that_is_passed_over_is_given_up_though_others_are_answered() {
    let (_directory, uri) =
        by_hand(flag::HAS_FLAGS, |_, _, at| if at > 0 { Does::Answer(0) } else { Does::Nothing });
    let uri = format!("{uri}&reconnect=0");
    let storage = NbdStorage::connect(&uri.parse().unwrap(), true).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) && began.elapsed() < Duration::from_secs(20) {
                // Fails once the connection is given up.
                let _ = storage.read_bytes(4096, &mut [0; 512]);
            }
        });
        assert!(storage.read_bytes(0, &mut [0; 512]).is_err());
        over.store(true, Ordering::Relaxed);
        others.join().unwrap();
    });
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

mod lies {
    use super::*;
    use proptest::prelude::*;

    fn read(uri: &str) {
        if let Ok(storage) = NbdStorage::connect(&uri.parse().unwrap(), true) {
            assert!(storage.read_bytes(0, &mut [0; 512]).is_err() || storage.len() < 512);
            let _ = storage.extent(0, 512);
        }
    }

    /// A handshake without options, then whatever.
    fn oldest(rest: &[u8]) -> Vec<u8> {
        let export = [&(1u64 << 20).to_be_bytes()[..], &1u16.to_be_bytes(), &[0; 124]].concat();
        [&b"NBDMAGICIHAVEOPT\0\0"[..], &export, rest].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), whole: bool) {
            let bytes = if whole { oldest(&bytes) } else { bytes };
            let (_directory, uri) = liar(bytes);
            read(&uri);
        }
    }

    /// The connection ends within a reply's data.
    #[test]
    fn half_an_answer_is_none() {
        let half = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &1u64.to_be_bytes(), &[1; 100]].concat();
        let (_directory, uri) = liar(oldest(&half));
        let storage = NbdStorage::connect(&uri.parse().unwrap(), true).unwrap();
        assert!(storage.read_bytes(0, &mut [0; 512]).is_err());
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let (_directory, uri) = liar(oldest(&[]));
        let began = Instant::now();
        read(&uri);
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
