//! Numbers of the console device (5.3).

/// Device ID (5).
pub const TYPE: u16 = 3;

/// The size of the console is known (5.3.3).
pub const F_SIZE: u64 = 1 << 0;
/// Ports other than the first, and control queues.
pub const F_MULTIPORT: u64 = 1 << 1;
/// A register that prints a byte.
pub const F_EMERG_WRITE: u64 = 1 << 2;

/// Offset of that register in the configuration space (5.3.4).
pub const EMERG_WRITE: u64 = 8;

/// Control queue, to the driver (5.3.2).
pub const CONTROL_RX: u16 = 2;
/// Control queue, from the driver.
pub const CONTROL_TX: u16 = 3;
/// The most ports, so that their queues stay few (Linux's driver has the same limit).
pub const PORTS_MAX: usize = 31;

/// Bytes of a control message's header.
pub const CONTROL_LEN: usize = 8;

/// Control events (5.3.6.2).
pub mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// The queue that carries bytes of `port` to the driver; the next one carries those from it (5.3.2).
pub fn receive_queue(port: u32) -> u16 {
    match u16::try_from(port) {
        Ok(0) => 0,
        Ok(port) => port.saturating_mul(2).saturating_add(2),
        Err(_) => u16::MAX,
    }
}

/// The queue that carries bytes of `port` from the driver.
pub fn transmit_queue(port: u32) -> u16 {
    receive_queue(port).saturating_add(1)
}

/// The port that a queue belongs to; `None` for the control queues.
pub fn port_of(queue: u16) -> Option<u32> {
    match queue {
        0 | 1 => Some(0),
        CONTROL_RX | CONTROL_TX => None,
        _ => Some(u32::from(queue.saturating_sub(2) >> 1)),
    }
}

/// A control message: header, then what the event adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    pub port: u32,
    pub event: u16,
    pub value: u16,
    pub more: Vec<u8>,
}

impl Control {
    pub fn new(port: u32, event: u16, value: u16) -> Self {
        Self { port, event, value, more: Vec::new() }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.more.len().saturating_add(CONTROL_LEN));
        bytes.extend(self.port.to_le_bytes());
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(&self.more);
        bytes
    }

    pub fn decode(header: [u8; CONTROL_LEN]) -> Self {
        let word = u64::from_le_bytes(header);
        Self::new(word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }
}
