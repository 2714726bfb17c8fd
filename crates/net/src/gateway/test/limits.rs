//! What is bounded, and what nobody is told: a gateway whose turns are taken here.

use super::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A gateway that reaches the host's loopback.
fn gateway(change: impl FnOnce(&mut Config)) -> Gateway {
    let mut config = Config::new(MAC);
    config.host_loopback = true;
    change(&mut config);
    Gateway::new(config).unwrap()
}

/// A frame of the guest's with a datagram.
fn datagram(gateway: &Gateway, from: u16, to: (IpAddr, u16)) -> Vec<u8> {
    let mut outbox = Outbox::new(1500);
    let ends = Ends { mac: config::GATEWAY_MAC, from: gateway.network.guest4.into(), to: to.0 };
    outbox.datagram(&ends, (from, to.1), b"x");
    let mut frame = outbox.batch.first().unwrap().1.to_vec();
    frame[6..12].copy_from_slice(&MAC);
    frame
}

fn own_key(gateway: &Gateway, from: u16, port: u16) -> Key {
    let guest = SocketAddr::new(gateway.network.guest4.into(), from);
    Key { guest, other: SocketAddr::new(gateway.network.gateway4.into(), port) }
}

/// Flows that come, have something to do, and go, while the guest takes nothing.
#[test]
fn work_that_is_over_is_not_kept() {
    let mut gateway = gateway(|config| config.flows_max = 8);
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    while gateway.outbox.has_room() {
        gateway.outbox.frame(MAC, 0x88b5, &[0; 50]);
    }
    for from in 1000..4000 {
        let frame = datagram(&gateway, from, (gateway.network.gateway4.into(), port));
        gateway.input(Offload::default(), &frame);
        let token = gateway.udp.find(&own_key(&gateway, from, port)).unwrap();
        gateway.udp_event(token);
        gateway.work();
    }
    assert!((8..300).contains(&gateway.ready.len()), "{}", gateway.ready.len());
    assert!(gateway.udp.is_full() && gateway.ready.iter().rev().take(8).all(|token| gateway.udp.has(*token)));
}

#[test]
fn strangers_do_not_take_the_guests_own_flows() {
    let mut gateway = gateway(|config| config.flows_max = 16);
    let (host, client) = (UdpSocket::bind("127.0.0.1:0").unwrap(), "192.0.2.1:9".parse().unwrap());
    let port = host.local_addr().unwrap().port();
    let stranger = |number: u16| Key {
        guest: SocketAddr::new([10, 77, 0, 2].into(), 80),
        other: SocketAddr::new([192, 0, 2, 1].into(), number),
    };
    let ask = |gateway: &mut Gateway, from: u16| {
        gateway.now += Duration::from_millis(1);
        let frame = datagram(gateway, from, (gateway.network.gateway4.into(), port));
        gateway.input(Offload::default(), &frame);
        gateway.run_flush();
    };
    ask(&mut gateway, 1000);
    for number in 1..=100 {
        gateway.now += Duration::from_millis(1);
        gateway.udp_forwarded(0, stranger(number), client, b"x");
        // One of them goes on talking.
        gateway.udp_forwarded(0, stranger(1), client, b"x");
    }
    let has = |gateway: &Gateway, key: &Key| gateway.udp.find(key).is_some();
    assert!(has(&gateway, &own_key(&gateway, 1000, port)));
    let left: Vec<u16> = (1..=100).filter(|number| has(&gateway, &stranger(*number))).collect();
    assert_eq!(left, [1, 94, 95, 96, 97, 98, 99, 100], "half of the table, those that were used last");
    // The guest's own take the rest, and then each other's places, but not that which is in use.
    for from in 1001..1040 {
        ask(&mut gateway, from);
        ask(&mut gateway, 1000);
    }
    let left = (1000..1040).filter(|from| has(&gateway, &own_key(&gateway, *from, port)));
    assert_eq!(left.collect::<Vec<_>>(), [1000, 1033, 1034, 1035, 1036, 1037, 1038, 1039]);
    assert!(has(&gateway, &stranger(94)));
    let ages = &gateway.udp_ages;
    assert_eq!((ages.own.len(), ages.forwarded.len()), (8, 8), "who is gone has no age");
}

#[test]
fn nothing_is_said_of_errors_and_of_what_is_for_many() {
    let mut gateway = gateway(|config| config.host_loopback = false);
    let broadcast = Ipv4Addr::from(u32::from(gateway.network.guest4) | 255);
    let mut answers = |frame: &[u8]| {
        gateway.input(Offload::default(), frame);
        gateway.run_flush();
        let count = gateway.outbox.batch.len();
        gateway.outbox.batch.clear();
        count
    };
    let probe = self::gateway(|_| ());
    for to in ["239.1.2.3", "255.255.255.255", &broadcast.to_string()] {
        let mut frame = datagram(&probe, 7, (to.parse().unwrap(), 7));
        assert_eq!(answers(&frame), 0, "{to}");
        frame[22] = 1;
        assert_eq!(answers(&frame), 0, "{to}, at its last hop");
    }
    let mut refused = datagram(&probe, 7, ([127, 0, 0, 1].into(), 7));
    assert_eq!(answers(&refused), 1);
    // An error of ICMP, and a question, at their last hops.
    (refused[22], refused[23]) = (1, protocol::ICMP);
    refused[34] = 3;
    assert_eq!(answers(&refused), 0);
    refused[34] = 8;
    assert_eq!(answers(&refused), 1);
}

#[test]
fn parts_of_a_packet_that_says_to_be_a_part() {
    let mut gateway = gateway(|_| ());
    let mut frame = datagram(&gateway, 7, ([192, 0, 2, 1].into(), 7));
    frame.resize(42, 0);
    (frame[17], frame[23]) = (28, protocol::FRAGMENT);
    for place in [0x2000u16, 1] {
        frame[20..22].copy_from_slice(&place.to_be_bytes());
        gateway.input(Offload::default(), &frame);
    }
    assert_eq!(gateway.monitor.inspect()["refused_destination"], 1);
}

/// In a process of its own, whose files can be taken away.
#[test]
fn out_of_files_nobody_is_forgotten() {
    const ALONE: &str = "YADO_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "gateway::test::limits::out_of_files_nobody_is_forgotten";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", name]).env(ALONE, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let listen = "127.0.0.1:0".parse().unwrap();
    let forward = Forward { transport: Transport::Tcp, listen, port: 80 };
    let mut gateway = gateway(|config| config.forwards = vec![forward]);
    gateway.poll_listeners().unwrap();
    let at = gateway.forwards()[0].listen;
    let clients = [0, 1].map(|_| TcpStream::connect(at).unwrap());
    let (bell, mut events) = (Bell::new().unwrap(), Vec::with_capacity(8));
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limits }).unwrap();
    let mut turns = |gateway: &mut Gateway, until: Duration| {
        let begin = Instant::now();
        while begin.elapsed() < until && gateway.tcp.iter().count() < clients.len() {
            gateway.sleep(&bell, true, None, &mut events).unwrap();
            gateway.work();
            assert!(gateway.ready.len() < 3 && gateway.tcp.iter().count() == 0 || until > ACCEPT);
        }
    };
    const ACCEPT: Duration = Duration::from_millis(250);
    turns(&mut gateway, ACCEPT);
    assert!(gateway.accept_again_at.is_some());
    setrlimit(Resource::Nofile, limits).unwrap();
    turns(&mut gateway, Duration::from_secs(5));
    assert_eq!(gateway.tcp.iter().count(), 2, "without another call");
}
