//! A switch's process: one thread that waits for kicks, messages and questions, and turns the [`Switch`].
//!
//! While frames come it polls; a port that was silent for a while is asked to say when it has frames again, and when all ports are
//! silent the process sleeps.

use super::capture::Capture;
use super::control::{LINE_MAX, PortKind, Reply, Request};
use super::forward::Switch;
use super::port::{Link, PortSpec};
use super::table::PortNumber;
use super::uplink::Uplink;
use super::watchdog::Watchdog;
use crate::tap::Tap;
use crate::vhost::{Backend, RingError};
use crate::vxlan::Vxlan;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Questions at a time.
const CONNECTIONS_MAX: usize = 256;
/// Turns between looks at what the kernel has to say, while there is work.
const TURNS_MAX: u32 = 64;
/// The longest name of a port, or a group.
const NAME_MAX: usize = 64;

/// What a switch is.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where its control socket is.
    pub control: PathBuf,
    /// Where the sockets of its ports are.
    pub ports: PathBuf,
    /// How long a port that is silent is still looked at.
    pub spin: Duration,
    /// Addresses that it learns.
    pub addresses_max: usize,
    /// Seconds after which it forgets one.
    pub ageing_seconds: u32,
}

/// Why a switch cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket cannot be made.
    #[error("cannot listen at {}: {source}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The host has no event queue.
    #[error("cannot wait for events: {0}")]
    Events(io::Error),
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Control,
    Connection(u32),
    Listener(PortNumber),
    Messages(PortNumber),
    Kick(PortNumber),
}

impl Token {
    fn encode(self) -> EventData {
        let (kind, value) = match self {
            Self::Control => (0, 0),
            Self::Connection(number) => (1, number),
            Self::Listener(port) => (2, port.into()),
            Self::Messages(port) => (3, port.into()),
            Self::Kick(port) => (4, port.into()),
        };
        EventData::new_u64(kind << 32 | u64::from(value))
    }

    fn decode(data: EventData) -> Option<Self> {
        let (kind, value) = (data.u64() >> 32, data.u64() as u32);
        Some(match kind {
            0 => Self::Control,
            1 => Self::Connection(value),
            2 => Self::Listener(value as PortNumber),
            3 => Self::Messages(value as PortNumber),
            4 => Self::Kick(value as PortNumber),
            _ => return None,
        })
    }
}

/// Somebody who asks.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    line: Vec<u8>,
    /// What it has not taken yet, from byte `taken` on. Until it has, nothing else is heard from it.
    out: Vec<u8>,
    taken: usize,
    /// It gets a capture.
    captures: bool,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new(), out: Vec::new(), taken: 0, captures: false }
    }

    /// Sends as much as it takes now; answers whether it has taken all.
    fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.out.get(self.taken..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.taken = self.taken.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.taken = 0;
        Ok(true)
    }
}

/// What the process knows of a port.
#[derive(Debug, Default)]
struct Place {
    listener: Option<(UnixListener, PathBuf)>,
    /// It goes with its connection.
    temporary: bool,
    /// Events that are waited for, with the versions of the rings that they are of.
    kicks: HashMap<usize, (u32, Arc<OwnedFd>)>,
    /// Who was here has made the switch wait: nobody is let in before the port is set again.
    banned: bool,
}

/// The process.
#[derive(Debug)]
pub struct Server {
    config: Config,
    listener: UnixListener,
    poll: OwnedFd,
    switch: Switch,
    places: HashMap<PortNumber, Place>,
    connections: HashMap<u32, Connection>,
    /// Who reads the capture at the same place of the switch's list.
    readers: Vec<u32>,
    next_connection: u32,
    began: Instant,
    /// Somebody could not be let in for want of files.
    accept_again: bool,
    stopping: bool,
    notes: Vec<String>,
}

fn listen(path: &Path) -> Result<UnixListener, Error> {
    let error = |source| Error::Listen { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    listener.set_nonblocking(true).map_err(error)?;
    Ok(listener)
}

fn check_name(what: &str, name: &str) -> Result<(), String> {
    let sound = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(sound) || name.starts_with('.') {
        return Err(format!(
            "{name:?} is no name of a {what}: up to {NAME_MAX} letters, digits, '-', '_' and '.'"
        ));
    }
    Ok(())
}

impl Server {
    /// Listens; nothing is served before [`Self::run`].
    pub fn new(config: Config) -> Result<Self, Error> {
        // Each guest is half a dozen files.
        crate::sys::raise_files_max();
        let listener = listen(&config.control)?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| Error::Events(error.into()))?;
        epoll::add(&poll, &listener, Token::Control.encode(), EventFlags::IN | EventFlags::ET)
            .map_err(|error| Error::Events(error.into()))?;
        Ok(Self {
            switch: Switch::new(config.addresses_max, config.ageing_seconds),
            config,
            listener,
            poll,
            places: HashMap::new(),
            connections: HashMap::new(),
            readers: Vec::new(),
            next_connection: 0,
            began: Instant::now(),
            accept_again: false,
            stopping: false,
            notes: Vec::new(),
        })
    }

    fn clock(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Serves until it is asked to stop. `note` hears what people should know.
    pub fn run(mut self, note: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let spin = u64::try_from(self.config.spin.as_nanos()).unwrap_or(u64::MAX);
        let mut events = Vec::with_capacity(256);
        let mut turns = 0u32;
        let mut watchdog = Watchdog::new().map_err(Error::Events)?;
        while !self.stopping {
            watchdog.turn();
            let now = self.clock();
            self.switch.turn(now, spin);
            if !self.switch.broken.is_empty() {
                self.note_broken();
            }
            self.notes.drain(..).for_each(|line| note(&line));
            turns = turns.wrapping_add(1);
            if self.switch.busy() && !turns.is_multiple_of(TURNS_MAX) {
                continue;
            }
            self.feed_captures();
            let wait = if self.switch.busy() {
                Some(0)
            } else {
                self.switch.next_at().map(|at| at.saturating_sub(self.clock()))
            };
            let wait = wait.map(|wait| Timespec {
                tv_sec: i64::try_from(wait / 1_000_000_000).unwrap_or(i64::MAX),
                tv_nsec: i64::try_from(wait % 1_000_000_000).unwrap_or(0),
            });
            events.clear();
            watchdog.sleep();
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Events(error.into())),
            }
            watchdog.turn();
            for event in &events {
                let epoll::Event { data, flags } = *event;
                if let Some(token) = Token::decode(data) {
                    self.event(token, flags);
                }
            }
            if std::mem::take(&mut self.accept_again) {
                self.accept();
                let ports: Vec<PortNumber> = self.places.keys().copied().collect();
                ports.into_iter().for_each(|port| self.front_end(port));
            }
        }
        self.notes.drain(..).for_each(|line| note(&line));
        Ok(())
    }

    fn note_broken(&mut self) {
        for (number, why) in std::mem::take(&mut self.switch.broken) {
            let name = self.switch.port(number).map_or("", |port| port.name.as_str());
            let note = format!("port {name}: {why}; its driver has to start again");
            if why == RingError::Call {
                self.ban(number);
            } else {
                self.notes.push(note);
            }
        }
    }

    /// A front end has made the switch wait, which it does to all: it goes, and nobody comes in its place before the port is set again.
    fn ban(&mut self, number: PortNumber) {
        if let Some(place) = self.places.get_mut(&number) {
            place.banned = true;
        }
        self.disconnect(number, "it makes others wait");
    }

    fn event(&mut self, token: Token, flags: EventFlags) {
        match token {
            Token::Control => self.accept(),
            Token::Connection(number) => self.question(number, flags),
            Token::Listener(port) => self.front_end(port),
            Token::Messages(port) => self.messages(port),
            Token::Kick(port) => self.switch.waken(port),
        }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => return self.refused(&error),
            };
            let number = self.next_connection;
            self.next_connection = number.wrapping_add(1);
            if self.connections.len() >= CONNECTIONS_MAX || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let token = Token::Connection(number).encode();
            if epoll::add(&self.poll, &stream, token, EventFlags::IN | EventFlags::RDHUP).is_ok() {
                self.connections.insert(number, Connection::new(stream));
            }
        }
    }

    /// Nobody was let in. Where files are wanting it is tried again when something else has happened.
    fn refused(&mut self, error: &io::Error) {
        let wanting = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
        self.accept_again |= wanting.contains(&error.raw_os_error());
    }

    /// Reads a question, and answers it when it is whole.
    fn question(&mut self, number: u32, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if !connection.out.is_empty() {
            return if self.flush(number).is_none() {
                self.close(number)
            };
        }
        let mut bytes = [0; 4096];
        // What follows the line belongs to the port's front end, so it is looked at before it is taken.
        let peeked = rustix::net::recv(
            &connection.stream,
            &mut bytes,
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
        );
        let count = match peeked {
            Ok((_, 0)) => return self.close(number),
            Ok((_, count)) => count.min(bytes.len()),
            Err(Errno::AGAIN | Errno::INTR) if !flags.intersects(EventFlags::HUP | EventFlags::ERR) => return,
            Err(_) => return self.close(number),
        };
        let seen = bytes.get(..count).unwrap_or_default();
        let end = seen.iter().position(|byte| *byte == b'\n');
        let take = end.map_or(count, |end| end.saturating_add(1));
        let Some(room) = bytes.get_mut(..take) else { return };
        if connection.stream.read_exact(room).is_err() || connection.captures {
            return self.close(number);
        }
        connection.line.extend_from_slice(room);
        if connection.line.len() > LINE_MAX {
            return self.close(number);
        }
        if end.is_some() {
            let line = std::mem::take(&mut connection.line);
            self.answer(number, &line);
        }
    }

    fn close(&mut self, number: u32) {
        let Some(connection) = self.connections.remove(&number) else { return };
        let _ = epoll::delete(&self.poll, &connection.stream);
        if let Some(place) = self.readers.iter().position(|reader| *reader == number) {
            self.readers.remove(place);
            let captures = self.switch.captures();
            if place < captures.len() {
                captures.remove(place);
            }
            self.switch.mark_captured();
        }
    }

    fn answer(&mut self, number: u32, line: &[u8]) {
        let result = match serde_json::from_slice::<Request>(line) {
            Ok(request) => self.perform(number, request),
            Err(error) => Err(format!("a question that is none: {error}")),
        };
        let done = match result {
            // The connection is a port's now, and was told so.
            Ok(None) => return,
            Ok(Some(value)) => self.reply(number, &Reply::Ok(value)),
            Err(why) => self.reply(number, &Reply::Error(why)),
        };
        if done.is_none() {
            self.close(number);
        }
    }

    fn reply(&mut self, number: u32, reply: &Reply) -> Option<()> {
        let connection = self.connections.get_mut(&number)?;
        serde_json::to_writer(&mut connection.out, reply).ok()?;
        connection.out.push(b'\n');
        self.flush(number)
    }

    /// Sends what somebody waits for as far as it is taken now, and listens to him again when all of it was.
    fn flush(&mut self, number: u32) -> Option<()> {
        let connection = self.connections.get_mut(&number)?;
        let done = connection.flush().ok()?;
        let flags = if done { EventFlags::IN | EventFlags::RDHUP } else { EventFlags::OUT };
        epoll::modify(&self.poll, &connection.stream, Token::Connection(number).encode(), flags).ok()
    }

    fn perform(&mut self, connection: u32, request: Request) -> Result<Option<Value>, String> {
        match request {
            Request::Inspect => {
                let mut tree = self.switch.inspect();
                if let (Some(tree), Ok(now)) =
                    (tree.as_object_mut(), SystemTime::now().duration_since(UNIX_EPOCH))
                {
                    tree.insert("pid".into(), std::process::id().into());
                    tree.insert("time_ns".into(), u64::try_from(now.as_nanos()).unwrap_or(0).into());
                }
                Ok(Some(tree))
            }
            Request::Addresses => Ok(Some(self.addresses())),
            Request::Multicast => Ok(Some(self.switch.inspect_multicast())),
            Request::AddPort { name, spec, kind } => self.add(&name, spec, kind).map(Some),
            Request::Attach { name, spec } => self.attach(connection, &name, spec).map(|()| None),
            Request::SetPort { name, spec } => {
                let port = self.find(&name)?;
                self.check(&name, &spec)?;
                self.switch.set(port, spec);
                if let Some(place) = self.places.get_mut(&port) {
                    place.banned = false;
                }
                Ok(Some(Value::Null))
            }
            Request::RemovePort { name } => {
                let port = self.find(&name)?;
                self.remove(port);
                Ok(Some(Value::Null))
            }
            Request::SetGroup { name, spec } => {
                if let Some(name) = &name {
                    check_name("group", name)?;
                }
                self.switch.set_group(name.as_deref(), spec).map(|()| Some(Value::Null))
            }
            Request::RemoveGroup { name } => self.switch.remove_group(&name).map(|()| Some(Value::Null)),
            Request::Capture { ports, snap } => self.capture(connection, &ports, snap).map(|()| None),
            Request::Stop => {
                self.stopping = true;
                Ok(Some(Value::Null))
            }
        }
    }

    fn addresses(&self) -> Value {
        let name = |number| self.switch.port(number).map_or("", |port| port.name.as_str());
        let entries = self.switch.addresses().map(|entry| {
            let mac = super::port::Mac(entry.key.address()).to_string();
            json!({ "address": mac, "vlan": entry.key.vlan(), "port": name(entry.port), "fixed": entry.fixed() })
        });
        Value::Array(entries.collect())
    }

    fn find(&self, name: &str) -> Result<PortNumber, String> {
        let found = self.switch.ports().find(|port| port.name == name);
        found.map(|port| port.number).ok_or_else(|| format!("there is no port {name}"))
    }

    /// Whether a port may be so. An address belongs to one port of a VLAN.
    fn check(&self, name: &str, spec: &PortSpec) -> Result<(), String> {
        if spec.priority > 7 {
            return Err(format!("priority {}: 0 to 7", spec.priority));
        }
        if let Some(group) = spec.group.as_deref().filter(|group| self.switch.group(Some(group)).is_none()) {
            return Err(format!("there is no group {group}: `yado switch limit` makes it"));
        }
        let others = self.switch.ports().filter(|port| port.name != name && port.spec.vlans == spec.vlans);
        for port in others {
            if let Some(mac) = spec.macs.iter().find(|mac| port.spec.macs.contains(mac)) {
                return Err(format!("{mac} is the address of the port {}", port.name));
            }
        }
        Ok(())
    }

    fn new_port(&mut self, name: &str, spec: PortSpec) -> Result<PortNumber, String> {
        check_name("port", name)?;
        if self.find(name).is_ok() {
            return Err(format!("there is a port {name} already"));
        }
        self.check(name, &spec)?;
        self.switch.add(name, spec).ok_or_else(|| format!("all {} ports are taken", super::PORTS_MAX))
    }

    fn add_uplink(&mut self, name: &str, spec: PortSpec, uplink: Uplink) -> Result<(), String> {
        let port = self.new_port(name, spec)?;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        let watched = epoll::add(&self.poll, &uplink, Token::Kick(port).encode(), flags);
        if let Some(port) = self.switch.port_mut(port) {
            port.link = Link::Uplink(uplink);
        }
        self.places.insert(port, Place::default());
        watched.map_err(|error| error.to_string())?;
        self.switch.waken(port);
        Ok(())
    }

    fn add(&mut self, name: &str, spec: PortSpec, kind: PortKind) -> Result<Value, String> {
        match kind {
            PortKind::Tap(interface) => {
                let tap = Tap::open(&interface).map_err(|error| error.to_string())?;
                self.add_uplink(name, spec, Uplink::Tap(tap))?;
                Ok(json!({ "interface": interface }))
            }
            PortKind::Vxlan(config) => {
                let tunnel = Vxlan::open(&config).map_err(|error| error.to_string())?;
                let local = tunnel.local();
                self.add_uplink(name, spec, Uplink::Vxlan(tunnel))?;
                Ok(json!({ "local": local, "remote": config.remote, "vni": config.vni }))
            }
            PortKind::Socket => {
                let port = self.new_port(name, spec)?;
                let path = self.config.ports.join(format!("{name}.sock"));
                match listen(&path).map_err(|error| error.to_string()).and_then(|listener| {
                    let flags = EventFlags::IN | EventFlags::ET;
                    epoll::add(&self.poll, &listener, Token::Listener(port).encode(), flags)
                        .map_err(|error| error.to_string())?;
                    Ok(listener)
                }) {
                    Ok(listener) => {
                        let answer = json!({ "socket": path });
                        self.places
                            .insert(port, Place { listener: Some((listener, path)), ..Place::default() });
                        Ok(answer)
                    }
                    Err(why) => {
                        self.switch.remove(port);
                        Err(why)
                    }
                }
            }
        }
    }

    /// The connection becomes the port's.
    fn attach(&mut self, number: u32, name: &str, spec: PortSpec) -> Result<(), String> {
        let port = self.new_port(name, spec)?;
        self.places.insert(port, Place { temporary: true, ..Place::default() });
        let told = self.reply(number, &Reply::Ok(Value::Null));
        // What follows the answer is not ours to send.
        if told.is_none() || self.connections.get(&number).is_none_or(|connection| !connection.out.is_empty())
        {
            self.remove(port);
            self.close(number);
            return Ok(());
        }
        if let Some(connection) = self.connections.remove(&number) {
            let _ = epoll::delete(&self.poll, &connection.stream);
            self.connect(port, connection.stream);
        }
        Ok(())
    }

    fn connect(&mut self, number: PortNumber, stream: UnixStream) {
        if epoll::add(&self.poll, &stream, Token::Messages(number).encode(), EventFlags::IN).is_err() {
            return self.disconnect(number, "no event queue");
        }
        if let Some(port) = self.switch.port_mut(number) {
            port.link = Link::Guest(Box::new(Backend::new(stream)));
        }
        // What came with the connection.
        self.messages(number);
    }

    fn front_end(&mut self, number: PortNumber) {
        loop {
            let Some(place) = self.places.get(&number) else { return };
            let (Some((listener, _)), banned) = (&place.listener, place.banned) else { return };
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => return self.refused(&error),
            };
            let free = self.switch.port(number).is_some_and(|port| matches!(port.link, Link::Nothing));
            // One at a time: who comes second is sent away.
            if free && !banned && stream.set_nonblocking(true).is_ok() {
                self.connect(number, stream);
            }
        }
    }

    /// A front end has something to say.
    fn messages(&mut self, number: PortNumber) {
        let Some(Link::Guest(backend)) = self.switch.port_mut(number).map(|port| &mut port.link) else {
            return;
        };
        let lost = backend.memory().lost();
        match backend.serve() {
            Ok(_) if lost => self.disconnect(number, "its memory was taken away"),
            Ok(change) => {
                if change.rings
                    && let Err(why) = self.watch_rings(number)
                {
                    let why = format!("its events cannot be waited for ({why})");
                    return self.disconnect(number, &why);
                }
                if let Some(address) = change.announce {
                    self.switch.announce(number, address);
                }
                self.switch.waken(number);
            }
            Err(crate::vhost::Error::Closed) => self.disconnect(number, ""),
            Err(crate::vhost::Error::Waits) => self.ban(number),
            Err(error) => self.disconnect(number, &error.to_string()),
        }
    }

    /// Waits for the events of the rings as they are now.
    fn watch_rings(&mut self, number: PortNumber) -> io::Result<()> {
        let Some(place) = self.places.get_mut(&number) else { return Ok(()) };
        let Some(Link::Guest(backend)) = self.switch.port_mut(number).map(|port| &mut port.link) else {
            return Ok(());
        };
        let (_, queues) = backend.parts();
        for (index, queue) in queues.iter_mut().enumerate() {
            let version = queue.kick_version();
            if index & 1 == 0
                && let Some(ring) = queue.ring()
            {
                ring.quiet();
            }
            if place.kicks.get(&index).is_some_and(|(known, _)| *known == version) {
                continue;
            }
            if let Some((_, old)) = place.kicks.remove(&index) {
                let _ = epoll::delete(&self.poll, &old);
            }
            let Some(kick) = queue.kick() else { continue };
            // Edges: each write to the event counts, and nobody has to read it.
            epoll::add(&self.poll, &kick, Token::Kick(number).encode(), EventFlags::IN | EventFlags::ET)?;
            place.kicks.insert(index, (version, kick));
        }
        Ok(())
    }

    fn disconnect(&mut self, number: PortNumber, why: &str) {
        if let Some(port) = self.switch.port_mut(number) {
            if !why.is_empty() {
                self.notes.push(format!("port {} is disconnected: {why}", port.name));
            }
            if let Link::Guest(backend) = std::mem::replace(&mut port.link, Link::Nothing) {
                let _ = epoll::delete(&self.poll, &*backend);
            }
        }
        if let Some(place) = self.places.get_mut(&number) {
            for (_, (_, kick)) in place.kicks.drain() {
                let _ = epoll::delete(&self.poll, &kick);
            }
            if place.temporary {
                self.remove(number);
            } else {
                self.switch.clear(number);
            }
        }
    }

    fn remove(&mut self, number: PortNumber) {
        if let Some(port) = self.switch.port_mut(number) {
            match std::mem::replace(&mut port.link, Link::Nothing) {
                Link::Guest(backend) => {
                    let _ = epoll::delete(&self.poll, &*backend);
                }
                Link::Uplink(uplink) => {
                    let _ = epoll::delete(&self.poll, &uplink);
                }
                Link::Nothing => {}
            }
        }
        if let Some(mut place) = self.places.remove(&number) {
            for (_, (_, kick)) in place.kicks.drain() {
                let _ = epoll::delete(&self.poll, &kick);
            }
            if let Some((listener, path)) = place.listener {
                let _ = epoll::delete(&self.poll, &listener);
                let _ = std::fs::remove_file(path);
            }
        }
        self.switch.remove(number);
    }

    fn capture(&mut self, number: u32, names: &[String], snap: u32) -> Result<(), String> {
        let mut ports = Vec::new();
        for name in names {
            ports.push((self.find(name)?, name.clone()));
        }
        if names.is_empty() {
            ports = self.switch.ports().map(|port| (port.number, port.name.clone())).collect();
        }
        // Now, not when the switch began: its clock stands still while the host sleeps, and the host's may have been set.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = u64::try_from(now.as_nanos()).unwrap_or(0).saturating_sub(self.clock());
        let capture = Capture::new(&ports, snap.clamp(64, super::capture::SNAP_DEFAULT), epoch);
        self.reply(number, &Reply::Ok(Value::Null)).ok_or("nobody reads")?;
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.captures = true;
            self.readers.push(number);
            self.switch.captures().push(capture);
            self.switch.mark_captured();
        }
        Ok(())
    }

    /// Gives those who capture what there is, if they have taken what there was.
    fn feed_captures(&mut self) {
        let mut fed = Vec::new();
        for (capture, reader) in self.switch.captures().iter_mut().zip(&self.readers) {
            let Some(connection) = self.connections.get_mut(reader) else { continue };
            if connection.out.is_empty() && !capture.file().bytes().is_empty() {
                capture.file().take(&mut connection.out);
                fed.push(*reader);
            }
        }
        for number in fed {
            if self.flush(number).is_none() {
                self.close(number);
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.config.control);
        for (_, path) in self.places.values().filter_map(|place| place.listener.as_ref()) {
            let _ = std::fs::remove_file(path);
        }
    }
}
