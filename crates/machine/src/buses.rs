//! Ports and memory-mapped registers: which device an access belongs to, and its deadline afterwards.
//!
//! Reads of nothing answer all ones, writes to nothing vanish. A port access that no single device covers is split
//! into bytes, as a PC's buses do.
//!
//! Lock order: one device at a time, nothing else held (but see `chipset::pci` for functions).

use crate::clock::Clock;
use crate::timers::Timers;
use chipset::pci::{Decoded, Host, SharedFunction};
use cpu::Space;
use device::{Access, Bus, Device, RangeTaken, VmTime};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A device that many threads reach.
pub(crate) type Shared = Arc<Mutex<dyn Device>>;

/// No deadline.
const NEVER: u64 = u64::MAX;

/// A device on a bus, with its timer slot.
struct Attached {
    device: Shared,
    timer: usize,
    /// The deadline that the timers know, so that they are only told of changes.
    armed: AtomicU64,
}

impl Attached {
    /// Uses the device, then tells the timers if its deadline has changed.
    fn with<R>(&self, timers: &Timers, use_it: impl FnOnce(&mut dyn Device) -> R) -> R {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let result = use_it(&mut *device);
        let deadline = device.deadline();
        let next = deadline.map_or(NEVER, |at| at.0);
        if self.armed.swap(next, Ordering::Relaxed) != next {
            timers.set(self.timer, deadline);
        }
        result
    }
}

/// All buses of a machine.
pub(crate) struct Buses {
    ports: Bus<(usize, u16)>,
    mmio: Bus<(usize, u16)>,
    devices: Vec<Attached>,
    pci: Host,
    timers: Arc<Timers>,
    clock: Arc<Clock>,
    /// Timer slots: vCPUs first, then devices, then PCI functions by slot number.
    first_timer: usize,
}

/// How many devices, with one timer slot each, a board may have.
pub(crate) const DEVICES_MAX: usize = 32;
/// Slots of the PCI bus.
pub(crate) const FUNCTIONS_MAX: usize = 32;

impl Buses {
    /// Empty buses but for `pci`, whose windows are put on them by the board. `cpus` timer slots are the vCPUs'.
    pub(crate) fn new(pci: Host, timers: Arc<Timers>, clock: Arc<Clock>, cpus: usize) -> Self {
        Self {
            ports: Bus::default(),
            mmio: Bus::default(),
            devices: Vec::new(),
            pci,
            timers,
            clock,
            first_timer: cpus,
        }
    }

    /// Adds a device; answers its number.
    pub(crate) fn add(&mut self, device: Shared) -> usize {
        let number = self.devices.len();
        let timer = self.first_timer.saturating_add(number);
        self.devices.push(Attached { device, timer, armed: AtomicU64::new(NEVER) });
        number
    }

    /// Puts a window of a device on a bus.
    pub(crate) fn map(
        &mut self,
        space: Space,
        base: u64,
        len: u64,
        device: usize,
        window: u16,
    ) -> Result<(), RangeTaken> {
        let bus = match space {
            Space::Port => &mut self.ports,
            Space::Mmio => &mut self.mmio,
        };
        bus.insert(base, len, (device, window))
    }

    /// The guest reads.
    pub(crate) fn read(&self, space: Space, address: u64, size: u8) -> u64 {
        let now = self.clock.now();
        self.read_at(space, address, size, now)
    }

    fn read_at(&self, space: Space, address: u64, size: u8, now: VmTime) -> u64 {
        if let Some((device, access)) = self.find(space, address, size) {
            return device.with(&self.timers, |device| device.read(access, now));
        }
        if let Some(Decoded { function, bar, offset }) = self.find_bar(space, address, size) {
            let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
            let value = locked.bar_read(bar, offset, size, now);
            let deadline = locked.deadline();
            drop(locked);
            self.arm_function(&function, deadline);
            return value;
        }
        if space == Space::Port && size > 1 {
            return (0..size).rev().fold(0, |value, byte| {
                let at = address.wrapping_add(byte.into());
                value << 8 | (self.read_at(space, at, 1, now) & 0xff)
            });
        }
        u64::MAX
    }

    /// The guest writes.
    pub(crate) fn write(&self, space: Space, address: u64, size: u8, value: u64) {
        let now = self.clock.now();
        self.write_at(space, address, size, value, now);
    }

    fn write_at(&self, space: Space, address: u64, size: u8, value: u64, now: VmTime) {
        if let Some((device, access)) = self.find(space, address, size) {
            return device.with(&self.timers, |device| device.write(access, value & access.mask(), now));
        }
        if let Some(Decoded { function, bar, offset }) = self.find_bar(space, address, size) {
            let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
            locked.bar_write(bar, offset, size, value, now);
            let deadline = locked.deadline();
            drop(locked);
            return self.arm_function(&function, deadline);
        }
        if space == Space::Port && size > 1 {
            for byte in 0..size {
                let shift = u32::from(byte).wrapping_mul(8);
                let at = address.wrapping_add(byte.into());
                self.write_at(space, at, 1, value.wrapping_shr(shift) & 0xff, now);
            }
        }
    }

    fn find(&self, space: Space, address: u64, size: u8) -> Option<(&Attached, Access)> {
        let bus = match space {
            Space::Port => &self.ports,
            Space::Mmio => &self.mmio,
        };
        let (&(device, window), offset) = bus.find(address, size.into())?;
        Some((self.devices.get(device)?, Access { window, offset, size }))
    }

    /// The BAR that holds the whole access.
    fn find_bar(&self, space: Space, address: u64, size: u8) -> Option<Decoded> {
        let find = |address: u64| match space {
            Space::Port => u16::try_from(address).ok().and_then(|port| self.pci.port(port)),
            Space::Mmio => self.pci.mmio(address),
        };
        let first = find(address)?;
        let last = find(address.checked_add(u64::from(size).saturating_sub(1))?)?;
        let same = Arc::ptr_eq(&first.function, &last.function) && first.bar == last.bar;
        same.then_some(first)
    }

    /// Functions rarely have deadlines, so their slot is searched for only if there is one.
    fn arm_function(&self, function: &SharedFunction, deadline: Option<VmTime>) {
        let Some(deadline) = deadline else { return };
        let slots = self.pci.functions();
        if let Some((slot, _)) = slots.iter().find(|(_, other)| Arc::ptr_eq(function, other)) {
            let first = self.first_timer.saturating_add(DEVICES_MAX);
            self.timers.set(first.saturating_add(usize::from(*slot)), Some(deadline));
        }
    }

    /// A deadline that is not a vCPU's has come.
    pub(crate) fn tick(&self, timer: usize) {
        let now = self.clock.now();
        let Some(number) = timer.checked_sub(self.first_timer) else { return };
        if let Some(attached) = self.devices.get(number) {
            attached.armed.store(NEVER, Ordering::Relaxed);
            return attached.with(&self.timers, |device| device.tick(now));
        }
        let Some(slot) = number.checked_sub(DEVICES_MAX) else { return };
        let functions = self.pci.functions();
        if let Some((_, function)) = functions.iter().find(|(number, _)| usize::from(*number) == slot) {
            let mut locked = function.lock().unwrap_or_else(PoisonError::into_inner);
            locked.tick(now);
            let deadline = locked.deadline();
            drop(locked);
            self.arm_function(function, deadline);
        }
    }

    /// Every device and PCI function is as after power-up.
    pub(crate) fn reset(&self) {
        for attached in &self.devices {
            attached.with(&self.timers, |device| device.reset());
        }
        // The bus itself is one of the devices, and has reset its functions; their deadlines were their drivers'.
        let functions = self.first_timer.saturating_add(DEVICES_MAX);
        for slot in 0..FUNCTIONS_MAX {
            self.timers.set(functions.saturating_add(slot), None);
        }
    }

    /// Everything's live state.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        let mut tree = serde_json::Map::new();
        for attached in &self.devices {
            let device = attached.device.lock().unwrap_or_else(PoisonError::into_inner);
            insert_unique(&mut tree, device.name(), device.inspect());
        }
        for (slot, function) in self.pci.functions() {
            let function = function.lock().unwrap_or_else(PoisonError::into_inner);
            let state = serde_json::json!({
                "pci": function.config().inspect(), "device": function.inspect(), "slot": slot,
            });
            insert_unique(&mut tree, function.name(), state);
        }
        tree.into()
    }
}

/// Inserts under a name, numbered from the second of its kind on.
fn insert_unique(
    tree: &mut serde_json::Map<String, serde_json::Value>,
    name: &str,
    value: serde_json::Value,
) {
    let taken = |name: &str| tree.contains_key(name);
    let key = if taken(name) {
        (2..u32::MAX).map(|n| format!("{name}-{n}")).find(|key| !taken(key)).unwrap_or_default()
    } else {
        name.to_owned()
    };
    tree.insert(key, value);
}
