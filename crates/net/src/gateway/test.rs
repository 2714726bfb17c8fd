//! The gateway with a guest that runs smoltcp, another people's TCP/IP, and a host that is this one's loopback.

use super::*;
use crate::segment;
use crate::{Checksum, Offload};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, dns, icmp, tcp as guest_tcp, udp};
use smoltcp::wire::{EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, IpEndpoint};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::thread::{self, JoinHandle};
use std::time::Duration;

mod limits;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A cable: frames each way.
#[derive(Default)]
struct Cable {
    up: Mutex<VecDeque<Vec<u8>>>,
    down: Mutex<VecDeque<Vec<u8>>>,
    /// Every so manieth frame to the guest is lost.
    loss: usize,
    count: Mutex<usize>,
    /// Frames to the guest that wait at most.
    room: usize,
}

struct CableCard(Arc<Cable>);

impl Card for CableCard {
    fn take(&self, batch: &mut Batch) -> bool {
        let mut up = self.0.up.lock().unwrap();
        while batch.has_room() {
            let Some(frame) = up.pop_front() else { return false };
            batch.push(Offload::default(), &[&frame]);
        }
        !up.is_empty()
    }

    fn give(&self, batch: &mut Batch) {
        let mut down = self.0.down.lock().unwrap();
        while let Some((offload, frame)) = batch.first() {
            if down.len() >= self.0.room {
                return;
            }
            // What a guest would be told of a frame is believed nowhere: so it has to be true.
            let offload = Offload::checked(offload.encode(), frame).expect("an offload that is no lie");
            let mut put = |offload: Offload, piece: &mut [u8]| {
                if let Checksum::Partial { start, offset } = offload.checksum {
                    segment::complete_checksum(piece, start, offset);
                }
                let mut count = self.0.count.lock().unwrap();
                *count += 1;
                if self.0.loss == 0 || !count.is_multiple_of(self.0.loss) {
                    down.push_back(piece.to_vec());
                }
            };
            match offload.segments {
                Some(segments) => segment::cut(frame, segments, &mut vec![], &mut put),
                None => put(offload, &mut frame.to_vec()),
            }
            batch.pop();
        }
    }
}

/// smoltcp's end of the cable.
struct End(Arc<Cable>, Bell);

struct Received(Vec<u8>);
struct Sending<'a>(&'a End);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.0.up.lock().unwrap().push_back(frame);
        self.0.1.ring();
        result
    }
}

impl Device for End {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.0.down.lock().unwrap().pop_front()?;
        self.1.ring();
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut about = DeviceCapabilities::default();
        about.medium = Medium::Ethernet;
        about.max_transmission_unit = 1514;
        about
    }
}

/// A guest on a gateway.
struct World {
    end: End,
    interface: Interface,
    sockets: SocketSet<'static>,
    network: Network,
    monitor: Arc<Monitor>,
    forwards: Vec<Forward>,
    bell: Bell,
    thread: Option<JoinHandle<()>>,
    port: u16,
}

impl Drop for World {
    fn drop(&mut self) {
        self.bell.close();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || matches!(ended, Some(Ok(()))), "the gateway ends with its bell");
    }
}

impl World {
    fn new(change: impl FnOnce(&mut Config), loss: usize) -> Self {
        let mut config = Config::new(MAC);
        config.host_loopback = true;
        change(&mut config);
        let gateway = Gateway::new(config).unwrap();
        let (network, monitor, forwards) = (gateway.network(), gateway.monitor(), gateway.forwards());
        let cable = Arc::new(Cable { loss, room: 100, ..Cable::default() });
        let bell = Bell::new().unwrap();
        let mut end = End(cable.clone(), bell.clone());
        let rope = bell.clone();
        let thread = thread::spawn(move || gateway.serve(&CableCard(cable), &rope).unwrap());
        let mut about = InterfaceConfig::new(EthernetAddress(MAC).into());
        about.random_seed = 7;
        let now = smoltcp::time::Instant::now();
        let mut interface = Interface::new(about, &mut end, now);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(network.guest4.into(), 24)).unwrap();
            addresses.push(IpCidr::new(network.guest6.into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(network.gateway4).unwrap();
        interface.routes_mut().add_default_ipv6_route(network.gateway6).unwrap();
        let sockets = SocketSet::new(vec![]);
        Self { end, interface, sockets, network, monitor, forwards, bell, thread: Some(thread), port: 40_000 }
    }

    fn poll(&mut self) {
        self.interface.poll(smoltcp::time::Instant::now(), &mut self.end, &mut self.sockets);
    }

    /// Plays until `done` has an answer.
    fn until<R>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<R>) -> R {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(Instant::now() < end, "{what} does not happen: {}", self.monitor.inspect());
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || guest_tcp::SocketBuffer::new(vec![0; 65_535]);
        self.sockets.add(guest_tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: impl Into<IpEndpoint>) -> SocketHandle {
        let handle = self.tcp_socket();
        self.port += 1;
        let socket = self.sockets.get_mut::<guest_tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), to, self.port).unwrap();
        handle
    }

    fn tcp(&mut self, handle: SocketHandle) -> &mut guest_tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn udp_socket(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 64 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        self.port += 1;
        socket.bind(self.port).unwrap();
        self.sockets.add(socket)
    }

    fn ask(&mut self, handle: SocketHandle, to: impl Into<IpEndpoint>, bytes: &[u8]) -> Vec<u8> {
        let to = to.into();
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(bytes, to).unwrap();
        self.until("an answer", |world| {
            let (bytes, about) = world.sockets.get_mut::<udp::Socket<'_>>(handle).recv().ok()?;
            assert_eq!(about.endpoint, to, "it comes from where the question went");
            Some(bytes.to_vec())
        })
    }
}

fn noise(len: usize, salt: u32) -> Vec<u8> {
    (0..len as u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) ^ salt.wrapping_mul(97)).to_le_bytes()[2])
        .collect()
}

/// Sends both ways at once and compares every byte.
fn exchange(world: &mut World, handle: SocketHandle, mut host: TcpStream, up: usize, down: usize) {
    let (to_host, to_guest) = (noise(up, 1), noise(down, 2));
    let (sent, expected) = (to_guest.clone(), to_host.clone());
    let far = thread::spawn(move || {
        let mut writer = host.try_clone().unwrap();
        let writes = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = vec![];
        host.read_to_end(&mut got).unwrap();
        writes.join().unwrap();
        assert!(got == expected, "{} bytes of {} came, or others", got.len(), expected.len());
    });
    let (mut written, mut got) = (0, vec![]);
    world.until("the exchange", |world| {
        let socket = world.tcp(handle);
        if written < to_host.len() && socket.can_send() {
            written += socket.send_slice(&to_host[written..]).unwrap();
            if written == to_host.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
        (written == to_host.len() && got.len() == down && far.is_finished()).then_some(())
    });
    assert!(got == to_guest);
    far.join().unwrap();
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn a_guest_calls_the_host_and_every_byte_arrives() {
    let mut world = World::new(|_| (), 0);
    let (listener, port) = listener();
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let host = listener.accept().unwrap().0;
    exchange(&mut world, handle, host, 3_000_000, 3_000_000);
    world.until("the end", |world| (world.monitor.inspect()["connections"] == 0).then_some(()));
}

#[test]
fn lost_frames_are_sent_again() {
    let mut world = World::new(|_| (), 97);
    let (listener, port) = listener();
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let host = listener.accept().unwrap().0;
    exchange(&mut world, handle, host, 100_000, 400_000);
}

#[test]
fn ipv6_is_spoken_as_well() {
    let mut world = World::new(|_| (), 0);
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else { return };
    let port = listener.local_addr().unwrap().port();
    let handle = world.connect((world.network.gateway6, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let host = listener.accept().unwrap().0;
    exchange(&mut world, handle, host, 100_000, 100_000);
}

#[test]
fn a_reader_that_pauses_stops_the_writer_and_loses_nothing() {
    let mut world = World::new(|_| (), 0);
    let (listener, port) = listener();
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let mut host = listener.accept().unwrap().0;
    let bytes = noise(12 << 20, 3);
    let mut written = 0;
    let mut still = 0;
    // The host does not read: its buffers and the gateway's fill, then the guest is stopped.
    world.until("a full pipe", |world| {
        let before = written;
        if world.tcp(handle).can_send() {
            written += world.tcp(handle).send_slice(&bytes[written..]).unwrap();
        }
        still = if written == before { still + 1 } else { 0 };
        (still > 2000).then_some(())
    });
    assert!(written < bytes.len(), "memory is bounded");
    let expected = bytes.clone();
    let reads = thread::spawn(move || {
        let mut got = vec![];
        host.read_to_end(&mut got).unwrap();
        assert!(got == expected);
    });
    world.until("the rest", |world| {
        if written < bytes.len() {
            written += world.tcp(handle).send_slice(&bytes[written..]).unwrap();
            if written == bytes.len() {
                world.tcp(handle).close();
            }
        }
        reads.is_finished().then_some(())
    });
    reads.join().unwrap();
}

#[test]
fn closed_ports_and_forbidden_places_refuse() {
    let mut world = World::new(|config| config.host_loopback = false, 0);
    let (listener, port) = listener();
    for to in ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "::ffff:127.0.0.1", "fe80::2"] {
        let to: IpAddr = to.parse().unwrap();
        // smoltcp would not send there, a hostile guest does.
        let from = if to.is_ipv4() { world.network.guest4.into() } else { world.network.guest6.into() };
        let mut outbox = Outbox::new(1500);
        let call = tcp::header::Header { flags: 2, window: 1000, ..Default::default() };
        outbox.tcp(&Ends { mac: MAC, from, to }, (9, port), call, 0, 0);
        let (offload, frame) = outbox.batch.first().unwrap();
        let (mut frame, Checksum::Partial { start, offset }) = (frame.to_vec(), offload.checksum) else {
            panic!()
        };
        segment::complete_checksum(&mut frame, start, offset);
        world.end.0.up.lock().unwrap().push_back(frame);
        world.bell.ring();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let reply = world.end.0.down.lock().unwrap().pop_front();
            let layers = reply.as_ref().and_then(|reply| Some((layers::parse(reply, true)?, reply)));
            if let Some((layers, reply)) = layers.filter(|(layers, _)| layers.protocol == protocol::TCP) {
                assert_eq!((layers.source, reply[layers.transport + 13]), (to, 0x14), "it is reset");
                break;
            }
            assert!(Instant::now() < end, "{to} is not refused");
        }
    }
    // The gateway's name is the host's own address, never its loopback.
    let handle = world.connect((world.network.gateway4, port));
    world.until("a refusal", |world| (world.tcp(handle).state() == guest_tcp::State::Closed).then_some(()));
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody came to the loopback");
}

#[test]
fn what_the_host_resets_is_reset_for_the_guest() {
    let mut world = World::new(|_| (), 0);
    let (listener, port) = listener();
    drop(listener);
    let handle = world.connect((world.network.gateway4, port));
    world.until("a refusal", |world| (world.tcp(handle).state() == guest_tcp::State::Closed).then_some(()));
    let (listener, port) = self::listener();
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let host = listener.accept().unwrap().0;
    rustix::net::sockopt::set_socket_linger(&host, Some(Duration::ZERO)).unwrap();
    drop(host);
    world.until("a reset", |world| (world.tcp(handle).state() == guest_tcp::State::Closed).then_some(()));
    // And the other way.
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    let mut host = listener.accept().unwrap().0;
    world.tcp(handle).abort();
    world.poll();
    let error = host.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn datagrams_of_all_sizes_find_there_and_back() {
    let mut world = World::new(|_| (), 0);
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    host.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let port = host.local_addr().unwrap().port();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let echo = thread::spawn(move || {
        let mut bytes = vec![0; 65_536];
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let Ok((len, from)) = host.recv_from(&mut bytes) else { continue };
            host.send_to(&bytes[..len], from).unwrap();
        }
    });
    let handle = world.udp_socket();
    // The longest that smoltcp puts together from fragments.
    for len in [1, 0, 500, 1472, 1473, 4000, 7000] {
        let bytes = noise(len, 5);
        let to = (world.network.gateway4, port);
        assert!(world.ask(handle, to, &bytes) == bytes, "{len} bytes");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    echo.join().unwrap();
}

#[test]
fn ports_lead_into_the_guest() {
    let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let forward = |transport, port| Forward { transport, listen, port };
    let forwards = vec![forward(Transport::Tcp, 80), forward(Transport::Udp, 53)];
    let mut world = World::new(|config| config.forwards = forwards, 0);
    let at: Vec<SocketAddr> = world.forwards.iter().map(|forward| forward.listen).collect();
    let again = Gateway::new(Config {
        forwards: vec![Forward { listen: at[0], ..world.forwards[0] }],
        ..Config::new(MAC)
    });
    let Err(error) = again else { panic!("the port is taken") };
    assert!(error.to_string().contains("choose another port"), "{error}");
    // The client comes before the guest listens, and is called back.
    let handle = world.tcp_socket();
    let client = TcpStream::connect(at[0]).unwrap();
    world.tcp(handle).listen(80).unwrap();
    world.until("a call", |world| world.tcp(handle).may_send().then_some(()));
    exchange(&mut world, handle, client, 200_000, 200_000);
    // Nobody listens now.
    let mut client = TcpStream::connect(at[0]).unwrap();
    world.tcp(handle).abort();
    let read = thread::spawn(move || client.read(&mut [0]));
    world.until("a refusal", |_| read.is_finished().then_some(()));
    assert!(read.join().unwrap().is_err());

    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8 << 10]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(53).unwrap();
    let handle = world.sockets.add(socket);
    let clients = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    for (client, text) in clients.iter().zip([b"one", b"two"]) {
        client.send_to(text, at[1]).unwrap();
    }
    let mut served = 0;
    world.until("two questions", |world| {
        let socket = world.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((bytes, about)) = socket.recv() {
            let bytes = bytes.to_vec();
            socket.send_slice(&bytes, about.endpoint).unwrap();
            served += 1;
        }
        (served == 2).then_some(())
    });
    world.poll();
    for (client, text) in clients.iter().zip([b"one", b"two"]) {
        let mut bytes = [0; 10];
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (len, from) = client.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..len], from), (&text[..], at[1]), "each has its own answer");
    }
}

#[test]
fn a_guest_is_told_its_address_and_its_names() {
    let mut world = World::new(|config| config.guest_name = Some("inn".into()), 0);
    world
        .interface
        .update_ip_addrs(|addresses| addresses.retain(|address| matches!(address, IpCidr::Ipv6(_))));
    world.interface.routes_mut().remove_default_ipv4_route();
    let handle = world.sockets.add(dhcpv4::Socket::new());
    let (address, router, servers) = world.until("an address", |world| {
        match world.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()? {
            dhcpv4::Event::Configured(config) => {
                Some((config.address, config.router, config.dns_servers.to_vec()))
            }
            dhcpv4::Event::Deconfigured => None,
        }
    });
    let network = world.network;
    assert_eq!((address.address(), address.prefix_len()), (network.guest4, 24));
    assert_eq!((router, servers), (Some(network.gateway4), vec![network.gateway4]));
    world.interface.update_ip_addrs(|addresses| addresses.push(address.into()).unwrap());
    let server = IpAddress::from(network.gateway4);
    let handle = world.sockets.add(dns::Socket::new(&[server], vec![]));
    let query = {
        let socket = world.sockets.get_mut::<dns::Socket<'_>>(handle);
        socket.start_query(world.interface.context(), "host.yado", smoltcp::wire::DnsQueryType::A).unwrap()
    };
    let found = world.until("an answer", |world| {
        world.sockets.get_mut::<dns::Socket<'_>>(handle).get_query_result(query).ok()
    });
    assert_eq!(found.as_slice(), [server]);
}

#[test]
fn the_gateway_answers_pings() {
    let mut world = World::new(|_| (), 0);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 8 << 10]);
    let handle = world.sockets.add(icmp::Socket::new(buffer(), buffer()));
    let to = IpAddress::from(world.network.gateway4);
    let socket = world.sockets.get_mut::<icmp::Socket<'_>>(handle);
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let request = Icmpv4Repr::EchoRequest { ident: 77, seq_no: 3, data: b"yado" };
    let room = socket.send(request.buffer_len(), to).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &smoltcp::phy::ChecksumCapabilities::default());
    world.until("a reply", |world| {
        let (bytes, from) = world.sockets.get_mut::<icmp::Socket<'_>>(handle).recv().ok()?;
        assert_eq!((from, bytes.ends_with(b"yado")), (to, true));
        Some(())
    });
}

#[test]
fn frames_of_any_content_leave_the_gateway_alive() {
    let mut world = World::new(|_| (), 0);
    let mut seed = 1u64;
    for round in 0..3000u64 {
        let mut frame = vec![];
        frame.extend(config::GATEWAY_MAC);
        frame.extend(MAC);
        let kinds: [&[u8]; 4] =
            [&[8, 0, 0x45, 0], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[0x86, 0xdd, 0x60], &[0x81, 0]];
        frame.extend(kinds[(round % 4) as usize]);
        for _ in 0..round % 90 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            frame.push(seed as u8);
        }
        // Half of them come from the guest's own address, so that more than the address is looked at.
        if round % 8 == 0 && frame.len() > 34 {
            frame[26..30].copy_from_slice(&world.network.guest4.octets());
            frame[23] = [1, 6, 17, 2][(round / 8 % 4) as usize];
        }
        world.end.0.up.lock().unwrap().push_back(frame);
        world.bell.ring();
    }
    let (listener, port) = listener();
    let handle = world.connect((world.network.gateway4, port));
    world.until("a connection", |world| world.tcp(handle).may_send().then_some(()));
    drop(listener);
}

/// Two guests that meet.
fn neighbours() -> (World, World, tempfile::TempDir) {
    let place = tempfile::tempdir().unwrap();
    let world = |name: &str| {
        let meeting = Meeting { directory: place.path().into(), suffix: ".net".into(), name: name.into() };
        World::new(|config| config.peers = Some(meeting), 0)
    };
    (world("web"), world("db"), place)
}

fn resolve(world: &mut World, name: &str) -> Option<IpAddress> {
    let server = IpAddress::from(world.network.gateway4);
    let handle = world.sockets.add(dns::Socket::new(&[server], vec![]));
    let socket = world.sockets.get_mut::<dns::Socket<'_>>(handle);
    let query = socket.start_query(world.interface.context(), name, smoltcp::wire::DnsQueryType::A).unwrap();
    let found = world.until("an answer", |world| {
        match world.sockets.get_mut::<dns::Socket<'_>>(handle).get_query_result(query) {
            Ok(found) => Some(found.first().copied()),
            Err(dns::GetQueryResultError::Failed) => Some(None),
            Err(dns::GetQueryResultError::Pending) => None,
        }
    });
    // It would take the answers of others.
    world.sockets.remove(handle);
    found
}

#[test]
fn guests_of_one_host_find_each_other_by_name() {
    let (mut web, mut db, place) = neighbours();
    assert_eq!(resolve(&mut web, "nobody.yado"), None);
    let address = resolve(&mut web, "db.yado").unwrap();
    assert!(web.network.peer_number(address.into()).is_some(), "{address}");
    let server = db.tcp_socket();
    db.tcp(server).listen(80).unwrap();
    let client = web.connect((address, 80));
    let (up, mut written, mut got) = (noise(2_000_000, 4), 0, vec![]);
    let end = Instant::now() + Duration::from_secs(60);
    while got.len() < up.len() {
        assert!(Instant::now() < end, "{written} went, {} came", got.len());
        web.poll();
        db.poll();
        if written < up.len() && web.tcp(client).can_send() {
            written += web.tcp(client).send_slice(&up[written..]).unwrap();
        }
        while db.tcp(server).can_recv() {
            db.tcp(server).recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
        }
    }
    assert!(got == up);
    // The other sees who it is, under the address that it would call it by.
    let seen = db.tcp(server).remote_endpoint().unwrap().addr;
    assert_eq!(resolve(&mut db, "web.yado"), Some(seen));
    // Nobody is there any more, which the guest hears at once.
    drop(db);
    assert_eq!(resolve(&mut web, "db.yado"), None);
    drop(place);
}

#[test]
fn long_datagrams_reach_other_guests_in_parts() {
    let (mut web, mut db, _place) = neighbours();
    let address = resolve(&mut web, "db.yado").unwrap();
    let (asks, answers) = (web.udp_socket(), db.udp_socket());
    let port = db.port;
    for len in [1, 1472, 1473, 6000] {
        let bytes = noise(len, 6);
        web.sockets.get_mut::<udp::Socket<'_>>(asks).send_slice(&bytes, (address, port)).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        let echoed = loop {
            assert!(Instant::now() < end, "{len} bytes are lost");
            web.poll();
            db.poll();
            let socket = db.sockets.get_mut::<udp::Socket<'_>>(answers);
            let asked = socket.recv().map(|(bytes, about)| (bytes.to_vec(), about.endpoint));
            if let Ok((bytes, from)) = asked {
                socket.send_slice(&bytes, from).unwrap();
            }
            if let Ok((bytes, about)) = web.sockets.get_mut::<udp::Socket<'_>>(asks).recv() {
                assert_eq!(about.endpoint, (address, port).into());
                break bytes.to_vec();
            }
        };
        assert!(echoed == bytes, "{len} bytes");
    }
}
