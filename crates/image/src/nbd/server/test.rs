//! The server against a model in memory and against other people's clients.

use super::*;
use crate::buffers::{Buffers, VecBuffers};
use crate::disk::{Content, Disk, Status};
use crate::format::Raw;
use crate::nbd::wire::{Mode, Request, chunk, command, error, option, reply};
use crate::storage::StorageFile;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

const SIZE: u64 = 4 << 20;

/// A server on a Unix socket, with a raw image; stops with the value.
pub struct Serving {
    server: Server,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
    pub socket: PathBuf,
    pub image: PathBuf,
    _directory: tempfile::TempDir,
}

impl Serving {
    pub fn disks(make: impl FnOnce(&Path) -> Vec<Export>) -> Self {
        Self::with_tls(make, Tls::Off)
    }

    pub fn with_tls(make: impl FnOnce(&Path) -> Vec<Export>, tls: Tls) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let server = Server::new(make(&image), Limits::default(), tls).unwrap();
        let socket = directory.path().join("socket");
        let listener = Listener::unix(&socket).unwrap();
        let thread = {
            let server = server.clone();
            Some(std::thread::spawn(move || server.accept(&listener)))
        };
        Self { server, thread, socket, image, _directory: directory }
    }

    pub fn raw(read_only: bool) -> Self {
        Self::disks(|image| {
            let disk = Arc::new(Raw::open(image, read_only).unwrap());
            vec![export("", disk)]
        })
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    pub fn stop(&mut self) {
        self.server.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop();
    }
}

pub fn export(name: &str, disk: Arc<dyn Disk>) -> Export {
    Export { name: name.into(), description: "a disk".into(), disk, read_only: false }
}

/// Runs one of other people's programs; answers what it printed and whether it succeeded.
fn run(program: &str, arguments: &[&str]) -> (String, bool) {
    // The system's own Python first: it is the one that has libnbd.
    let path = format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|_| panic!("{program}, which `cargo xtask setup` installs"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (text, output.status.success())
}

pub fn succeeds(program: &str, arguments: &[&str]) -> String {
    let (text, good) = run(program, arguments);
    assert!(good, "{program} {arguments:?}: {text}");
    text
}

/// A client that does as it is told, right or wrong.
pub struct Client {
    pub socket: UnixStream,
    pub mode: Mode,
}

impl Client {
    pub fn greet(serving: &Serving) -> Self {
        let mut socket = UnixStream::connect(&serving.socket).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        Self { socket, mode: Mode::Simple }
    }

    pub fn option(&mut self, number: u32, data: &[u8]) {
        let head =
            [&wire::OPTION.to_be_bytes()[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
        self.socket.write_all(&[&head.concat(), data].concat()).unwrap();
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The replies to an option up to the last one: their types and data.
    pub fn replies(&mut self) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let head = self.bytes(20);
            assert_eq!(crate::endian::be64(&head, 0), wire::OPTION_REPLY);
            let kind = crate::endian::be32(&head, 12);
            let data = self.bytes(crate::endian::be32(&head, 16) as usize);
            replies.push((kind, data));
            if kind == reply::ACK || kind & reply::ERROR != 0 {
                return replies;
            }
        }
    }

    pub fn last(&mut self, number: u32, data: &[u8]) -> u32 {
        self.option(number, data);
        self.replies().last().unwrap().0
    }

    pub fn go(serving: &Serving, mode: Mode) -> Self {
        let mut this = Self::greet(serving);
        match mode {
            Mode::Simple => {}
            Mode::Structured => assert_eq!(this.last(option::STRUCTURED_REPLY, &[]), reply::ACK),
            Mode::Extended => assert_eq!(this.last(option::EXTENDED_HEADERS, &[]), reply::ACK),
        }
        this.mode = mode;
        if mode > Mode::Simple {
            assert_eq!(this.last(option::SET_META_CONTEXT, &contexts("", &["base:allocation"])), reply::ACK);
        }
        assert_eq!(this.last(option::GO, &[0; 6]), reply::ACK);
        this
    }

    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) {
        let request = Request { flags, kind, cookie: 7, offset, len };
        let (bytes, count) = request.encode(self.mode);
        self.socket.write_all(&[&bytes[..count], payload].concat()).unwrap();
    }

    /// The answer to the only request: its error, and all payloads with their chunk types.
    pub fn answer(&mut self) -> (u32, Vec<(u16, Vec<u8>)>) {
        let mut chunks = Vec::new();
        loop {
            let magic = self.bytes(4);
            let len = wire::Reply::len(self.mode, crate::endian::be32(&magic, 0)).unwrap();
            let head = [magic, self.bytes(len - 4)].concat();
            match wire::Reply::parse(&head).unwrap() {
                wire::Reply::Simple { error, cookie } => {
                    assert_eq!(cookie, 7);
                    return (error, chunks);
                }
                wire::Reply::Chunk { flags, kind, cookie, len } => {
                    assert_eq!(cookie, 7);
                    let payload = self.bytes(len as usize);
                    if kind & chunk::ERROR_BIT != 0 {
                        return (crate::endian::be32(&payload, 0), chunks);
                    }
                    chunks.push((kind, payload));
                    if flags & chunk::FLAG_DONE != 0 {
                        return (0, chunks);
                    }
                }
            }
        }
    }

    pub fn error(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> u32 {
        self.ask(kind, flags, offset, len, payload);
        self.answer().0
    }

    /// Whether the server has ended the connection.
    pub fn is_cut(&mut self) -> bool {
        matches!(self.socket.read(&mut [0; 64]), Ok(0) | Err(_))
    }
}

fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let counted = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let mut data = counted(export);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(counted(query)));
    data
}

#[test]
fn options_are_answered_by_the_book() {
    let serving = Serving::raw(false);
    let mut client = Client::greet(&serving);
    assert_eq!(client.last(77, b"abc"), reply::ERR_UNSUP);
    assert_eq!(client.last(option::LIST, b"x"), reply::ERR_INVALID);
    assert_eq!(client.last(option::STARTTLS, &[]), reply::ERR_POLICY);
    assert_eq!(client.last(option::SET_META_CONTEXT, &contexts("", &[])), reply::ERR_INVALID);
    assert_eq!(client.last(option::INFO, &[0, 0, 0, 9, 0, 0]), reply::ERR_INVALID);
    assert_eq!(client.last(option::INFO, b"\0\0\0\x01x\0\0"), reply::ERR_UNKNOWN);
    assert_eq!(client.last(option::STRUCTURED_REPLY, &[]), reply::ACK);
    assert_eq!(client.last(option::STRUCTURED_REPLY, &[]), reply::ERR_INVALID);
    client.option(option::LIST_META_CONTEXT, &contexts("", &[]));
    assert_eq!(client.replies().len(), 3);
    client.option(option::LIST_META_CONTEXT, &contexts("", &["qemu:", "unknown:x"]));
    assert_eq!(client.replies()[0].1[4..], *b"qemu:allocation-depth");
    client.option(option::SET_META_CONTEXT, &contexts("", &["base:"]));
    assert_eq!(client.replies().len(), 1);
    assert_eq!(client.last(option::EXTENDED_HEADERS, &[]), reply::ACK);
    assert_eq!(client.last(option::STRUCTURED_REPLY, &[]), reply::ERR_EXT_HEADER_REQD);
    assert_eq!(client.last(5000, &vec![0; 70_000]), reply::ERR_TOO_BIG);
    // Name, description and block sizes as asked for, and the export anyhow.
    client.option(option::INFO, &[0, 0, 0, 0, 0, 3, 0, 1, 0, 2, 0, 3]);
    let kinds: Vec<u8> =
        client.replies().iter().filter(|(_, data)| !data.is_empty()).map(|(_, data)| data[1]).collect();
    assert_eq!(kinds, [0, 1, 2, 3]);
    client.option(option::ABORT, &[]);
    assert_eq!(client.replies()[0].0, reply::ACK);
    assert!(client.is_cut());
}

#[test]
fn old_clients_get_their_zeroes() {
    let serving = Serving::raw(false);
    let mut socket = UnixStream::connect(&serving.socket).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&0u32.to_be_bytes()).unwrap();
    let mut client = Client { socket, mode: Mode::Simple };
    client.option(option::EXPORT_NAME, &[]);
    let export = client.bytes(8 + 2 + 124);
    assert_eq!(crate::endian::be64(&export, 0), SIZE);
    assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0);
    client.ask(command::DISC, 0, 0, 0, &[]);
    assert!(client.is_cut());
}

#[test]
fn wrong_requests_are_refused_and_the_connection_goes_on() {
    let serving = Serving::raw(false);
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut client = Client::go(&serving, mode);
        let write = if mode == Mode::Extended { command::FLAG_PAYLOAD_LEN } else { 0 };
        assert_eq!(client.error(command::READ, 0, SIZE - 5, 6, &[]), error::EINVAL);
        assert_eq!(client.error(command::READ, 0, u64::MAX, 6, &[]), error::EINVAL);
        assert_eq!(client.error(command::READ, command::FLAG_NO_HOLE, 0, 1, &[]), error::EINVAL);
        assert_eq!(client.error(command::READ, 0, 0, (32 << 20) + 1, &[]), error::EINVAL);
        assert_eq!(client.error(command::WRITE, write, SIZE - 5, 6, b"abcdef"), error::ENOSPC);
        assert_eq!(client.error(command::WRITE, write | 0x4000, 0, 6, b"abcdef"), error::EINVAL);
        assert_eq!(client.error(command::WRITE_ZEROES, 0, SIZE, 1, &[]), error::ENOSPC);
        assert_eq!(client.error(command::WRITE_ZEROES, 1 << 3, 0, 1, &[]), error::EINVAL);
        assert_eq!(client.error(command::TRIM, 0, SIZE, 1, &[]), error::EINVAL);
        assert_eq!(client.error(99, 0, 0, 0, &[]), error::EINVAL);
        assert_eq!(client.error(command::BLOCK_STATUS, 0, 0, 0, &[]), error::EINVAL);
        if mode == Mode::Extended {
            let payload = [&8u64.to_be_bytes()[..], &9u32.to_be_bytes()].concat();
            let flags = command::FLAG_PAYLOAD_LEN;
            assert_eq!(client.error(command::BLOCK_STATUS, flags, 0, 12, &payload), error::EINVAL);
            assert_eq!(client.error(command::TRIM, flags, 0, 3, b"abc"), error::EINVAL);
            let payload = [&SIZE.to_be_bytes()[..], &1u32.to_be_bytes()].concat();
            client.ask(command::BLOCK_STATUS, flags, 0, 12, &payload);
            let (error, chunks) = client.answer();
            assert_eq!((error, chunks[0].0, chunks[0].1.len()), (0, chunk::BLOCK_STATUS_EXT, 8 + 2 * 16));
        }
        // Nothing of no length is an error.
        assert_eq!(client.error(command::READ, 0, 0, 0, &[]), 0);
        assert_eq!(client.error(command::WRITE, write, 0, 0, &[]), 0);
        assert_eq!(client.error(command::TRIM, 0, SIZE, 0, &[]), 0);
        assert_eq!(client.error(command::WRITE, write, 512, 4, b"good"), 0);
        assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0);
    }
    let mut start = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::open(&serving.image).unwrap(), &mut start, 512)
        .unwrap();
    assert_eq!(&start, b"good");
}

#[test]
fn nothing_is_written_where_writing_is_forbidden() {
    let serving = Serving::raw(true);
    let mut client = Client::go(&serving, Mode::Structured);
    for kind in [command::TRIM, command::WRITE_ZEROES] {
        assert_eq!(client.error(kind, 0, 0, 512, &[]), error::EPERM);
    }
    assert_eq!(client.error(command::WRITE, 0, 0, 3, b"bad"), error::EPERM);
    assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0);
    assert_eq!(client.error(command::CACHE, 0, 0, SIZE, &[]), 0);
}

#[test]
fn what_is_no_protocol_ends_the_connection_and_no_other() {
    let serving = Serving::raw(false);
    let mut witness = Client::go(&serving, Mode::Simple);
    let mut client = Client::greet(&serving);
    client.socket.write_all(&[7; 64]).unwrap();
    assert!(client.is_cut());
    let mut client = Client::go(&serving, Mode::Structured);
    client.socket.write_all(&[9; 28]).unwrap();
    assert!(client.is_cut());
    let mut client = Client::go(&serving, Mode::Extended);
    client.ask(command::WRITE, command::FLAG_PAYLOAD_LEN, 0, u64::MAX, &[]);
    assert!(client.is_cut());
    let mut client = Client::greet(&serving);
    client.option(option::EXPORT_NAME, b"nobody");
    assert!(client.is_cut());
    assert_eq!(witness.error(command::READ, 0, 0, 0, &[]), 0);
}

/// A disk that does as it is told, and else nothing: what is read is the byte of its offset, what is written fails.
pub struct Scripted {
    pub capacity: u64,
    /// Bytes of an extent.
    pub extent: u64,
    /// Before each read.
    pub read: fn(&Reads, offset: u64, len: u64) -> io::Result<()>,
    pub reads: Reads,
    /// Before zeroes are written.
    pub zero: fn(),
}

/// What a disk remembers of reads.
#[derive(Default)]
pub struct Reads {
    pub now: AtomicU64,
    pub most: AtomicU64,
}

impl Default for Scripted {
    fn default() -> Self {
        Self {
            capacity: SIZE,
            extent: u64::MAX,
            read: |_, _, _| Ok(()),
            reads: Reads::default(),
            zero: || {},
        }
    }
}

impl Disk for Scripted {
    fn capacity(&self) -> u64 {
        self.capacity
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        (self.read)(&self.reads, offset, buffers.len())?;
        buffers.put(0, &vec![offset as u8; buffers.len() as usize])
    }
    fn write(&self, _: u64, _: &dyn Buffers) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        (self.zero)();
        Ok(())
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        let len = len.min(self.extent - offset % self.extent);
        Ok(Status { len, content: Content::Data, depth: 0, present: true, offset: None, compressed: false })
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn snapshot(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
}

/// A disk that fails at some places and takes its time at others.
fn faulty() -> Scripted {
    let read = |reads: &Reads, offset: u64, len: u64| {
        if offset < 1 << 20 {
            let now = reads.now.fetch_add(1, Ordering::SeqCst) + 1;
            reads.most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            reads.now.fetch_sub(1, Ordering::SeqCst);
        } else if offset.saturating_add(len) > 3 << 20 {
            return Err(io::Error::other("the disk is on fire"));
        }
        Ok(())
    };
    Scripted { read, ..Scripted::default() }
}

#[test]
fn errors_of_the_disk_reach_the_client() {
    let serving = Serving::disks(|_| vec![export("", Arc::new(faulty()))]);
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut client = Client::go(&serving, mode);
        assert_eq!(client.error(command::READ, 0, 3 << 20, 512, &[]), error::EIO);
        // The first pieces of a long read are good: chunks, then the error.
        client.ask(command::READ, 0, 2 << 20, 2 << 20, &[]);
        let (error, chunks) = client.answer();
        assert_eq!((error, chunks.is_empty()), (error::EIO, mode == Mode::Simple));
        let write = if mode == Mode::Extended { command::FLAG_PAYLOAD_LEN } else { 0 };
        let long = vec![1; 300 << 10];
        assert_eq!(client.error(command::WRITE, write, 0, long.len() as u64, &long), error::ENOSPC);
        assert_eq!(client.error(command::WRITE, write | command::FLAG_FUA, 0, 3, b"abc"), error::ENOSPC);
    }
}

#[test]
fn a_slow_disk_serves_many_requests_at_a_time() {
    let disk = Arc::new(faulty());
    let serving = Serving::disks(|_| vec![export("", disk.clone())]);
    let mut client = Client::go(&serving, Mode::Simple);
    for _ in 0..2 {
        for _ in 0..32 {
            client.ask(command::READ, 0, 0, 512, &[]);
        }
        for _ in 0..32 {
            assert_eq!(client.bytes(16 + 512).len(), 528);
        }
    }
    assert!(disk.reads.most.load(Ordering::SeqCst) > 4);
}

#[test]
fn a_client_that_takes_no_replies_hurts_nobody() {
    let mut serving = Serving::raw(false);
    let mut greedy = Client::go(&serving, Mode::Simple);
    greedy.socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let request = Request { flags: 0, kind: command::READ, cookie: 7, offset: 0, len: 1 << 20 };
    let (bytes, count) = request.encode(Mode::Simple);
    for _ in 0..100_000 {
        if greedy.socket.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let mut client = Client::go(&serving, Mode::Structured);
    assert_eq!(client.error(command::WRITE, 0, 0, 3, b"abc"), 0);
    drop(greedy);
    serving.stop();
}

#[test]
fn a_stopping_server_answers_what_has_begun() {
    let mut serving = Serving::disks(|_| vec![export("", Arc::new(faulty()))]);
    let mut client = Client::go(&serving, Mode::Simple);
    client.ask(command::READ, 0, 0, 512, &[]);
    std::thread::sleep(Duration::from_millis(5));
    let path = serving.socket.clone();
    serving.stop();
    assert_eq!(client.bytes(16 + 512).len(), 528);
    assert!(client.is_cut() && !path.exists());
}

#[test]
fn other_peoples_clients_find_all_exports() {
    let serving = Serving::disks(|image| {
        let writable = Arc::new(Raw::open(image, false).unwrap());
        let other = image.with_file_name("other");
        std::fs::write(&other, vec![7; 8192]).unwrap();
        let locked =
            Export { read_only: true, ..export("second disk", Arc::new(Raw::open(&other, false).unwrap())) };
        vec![export("first", writable), locked]
    });
    let list = succeeds("nbdinfo", &["--list", "--json", &serving.uri("")]);
    for word in ["\"first\"", "\"second disk\"", "base:allocation", "qemu:allocation-depth", "a disk"] {
        assert!(list.contains(word), "{word}: {list}");
    }
    succeeds("nbdinfo", &["--can", "multi-conn", &serving.uri("first")]);
    succeeds("nbdinfo", &["--is", "read-only", &serving.uri("second%20disk")]);
    assert!(!run("nbdinfo", &["--is", "read-only", &serving.uri("first")]).1);
    assert!(!run("nbdinfo", &["--size", &serving.uri("third")]).1);
    assert_eq!(succeeds("nbdinfo", &["--size", &serving.uri("second%20disk")]).trim(), "8192");
    assert!(!run("qemu-io", &["-f", "raw", "-c", "write 0 512", &serving.uri("second%20disk")]).1);
}

#[test]
fn other_peoples_clients_read_and_write() {
    let serving = Serving::raw(false);
    let uri = serving.uri("");
    let own = serving.image.with_file_name("own");
    // Data, holes, and an odd end in a file of the same size.
    let bytes: Vec<u8> = (0..SIZE).map(|at| if at & (1 << 18) == 0 { (at % 253) as u8 } else { 0 }).collect();
    std::fs::write(&own, &bytes).unwrap();
    let own = own.to_str().unwrap();
    succeeds("nbdcopy", &["--flush", "--connections=4", "--requests=32", own, &uri]);
    assert!(std::fs::read(&serving.image).unwrap() == bytes);
    let back = format!("{own}.back");
    succeeds("nbdcopy", &["--synchronous", &uri, &back]);
    assert!(std::fs::read(&back).unwrap() == bytes);
    assert!(succeeds("qemu-img", &["compare", "-f", "raw", "-F", "raw", own, &uri]).contains("identical"));
    let map = succeeds("nbdinfo", &["--map", &uri]);
    assert!(map.lines().count() > 4 && map.contains("hole,zero") && map.contains("data"), "{map}");
    let work =
        ["write -P 3 5 70001", "write -z -u 4096 8192", "write -f -P 4 65536 512", "discard 1M 1M", "flush"];
    let checks = ["read -P 3 5 4091", "read -P 0 4k 8k", "read -P 4 64k 512", "read -P 3 12288 53248"];
    let lines = work.iter().chain(&checks).flat_map(|line| ["-c", *line]);
    let text = succeeds("qemu-io", &[&["-f", "raw"][..], &lines.collect::<Vec<_>>(), &[&uri]].concat());
    assert!(!text.contains("failed"), "{text}");
}

#[test]
fn the_python_client_finds_no_fault() {
    let serving = Serving::raw(false);
    // One extent of zeroes, one of data, one of zeroes; errors by their names; DF; many requests under way.
    let script = r#"
import sys
h.add_meta_context("base:allocation")
h.set_strict_mode(0)
h.connect_uri("URI")
assert h.get_structured_replies_negotiated() and h.can_df() and h.can_multi_conn()
h.pwrite(b"x" * 65536, 1 << 20, nbd.CMD_FLAG_FUA)
seen = []
h.block_status(4 << 20, 0, lambda name, at, entries, err: seen.extend(entries))
assert seen == [1 << 20, 3, 65536, 0, (3 << 20) - 65536, 3], seen
seen = []
h.block_status(4 << 20, 0, lambda name, at, entries, err: seen.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert seen == [1 << 20, 3], seen
assert h.pread(4 << 20, 0, nbd.CMD_FLAG_DF).count(b"x") == 65536
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
h.pread_structured(4 << 20, 0, chunk)
assert sum(length for _, length, _ in chunks) == 4 << 20 and any(status == nbd.READ_HOLE for _, _, status in chunks)
for call, number in [(lambda: h.pread(9, (4 << 20) - 8), "EINVAL"), (lambda: h.pwrite(b"123456789", (4 << 20) - 8), "ENOSPC"),
                     (lambda: h.trim(512, 4 << 20), "EINVAL"), (lambda: h.zero(9, (4 << 20) - 8), "ENOSPC")]:
    try:
        call()
        sys.exit("no " + number)
    except nbd.Error as error:
        assert error.errno == number, (error.errno, number)
buffers = [nbd.Buffer(4096) for _ in range(256)]
cookies = [h.aio_pread(buffer, 1 << 20) for buffer in buffers]
while cookies:
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
    if cookies:
        h.poll(-1)
assert all(buffer.to_bytearray() == b"x" * 4096 for buffer in buffers)
h.zero(65536, 1 << 20)
h.cache(65536, 1 << 20)
h.pwrite(b"z" * 65536, 0)
assert h.can_fast_zero()
h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(65536, 0) == bytearray(65536)
h.flush()
assert h.pread(65536, 1 << 20) == bytearray(65536)
h.shutdown()
"#;
    succeeds("nbdsh", &["-c", &script.replace("URI", &serving.uri(""))]);
}

#[test]
fn a_chain_tells_its_depth() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    std::fs::write(place("base"), vec![7; 1 << 20]).unwrap();
    let options = crate::format::qcow2::CreateOptions {
        backing: Some(("base".into(), "raw".into())),
        ..crate::format::qcow2::CreateOptions::new(2 << 20)
    };
    let top = crate::create_qcow2(&place("top"), &options).unwrap();
    top.disk.write(0, &VecBuffers::new(vec![1; 65536])).unwrap();
    let serving = Serving::disks(|_| vec![export("", top.disk.clone())]);
    let map = succeeds("nbdinfo", &["--map=qemu:allocation-depth", &serving.uri("")]);
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(rows, [["0", "65536", "1"], ["65536", "983040", "2"], ["1048576", "1048576", "0"]]);
}

/// Several connections write and read overlapping ranges at once. Every sector that is read has been written by
/// somebody, whole; when all is over, what is on the disk is what the last writers wrote.
#[test]
fn overlapping_requests_of_many_connections_leave_whole_sectors() {
    const SECTOR: usize = 512;
    let serving = Serving::raw(false);
    let mut stamps = Vec::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4u64)
            .map(|number| {
                let serving = &serving;
                scope.spawn(move || {
                    let mut client =
                        Client::go(serving, if number % 2 == 0 { Mode::Simple } else { Mode::Structured });
                    let mut random = number;
                    let mut last = vec![0u64; 64];
                    for stamp in 1..400u64 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(stamp);
                        let (at, count) = ((random >> 33) as usize % 56, 1 + (random >> 50) as usize % 8);
                        if random >> 60 & 3 == 0 {
                            client.ask(command::READ, 0, (at * SECTOR) as u64, (count * SECTOR) as u64, &[]);
                            let bytes = if client.mode == Mode::Simple {
                                client.bytes(16 + count * SECTOR)[16..].to_vec()
                            } else {
                                client
                                    .answer()
                                    .1
                                    .iter()
                                    .flat_map(|(_, payload)| payload[8..].to_vec())
                                    .collect()
                            };
                            assert!(
                                bytes
                                    .chunks(SECTOR)
                                    .all(|sector| sector.iter().all(|byte| *byte == sector[0]))
                            );
                        } else {
                            let value = (number * 60 + stamp % 60) as u8;
                            let flags = if stamp % 50 == 0 { command::FLAG_FUA } else { 0 };
                            let payload = vec![value; count * SECTOR];
                            let len = payload.len() as u64;
                            assert_eq!(
                                client.error(command::WRITE, flags, (at * SECTOR) as u64, len, &payload),
                                0
                            );
                            last[at..at + count].fill(value.into());
                        }
                    }
                    last
                })
            })
            .collect();
        stamps.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    });
    let disk = std::fs::read(&serving.image).unwrap();
    for (number, sector) in disk.chunks(SECTOR).take(64).enumerate() {
        assert!(sector.iter().all(|byte| *byte == sector[0]));
        let somebodys = stamps.iter().any(|last| last[number] == u64::from(sector[0]));
        assert!(somebodys, "sector {number} has what nobody wrote last");
    }
}

mod model {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64, usize, u8, bool),
        Zero(u64, u64, bool),
        Read(u64, u64, bool),
        Flush,
    }

    fn step() -> impl Strategy<Value = Step> {
        let at = 0..SIZE - (600 << 10);
        (at, prop_oneof![0..70_000u64, 0..(600u64 << 10)], any::<u8>(), 0..8).prop_map(
            |(at, len, value, kind)| match kind {
                0..=2 => Step::Write(at, len as usize, value, kind == 0),
                3 => Step::Zero(at, len, value & 1 == 0),
                4 => Step::Flush,
                _ => Step::Read(at, len, value & 1 == 0),
            },
        )
    }

    fn data(client: &mut Client, offset: u64, len: u64) -> Vec<u8> {
        if client.mode == Mode::Simple {
            return client.bytes(16 + len as usize)[16..].to_vec();
        }
        let mut bytes = vec![0xee; len as usize];
        let (error, chunks) = client.answer();
        assert_eq!(error, 0);
        for (kind, payload) in chunks.iter().filter(|(kind, _)| *kind != chunk::NONE) {
            let at = (crate::endian::be64(payload, 0) - offset) as usize;
            match *kind {
                chunk::OFFSET_DATA => bytes[at..at + payload.len() - 8].copy_from_slice(&payload[8..]),
                chunk::OFFSET_HOLE => bytes[at..at + crate::endian::be32(payload, 8) as usize].fill(0),
                other => panic!("chunk {other}"),
            }
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_disk_behind_the_protocol_is_a_disk(steps in proptest::collection::vec(step(), 1..30), mode in 0usize..3) {
            let serving = Serving::raw(false);
            let mode = [Mode::Simple, Mode::Structured, Mode::Extended][mode];
            let mut client = Client::go(&serving, mode);
            let write = if mode == Mode::Extended { command::FLAG_PAYLOAD_LEN } else { 0 };
            let mut model = vec![0; SIZE as usize];
            for step in steps {
                match step {
                    Step::Write(at, len, value, fua) => {
                        let flags = write | if fua { command::FLAG_FUA } else { 0 };
                        prop_assert_eq!(client.error(command::WRITE, flags, at, len as u64, &vec![value; len]), 0);
                        model[at as usize..at as usize + len].fill(value);
                    }
                    Step::Zero(at, len, hole) => {
                        let flags = if hole { 0 } else { command::FLAG_NO_HOLE };
                        prop_assert_eq!(client.error(command::WRITE_ZEROES, flags, at, len, &[]), 0);
                        model[at as usize..(at + len) as usize].fill(0);
                    }
                    Step::Flush => prop_assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0),
                    Step::Read(at, len, whole) => {
                        let flags = if whole && mode > Mode::Simple { command::FLAG_DF } else { 0 };
                        client.ask(command::READ, flags, at, len, &[]);
                        let bytes = data(&mut client, at, len);
                        prop_assert!(bytes == model[at as usize..(at + len) as usize], "{} bytes at {}", len, at);
                    }
                }
            }
            drop(client);
            let storage = StorageFile::open_shared(&serving.image, true).unwrap();
            let mut disk = vec![0; SIZE as usize];
            crate::storage::Storage::read_bytes(&storage, 0, &mut disk).unwrap();
            prop_assert!(disk == model);
        }
    }
}
