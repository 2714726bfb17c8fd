//! Getting files from a mirror by HTTP or HTTPS.
//!
//! One [`Client`] serves all threads of a build: connections are kept and each host is looked up once, because eight threads that each
//! ask a slow resolver per request cost more than the downloads. Every wait has an end: a connection that sends nothing for
//! [`STALL_MAX`] is given up, bodies are cut at a size limit, and [`Client::stop`] breaks all transfers at once (Ctrl-C).

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

/// Longest silence of a server before a transfer is given up.
pub const STALL_MAX: Duration = Duration::from_secs(20);
/// Bytes a second that a transfer has to bring on average once it has taken so long: one that brings a little now and then would never end.
const RATE_MIN: u64 = 1000;
/// Longest name look-up.
const RESOLVE_MAX: Duration = Duration::from_secs(10);
/// Tries per file; only failures of the network are tried again.
const TRIES: u32 = 3;

/// Why a file could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server does not have it.
    #[error("{url} does not exist on this mirror (HTTP {status})")]
    Missing {
        /// What was asked for.
        url: String,
        /// HTTP status code.
        status: u16,
    },
    /// The server answered, but not with the file.
    #[error("{url}: the mirror answered HTTP {status}; try again later or give another --mirror")]
    Refused {
        /// What was asked for.
        url: String,
        /// HTTP status code.
        status: u16,
    },
    /// No connection, or it broke.
    #[error("{url}: {reason}; check the network or give another --mirror")]
    Network {
        /// What was asked for.
        url: String,
        /// What went wrong.
        reason: String,
    },
    /// The body ended early.
    #[error("{url}: the mirror sent only {got} of {expected} bytes; try again or give another --mirror")]
    Truncated {
        /// What was asked for.
        url: String,
        /// Bytes received.
        got: u64,
        /// Bytes announced by the signed index.
        expected: u64,
    },
    /// The body is larger than allowed.
    #[error("{url}: the mirror sends more than the {limit} bytes that it may have; give another --mirror")]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The local file could not be written.
    #[error("cannot write to the cache: {0}; free some space or give another cache directory")]
    Local(std::io::Error),
    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,
}

/// An HTTP client shared by all threads of one build.
#[derive(Clone, Debug)]
pub struct Client {
    agent: ureq::Agent,
    stopped: Arc<AtomicBool>,
    /// After which [`RATE_MIN`] holds.
    patience: Duration,
}

impl Client {
    /// Makes a client for up to `connections` transfers at once. Proxies come from the usual environment variables.
    pub fn new(connections: usize) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("yado/", env!("CARGO_PKG_VERSION")))
            .max_idle_connections(connections)
            .max_idle_connections_per_host(connections)
            .max_response_header_size(32 << 10)
            .max_redirects(5)
            .timeout_resolve(Some(RESOLVE_MAX))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(STALL_MAX))
            .timeout_per_read(Some(STALL_MAX))
            .timeout_per_write(Some(STALL_MAX))
            .tls_config(TlsConfig::builder().root_certs(root_certificates()).build())
            .build();
        let resolver = OnceResolver { known: Mutex::default(), stopped: Arc::clone(&stopped) };
        let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), resolver);
        Client { agent, stopped, patience: STALL_MAX }
    }

    /// Breaks every transfer, now and later.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.agent.clone().shutdown();
    }

    /// Fetches a file of unknown size into memory, at most `limit` bytes.
    pub fn get(&self, url: &str, limit: u64) -> Result<Vec<u8>, Error> {
        self.with_retries(|| {
            let mut body = Vec::new();
            self.transfer(url, limit, None, &mut body, &mut |_| ())?;
            Ok(body)
        })
    }

    /// Fetches a file of known size into `sink`; `advanced` hears the bytes of each piece.
    ///
    /// Tries once: whoever owns the sink knows how to start over.
    pub fn fetch(
        &self,
        url: &str,
        size: u64,
        sink: &mut dyn Write,
        advanced: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        self.transfer(url, size, Some(size), sink, advanced)
    }

    /// Runs `attempt` again after failures of the network, with a growing pause.
    pub fn with_retries<T>(&self, mut attempt: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        for round in 1..TRIES {
            match attempt() {
                Err(Error::Network { .. } | Error::Truncated { .. })
                    if !self.stopped.load(Ordering::SeqCst) =>
                {
                    std::thread::sleep(Duration::from_millis(u64::from(round).saturating_mul(200)));
                }
                result => return result,
            }
        }
        attempt()
    }

    fn transfer(
        &self,
        url: &str,
        limit: u64,
        expected: Option<u64>,
        sink: &mut dyn Write,
        advanced: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let network = |reason: String| {
            if self.stopped.load(Ordering::SeqCst) {
                Error::Stopped
            } else {
                Error::Network { url: url.to_owned(), reason }
            }
        };
        if self.stopped.load(Ordering::SeqCst) {
            return Err(Error::Stopped);
        }
        let response = self.agent.get(url).call().map_err(|error| network(plain(&error)))?;
        match response.status().as_u16() {
            200 => {}
            status @ (404 | 410 | 403) => return Err(Error::Missing { url: url.to_owned(), status }),
            status => return Err(Error::Refused { url: url.to_owned(), status }),
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 64 << 10];
        let (began, mut total) = (Instant::now(), 0u64);
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                // A connection that closes early is what "truncated" means when the size is known.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && expected.is_some() => {
                    break;
                }
                Err(error) => return Err(network(error.to_string())),
            };
            total = total.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
            let took = began.elapsed();
            if took > self.patience && total < took.as_secs().max(1).saturating_mul(RATE_MIN) {
                return Err(network(format!("the mirror has sent {total} bytes in {} s", took.as_secs())));
            }
            if total > limit {
                return Err(Error::TooLarge { url: url.to_owned(), limit });
            }
            sink.write_all(buffer.get(..count).unwrap_or_default()).map_err(Error::Local)?;
            advanced(u64::try_from(count).unwrap_or(u64::MAX));
        }
        if self.stopped.load(Ordering::SeqCst) {
            return Err(Error::Stopped);
        }
        match expected {
            Some(expected) if total < expected => {
                Err(Error::Truncated { url: url.to_owned(), got: total, expected })
            }
            _ => Ok(()),
        }
    }
}

/// The client library's message without its own prefixes.
fn plain(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "the mirror does not answer in time".to_owned(),
        ureq::Error::HostNotFound => "the host name is not known".to_owned(),
        ureq::Error::ConnectionFailed => "no connection".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// The host's certificate authorities if it has a bundle (private mirrors often have a private authority), else Mozilla's.
fn root_certificates() -> RootCerts {
    let bundles =
        ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
    let named = std::env::var("SSL_CERT_FILE").ok();
    let text = named.iter().map(String::as_str).chain(bundles).find_map(|path| std::fs::read(path).ok());
    let certificates: Vec<_> = ureq::tls::parse_pem(&text.unwrap_or_default())
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate.to_owned()),
            _ => None,
        })
        .collect();
    if certificates.is_empty() { RootCerts::WebPki } else { RootCerts::Specific(Arc::new(certificates)) }
}

/// Looks each host up once; the look-up runs in a thread of its own so that Ctrl-C need not wait for a dead name server.
#[derive(Debug)]
struct OnceResolver {
    known: Mutex<HashMap<String, Vec<SocketAddr>>>,
    stopped: Arc<AtomicBool>,
}

impl Resolver for OnceResolver {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().ok_or(ureq::Error::HostNotFound)?;
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let name = format!("{host}:{port}");
        // Held during the look-up on purpose: the other threads want the same answer.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match known.get(&name) {
            Some(found) => found.clone(),
            None => {
                let found = self.look_up(&name)?;
                known.insert(name, found.clone());
                found
            }
        };
        let mut addresses = self.empty();
        // The array holds sixteen; a mirror with more has enough with them.
        found.into_iter().take(16).for_each(|address| addresses.push(address));
        Ok(addresses)
    }
}

impl OnceResolver {
    fn look_up(&self, name: &str) -> Result<Vec<SocketAddr>, ureq::Error> {
        let (sender, receiver) = mpsc::channel();
        let name = name.to_owned();
        std::thread::spawn(move || {
            let _ = sender.send(name.to_socket_addrs().map(Iterator::collect::<Vec<_>>));
        });
        let step = Duration::from_millis(50);
        let mut waited = Duration::ZERO;
        while waited < RESOLVE_MAX && !self.stopped.load(Ordering::SeqCst) {
            match receiver.recv_timeout(step) {
                Ok(Ok(found)) if !found.is_empty() => return Ok(found),
                Ok(_) | Err(mpsc::RecvTimeoutError::Disconnected) => return Err(ureq::Error::HostNotFound),
                Err(mpsc::RecvTimeoutError::Timeout) => waited = waited.saturating_add(step),
            }
        }
        Err(ureq::Error::Timeout(ureq::Timeout::Resolve))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    #[test]
    fn a_mirror_that_sends_a_byte_now_and_then_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
            while stream.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let client = Client { patience: Duration::from_millis(200), ..Client::new(1) };
        let (mut body, began) = (Vec::new(), Instant::now());
        let error =
            client.fetch(&format!("http://{address}/x"), 1_000_000, &mut body, &mut |_| ()).unwrap_err();
        assert!(matches!(&error, Error::Network { reason, .. } if reason.contains("has sent")), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
