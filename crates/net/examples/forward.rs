//! What the switch's forwarding core takes for a frame, alone on one CPU: two drivers and the switch take turns in one thread, and only
//! the switch's turns are timed, each by itself, so that a busy host disturbs few of them. `forward [BYTES]`: frames of this length alone.
//! See docs/benchmarks/network.md.

use net::switch::{Link, PortSpec, Switch};
use net::vhost::{Backend, Frontend, GuestRegion, Segment, feature};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

const FEATURES: u64 = feature::VERSION_1 | feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
const BURST: u32 = 32;
const BUFFERS: u32 = 1024;
const MEMORY: u64 = 256 << 20;
const TURNS: usize = 20_000;

struct Guest {
    front: Frontend,
    memory: File,
    next: u32,
    frame: u32,
    buffer: u32,
}

/// A guest with buffers of `buffer` bytes that sends frames of `frame` bytes, connected to a port.
fn guest(
    switch: &mut Switch,
    name: &str,
    frame: u32,
    buffer: u32,
) -> Result<Guest, Box<dyn std::error::Error>> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut backend = Backend::new(theirs);
    let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?);
    memory.set_len(MEMORY)?;
    let region = memory.try_clone()?;
    let driver = std::thread::spawn(move || -> Result<Frontend, net::vhost::Error> {
        let mut front = Frontend::new(ours, 2, 1024)?;
        let region = GuestRegion { guest: 0, len: MEMORY, file: region.as_fd(), offset: 0 };
        front.start(FEATURES, &[region], 2)?;
        front.enable(0, true)?;
        front.enable(1, true)?;
        front.rings_max()?;
        Ok(front)
    });
    while !driver.is_finished() {
        backend.serve()?;
        std::thread::yield_now();
    }
    let front = driver.join().map_err(|_| "the driver's thread failed")??;
    let port = switch.add(name, PortSpec { trusted: true, ..PortSpec::default() }).ok_or("too many ports")?;
    switch.port_mut(port).ok_or("no port")?.link = Link::Guest(Box::new(backend));
    let mut guest = Guest { front, memory, next: 0, frame, buffer };
    for number in 0..BUFFERS {
        guest.post(number);
    }
    guest.front.ring(0).ok_or("no ring")?.publish();
    Ok(guest)
}

impl Guest {
    fn post(&mut self, number: u32) {
        let segment = Segment { address: u64::from(number) * u64::from(self.buffer), len: self.buffer };
        if let Some(ring) = self.front.ring(0) {
            ring.post(number, &[segment], true);
        }
    }

    /// Sends a burst from its own address to another.
    fn send(&mut self, to: [u8; 6], from: [u8; 6], write: bool) -> std::io::Result<()> {
        for _ in 0..BURST {
            let place = (MEMORY / 2) + u64::from(self.next % 512) * 0x1_1000;
            self.next = self.next.wrapping_add(1);
            if write {
                let frame = [&[0; 12][..], &to, &from, &[8, 0, 0x45, 0]].concat();
                self.memory.write_all_at(&frame, place)?;
            }
            let segment = Segment { address: place, len: self.frame + 12 };
            if let Some(ring) = self.front.ring(1) {
                ring.post(0, &[segment], false);
            }
        }
        if let Some(ring) = self.front.ring(1) {
            ring.publish();
        }
        Ok(())
    }

    /// Takes back what was sent, and gives new buffers for what was received; answers how many those were.
    fn collect(&mut self) -> Result<u32, net::vhost::Error> {
        let mut count = 0;
        while self.front.ring(1).is_some_and(|ring| matches!(ring.collect(), Ok(Some(_)))) {}
        while let Some(Some((number, _))) =
            self.front.ring(0).map(net::vhost::DriverRing::collect).transpose()?
        {
            self.post(number);
            count += 1;
        }
        if let Some(ring) = self.front.ring(0) {
            ring.publish();
        }
        Ok(count)
    }
}

/// Nanoseconds for a frame: the best turn, and the middle one.
fn measure(frame: u32, buffer: u32, others: u32) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let mut switch = Switch::default();
    let (a, b) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut one = guest(&mut switch, "a", frame, buffer)?;
    let mut two = guest(&mut switch, "b", frame, buffer)?;
    for port in 0..others {
        switch.add(&format!("p{port}"), PortSpec::default());
    }
    let now = Instant::now();
    let clock = || u64::try_from(now.elapsed().as_nanos()).unwrap_or(0);
    let (first, second) = (0, 1);
    two.send(a, b, true)?;
    switch.waken(second);
    switch.turn(clock(), 0);
    one.collect()?;
    two.collect()?;
    let mut times = Vec::with_capacity(TURNS);
    for turn in 0..TURNS {
        one.send(b, a, turn < 32)?;
        switch.waken(first);
        let begin = Instant::now();
        switch.turn(clock(), 0);
        times.push(begin.elapsed().as_nanos() as f64 / f64::from(BURST));
        one.collect()?;
        let got = two.collect()?;
        let expected = BURST * (frame + 12).div_ceil(buffer);
        if got != expected {
            return Err(format!("{got} buffers came, not {expected}: {}", switch.inspect()).into());
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(0.0);
    Ok((at(1), at(50)))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let only: Option<u32> = std::env::args().nth(1).map(|bytes| bytes.parse()).transpose()?;
    println!("{:>8}  {:>8}  {:>8}  {:>14}", "bytes", "best ns", "middle", "frames/s (M)");
    for (frame, buffer, others) in [(60, 2048, 0), (60, 2048, 254), (1514, 2048, 0), (65_000, 65_536, 0)] {
        if only.is_some_and(|bytes| bytes != frame || others > 0) {
            continue;
        }
        let (best, middle) = measure(frame, buffer, others)?;
        let about = if others > 0 { format!(" with {} ports", others + 2) } else { String::new() };
        println!("{frame:>8}  {best:>8.1}  {middle:>8.1}  {:>14.2}{about}", 1000.0 / middle);
    }
    Ok(())
}
