//! Root bus 00 with its host bridge: configuration access, address routing, resource assignment, INTx wires.
//!
//! As a [`Device`], window [`Host::PORTS`] is the 8 ports from 0xcf8 (configuration mechanism 1, PCI 3.0, 3.2.2.3.2;
//! a byte at 0xcf9 is the reset control register) and window [`Host::ECAM`] is the memory-mapped configuration
//! space of bus 0 (1 MiB). BAR accesses go through [`Host::mmio`] and [`Host::port`].

use super::{Bar, BarKind, ConfigSpace, Function, Identity, command};
use crate::locked;
use device::{Access, Device, Line, VmTime};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A function, shared between the bus and whoever serves it.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// Slots on the bus; slot 0 is the host bridge.
const SLOTS: usize = 32;

/// A range of addresses for BARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

impl Window {
    /// Cuts an aligned piece off the start.
    fn take(&mut self, size: u64) -> Option<u64> {
        let end = self.base.checked_add(self.len)?;
        let start = self.base.checked_next_multiple_of(size)?;
        let next = start.checked_add(size)?;
        if next > end || start == 0 {
            return None;
        }
        *self = Self { base: next, len: end.checked_sub(next)? };
        Some(start)
    }
}

/// The windows the board has for BARs.
#[derive(Debug, Clone, Copy, Default)]
struct Windows {
    ports: Window,
    mmio32: Window,
    mmio64: Window,
}

/// An address found on the bus.
#[derive(Clone)]
pub struct Decoded {
    /// Whose it is.
    pub function: SharedFunction,
    /// Which BAR.
    pub bar: u8,
    /// Byte offset in the BAR.
    pub offset: u64,
}

/// A BAR that answers now.
#[derive(Clone)]
struct Route {
    base: u64,
    size: u64,
    bar: u8,
    function: SharedFunction,
}

#[derive(Default)]
struct Routes {
    ports: Vec<Route>,
    mmio: Vec<Route>,
}

/// Four INTx wires, each shared by all slots: high while any slot holds it.
struct Wires {
    gsis: [u8; 4],
    lines: [Line; 4],
    holders: Mutex<[u32; 4]>,
}

struct State {
    slots: [Option<SharedFunction>; SLOTS],
    /// When functions whose configuration space was accessed have their deadlines; whoever accesses a BAR keeps those himself.
    due: [Option<VmTime>; SLOTS],
    /// The last dword written to 0xcf8.
    address: u32,
    windows: Windows,
}

struct Inner {
    state: Mutex<State>,
    routes: RwLock<Routes>,
    wires: Wires,
    /// What a write to 0xcf9 does: handed the value.
    reset_control: Box<dyn Fn(u8) + Send + Sync>,
}

/// The root bus. Cheap to clone; clones are the same bus.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("pci::Host")
    }
}

impl Host {
    /// Window number of ports 0xcf8-0xcff.
    pub const PORTS: u16 = 0;
    /// Window number of the memory-mapped configuration space.
    pub const ECAM: u16 = 1;
    /// Bytes of the ECAM window: one bus.
    pub const ECAM_LEN: u64 = 1 << 20;

    /// A bus with a host bridge in slot 0. `intx` are the four interrupt wires and their GSIs; `reset_control` is
    /// handed what the guest writes to port 0xcf9.
    pub fn new(intx: [(u8, Line); 4], reset_control: impl Fn(u8) + Send + Sync + 'static) -> Self {
        let mut slots: [Option<SharedFunction>; SLOTS] = std::array::from_fn(|_| None);
        if let Some(slot) = slots.first_mut() {
            *slot = Some(Arc::new(Mutex::new(HostBridge::new())));
        }
        let gsis = [intx[0].0, intx[1].0, intx[2].0, intx[3].0];
        let lines = intx.map(|(_, line)| line);
        Self(Arc::new(Inner {
            state: Mutex::new(State { slots, due: [None; SLOTS], address: 0, windows: Windows::default() }),
            routes: RwLock::default(),
            wires: Wires { gsis, lines, holders: Mutex::default() },
            reset_control: Box::new(reset_control),
        }))
    }

    /// Puts `function` into the lowest free slot and wires its pin A. Answers the slot, or `None` if the bus is
    /// full. Call [`Self::assign_resources`] after the last one.
    pub fn attach(&self, function: SharedFunction) -> Option<u8> {
        let slot = {
            let mut state = locked(&self.0.state);
            let slot = state.slots.iter().position(Option::is_none)?;
            *state.slots.get_mut(slot)? = Some(function.clone());
            u8::try_from(slot).ok()?
        };
        let (gsi, line) = self.interrupt_line(slot, 0);
        locked(&function).config_mut().connect_interrupt(0, gsi, line);
        self.rebuild_routes(&locked(&self.0.state));
        Some(slot)
    }

    /// All functions and their slots.
    pub fn functions(&self) -> Vec<(u8, SharedFunction)> {
        let state = locked(&self.0.state);
        (0u8..).zip(&state.slots).filter_map(|(i, f)| Some((i, f.clone()?))).collect()
    }

    /// Which of the four wires pin `pin` (0-3 for A-D) of `slot` is on: PCI's usual swizzle.
    pub fn wire(slot: u8, pin: u8) -> usize {
        usize::from(slot.wrapping_add(pin) & 3)
    }

    /// The GSI and the wire of a slot's pin. The wire is shared: it is high while any slot holds it.
    pub fn interrupt_line(&self, slot: u8, pin: u8) -> (u8, Line) {
        let wire = Self::wire(slot, pin);
        let gsi = self.0.wires.gsis.get(wire).copied().unwrap_or(0);
        let inner = Arc::downgrade(&self.0);
        let bit = 1u32 << (slot & 31);
        let line = Line::new(move |high| {
            let Some(inner) = inner.upgrade() else { return };
            // The wire is set under the lock, so that levels arrive in order.
            let mut holders = locked(&inner.wires.holders);
            let Some(holder) = holders.get_mut(wire) else { return };
            let before = *holder != 0;
            *holder = if high { *holder | bit } else { *holder & !bit };
            if let Some(line) = inner.wires.lines.get(wire)
                && (*holder != 0) != before
            {
                line.set(!before);
            }
        });
        (gsi, line)
    }

    /// Gives every BAR an address and enables decoding, as firmware would: biggest first, memory BARs from `mmio32`
    /// while they fit, then (64-bit ones) from `mmio64`, I/O BARs from `ports`. Answers whether all fit. The
    /// windows are remembered for [`Device::reset`].
    pub fn assign_resources(&self, ports: Window, mmio32: Window, mmio64: Window) -> bool {
        let mut state = locked(&self.0.state);
        state.windows = Windows { ports, mmio32, mmio64 };
        let all = Self::assign(&state);
        self.rebuild_routes(&state);
        all
    }

    fn assign(state: &State) -> bool {
        let Windows { mut ports, mut mmio32, mut mmio64 } = state.windows;
        let mut bars = Vec::new();
        for function in state.slots.iter().flatten() {
            let guard = locked(function);
            bars.extend((0..6u8).filter_map(|i| Some((guard.config().bar(i)?, i, function.clone()))));
        }
        bars.sort_by_key(|(bar, ..)| std::cmp::Reverse(bar.size));
        let mut all = true;
        for (bar, index, function) in bars {
            let base = match bar.kind {
                BarKind::Io => ports.take(bar.size),
                BarKind::Memory32 => mmio32.take(bar.size),
                BarKind::Memory64 { .. } => mmio32.take(bar.size).or_else(|| mmio64.take(bar.size)),
            };
            let Some(base) = base else {
                all = false;
                continue;
            };
            let mut function = locked(&function);
            let config = function.config_mut();
            config.set_bar_base(index, base);
            let enable = if bar.kind == BarKind::Io { command::IO } else { command::MEMORY };
            config.write(0x04, 2, u32::from(config.command() | enable));
        }
        all
    }

    /// The function and BAR at a guest-physical address, if one answers there. Lock the function, then access it.
    pub fn mmio(&self, address: u64) -> Option<Decoded> {
        find(&self.0.routes.read().unwrap_or_else(PoisonError::into_inner).mmio, address)
    }

    /// The function and BAR at an I/O port.
    pub fn port(&self, port: u16) -> Option<Decoded> {
        find(&self.0.routes.read().unwrap_or_else(PoisonError::into_inner).ports, port.into())
    }

    /// Reads configuration space: 1, 2, 4 or 8 bytes. `bdf` is bus << 8 | device << 3 | function.
    pub fn config_read(&self, bdf: u16, offset: u16, size: u8) -> u64 {
        let mut state = locked(&self.0.state);
        let Some(function) = find_function(&state, bdf) else { return u64::MAX };
        let mut function = locked(function);
        function.config_reading(offset);
        let low = u64::from(function.config().read(offset, size.min(4)));
        let high = if size == 8 { function.config().read(offset.wrapping_add(4), 4) } else { 0 };
        let deadline = function.deadline();
        drop(function);
        set_due(&mut state, bdf, deadline);
        low | u64::from(high) << 32
    }

    /// Writes configuration space.
    pub fn config_write(&self, bdf: u16, offset: u16, size: u8, value: u64) {
        let mut state = locked(&self.0.state);
        let Some(function) = find_function(&state, bdf) else { return };
        let deadline = {
            let mut function = locked(function);
            function.config_mut().write(offset, size.min(4), value as u32);
            function.config_written(offset);
            if size == 8 {
                let offset = offset.wrapping_add(4);
                function.config_mut().write(offset, 4, (value >> 32) as u32);
                function.config_written(offset);
            }
            function.deadline()
        };
        set_due(&mut state, bdf, deadline);
        // Only the command register and the BARs change what is decoded.
        if offset < 0x28 {
            self.rebuild_routes(&state);
        }
    }

    fn rebuild_routes(&self, state: &State) {
        let mut routes = Routes::default();
        for function in state.slots.iter().flatten() {
            let guard = locked(function);
            let config = guard.config();
            for bar in 0..6u8 {
                let (Some(Bar { kind, size }), Some(base)) = (config.bar(bar), config.bar_address(bar))
                else {
                    continue;
                };
                let route = Route { base, size, bar, function: function.clone() };
                if kind == BarKind::Io { routes.ports.push(route) } else { routes.mmio.push(route) }
            }
        }
        routes.ports.sort_by_key(|route| route.base);
        routes.mmio.sort_by_key(|route| route.base);
        *self.0.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
    }

    fn ports_read(&self, offset: u64, size: u8) -> u64 {
        let address = locked(&self.0.state).address;
        match offset {
            0 if size == 4 => address.into(),
            4..8 => match mechanism_1(address, offset) {
                Some((bdf, register)) => self.config_read(bdf, register, size),
                None => u64::MAX,
            },
            // The reset control register reads as zero: nothing is being reset.
            1 if size == 1 => 0,
            _ => u64::MAX,
        }
    }

    fn ports_write(&self, offset: u64, size: u8, value: u64) {
        match offset {
            0 if size == 4 => locked(&self.0.state).address = value as u32 & 0x80ff_fffc,
            1 if size == 1 => (self.0.reset_control)(value as u8),
            4..8 => {
                let address = locked(&self.0.state).address;
                if let Some((bdf, register)) = mechanism_1(address, offset) {
                    self.config_write(bdf, register, size, value);
                }
            }
            _ => {}
        }
    }
}

/// Function and register that an access to 0xcfc + n reaches.
fn mechanism_1(address: u32, offset: u64) -> Option<(u16, u16)> {
    let register = (address & 0xfc) as u16 | (offset & 3) as u16;
    (address >> 31 != 0).then_some(((address >> 8) as u16, register))
}

fn find_function(state: &State, bdf: u16) -> Option<&SharedFunction> {
    // Bus 0 only, and every device has one function.
    if bdf >> 8 != 0 || bdf & 7 != 0 {
        return None;
    }
    state.slots.get(usize::from(bdf >> 3))?.as_ref()
}

fn set_due(state: &mut State, bdf: u16, deadline: Option<VmTime>) {
    if let Some(due) = state.due.get_mut(usize::from(bdf >> 3)) {
        *due = deadline;
    }
}

fn find(routes: &[Route], address: u64) -> Option<Decoded> {
    let after = routes.partition_point(|route| route.base <= address);
    let route = routes.get(after.checked_sub(1)?)?;
    let offset = address.checked_sub(route.base)?;
    (offset < route.size).then(|| Decoded { function: route.function.clone(), bar: route.bar, offset })
}

impl Device for Host {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn read(&mut self, access: Access, _now: VmTime) -> u64 {
        let value = match access.window {
            Self::PORTS => self.ports_read(access.offset, access.size),
            Self::ECAM => {
                self.config_read((access.offset >> 12) as u16, (access.offset & 0xfff) as u16, access.size)
            }
            _ => u64::MAX,
        };
        value & access.mask()
    }

    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        match access.window {
            Self::PORTS => self.ports_write(access.offset, access.size, value),
            Self::ECAM => self.config_write(
                (access.offset >> 12) as u16,
                (access.offset & 0xfff) as u16,
                access.size,
                value,
            ),
            _ => {}
        }
    }

    fn deadline(&self) -> Option<VmTime> {
        locked(&self.0.state).due.iter().flatten().min().copied()
    }

    fn tick(&mut self, now: VmTime) {
        let mut state = locked(&self.0.state);
        let State { slots, due, .. } = &mut *state;
        for (function, due) in slots.iter().zip(due) {
            if due.take_if(|at| *at <= now).is_some()
                && let Some(function) = function
            {
                let mut function = locked(function);
                function.tick(now);
                *due = function.deadline();
            }
        }
    }

    /// Resets all functions and gives them their addresses again.
    fn reset(&mut self) {
        let mut state = locked(&self.0.state);
        state.address = 0;
        state.due = [None; SLOTS];
        for function in state.slots.iter().flatten() {
            locked(function).reset();
        }
        Self::assign(&state);
        self.rebuild_routes(&state);
    }

    fn inspect(&self) -> Value {
        let functions: Vec<Value> = self
            .functions()
            .into_iter()
            .map(|(slot, function)| {
                let function = locked(&function);
                json!({ "slot": slot, "name": function.name(), "config": function.config().inspect(),
                    "state": function.inspect() })
            })
            .collect();
        json!({ "functions": functions })
    }
}

/// The bridge between the processors and bus 0: identity only.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // A plain PCI Express host bridge that no kernel has a quirk for.
        let identity = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06, ..Identity::default() };
        Self(ConfigSpace::new(identity))
    }
}

impl Function for HostBridge {
    fn name(&self) -> &'static str {
        "host-bridge"
    }
    fn config(&self) -> &ConfigSpace {
        &self.0
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
    fn bar_read(&mut self, _bar: u8, _offset: u64, _size: u8, _now: VmTime) -> u64 {
        u64::MAX
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, _size: u8, _value: u64, _now: VmTime) {}
    fn reset(&mut self) {
        self.0.reset();
    }
    fn inspect(&self) -> Value {
        Value::Null
    }
}
