//! The name server that the guest sees: answers for `host.yado` and the names of other guests, passes
//! everything else to the host's resolvers.

use super::config::{HOST_NAME, Network, ZONE};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// The port of name servers.
pub const PORT: u16 = 53;
/// How often the host's resolver file is looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(5);
/// Servers that are used, as glibc does (resolv.conf(5)).
const SERVERS_MAX: usize = 3;
const HEADER_LEN: usize = 12;
/// Types of records (RFC 1035, 3.2.2; RFC 3596).
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Seconds that answers about our own names may be kept.
const TTL: u32 = 60;
/// The same of guests, which come and go.
const TTL_GUEST: u32 = 5;

/// A question that was passed on and is not answered yet.
#[derive(Debug)]
pub struct Query {
    pub message: Vec<u8>,
    /// Which server has it.
    pub server: usize,
    pub tries: u8,
    /// When another one gets it.
    pub again_at: Instant,
}

impl Query {
    /// How long a server has.
    pub const PATIENCE: Duration = Duration::from_millis(1500);
    pub const TRIES_MAX: u8 = 4;
}

/// The host's resolvers, as its file says now.
#[derive(Debug)]
pub struct Resolvers {
    path: PathBuf,
    servers: Vec<SocketAddr>,
    looked: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Resolvers {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), servers: Vec::new(), looked: None, modified: None }
    }

    fn look(&mut self, now: Instant) {
        if self.looked.is_some_and(|at| now.saturating_duration_since(at) < LOOK_PERIOD) {
            return;
        }
        self.looked = Some(now);
        let modified = std::fs::metadata(&self.path).and_then(|about| about.modified()).ok();
        if modified != self.modified || self.servers.is_empty() {
            self.modified = modified;
            match std::fs::read_to_string(&self.path) {
                Ok(text) => self.servers = servers(&text),
                // A file that was put in the place of the first may be out of this process's reach: who answered may still.
                Err(_) if !self.servers.is_empty() => {}
                Err(_) => self.servers = servers(""),
            }
        }
    }

    /// The first server.
    pub fn first(&mut self, now: Instant) -> Option<(usize, SocketAddr)> {
        self.look(now);
        self.servers.first().map(|server| (0, *server))
    }

    /// The one after `server`, which may be the same.
    pub fn after(&mut self, server: usize, now: Instant) -> Option<(usize, SocketAddr)> {
        self.look(now);
        let next = server.saturating_add(1).checked_rem(self.servers.len())?;
        self.servers.get(next).map(|server| (next, *server))
    }
}

/// The servers of a resolv.conf(5). One that says none means the host itself.
fn servers(text: &str) -> Vec<SocketAddr> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        words.next()?.parse::<IpAddr>().ok()
    });
    let found: Vec<_> = addresses.map(|ip| SocketAddr::new(ip, PORT)).take(SERVERS_MAX).collect();
    if found.is_empty() { vec![SocketAddr::from(([127, 0, 0, 1], PORT))] } else { found }
}

/// The answer to a question about our own zone, in which guests are found by `guest`; `None`: it is for somebody else.
pub fn answer(
    message: &[u8],
    network: &Network,
    guest: &mut dyn FnMut(&str) -> Option<Ipv4Addr>,
) -> Option<Vec<u8>> {
    let header = message.get(..HEADER_LEN)?;
    let [id_high, id_low, flags, _, 0, 1, ..] = *header else { return None };
    // A standard query with one question (RFC 1035, 4.1.1).
    if flags & 0xf8 != 0 {
        return None;
    }
    let (labels, end) = name(message)?;
    let (zone, names) = labels.split_last()?;
    if !zone.eq_ignore_ascii_case(ZONE.as_bytes()) {
        return None;
    }
    let question = message.get(HEADER_LEN..end.checked_add(4)?)?;
    let tail = question.get(question.len().checked_sub(4)?..)?;
    let [kind_high, kind_low, class_high, class_low] = *tail else { return None };
    let (kind, class) =
        (u16::from_be_bytes([kind_high, kind_low]), u16::from_be_bytes([class_high, class_low]));
    let host = matches!(names, [host] if host.eq_ignore_ascii_case(HOST_NAME.as_bytes()));
    let (v4, v6, ttl) = if host {
        (Some(network.gateway4), Some(network.gateway6), TTL)
    } else {
        // A guest's name may have dots in it. Guests have no addresses of IPv6 for each other.
        let name = String::from_utf8(names.join(&b'.')).ok();
        (name.and_then(|name| guest(&name)), None, TTL_GUEST)
    };
    let known = v4.is_some();
    let data = match kind {
        TYPE_A if class == CLASS_IN => v4.map(|address| address.octets().to_vec()),
        TYPE_AAAA if class == CLASS_IN => v6.map(|address| address.octets().to_vec()),
        _ => None,
    };
    // An answer with authority; a name that does not exist is an error (3), one without such data is not.
    let code = if known { 0x80 } else { 0x83 };
    let count = u8::from(data.is_some());
    let mut reply = vec![id_high, id_low, 0x84 | (flags & 1), code, 0, 1, 0, count, 0, 0, 0, 0];
    reply.extend_from_slice(question);
    if let Some(data) = data {
        // The name is the question's.
        reply.extend([0xc0, HEADER_LEN as u8]);
        reply.extend(kind.to_be_bytes());
        reply.extend(class.to_be_bytes());
        reply.extend(ttl.to_be_bytes());
        reply.extend([0, data.len() as u8]);
        reply.extend(data);
    }
    Some(reply)
}

/// The labels of a question's name, and where it ends. A question has no compressed names to speak of.
fn name(message: &[u8]) -> Option<(Vec<&[u8]>, usize)> {
    let mut at = HEADER_LEN;
    let mut labels = Vec::new();
    loop {
        let len = usize::from(*message.get(at)?);
        at = at.checked_add(1)?;
        if len == 0 {
            return Some((labels, at));
        }
        // RFC 1035, 2.3.4: a name has at most 255 bytes, a label 63.
        if len > 63 || at > HEADER_LEN.saturating_add(255) {
            return None;
        }
        let end = at.checked_add(len)?;
        labels.push(message.get(at..end)?);
        at = end;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn question(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![7, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    fn answer(message: &[u8], network: &Network) -> Option<Vec<u8>> {
        let mut guest = |name: &str| (name == "my.web").then_some(network.peer(9));
        super::answer(message, network, &mut guest)
    }

    #[test]
    fn guests_have_names() {
        let network = Network::choose("");
        let reply = answer(&question("my.web.yado", TYPE_A), &network).unwrap();
        assert_eq!((reply[3], reply[7]), (0x80, 1));
        assert!(reply.ends_with(&[0, 0, 0, 5, 0, 4, 10, 77, 1, 9]));
        let reply = answer(&question("my.web.yado", TYPE_AAAA), &network).unwrap();
        assert_eq!((reply[3], reply[7]), (0x80, 0), "it exists, but has no such address");
        assert_eq!(answer(&question("yado", TYPE_A), &network).unwrap()[3], 0x83);
    }

    #[test]
    fn the_host_has_a_name_and_others_are_asked_elsewhere() {
        let network = Network::choose("");
        let reply = answer(&question("Host.YADO", TYPE_A), &network).unwrap();
        assert_eq!(&reply[..4], [7, 8, 0x85, 0x80]);
        assert!(reply.ends_with(&network.gateway4.octets()));
        let reply = answer(&question("host.yado", TYPE_AAAA), &network).unwrap();
        assert!(reply.ends_with(&network.gateway6.octets()));
        let reply = answer(&question("host.yado", 15), &network).unwrap();
        assert_eq!((reply[3], reply[7]), (0x80, 0), "it exists, but has no such record");
        assert_eq!(answer(&question("nobody.yado", TYPE_A), &network).unwrap()[3], 0x83);
        assert_eq!(answer(&question("a.example", TYPE_A), &network), None);
        assert_eq!(answer(&question("yado.example", TYPE_A), &network), None);
    }

    #[test]
    fn the_hosts_file_names_the_servers() {
        let text = "# nameserver 9.9.9.9\nsearch example\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\n\
                    nameserver ::1\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n";
        let found: Vec<String> = servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:53", "[::1]:53", "10.0.0.3:53"]);
        assert_eq!(servers(""), [SocketAddr::from(([127, 0, 0, 1], 53))]);
    }

    proptest! {
        #[test]
        fn no_message_harms(message in prop::collection::vec(any::<u8>(), 0..100), whole: bool) {
            let mut bytes = question("host.yado", TYPE_A);
            if whole {
                bytes.extend(&message);
                message.iter().enumerate().for_each(|(at, byte)| bytes[at % 29] ^= byte & 1);
                answer(&bytes, &Network::choose(""));
            } else {
                answer(&message, &Network::choose(""));
            }
        }
    }
}
