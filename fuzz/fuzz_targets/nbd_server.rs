//! A hostile NBD client: any bytes, or options and requests in good order with any content. The server must not panic,
//! hang, or answer anything that is no reply; what it answers are whole replies to what was asked.
#![no_main]

use image::nbd::{Export, Limits, Server, Stream, Tls};
use image::{Buffers, Content, Disk, Status};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use yado_fuzz::Input;

const SIZE: usize = 300 << 10;
/// Bytes that fit in a socket before anybody reads them.
const SENT_MAX: usize = 100 << 10;

/// A disk in memory; every eighth page fails.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with<T>(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        assert!(offset + len <= SIZE as u64, "a request left the disk");
        if offset >> 12 & 7 == 7 {
            return Err(io::Error::other("a bad page"));
        }
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(f(&mut bytes[offset as usize..(offset + len) as usize]))
    }
}

impl Disk for Memory {
    fn capacity(&self) -> u64 {
        SIZE as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.with(offset, buffers.len(), |bytes| buffers.put(0, bytes))?
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.with(offset, buffers.len(), |bytes| buffers.get(0, bytes))?
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.with(offset, len, |bytes| bytes.fill(0))
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        let (page, within) = (offset >> 13, 8192 - (offset & 8191));
        let content = if page & 1 == 0 { Content::Data } else { Content::Zero };
        Ok(Status {
            len: within.min(len),
            content,
            depth: (page & 3) as u32,
            present: page & 4 == 0,
            offset: None,
            compressed: false,
        })
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn snapshot(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
}

fn server() -> Server {
    let disk = Arc::new(Memory(Mutex::new(vec![7; SIZE])));
    let export = |name: &str, read_only| Export {
        name: name.into(),
        description: "fuzz".into(),
        disk: disk.clone(),
        read_only,
    };
    Server::new(vec![export("", false), export("b", true)], Limits::default(), Tls::Off).expect("a server")
}

thread_local! {
    static SERVER: RefCell<Server> = RefCell::new(server());
}

fn option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend(b"IHAVEOPT");
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

fn counted(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

/// Options with any content.
fn haggle(input: &mut Input<'_>, out: &mut Vec<u8>) {
    for _ in 0..input.u8() & 7 {
        let number = u32::from(input.u8() % 14);
        let len = usize::from(input.u8() & 63);
        let mut data: Vec<u8> = (0..len).map(|_| input.u8()).collect();
        if matches!(number, 9 | 10) && len > 20 {
            let queries = [counted(b"base:allocation"), counted(&data[..9])].concat();
            data = [&counted(b"")[..], &2u32.to_be_bytes(), &queries].concat();
        }
        // The ones that end the handshake come later.
        if !matches!(number, 1 | 2 | 7) {
            option(out, number, &data);
        }
    }
}

/// How the session is opened: the bytes, and the length of a request's header.
fn open(kind: u8, out: &mut Vec<u8>) -> usize {
    let mode = kind % 3;
    if mode > 0 {
        option(out, if mode == 1 { 8 } else { 11 }, &[]);
        let queries = [counted(b"base:allocation"), counted(b"qemu:allocation-depth")].concat();
        option(out, 10, &[&counted(b"")[..], &2u32.to_be_bytes(), &queries].concat());
    }
    option(out, 7, &[&counted(if kind & 4 == 0 { b"" } else { b"b" })[..], &[0, 1, 0, 3]].concat());
    if mode == 2 { 32 } else { 28 }
}

/// Requests; answers how many of each cookie there are.
fn requests(input: &mut Input<'_>, wide: bool, out: &mut Vec<u8>) -> HashMap<u64, u32> {
    let mut asked = HashMap::new();
    while !input.is_empty() && out.len() < SENT_MAX {
        let (kind, flags, shape) = (input.u8(), input.u8(), input.u8());
        let cookie = u64::from(input.u8());
        let offset = if shape & 1 == 0 { u64::from(input.u16()) << 3 } else { input.number() };
        let len = if shape & 2 == 0 { u64::from(input.u16()) } else { input.number() };
        let payload = shape & 4 != 0;
        let len = if payload { len & 0x1fff } else { len };
        out.extend(if wide { 0x21e4_1c71_u32 } else { 0x2560_9513 }.to_be_bytes());
        out.extend(u16::from(flags & 0x3f).to_be_bytes());
        out.extend(u16::from(if kind < 200 { kind % 9 } else { kind }).to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        if wide {
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
        if payload {
            out.extend((0..len).map(|at| at as u8));
        }
        *asked.entry(cookie).or_insert(0) += 1;
    }
    asked
}

/// Whether bytes after the last option's reply are whole replies to what was asked.
fn check(mut rest: &[u8], wide: bool, asked: &mut HashMap<u64, u32>) {
    let be = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let mut answered = |cookie: u64| {
        let left = asked.get_mut(&cookie).expect("a reply to nothing");
        *left = left.checked_sub(1).expect("two replies to one request");
    };
    while !rest.is_empty() {
        let magic = be(&rest[..4]);
        let (head, len, done) = match magic {
            0x6744_6698 if !wide => (16, 0, true),
            0x668e_33ef if !wide => (20, be(&rest[16..20]), rest[5] & 1 != 0),
            0x6e8a_278c if wide => (32, be(&rest[24..32]), rest[5] & 1 != 0),
            other => panic!("{other:#x} begins no reply"),
        };
        if done {
            answered(be(&rest[8..16]));
        }
        rest = &rest[head + len as usize..];
    }
}

fn play(server: &Server, input: &mut Input<'_>) {
    let kind = input.u8();
    let mut out = 3u32.to_be_bytes().to_vec();
    let mut session = None;
    if kind & 0x80 != 0 {
        while !input.is_empty() {
            out.push(input.u8());
        }
    } else {
        if kind & 0x40 != 0 {
            haggle(input, &mut out);
        }
        let wide = open(kind, &mut out) == 32;
        // Only here it is known which replies there must be: simple ones of reads cannot be told apart without asking back,
        // and what was haggled for may have changed the kind of replies.
        let known = kind % 3 > 0 && kind & 0x40 == 0;
        let asked = requests(input, wide, &mut out);
        session = known.then_some((wide, asked));
    }
    let (mut client, ours) = UnixStream::pair().expect("a socket");
    let mut half = client.try_clone().expect("a descriptor");
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = half.read_to_end(&mut bytes);
        bytes
    });
    client.write_all(&out[..out.len().min(SENT_MAX)]).expect("room in the socket");
    let whole = out.len() <= SENT_MAX;
    let _ = client.shutdown(Shutdown::Write);
    let _ = server.serve(Stream::from(ours));
    drop(client);
    let bytes = reader.join().expect("a reader");
    if let Some((wide, mut asked)) = session.filter(|_| whole) {
        // The last reply of the handshake is the acknowledgement of GO.
        let ack = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &[0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0]].concat();
        let at = bytes.windows(ack.len()).position(|window| window == ack).expect("the session was opened");
        check(&bytes[at + ack.len()..], wide, &mut asked);
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    SERVER.with_borrow(|server| play(server, &mut Input(data)));
});
