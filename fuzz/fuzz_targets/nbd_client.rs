//! An NBD server that lies, from the greeting on or only in its replies. The client must not panic or hang, and what it
//! says it has read it has.
#![no_main]

use image::nbd::{NbdStorage, Stream};
use image::storage::Storage;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use yado_fuzz::Input;

const SENT_MAX: usize = 100 << 10;

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// A handshake that succeeds, with numbers of the fuzzer's.
fn shake(input: &mut Input<'_>, mode: u8, out: &mut Vec<u8>) {
    const ACK: u32 = 1;
    const UNSUP: u32 = 1 << 31 | 1;
    out.extend(b"NBDMAGICIHAVEOPT\0\x03");
    reply(out, 11, if mode == 2 { ACK } else { UNSUP }, b"no");
    if mode < 2 {
        reply(out, 8, if mode == 1 { ACK } else { UNSUP }, b"");
    }
    if mode > 0 {
        reply(out, 10, 4, b"\0\0\0\x05base:allocation");
        reply(out, 10, ACK, b"");
    }
    let size = if input.u8() & 3 == 0 { input.number() } else { 1 << 20 };
    let flags = u16::from(input.u8()) | 1;
    let export = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(out, 7, 3, &export);
    if input.u8() & 1 == 0 {
        let sizes = [1u32 << (input.u8() & 31), 4096, input.number() as u32].map(u32::to_be_bytes);
        reply(out, 7, 3, &[&3u16.to_be_bytes()[..], &sizes.concat()].concat());
    }
    reply(out, 7, ACK, b"");
}

/// Bytes other than those that mark what was not read.
fn plain(input: &mut Input<'_>, count: usize) -> Vec<u8> {
    input.take(count).iter().map(|byte| byte & 0x7f).collect()
}

/// Replies to the requests 1, 2, 3..., with any content.
fn answer(input: &mut Input<'_>, mode: u8, out: &mut Vec<u8>) {
    let mut cookie = 1u64;
    while !input.is_empty() && out.len() < SENT_MAX {
        let (kind, shape) = (input.u8(), input.u8());
        let cookie_now = if shape & 0x40 == 0 { cookie } else { input.number() };
        if mode < 2 && (mode == 0 || kind & 7 == 7) {
            out.extend(0x6744_6698_u32.to_be_bytes());
            out.extend(if shape & 3 == 0 { u32::from(input.u8()) } else { 0 }.to_be_bytes());
            out.extend(cookie_now.to_be_bytes());
            if shape & 4 == 0 {
                out.extend([0xab; 512]);
            }
            cookie += 1;
            continue;
        }
        let (number, mut payload): (u16, Vec<u8>) = match kind & 7 {
            0 => (0, Vec::new()),
            1 => (1, [&input.number().to_be_bytes()[..], &vec![0xab; usize::from(input.u16() & 0x3ff)]].concat()),
            2 => (2, [&input.number().to_be_bytes()[..], &u32::from(input.u16()).to_be_bytes()].concat()),
            3 => (5, [&5u32.to_be_bytes()[..], &input.take(32).to_vec()].concat()),
            4 => (6, [&[0, 0, 0, 5, 0, 0, 0, 1][..], &input.number().to_be_bytes(), &input.number().to_be_bytes()].concat()),
            5 => (0x8001, [&u32::from(input.u8()).to_be_bytes()[..], &[0, 3], b"bad"].concat()),
            _ => (input.u16(), plain(input, 40)),
        };
        if shape & 0x20 != 0 {
            payload.extend(plain(input, 9));
        }
        let len = if shape & 0x10 == 0 { payload.len() as u64 } else { input.number() };
        let done = u16::from(shape & 1);
        out.extend(if mode == 2 { 0x6e8a_278c_u32 } else { 0x668e_33ef }.to_be_bytes());
        out.extend(done.to_be_bytes());
        out.extend(number.to_be_bytes());
        out.extend(cookie_now.to_be_bytes());
        if mode == 2 {
            out.extend(0u64.to_be_bytes());
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
        out.extend(payload);
        cookie += u64::from(done);
    }
}

fn play(input: &mut Input<'_>) {
    let kind = input.u8();
    let mut out = Vec::new();
    let any = kind & 0x80 != 0;
    if any {
        out.extend(b"NBDMAGICIHAVEOPT\0\x03");
        out.extend(input.take(4096));
    } else {
        shake(input, kind % 3, &mut out);
        answer(input, kind % 3, &mut out);
    }
    let (mut server, ours) = UnixStream::pair().expect("a socket");
    let mut half = server.try_clone().expect("a descriptor");
    let drain = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while matches!(half.read(&mut bytes), Ok(1..)) {}
    });
    server.write_all(&out[..out.len().min(SENT_MAX)]).expect("room in the socket");
    let _ = server.shutdown(Shutdown::Write);
    if let Ok(storage) = NbdStorage::over(Stream::from(ours), "", false) {
        let mut bytes = [0xee; 512];
        for at in [0, 512, 777] {
            if storage.read_bytes(at, &mut bytes).is_ok() {
                assert!(any || bytes.iter().all(|byte| *byte != 0xee), "bytes that were not read");
            }
            if let Ok(extent) = storage.extent(at, 4096) {
                assert!((1..=4096).contains(&extent.len));
            }
            let _ = storage.write_bytes(at, &bytes);
            let _ = storage.zero_range(at, 4096);
            let _ = storage.punch_hole(at, 4096);
            let _ = storage.flush();
        }
    }
    drop(server);
    drain.join().expect("a reader");
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| play(&mut Input(data)));
