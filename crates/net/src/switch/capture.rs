//! Frames for people to look at, as pcapng (the IETF's draft-ietf-opsawg-pcapng): each port an interface, each frame with the
//! moment, the direction, and why it was dropped, if it was.

use super::queue::Waiting;
use super::reason::{NAMES, Reason};
use super::table::PortNumber;

/// Bytes that wait for a reader.
const BUFFER_MAX: usize = 8 << 20;
/// Bytes of a frame, unless said otherwise.
pub const SNAP_DEFAULT: u32 = 65_535 + 22;

mod block {
    pub const SECTION: u32 = 0x0a0d_0d0a;
    pub const INTERFACE: u32 = 1;
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

/// A pcapng file that is being written.
#[derive(Debug)]
pub struct Pcapng {
    bytes: Vec<u8>,
    snap: u32,
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
        Self { bytes, snap }
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
    }

    /// Adds a frame of an interface, at so many nanoseconds since 1970.
    pub fn frame(
        &mut self,
        interface: u32,
        at: u64,
        direction: Direction,
        parts: [&[u8]; 3],
        comment: Option<&str>,
    ) {
        let len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
        let mut data = parts.concat();
        data.truncate(self.snap as usize);
        let mut body = interface.to_le_bytes().to_vec();
        body.extend(((at >> 32) as u32).to_le_bytes());
        body.extend((at as u32).to_le_bytes());
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

    /// Moves what nobody has taken yet into an empty place.
    pub fn take(&mut self, into: &mut Vec<u8>) {
        std::mem::swap(&mut self.bytes, into);
        self.bytes.clear();
    }
}

/// A capture of some ports.
#[derive(Debug)]
pub struct Capture {
    ports: Vec<PortNumber>,
    file: Pcapng,
    /// From the switch's clock to nanoseconds since 1970.
    epoch: u64,
    /// Frames in it.
    pub frames: u64,
    /// Frames that found no room because nobody took the others.
    pub missed: u64,
}

impl Capture {
    /// Of these ports, by number and name. `epoch` is what the switch's clock read at, in nanoseconds since 1970, when it was 0.
    pub fn new(ports: &[(PortNumber, String)], snap: u32, epoch: u64) -> Self {
        let mut file = Pcapng::new(snap);
        ports.iter().for_each(|(_, name)| file.interface(name));
        Self { ports: ports.iter().map(|(number, _)| *number).collect(), file, epoch, frames: 0, missed: 0 }
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
        if self.file.bytes().len() > BUFFER_MAX {
            self.missed = self.missed.wrapping_add(1);
            return;
        }
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
        self.frames = self.frames.wrapping_add(1);
    }

    /// What there is to be read.
    pub fn file(&mut self) -> &mut Pcapng {
        &mut self.file
    }
}
