//! Tests of both halves of the protocol, coupled in memory: the stream is cut anywhere, everybody is slow at random.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::client::{Client, Event, LostReason, OUTPUT_WINDOW, RequestError, SessionId};
use crate::fuzz::fuzz_client;
use crate::message::{Ending, Exec, Failure, Poweroff, Stream, ToHost, VERSION};
use crate::peer::{Command, Peer, SESSIONS_MAX};
use crate::wire::{DATA_MAX, Outbox};

const STDIN_WINDOW: u32 = 5000;

/// A number from 0 to `below` - 1 (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }
}

/// A command that sends its input back on both streams.
#[derive(Default)]
struct Echo {
    started: bool,
    back: [Vec<u8>; 2],
    ended: bool,
}

/// What the host has given to and got from a command.
#[derive(Default)]
struct Exchange {
    given: Vec<u8>,
    to_give: usize,
    closed: bool,
    got: [Vec<u8>; 2],
    unused: [usize; 2],
    ending: Option<Event>,
}

struct World {
    dice: Dice,
    client: Client,
    peer: Peer,
    to_agent: Vec<u8>,
    to_host: Vec<u8>,
    echoes: BTreeMap<u32, Echo>,
    exchanges: BTreeMap<SessionId, Exchange>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            dice: Dice(seed | 1),
            client: Client::new(seed),
            peer: Peer::new(crate::AGENT_BUILD, STDIN_WINDOW),
            to_agent: Vec::new(),
            to_host: Vec::new(),
            echoes: BTreeMap::new(),
            exchanges: BTreeMap::new(),
        }
    }

    /// One random thing happens.
    fn step(&mut self) {
        match self.dice.roll(8) {
            0 => {
                let count = self.dice.roll(self.client.pending().len() + 1);
                self.to_agent.extend_from_slice(&self.client.pending()[..count]);
                self.client.sent(count);
            }
            1 => {
                let count = self.dice.roll(self.peer.pending().len() + 1);
                self.to_host.extend_from_slice(&self.peer.pending()[..count]);
                self.peer.sent(count);
            }
            2 => {
                let count = self.dice.roll(self.to_agent.len() + 1);
                self.peer.receive(&self.to_agent[..count]);
                self.to_agent.drain(..count);
            }
            3 => {
                let count = self.dice.roll(self.to_host.len() + 1);
                self.client.receive(&self.to_host[..count]);
                self.to_host.drain(..count);
            }
            4 => self.host_hears(),
            5 => self.host_speaks(),
            6 => self.agent_obeys(),
            _ => self.processes_run(),
        }
        assert!(self.client.held() <= SESSIONS_MAX * 2 * OUTPUT_WINDOW);
    }

    fn host_hears(&mut self) {
        for _ in 0..self.dice.roll(4) {
            match self.client.poll_event() {
                Some(Event::Output { session, stream, bytes }) => {
                    let exchange = self.exchanges.get_mut(&session).unwrap();
                    assert_eq!(exchange.ending, None);
                    let index = usize::from(stream == Stream::Stderr);
                    exchange.got[index].extend_from_slice(&bytes);
                    exchange.unused[index] += bytes.len();
                    assert!(exchange.unused[index] <= OUTPUT_WINDOW);
                }
                Some(event @ (Event::Exited { session, .. } | Event::Failed { session, .. })) => {
                    let exchange = self.exchanges.get_mut(&session).unwrap();
                    assert_eq!(exchange.ending.replace(event), None);
                }
                Some(Event::Started { .. } | Event::StdinReady { .. } | Event::Ready { .. }) | None => {}
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    fn host_speaks(&mut self) {
        let open: Vec<SessionId> = self.exchanges.keys().copied().collect();
        let Some(&session) = open.get(self.dice.roll(open.len())) else { return };
        let exchange = self.exchanges.get_mut(&session).unwrap();
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let count = self.dice.roll(exchange.unused[index] + 1);
            self.client.consumed(session, stream, count);
            exchange.unused[index] -= count;
        }
        let count = self.dice.roll(exchange.to_give.min(30_000) + 1);
        let bytes: Vec<u8> = (0..count).map(|_| (self.dice.roll(300) & 0xff) as u8).collect();
        match self.client.stdin(session, &bytes) {
            Ok(taken) => {
                exchange.given.extend_from_slice(&bytes[..taken]);
                exchange.to_give -= taken;
            }
            Err(error) => assert_eq!(error, RequestError::NoSession),
        }
        if exchange.to_give == 0 && !exchange.closed && exchange.ending.is_none() {
            exchange.closed = true;
            let _ = self.client.stdin_eof(session);
        }
    }

    fn agent_obeys(&mut self) {
        match self.peer.next_command() {
            Some(Command::Reset) => self.echoes.clear(),
            Some(Command::Exec(id, exec)) => {
                assert_eq!(exec.argv, [b"echo".to_vec()]);
                self.echoes.insert(id, Echo::default());
            }
            Some(other) => panic!("{other:?}"),
            None => {}
        }
    }

    fn processes_run(&mut self) {
        for (&id, echo) in &mut self.echoes {
            if !echo.started {
                echo.started = true;
                self.peer.started(id, 100 + id);
            }
            let (bytes, ended) = self.peer.stdin(id);
            assert!(bytes.len() <= STDIN_WINDOW as usize);
            let count = self.dice.roll(bytes.len() + 1);
            echo.back.iter_mut().for_each(|back| back.extend_from_slice(&bytes[..count]));
            echo.ended = ended && count == bytes.len();
            self.peer.stdin_taken(id, count);
            for (back, stream) in echo.back.iter_mut().zip([Stream::Stdout, Stream::Stderr]) {
                let room = self.peer.room(id, stream).min(back.len());
                let count = self.dice.roll(room + 1);
                self.peer.output(id, stream, back.drain(..count).collect());
            }
        }
        let finished = |echo: &Echo| echo.ended && echo.back.iter().all(Vec::is_empty);
        let ids: Vec<u32> =
            self.echoes.iter().filter(|(_, echo)| finished(echo)).map(|(&id, _)| id).collect();
        for id in ids {
            self.echoes.remove(&id);
            self.peer.exited(id, Ending::Code((id & 0xff) as u8));
        }
    }

    fn until_ready(&mut self) {
        for _ in 0..100_000 {
            if self.client.is_ready() {
                return;
            }
            self.step();
        }
        panic!("no greeting in 100000 steps");
    }

    fn begin(&mut self, to_give: usize) -> SessionId {
        let session = self.client.exec(Exec { argv: vec![b"echo".to_vec()], ..Exec::default() }).unwrap();
        self.exchanges.insert(session, Exchange { to_give, ..Exchange::default() });
        session
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn all_bytes_arrive_once_and_in_order(seed in any::<u64>(), sizes in proptest::collection::vec(0usize..400_000, 1..6)) {
        let mut world = World::new(seed);
        world.until_ready();
        for &size in &sizes {
            world.begin(size);
        }
        let mut steps = 0;
        while world.exchanges.values().any(|exchange| exchange.ending.is_none()) {
            world.step();
            steps += 1;
            prop_assert!(steps < 3_000_000, "it does not get on");
        }
        for (exchange, size) in world.exchanges.values().zip(sizes) {
            prop_assert_eq!(exchange.given.len(), size);
            prop_assert!(exchange.got[0] == exchange.given && exchange.got[1] == exchange.given);
        }
    }

    #[test]
    fn a_stream_with_noise_before_it_comes_up(seed in any::<u64>(), noise in proptest::collection::vec(any::<u8>(), 0..500)) {
        let mut world = World::new(seed);
        world.to_agent = noise.clone();
        world.to_host = noise;
        world.peer.announce();
        world.until_ready();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_guest_breaks_the_client(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        fuzz_client(&data);
    }
}

/// A client whose guest is played by hand.
fn ready_client() -> Client {
    let mut client = Client::new(9);
    say(&mut client, 0, &ToHost::Ready { version: VERSION, nonce: 10, build: 0, stdin_window: 100 });
    assert_eq!(client.poll_event(), Some(Event::Ready { same_build: false }));
    client
}

fn say(client: &mut Client, session: u32, message: &ToHost) {
    let mut out = Outbox::default();
    message.send(session, &mut out);
    client.receive(out.pending());
}

fn run(client: &mut Client) -> SessionId {
    client.exec(Exec { argv: vec![b"x".to_vec()], ..Exec::default() }).unwrap()
}

#[test]
fn breaches_end_the_link() {
    let output = |length| ToHost::Output(Stream::Stdout, vec![0; length]);
    let breaches: [(&str, Vec<(u32, ToHost)>); 9] = [
        ("output of no session", vec![(5, output(1))]),
        ("output before the start", vec![(1, output(1))]),
        ("empty output", vec![(1, ToHost::Started(1)), (1, output(0))]),
        ("two starts", vec![(1, ToHost::Started(1)), (1, ToHost::Started(1))]),
        ("an end before the start", vec![(1, ToHost::Exit(Ending::Code(0)))]),
        ("a failure after the start", vec![(1, ToHost::Started(1)), (1, ToHost::Failed(Failure::User, 1))]),
        ("words after the end", vec![(1, ToHost::Failed(Failure::User, 1)), (1, ToHost::Started(1))]),
        ("more credit than the window", vec![(1, ToHost::Started(1)), (1, ToHost::Credit(1))]),
        ("an answer to no question", vec![(0, ToHost::Pong(3))]),
    ];
    for (what, messages) in breaches {
        let mut client = ready_client();
        run(&mut client);
        for (session, message) in &messages {
            say(&mut client, *session, message);
        }
        let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
        assert!(events.contains(&Event::LinkLost(LostReason::Breach)), "{what}: {events:?}");
        assert!(!client.is_ready());
        assert_eq!(client.ping(1), Err(RequestError::NotReady));
    }
}

#[test]
fn output_beyond_the_window_ends_the_link() {
    let mut client = ready_client();
    let session = run(&mut client);
    say(&mut client, 1, &ToHost::Started(1));
    for _ in 0..OUTPUT_WINDOW / DATA_MAX {
        say(&mut client, 1, &ToHost::Output(Stream::Stdout, vec![7; DATA_MAX]));
    }
    assert!(client.is_ready());
    assert_eq!(client.held(), OUTPUT_WINDOW);
    say(&mut client, 1, &ToHost::Output(Stream::Stdout, vec![7]));
    assert!(!client.is_ready());
    let reason = LostReason::Breach;
    let events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
    assert_eq!(events[0], Event::Started { session, pid: 1 });
    assert!(matches!(&events[1], Event::Output { bytes, .. } if bytes.len() == OUTPUT_WINDOW));
    assert_eq!(events[2..], [Event::LinkLost(reason), Event::SessionLost { session, reason }]);
}

#[test]
fn answers_to_earlier_greetings_do_not_count() {
    let mut client = Client::new(9);
    say(&mut client, 0, &ToHost::Announce); // Makes the client greet again, with nonce 11.
    say(&mut client, 0, &ToHost::Ready { version: VERSION, nonce: 10, build: 0, stdin_window: 1 });
    assert!(!client.is_ready());
    say(&mut client, 0, &ToHost::Ready { version: VERSION, nonce: 11, build: 0, stdin_window: 1 });
    assert!(client.is_ready());
}

#[test]
fn another_version_is_told_and_not_used() {
    let mut client = Client::new(9);
    say(&mut client, 0, &ToHost::Ready { version: 99, nonce: 10, build: 0, stdin_window: 1 });
    assert_eq!(client.poll_event(), Some(Event::Incompatible { version: 99 }));
    assert!(!client.is_ready());
}

#[test]
fn what_cannot_be_run_is_refused_before_it_is_sent() {
    let mut client = ready_client();
    client.sent(client.pending().len());
    let with =
        |argv: &[&[u8]]| Exec { argv: argv.iter().map(|word| word.to_vec()).collect(), ..Exec::default() };
    assert_eq!(client.exec(with(&[])), Err(RequestError::BadString));
    assert_eq!(client.exec(with(&[b""])), Err(RequestError::BadString));
    assert_eq!(client.exec(with(&[b"a\0b"])), Err(RequestError::BadString));
    assert_eq!(client.exec(with(&[b"a", &[b'x'; 300_000]])), Err(RequestError::TooLong));
    assert!(client.pending().is_empty());
    for _ in 0..SESSIONS_MAX {
        run(&mut client);
    }
    assert_eq!(client.exec(with(&[b"a"])), Err(RequestError::TooManySessions));
}

#[test]
fn the_agent_ends_everything_when_bytes_are_lost_or_the_host_is_new() {
    let mut peer = Peer::new(1, 100);
    let mut client = Client::new(1);
    peer.receive(client.pending());
    assert!(peer.is_up());
    assert_eq!(peer.next_command(), Some(Command::Reset));
    client.sent(client.pending().len());
    client.receive(peer.pending());
    run(&mut client);
    client.poweroff(Poweroff::Orderly).unwrap();
    let bytes = client.pending().to_vec();
    let mut damaged = bytes.clone();
    damaged[4] ^= 0x55;
    peer.receive(&damaged);
    assert!(!peer.is_up());
    assert_eq!(peer.next_command(), Some(Command::Reset));
    assert_eq!(peer.next_command(), None, "nothing after the damage is obeyed");
    peer.receive(Client::new(50).pending());
    assert!(peer.is_up());
}
