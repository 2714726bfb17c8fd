//! `yado stats --prometheus --listen WHERE`: the counters of all guests at `/metrics`, over HTTP (RFC 9112), for as long as it runs.
//!
//! One connection carries one request. Each has a thread, and there are few; who does not ask in time, or asks for more than a head of
//! some kilobytes, is gone. Nothing that a client sends changes anything.

use anyhow::Context;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Clients at once; others are told to come again.
const CLIENTS_MAX: usize = 16;
/// Bytes of a request's head.
const HEAD_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;
/// How long a client may take to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Where {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Where {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| format!("{text:?}: write 127.0.0.1:9177, [::1]:9177 or unix:PATH")),
        }
    }
}

/// A connection of either kind.
trait Client: Read + Write + Send {
    fn patience(&self, time: Duration) -> io::Result<()>;
}

macro_rules! client {
    ($($kind:ty),*) => { $(
        impl Client for $kind {
            fn patience(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time))?;
                self.set_write_timeout(Some(time))
            }
        }
    )* };
}

client!(std::net::TcpStream, UnixStream);

/// Answers with what `text` says, until the process ends.
pub fn serve(
    place: &Where,
    text: impl Fn() -> anyhow::Result<String> + Send + Sync + 'static,
) -> anyhow::Result<()> {
    let service = Arc::new(Service { text, clients: AtomicUsize::new(0) });
    match place {
        Where::Tcp(address) => {
            let listener =
                TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
            eprintln!("yado: metrics at http://{}/metrics", listener.local_addr()?);
            service.each(|| listener.accept().map(|(stream, _)| stream))
        }
        Where::Unix(path) => {
            let listener = at_path(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            eprintln!("yado: metrics at {} (/metrics)", path.display());
            service.each(|| listener.accept().map(|(stream, _)| stream))
        }
    }
}

/// For this user only. A socket at which nobody listens any more makes room.
fn at_path(path: &Path) -> io::Result<UnixListener> {
    let listener = image::nbd::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct Service<T> {
    text: T,
    clients: AtomicUsize,
}

impl<T: Fn() -> anyhow::Result<String> + Send + Sync + 'static> Service<T> {
    fn each<C: Client + 'static>(self: Arc<Self>, accept: impl Fn() -> io::Result<C>) -> anyhow::Result<()> {
        loop {
            let Ok(mut client) = accept() else {
                // No descriptor is free: some come back.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let (service, all) = (self.clone(), self.clone());
            let many = self.clients.fetch_add(1, Ordering::SeqCst) >= CLIENTS_MAX;
            let mut answer = move || {
                // A client that leaves early is none of our affair.
                let _ = if many { refuse(&mut client) } else { service.answer(&mut client) };
                service.clients.fetch_sub(1, Ordering::SeqCst);
            };
            if many {
                answer();
            } else if std::thread::Builder::new().name("client".into()).spawn(answer).is_err() {
                // The host has no thread to spare now: this client is dropped, others come.
                all.clients.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn answer(&self, client: &mut impl Client) -> io::Result<()> {
        let Some(asked) = asked(&head(client)?) else { return Ok(()) };
        match asked {
            Asked::Metrics { body } => match (self.text)() {
                Ok(text) => reply(client, "200 OK", METRICS, &text, body),
                Err(error) => reply(client, "500 Internal Server Error", PLAIN, &format!("{error}\n"), body),
            },
            Asked::Other(status) => {
                reply(client, status, PLAIN, &format!("{status}; there is /metrics\n"), true)
            }
        }
    }
}

const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

fn refuse(client: &mut impl Client) -> io::Result<()> {
    reply(client, "503 Service Unavailable", PLAIN, "too many clients at once\n", true)
}

fn reply(client: &mut impl Client, status: &str, kind: &str, text: &str, body: bool) -> io::Result<()> {
    let length = text.len();
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}Connection: close\r\n\r\n"
    );
    let until = Instant::now() + PATIENCE;
    let mut left = [head.as_bytes(), if body { text.as_bytes() } else { b"" }].concat();
    while !left.is_empty() {
        // Who takes a byte now and then takes up one of few places.
        let time = until.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        client.patience(time)?;
        match client.write(&left) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => drop(left.drain(..count.min(left.len()))),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    client.flush()
}

/// What somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Metrics {
        body: bool,
    },
    /// An answer that is only a status.
    Other(&'static str),
}

/// Reads to the end of a request's head, or to what can be none.
fn head(client: &mut impl Client) -> io::Result<Vec<u8>> {
    let until = Instant::now() + PATIENCE;
    let (mut head, mut part) = (Vec::new(), [0; 1024]);
    while asked(&head).is_none() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        client.patience(left)?;
        match client.read(&mut part) {
            Ok(0) => break,
            Ok(count) => head.extend_from_slice(part.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}

/// What a head asks for; `None` if it has no end yet.
fn asked(head: &[u8]) -> Option<Asked> {
    const BAD: Asked = Asked::Other("400 Bad Request");
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) if head.len() < HEAD_MAX => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Some(Asked::Other("431 Request Header Fields Too Large"));
        }
        Err(_) => return Some(BAD),
    }
    let (Some(method), Some(target)) = (request.method, request.path) else { return Some(BAD) };
    let path = target.split(['?', '#']).next();
    Some(match (method, path) {
        ("GET" | "HEAD", Some("/metrics")) => Asked::Metrics { body: method == "GET" },
        ("GET" | "HEAD", _) => Asked::Other("404 Not Found"),
        _ => Asked::Other("405 Method Not Allowed"),
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn places_are_read() {
        assert_eq!("unix:/run/m".parse(), Ok(Where::Unix("/run/m".into())));
        assert_eq!("[::1]:1".parse(), Ok(Where::Tcp("[::1]:1".parse().unwrap())));
        for text in ["unix:", "9177", "localhost:1", ""] {
            assert!(text.parse::<Where>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_whole_requests_for_metrics_get_them() {
        let metrics = |body| Some(Asked::Metrics { body });
        assert_eq!(asked(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), metrics(true));
        assert_eq!(asked(b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n"), metrics(false));
        for part in [&b""[..], b"GET /me", b"GET /metrics HTTP/1.1\r\nHost: a\r\n"] {
            assert_eq!(asked(part), None);
        }
        let status = |head: &[u8]| match asked(head) {
            Some(Asked::Other(status)) => status[..3].to_owned(),
            other => panic!("{other:?}"),
        };
        assert_eq!(status(b"GET /metrics/ HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(status(b"\x16\x03\x01"), "400", "TLS");
        assert_eq!(status(&[b"GET /".as_slice(), &[b'a'; HEAD_MAX]].concat()), "431");
        let many = b"a: b\r\n".repeat(HEADERS_MAX + 1);
        assert_eq!(status(&[b"GET / HTTP/1.1\r\n".as_slice(), &many, b"\r\n"].concat()), "431");
    }

    /// A service on a socket, and what it answers to these bytes.
    fn answer(path: &Path, bytes: &[u8]) -> String {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(bytes).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        said
    }

    #[test]
    fn a_socket_that_nobody_serves_makes_room_and_the_new_one_answers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics");
        drop(UnixListener::bind(&path).unwrap());
        let place = Where::Unix(path.clone());
        std::thread::spawn(move || serve(&place, || Ok("a 1\n".to_owned())));
        let until = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(&path).is_err() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let whole = answer(&path, b"GET /metrics HTTP/1.1\r\n\r\n");
        assert!(whole.starts_with("HTTP/1.1 200 OK\r\n") && whole.ends_with("\r\n\r\na 1\n"), "{whole}");
        let head = answer(&path, b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 4\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        // Those who say nothing hold up nobody, until there are too many.
        let silent: Vec<_> = (0..CLIENTS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(answer(&path, b"").starts_with("HTTP/1.1 503 "));
        drop(silent);
        assert!(at_path(&path).is_err(), "a socket that is served stays");
        let notes = directory.path().join("notes.txt");
        fs::write(&notes, "mine").unwrap();
        assert!(at_path(&notes).is_err());
        assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
    }
}
