//! Frames for people to look at, as pcapng (the IETF's draft-ietf-opsawg-pcapng): each port an interface, each frame with the
//! moment, the direction, and why it was dropped, if it was.

use super::queue::Waiting;
use super::reason::{NAMES, Reason};
use super::table::PortNumber;

/// Bytes that wait for a reader.
pub(crate) const BUFFER_MAX: usize = 8 << 20;
/// Bytes of a frame, unless said otherwise.
pub const SNAP_DEFAULT: u32 = 65_535 + 22;

mod block {
    pub const SECTION: u32 = 0x0a0d_0d0a;
    pub const INTERFACE: u32 = 1;
    pub const STATISTICS: u32 = 5;
    pub const PACKET: u32 = 6;
    pub const BYTE_ORDER: u32 = 0x1a2b_3c4d;
}

mod option {
    pub const END: u16 = 0;
    pub const COMMENT: u16 = 1;
    pub const USER_APPLICATION: u16 = 4;
    pub const INTERFACE_NAME: u16 = 2;
    pub const TIME_RESOLUTION: u16 = 9;
    pub const PACKET_FLAGS: u16 = 2;
    pub const INTERFACE_DROPPED: u16 = 5;
}

const LINK_ETHERNET: u16 = 1;

/// From the port's point of view as tcpdump on its host would have it: In came from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the port into the switch.
    In,
    /// From the switch to the port.
    Out,
}

fn padded(bytes: &[u8], to: &mut Vec<u8>) {
    to.extend_from_slice(bytes);
    let end = to.len().next_multiple_of(4);
    to.resize(end, 0);
}

fn add_option(code: u16, value: &[u8], to: &mut Vec<u8>) {
    to.extend(code.to_le_bytes());
    to.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    padded(value, to);
}

fn add_block(kind: u32, body: &[u8], to: &mut Vec<u8>) {
    let len = u32::try_from(body.len().saturating_add(12)).unwrap_or(u32::MAX).to_le_bytes();
    to.extend(kind.to_le_bytes());
    to.extend(len);
    to.extend_from_slice(body);
    to.extend(len);
}

/// Frames of an interface that found no room, because nobody took the others.
#[derive(Debug, Clone, Copy, Default)]
struct Missed {
    count: u64,
    /// When there was the last that the file does not know of.
    untold: Option<u64>,
}

/// Where a block belongs: an interface, and a moment.
fn place(interface: u32, at: u64) -> Vec<u8> {
    [interface.to_le_bytes(), ((at >> 32) as u32).to_le_bytes(), (at as u32).to_le_bytes()].concat()
}

/// A pcapng file that is being written, and read as it grows.
#[derive(Debug)]
pub struct Pcapng {
    bytes: Vec<u8>,
    snap: u32,
    interfaces: Vec<Missed>,
    frames: u64,
}

impl Pcapng {
    /// One with frames cut after `snap` bytes.
    pub fn new(snap: u32) -> Self {
        let mut body = block::BYTE_ORDER.to_le_bytes().to_vec();
        // Version 1.0, of unknown length.
        body.extend([1, 0, 0, 0]);
        body.extend(u64::MAX.to_le_bytes());
        add_option(option::USER_APPLICATION, b"yado", &mut body);
        add_option(option::END, &[], &mut body);
        let mut bytes = Vec::new();
        add_block(block::SECTION, &body, &mut bytes);
        Self { bytes, snap, interfaces: Vec::new(), frames: 0 }
    }

    /// Declares the next interface; they are numbered from 0.
    pub fn interface(&mut self, name: &str) {
        let mut body = LINK_ETHERNET.to_le_bytes().to_vec();
        body.extend([0, 0]);
        body.extend(self.snap.to_le_bytes());
        add_option(option::INTERFACE_NAME, name.as_bytes(), &mut body);
        // 10^-9 seconds.
        add_option(option::TIME_RESOLUTION, &[9], &mut body);
        add_option(option::END, &[], &mut body);
        add_block(block::INTERFACE, &body, &mut self.bytes);
        self.interfaces.push(Missed::default());
    }

    /// Adds a frame of an interface, at so many nanoseconds since 1970, if there is room.
    pub fn frame(
        &mut self,
        interface: u32,
        at: u64,
        direction: Direction,
        parts: [&[u8]; 3],
        comment: Option<&str>,
    ) {
        if self.bytes.len() > BUFFER_MAX {
            if let Some(missed) = self.interfaces.get_mut(interface as usize) {
                *missed = Missed { count: missed.count.wrapping_add(1), untold: Some(at) };
            }
            return;
        }
        self.frames = self.frames.wrapping_add(1);
        let len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
        let mut data = parts.concat();
        data.truncate(self.snap as usize);
        let mut body = place(interface, at);
        body.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
        body.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        padded(&data, &mut body);
        let flags: u32 = if direction == Direction::In { 1 } else { 2 };
        add_option(option::PACKET_FLAGS, &flags.to_le_bytes(), &mut body);
        if let Some(comment) = comment {
            add_option(option::COMMENT, comment.as_bytes(), &mut body);
        }
        add_option(option::END, &[], &mut body);
        add_block(block::PACKET, &body, &mut self.bytes);
    }

    /// What nobody has taken yet.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Moves what nobody has taken yet into an empty place. What is missing behind it is said first of what comes next (4.6).
    pub fn take(&mut self, into: &mut Vec<u8>) {
        std::mem::swap(&mut self.bytes, into);
        self.bytes.clear();
        for (number, missed) in (0u32..).zip(&mut self.interfaces) {
            let Some(at) = missed.untold.take() else { continue };
            let mut body = place(number, at);
            add_option(option::INTERFACE_DROPPED, &missed.count.to_le_bytes(), &mut body);
            add_option(option::END, &[], &mut body);
            add_block(block::STATISTICS, &body, &mut self.bytes);
        }
    }

    /// Frames in it, and frames that found no room.
    pub fn counts(&self) -> (u64, u64) {
        (self.frames, self.interfaces.iter().fold(0, |sum, missed| sum.wrapping_add(missed.count)))
    }
}

/// A capture of some ports.
#[derive(Debug)]
pub struct Capture {
    ports: Vec<PortNumber>,
    file: Pcapng,
    /// From the switch's clock to nanoseconds since 1970.
    epoch: u64,
}

impl Capture {
    /// Of these ports, by number and name. `epoch` is what the switch's clock read at, in nanoseconds since 1970, when it was 0.
    pub fn new(ports: &[(PortNumber, String)], snap: u32, epoch: u64) -> Self {
        let mut file = Pcapng::new(snap);
        ports.iter().for_each(|(_, name)| file.interface(name));
        Self { ports: ports.iter().map(|(number, _)| *number).collect(), file, epoch }
    }

    /// Whether it is of a port.
    pub fn wants(&self, port: PortNumber) -> bool {
        self.ports.contains(&port)
    }

    /// A port is gone; its number may be another one's soon.
    pub fn forget(&mut self, port: PortNumber) {
        self.ports.iter_mut().filter(|number| **number == port).for_each(|number| *number = PortNumber::MAX);
    }

    /// Adds a frame.
    pub fn record(
        &mut self,
        port: PortNumber,
        direction: Direction,
        frame: &Waiting,
        dropped: Option<Reason>,
    ) {
        let Some(interface) = self.ports.iter().position(|number| *number == port) else { return };
        // Inside the switch tags are apart from frames; who looks wants to see them.
        let (macs, rest) = frame.bytes.split_at(frame.bytes.len().min(12));
        let control = frame.vlan & 0xfff | u16::from(frame.priority) << 13;
        let tag = [super::vlan::TAG.to_be_bytes(), control.to_be_bytes()].concat();
        let tag = if frame.vlan > 1 { tag.as_slice() } else { &[] };
        let comment =
            dropped.and_then(|reason| NAMES.get(reason as usize)).map(|name| format!("dropped: {name}"));
        let at = self.epoch.saturating_add(frame.since);
        let interface = u32::try_from(interface).unwrap_or(0);
        self.file.frame(interface, at, direction, [macs, tag, rest], comment.as_deref());
    }

    /// For people.
    pub fn inspect(&self) -> serde_json::Value {
        let (frames, missed) = self.file.counts();
        serde_json::json!({ "frames": frames, "missed": missed })
    }

    /// What there is to be read.
    pub fn file(&mut self) -> &mut Pcapng {
        &mut self.file
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// Kinds of blocks, with their bodies.
    fn blocks(bytes: &[u8]) -> Vec<(u32, &[u8])> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (mut list, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let len = word(at + 4) as usize;
            list.push((word(at), &bytes[at + 8..at + len - 4]));
            at += len;
        }
        list
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut file = Pcapng::new(SNAP_DEFAULT);
        ["a", "b"].into_iter().for_each(|name| file.interface(name));
        let mut bytes = Vec::new();
        file.take(&mut bytes);
        assert!(file.bytes().is_empty(), "nothing is missing");
        let frame = vec![7; 60_000];
        let add = |file: &mut Pcapng, at| file.frame(1, at, Direction::In, [&frame, &[], &[]], None);
        (0..150).for_each(|at| add(&mut file, 5 << 32 | at));
        let (frames, missed) = file.counts();
        assert_eq!((frames, missed), (140, 10));
        let mut bytes = Vec::new();
        file.take(&mut bytes);
        assert!(blocks(&bytes).iter().all(|(kind, _)| *kind == block::PACKET));
        add(&mut file, 6 << 32);
        let mut bytes = Vec::new();
        file.take(&mut bytes);
        let list = blocks(&bytes);
        assert_eq!(
            list.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
            [block::STATISTICS, block::PACKET]
        );
        let said =
            [&1u32.to_le_bytes()[..], &5u32.to_le_bytes(), &149u32.to_le_bytes(), &[5, 0, 8, 0, 10]].concat();
        assert_eq!(list[0].1[..said.len()], said);
        assert!(file.bytes().is_empty(), "once");
    }
}
