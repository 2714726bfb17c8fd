//! How a server takes clients in, and how it ends.

use super::test::{Client, Serving, export};
use super::*;
use crate::buffers::Buffers;
use crate::disk::{Content, Disk, Status};
use crate::nbd::wire::{Mode, Request, command, error, option, reply};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// A disk that takes its time to zero.
struct Slow;

impl Disk for Slow {
    fn capacity(&self) -> u64 {
        1 << 50
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, _: u64, buffers: &dyn Buffers) -> io::Result<()> {
        buffers.put(0, &vec![7; buffers.len() as usize])
    }
    fn write(&self, _: u64, _: &dyn Buffers) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        std::thread::sleep(Duration::from_millis(5));
        Ok(())
    }
    fn block_status(&self, _: u64, len: u64) -> io::Result<Status> {
        Ok(Status { len, content: Content::Data, depth: 0, present: true, offset: None, compressed: false })
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn snapshot(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_server_that_stops_does_not_zero_on_for_hours() {
    let mut serving = Serving::disks(|_| vec![export("", Arc::new(Slow))]);
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
    let server = Server::new(vec![export("", Arc::new(Slow))], Limits::default(), Tls::Off).unwrap();
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
    let server = Server::new(vec![export("", Arc::new(Slow))], limits, Tls::Off).unwrap();
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
    let serving = Serving::disks(|_| vec![export("", Arc::new(Slow))]);
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
