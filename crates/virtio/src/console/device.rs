//! The console device: ports, their bytes, and the talk on the control queues.
//!
//! A port is *unknown* to the driver until it has said PORT_READY; *open* in the guest while a program holds it (the
//! console is open as soon as the driver made it a console), and *attended* while somebody holds our end. Bytes are
//! offered to open ports only: Linux's driver throws away what arrives at others. What the guest sends waits in a bounded
//! buffer. When that is full, an attended port leaves the rest in the guest's queue until it is drained; an unattended
//! port forgets the oldest bytes, since Linux's console spins until its output is taken and must not hang for want of a
//! reader.

use super::spec::{self, CONTROL_LEN, CONTROL_RX, CONTROL_TX, Control, event, receive_queue, transmit_queue};
use crate::queue::{Chain, RingError};
use crate::transport::{Device, Pci, Queues};
use device::serial::Endpoint;
use device::{MsiSink, Notify};
use memory::GuestMemory;
use serde_json::{Value, json};
use std::collections::VecDeque;

/// The port that is the guest's console; named ports follow it from 1 on.
pub const CONSOLE_PORT: u32 = 0;
/// Bytes from the guest that wait on a port.
const OUTPUT_MAX: usize = 64 * 1024;
/// Entries of a port's queues: Linux fills the whole receive queue with pages.
const QUEUE_SIZE: u16 = 64;
/// Messages that wait for the driver before its own are left in their queue. One of its messages can cause as many
/// answers as there are ports.
const CONTROL_MAX: usize = 64;

/// A console device on the PCI bus.
pub type Console = Pci<ConsoleDevice>;

#[derive(Debug, Default)]
struct Port {
    name: Option<String>,
    /// The driver has set the port up.
    ready: bool,
    open: bool,
    attended: bool,
    output: VecDeque<u8>,
    /// The chain being taken into `output`, and how many of its bytes are.
    sending: Option<(Chain, u64)>,
    /// The last offer was not taken whole.
    starved: bool,
}

/// What is behind the queues of a [`Console`].
#[derive(Debug)]
pub struct ConsoleDevice {
    ports: Vec<Port>,
    multiport: bool,
    control: VecDeque<Control>,
    columns: u16,
    rows: u16,
    notify: Notify,
}

impl Pci<ConsoleDevice> {
    /// A console, and a port for each of `names` (at most 30) numbered from 1 on. `notify` tells the holders of ports
    /// that output has arrived or that a port takes input again.
    pub fn new(memory: GuestMemory, sink: MsiSink, notify: Notify, names: &[&str]) -> Self {
        let named = names.iter().map(|&name| Port { name: Some(name.to_owned()), ..Port::default() });
        let ports = std::iter::once(Port::default()).chain(named).take(spec::PORTS_MAX).collect();
        let device =
            ConsoleDevice { ports, multiport: false, control: VecDeque::new(), columns: 0, rows: 0, notify };
        Self::with_device(device, memory, sink)
    }

    /// Tells the guest the size of its console, in characters.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let device = self.device_mut();
        (device.columns, device.rows) = (columns, rows);
        if device.port(CONSOLE_PORT).is_some_and(|port| port.ready) {
            device.say_size();
        }
        self.config_changed();
        self.run(ConsoleDevice::serve_control);
    }

    /// Whether a program in the guest holds `port`.
    pub fn guest_open(&self, port: u32) -> bool {
        self.live() && self.device().port(port).is_some_and(|port| port.open)
    }
}

impl Endpoint for Pci<ConsoleDevice> {
    fn offer(&mut self, port: u32, bytes: &[u8]) -> usize {
        self.run(|device, queues| device.deliver(port, bytes, queues)).unwrap_or(0)
    }

    fn take(&mut self, port: u32, into: &mut Vec<u8>, max: usize) {
        let mut left = max;
        loop {
            let Some(state) = self.device_mut().port_mut(port) else { return };
            let len = left.min(state.output.len());
            into.extend(state.output.drain(..len));
            left = left.saturating_sub(len);
            // Drained: what the guest's queue still holds has room now, even if it is for the next call.
            let arrived = self.run(|device, queues| device.pump(port, queues)).unwrap_or(false);
            if !arrived {
                return;
            }
            if left == 0 {
                self.device().notify.notify();
                return;
            }
        }
    }

    fn connect(&mut self, port: u32, connected: bool) {
        let device = self.device_mut();
        let Some(state) = device.port_mut(port).filter(|port| port.attended != connected) else { return };
        state.attended = connected;
        if state.ready {
            device.say(Control::new(port, event::PORT_OPEN, connected.into()));
        }
        let arrived = self.run(|device, queues| {
            device.serve_control(queues)?;
            device.pump(port, queues)
        });
        if arrived == Some(true) {
            self.device().notify.notify();
        }
    }
}

impl ConsoleDevice {
    fn port(&self, port: u32) -> Option<&Port> {
        self.ports.get(usize::try_from(port).ok()?)
    }

    fn port_mut(&mut self, port: u32) -> Option<&mut Port> {
        self.ports.get_mut(usize::try_from(port).ok()?)
    }

    /// Puts bytes into the guest's buffers; answers how many.
    fn deliver(&mut self, port: u32, bytes: &[u8], queues: &mut Queues) -> Result<usize, RingError> {
        let Some(state) = self.port_mut(port) else { return Ok(0) };
        let queue = receive_queue(port);
        let mut done = 0usize;
        if !state.open {
            return Ok(0);
        }
        state.starved = false;
        for _ in 0..queues.burst(queue) {
            let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else { return Ok(done) };
            let Some(chain) = queues.pop(queue)? else {
                state.starved = true;
                return Ok(done);
            };
            let len = chain.writable.write(queues.memory(), 0, rest)?;
            queues.push(queue, chain.head, u32::try_from(len).unwrap_or(u32::MAX))?;
            done = done.saturating_add(len);
        }
        if done < bytes.len() {
            // There may be more buffers, but this call has done its share.
            self.notify.notify();
        }
        Ok(done)
    }

    /// Moves what the guest has sent on `port` into its buffer; answers whether anything came.
    fn pump(&mut self, port: u32, queues: &mut Queues) -> Result<bool, RingError> {
        let Some(state) = self.port_mut(port) else { return Ok(false) };
        let queue = transmit_queue(port);
        let mut arrived = false;
        for _ in 0..queues.burst(queue) {
            let (chain, done) = match state.sending.take() {
                Some(sending) => sending,
                None => match queues.pop(queue)? {
                    Some(chain) => (chain, 0),
                    None => return Ok(arrived),
                },
            };
            let len = chain.readable.len();
            let before = done;
            let done = state.absorb(&chain, before, queues.memory())?;
            arrived |= done > before;
            if done < len {
                state.sending = Some((chain, done));
                return Ok(arrived);
            }
            queues.push(queue, chain.head, 0)?;
        }
        queues.again(queue);
        self.notify.notify();
        Ok(arrived)
    }

    /// Sends what waits for the driver, and hears what it has to say as long as the answers have room.
    fn serve_control(&mut self, queues: &mut Queues) -> Result<(), RingError> {
        if !self.multiport {
            self.control.clear();
            return Ok(());
        }
        for _ in 0..queues.burst(CONTROL_TX) {
            self.send_control(queues)?;
            if self.control.len() >= CONTROL_MAX {
                return Ok(());
            }
            let Some(chain) = queues.pop(CONTROL_TX)? else { return Ok(()) };
            let mut header = [0; CONTROL_LEN];
            if chain.readable.read(queues.memory(), 0, &mut header)? == CONTROL_LEN {
                self.hear(&Control::decode(header));
            }
            queues.push(CONTROL_TX, chain.head, 0)?;
        }
        self.send_control(queues)?;
        queues.again(CONTROL_TX);
        Ok(())
    }

    fn send_control(&mut self, queues: &mut Queues) -> Result<(), RingError> {
        while let Some(message) = self.control.front() {
            let Some(chain) = queues.pop(CONTROL_RX)? else { break };
            let len = chain.writable.write(queues.memory(), 0, &message.encode())?;
            queues.push(CONTROL_RX, chain.head, u32::try_from(len).unwrap_or(u32::MAX))?;
            self.control.pop_front();
        }
        Ok(())
    }

    /// A message of the driver (5.3.6.2).
    fn hear(&mut self, message: &Control) {
        let (port, yes) = (message.port, message.value == 1);
        match message.event {
            event::DEVICE_READY if yes => {
                for (port, _) in (0u32..).zip(&self.ports) {
                    self.control.push_back(Control::new(port, event::PORT_ADD, 1));
                }
            }
            event::PORT_READY => self.port_ready(port, yes),
            event::PORT_OPEN => {
                if let Some(state) = self.port_mut(port) {
                    state.open = yes;
                    self.notify.notify();
                }
            }
            _ => {}
        }
    }

    fn port_ready(&mut self, port: u32, ready: bool) {
        let Some(state) = self.port_mut(port) else { return };
        state.ready = ready;
        let (name, attended) = (state.name.clone(), state.attended);
        if !ready {
            return;
        }
        if port == CONSOLE_PORT {
            self.say(Control::new(port, event::CONSOLE_PORT, 1));
            if self.columns != 0 {
                self.say_size();
            }
        }
        if let Some(name) = name {
            self.say(Control { more: name.into_bytes(), ..Control::new(port, event::PORT_NAME, 1) });
        }
        if attended {
            self.say(Control::new(port, event::PORT_OPEN, 1));
        }
    }

    /// Queues a message; an older one of the same kind that has not left yet is out of date.
    fn say(&mut self, message: Control) {
        self.control.retain(|old| (old.port, old.event) != (message.port, message.event));
        self.control.push_back(message);
    }

    fn say_size(&mut self) {
        // 5.3.6.2 has columns first, but Linux's driver (6.1 and 6.12 alike) reads rows first.
        let mut more = self.rows.to_le_bytes().to_vec();
        more.extend(self.columns.to_le_bytes());
        self.say(Control { more, ..Control::new(CONSOLE_PORT, event::RESIZE, 1) });
    }
}

impl Port {
    /// Takes bytes of `chain` from byte `done` on; answers where it stopped.
    fn absorb(&mut self, chain: &Chain, mut done: u64, memory: &GuestMemory) -> Result<u64, RingError> {
        let len = chain.readable.len();
        if !self.attended {
            // Only the end of a long text would stay; do not read the rest of it.
            done = done.max(len.saturating_sub(OUTPUT_MAX as u64));
        }
        let left = usize::try_from(len.saturating_sub(done)).unwrap_or(usize::MAX);
        let room = OUTPUT_MAX.saturating_sub(self.output.len());
        if !self.attended && room < left {
            let old = left.saturating_sub(room).min(self.output.len());
            self.output.drain(..old);
        }
        let part = left.min(OUTPUT_MAX.saturating_sub(self.output.len()));
        let mut bytes = vec![0; part];
        let read = chain.readable.read(memory, done, &mut bytes)?;
        self.output.extend(bytes);
        Ok(done.saturating_add(read as u64))
    }
}

impl Device for ConsoleDevice {
    const NAME: &'static str = "virtio-console";
    const TYPE: u16 = spec::TYPE;
    const CLASS: (u8, u8) = (0x07, 0x80);

    fn features(&self) -> u64 {
        spec::F_SIZE | spec::F_MULTIPORT | spec::F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // A pair per port and the control pair.
        vec![QUEUE_SIZE; self.ports.len().saturating_add(1).saturating_mul(2)]
    }

    fn config(&self) -> Vec<u8> {
        let mut image = Vec::with_capacity(12);
        image.extend(self.columns.to_le_bytes());
        image.extend(self.rows.to_le_bytes());
        image.extend(u32::try_from(self.ports.len()).unwrap_or(u32::MAX).to_le_bytes());
        image.extend([0; 4]);
        image
    }

    fn config_written(&mut self, offset: u64, bytes: &[u8]) {
        let (spec::EMERG_WRITE, Some(&byte), Some(port)) = (offset, bytes.first(), self.ports.first_mut())
        else {
            return;
        };
        if port.output.len() < OUTPUT_MAX {
            port.output.push_back(byte);
            self.notify.notify();
        }
    }

    fn activate(&mut self, features: u64) {
        self.multiport = features & spec::F_MULTIPORT != 0;
        if let (false, Some(port)) = (self.multiport, self.ports.first_mut()) {
            port.open = true;
            self.notify.notify();
        }
    }

    fn notified(&mut self, queue: u16, queues: &mut Queues) -> Result<(), RingError> {
        let Some(port) = spec::port_of(queue) else { return self.serve_control(queues) };
        if queue == transmit_queue(port) {
            if self.pump(port, queues)? {
                self.notify.notify();
            }
        } else if let Some(state) = self.port_mut(port)
            && std::mem::take(&mut state.starved)
        {
            self.notify.notify();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.control.clear();
        self.multiport = false;
        for port in &mut self.ports {
            // What the guest sent before it went down is still worth reading.
            (port.ready, port.open, port.starved, port.sending) = (false, false, false, None);
        }
    }

    fn inspect(&self) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                json!({ "name": port.name, "ready": port.ready, "open": port.open, "attended": port.attended,
                    "output_waiting": port.output.len(), "guest_blocked": port.sending.is_some(),
                    "input_starved": port.starved })
            })
            .collect();
        json!({ "multiport": self.multiport, "columns": self.columns, "rows": self.rows,
            "control_waiting": self.control.len(), "ports": ports })
    }
}
