//! A card whose driver is played here, and a back end that does as it is told.

use super::*;
use chipset::pci::{Function, command};
use device::{MsiSink, Notify, VmTime};
use memory::Backing;
use net::vhost::Backend;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use virtio::NetConfig;

const FEATURES: u64 = feature::VERSION_1 | 1 << 17 | feature::MQ;
const CONTROL_QUEUE: u16 = 4;
const DATA: u64 = 0x10_0000;
/// Registers of the common structure, which is at the BAR's beginning, and of the notifications (virtio 4.1.4.3).
const STATUS: u64 = 20;
const NOTIFY: u64 = 0x3000;

struct Guest {
    card: Arc<Mutex<Net>>,
    memory: GuestMemory,
    bell: Bell,
    /// The back end takes no chains.
    hold: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    available: [u16; 5],
}

fn ring(queue: u16) -> u64 {
    0x1_0000 + u64::from(queue) * 0x4000
}

impl Guest {
    fn new() -> Self {
        let nobody = BackEnd::Socket("/nonexistent/socket".into());
        Self::on(nobody, |why| panic!("{why:?}"))
    }

    /// A guest whose back end is looked for there, once it has gone.
    fn on(again: BackEnd, tell: impl Fn(Option<String>) + Send + 'static) -> Self {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Shared).unwrap();
        let bell = Bell::new().unwrap();
        let (rung, config) =
            (bell.clone(), NetConfig { address: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs: 2, withheld: 0 });
        let notify = Notify::new(move || rung.ring());
        let card = Net::new(memory.clone(), MsiSink::unconnected(), notify, config);
        let card = Arc::new(Mutex::new(card));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (hold, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (holds, ends) = (hold.clone(), over.clone());
        let back_end = thread::spawn(move || serve(Backend::new(theirs), &holds, &ends));
        let front = Frontend::new(ours, 4, RING_SIZE).unwrap();
        let carrier = Carrier::new(card.clone(), memory.clone(), again, front, 4).unwrap();
        let ear = bell.clone();
        let carrier = thread::spawn(move || carrier.serve(&ear, &tell));
        let threads = vec![carrier, back_end];
        let mut guest = Self { card, memory, bell, hold, over, threads, available: [0; 5] };
        guest.set_command(command::MEMORY | command::BUS_MASTER);
        for status in [1, 3] {
            guest.write(STATUS, 1, status);
        }
        for (select, half) in [(0, FEATURES & 0xffff_ffff), (1, FEATURES >> 32)] {
            guest.write(8, 4, select);
            guest.write(12, 4, half);
        }
        guest.write(STATUS, 1, 11);
        for queue in 0..5 {
            let at = ring(queue);
            for (register, value) in
                [(22, queue.into()), (24, 16), (32, at), (40, at + 0x2000), (48, at + 0x3000)]
            {
                guest.write(register, if register < 32 { 2 } else { 4 }, value);
            }
            guest.write(28, 2, 1);
        }
        guest.write(STATUS, 1, 15);
        guest.pairs(2);
        guest
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.card.lock().unwrap().bar_write(0, offset, size, value, VmTime(0));
    }

    fn set_command(&self, value: u16) {
        let mut card = self.card.lock().unwrap();
        card.config_mut().write(4, 2, value.into());
        card.config_written(4);
        self.bell.ring();
    }

    /// Sends a chain; each of its buffers has a page of its own.
    fn send(&mut self, queue: u16, buffers: &[(&[u8], u32)]) {
        let slot = &mut self.available[usize::from(queue)];
        for (index, (bytes, room)) in (0u16..).zip(buffers) {
            let at = DATA + u64::from(queue) * 0x10000 + u64::from(*slot * 4 + index) * 0x1000;
            self.memory.write(at, bytes).unwrap();
            let next = index + 1 < buffers.len() as u16;
            let flags = u128::from(next) | if bytes.is_empty() { 2 } else { 0 };
            let len = if bytes.is_empty() { *room } else { bytes.len() as u32 };
            let number = u64::from(*slot * 4 + index);
            let raw = u128::from(at) | u128::from(len) << 64 | flags << 96 | u128::from(number + 1) << 112;
            self.memory.write(ring(queue) + number * 16, &raw.to_le_bytes()).unwrap();
        }
        let available = ring(queue) + 0x2000;
        self.memory.write(available + 4 + u64::from(*slot) * 2, &(*slot * 4).to_le_bytes()).unwrap();
        *slot += 1;
        self.memory.write(available + 2, &slot.to_le_bytes()).unwrap();
        self.write(NOTIFY + u64::from(queue) * 4, 2, queue.into());
    }

    fn pairs(&mut self, pairs: u8) {
        self.send(CONTROL_QUEUE, &[(&[4, 0, pairs, 0], 0), (&[], 1)]);
        let used = self.available[usize::from(CONTROL_QUEUE)];
        assert_eq!(self.memory.load_u16(ring(CONTROL_QUEUE) + 0x3002).unwrap(), used);
    }

    fn used(&self, queue: u16, count: u16) {
        let began = Instant::now();
        while self.memory.load_u16(ring(queue) + 0x3002).unwrap() != count {
            assert!(began.elapsed() < Duration::from_secs(20), "queue {queue} has not {count}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Until so much is lent.
    fn lent(&self, count: u64) {
        let began = Instant::now();
        let lent = || self.card.lock().unwrap().inspect()["device"]["lent"].as_u64().unwrap();
        while lent() != count {
            assert!(began.elapsed() < Duration::from_secs(20), "{} are lent, not {count}", lent());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.bell.close();
        // The carrier stops the back end first.
        for thread in self.threads.drain(..1) {
            let _ = thread.join();
        }
        self.over.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Takes what is sent, and fills each buffer with a frame of zeroes, unless it is held.
fn serve(mut back_end: Backend, hold: &AtomicBool, over: &AtomicBool) {
    while !over.load(Ordering::SeqCst) && back_end.serve().is_ok() {
        let (_, queues) = back_end.parts();
        for (number, queue) in queues.iter_mut().enumerate() {
            let Some(ring) = queue.ring().filter(|_| !hold.load(Ordering::SeqCst)) else { continue };
            let count = ring.available(64).unwrap();
            for ahead in 0..count {
                let head = ring.head(ahead);
                ring.give(head, if number & 1 == 0 { 72 } else { 0 });
            }
            ring.take(count);
            if count > 0 && ring.publish() {
                queue.call().unwrap();
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_was_sent_before_a_pair_was_switched_off_comes_back() {
    let mut guest = Guest::new();
    guest.hold.store(true, Ordering::SeqCst);
    guest.send(3, &[(&[1; 72], 0)]);
    guest.send(1, &[(&[1; 72], 0)]);
    guest.lent(2);
    guest.pairs(1);
    guest.hold.store(false, Ordering::SeqCst);
    guest.used(3, 1);
    guest.used(1, 1);
    guest.lent(0);
}

#[test]
fn a_card_that_is_no_bus_master_for_a_while_keeps_its_buffers() {
    let mut guest = Guest::new();
    guest.hold.store(true, Ordering::SeqCst);
    guest.send(0, &[(&[], 2000)]);
    guest.send(1, &[(&[1; 72], 0)]);
    guest.lent(2);
    guest.set_command(command::MEMORY);
    guest.hold.store(false, Ordering::SeqCst);
    thread::sleep(Duration::from_millis(50));
    guest.set_command(command::MEMORY | command::BUS_MASTER);
    guest.used(0, 1);
    guest.used(1, 1);
}

/// What is said, as it is said.
fn heard() -> (Receiver<Option<String>>, impl Fn(Option<String>) + Send + 'static) {
    let (says, hears) = channel();
    (hears, move |why| says.send(why).unwrap())
}

#[test]
fn who_is_cut_off_hears_why_and_when_it_is_over() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("socket");
    let (hears, tell) = heard();
    let mut guest = Guest::on(BackEnd::Socket(path.clone()), tell);
    let next = || hears.recv_timeout(Duration::from_secs(5)).unwrap();
    guest.send(1, &[(&[1; 72], 0)]);
    guest.used(1, 1);
    guest.over.store(true, Ordering::SeqCst);
    assert!(next().is_some_and(|why| why.contains("closed")));
    assert!(next().is_some_and(|why| why.contains("No such file")));
    // The same again is not said again.
    assert!(hears.recv_timeout(Duration::from_millis(1200)).is_err());
    let listener = UnixListener::bind(&path).unwrap();
    let (hold, over) = (guest.hold.clone(), Arc::new(AtomicBool::new(false)));
    let ends = over.clone();
    let back_end = thread::spawn(move || serve(Backend::new(listener.accept().unwrap().0), &hold, &ends));
    assert_eq!(next(), None);
    guest.send(1, &[(&[1; 72], 0)]);
    guest.used(1, 2);
    over.store(true, Ordering::SeqCst);
    back_end.join().unwrap();
}

/// Somebody listens, and says nothing.
#[test]
fn who_does_not_let_it_in_does_not_hold_it_up() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let port = ("p".to_owned(), Box::default());
    let switch = BackEnd::Switch { control: path.clone(), port: port.0, spec: port.1 };
    for back_end in [BackEnd::Socket(path), switch] {
        let (hears, tell) = heard();
        let guest = Guest::on(back_end, tell);
        guest.over.store(true, Ordering::SeqCst);
        assert!(hears.recv_timeout(Duration::from_secs(5)).unwrap().is_some());
        thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        drop(guest);
        assert!(begin.elapsed() < Duration::from_millis(2500), "{:?}", begin.elapsed());
    }
}
