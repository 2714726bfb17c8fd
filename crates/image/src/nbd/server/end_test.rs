//! How a server takes clients in, and how it ends.

use super::test::{Client, Reads, Scripted, Serving, export};
use super::*;
use crate::nbd::wire::{Mode, Request, command, error, option, reply};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// A disk that takes its time to zero.
fn slow() -> Scripted {
    Scripted {
        capacity: 1 << 50,
        zero: || std::thread::sleep(Duration::from_millis(5)),
        ..Scripted::default()
    }
}

#[test]
fn a_server_that_stops_does_not_zero_on_for_hours() {
    let mut serving = Serving::disks(|_| vec![export("", Arc::new(slow()))]);
    let mut client = Client::go(&serving, Mode::Extended);
    client.ask(command::WRITE_ZEROES, 0, 0, 1 << 50, &[]);
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    serving.stop();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(client.answer().0, error::ESHUTDOWN);
}

#[test]
fn a_client_that_asks_without_end_does_not_keep_a_server_from_stopping() {
    let server = Server::new(vec![export("", Arc::new(slow()))], Limits::default(), Tls::Off).unwrap();
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.address().unwrap();
    let accepting = {
        let server = server.clone();
        std::thread::spawn(move || server.accept(&listener))
    };
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let go = [&b"\0\0\0\x03IHAVEOPT"[..], &option::EXPORT_NAME.to_be_bytes(), &[0; 4]].concat();
    stream.write_all(&go).unwrap();
    let mut hears = stream.try_clone().unwrap();
    let asks = std::thread::spawn(move || {
        let request = Request { flags: 0, kind: command::READ, cookie: 7, offset: 0, len: 512 };
        let (bytes, count) = request.encode(Mode::Simple);
        while stream.write_all(&bytes[..count]).is_ok() {}
    });
    let heard = std::thread::spawn(move || while matches!(hears.read(&mut [0; 65536]), Ok(1..)) {});
    while server.statistics().requests < 100 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    accepting.join().unwrap().unwrap();
    asks.join().unwrap();
    heard.join().unwrap();
}

/// A place among the connections is for a client, not for a listener that waits for one.
#[test]
fn the_only_place_is_for_who_comes_first_wherever() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { connections_max: 1, ..Limits::default() };
    let server = Server::new(vec![export("", Arc::new(slow()))], limits, Tls::Off).unwrap();
    let places = ["a", "b"].map(|name| directory.path().join(name));
    let accepting = places.clone().map(|place| {
        let (server, listener) = (server.clone(), Listener::unix(&place).unwrap());
        std::thread::spawn(move || server.accept(&listener))
    });
    for place in [&places[1], &places[0], &places[1]] {
        let mut socket = std::os::unix::net::UnixStream::connect(place).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        // A client that were told of several connections would wait for the second one.
        let choice = [&b"\0\0\0\x03IHAVEOPT"[..], &option::EXPORT_NAME.to_be_bytes(), &[0; 4]].concat();
        socket.write_all(&choice).unwrap();
        let mut export = [0; 10];
        socket.read_exact(&mut export).unwrap();
        assert_eq!(crate::endian::be16(&export, 8) & wire::flag::CAN_MULTI_CONN, 0);
    }
    server.stop();
    for thread in accepting {
        thread.join().unwrap().unwrap();
    }
    assert!(places.iter().all(|place| !place.exists()));
}

#[test]
fn a_socket_that_somebody_else_put_there_stays() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("socket");
    let listener = Listener::unix(&place).unwrap();
    std::fs::remove_file(&place).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&place).unwrap();
    drop(listener);
    assert!(place.exists());
    // One that is listened at is not taken away either; one that nobody listens at is.
    assert!(Listener::unix(&place).is_err());
    drop(other);
    drop(Listener::unix(&place).unwrap());
    assert!(!place.exists());
}

#[test]
fn what_cannot_be_zeroed_fast_is_not_zeroed() {
    let serving = Serving::disks(|_| vec![export("", Arc::new(slow()))]);
    let mut client = Client::go(&serving, Mode::Structured);
    let error = client.error(command::WRITE_ZEROES, command::FLAG_FAST_ZERO, 0, 512, &[]);
    assert_eq!(error, error::ENOTSUP);
    assert_eq!(client.error(command::WRITE_ZEROES, 0, 0, 512, &[]), 0);
}

#[test]
fn long_names_are_refused_shortly() {
    let serving = Serving::raw(false);
    let mut client = Client::greet(&serving);
    let name = [1; wire::STRING_MAX];
    let data = [&(name.len() as u32).to_be_bytes()[..], &name, &[0, 0]].concat();
    client.option(option::INFO, &data);
    let replies = client.replies();
    assert_eq!(replies[0].0, reply::ERR_UNKNOWN);
    assert!(replies[0].1.len() <= wire::MESSAGE_MAX);
}

#[test]
fn what_must_be_waited_for_is_waited_for_though_its_beginning_was_sent() {
    const LEN: u64 = 256 << 10;
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        // Many short extents, the last of which is not in memory when it is first read.
        let read = |reads: &Reads, offset: u64, len: u64| match offset + len {
            LEN if reads.most.fetch_add(1, Ordering::SeqCst) == 0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        };
        let disk = Arc::new(Scripted { capacity: LEN, extent: 512, read, ..Scripted::default() });
        let serving = Serving::disks(|_| vec![export("", disk.clone())]);
        let mut client = Client::go(&serving, mode);
        client.ask(command::READ, 0, 0, LEN, &[]);
        let (error, chunks) = client.answer();
        assert_eq!((error, disk.reads.most.load(Ordering::SeqCst)), (0, 2), "{mode:?}");
        if mode == Mode::Simple {
            assert!(client.bytes(LEN as usize).iter().all(|byte| *byte == 0));
        } else {
            assert!(chunks.len() > 256, "{}", chunks.len());
        }
    }
}
