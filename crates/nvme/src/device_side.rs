//! The controller: registers, doorbells, interrupts, and its two faces.

use crate::admin::Answer;
use crate::identify::Namespace;
use crate::io::Pending;
use crate::queue::{Completion, CompletionQueue, SubmissionQueue};
use crate::spec::{CAPABILITIES, QUEUE_ENTRIES_MAX, Status, VERSION, cc, csts, register};
use chipset::pci::{BarKind, ConfigSpace, Function, Identity, MsiX, command};
use device::block::{Controller, Geometry, Operation, Outcome, Request};
use device::{MsiSink, Notify, VmTime};
use memory::GuestMemory;
use std::collections::{BTreeMap, VecDeque};

/// The volatile write cache among the features (section 5.27.1.4); bit 0: it is on.
pub(crate) const WRITE_CACHE: usize = 6;
/// Queues of each kind, the administrator's included.
pub(crate) const QUEUES: u16 = 17;
/// Registers and doorbells: 8 KiB; then the MSI-X table and its pending bits.
const BAR_SIZE: u64 = 0x4000;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;

/// What the disk is.
#[derive(Debug, Clone)]
pub struct NvmeConfig {
    /// Capacity, block size, abilities.
    pub geometry: Geometry,
    /// Serial number: up to 20 ASCII characters.
    pub serial: String,
    /// The namespace's UUID.
    pub uuid: [u8; 16],
}

/// Which command a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    pub queue: u16,
    pub command: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Disabled,
    Ready,
    /// Disabled, as soon as the worker has answered everything.
    Draining,
}

/// The controller.
pub struct Nvme {
    config: ConfigSpace,
    pub(crate) msix: MsiX,
    pub(crate) memory: GuestMemory,
    notify: Notify,
    pub(crate) geometry: Geometry,
    pub(crate) namespace: Namespace,
    pub(crate) serial: String,

    state: State,
    cc: u32,
    csts: u32,
    masked: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    pub(crate) features: [u32; 16],
    pub(crate) submission_queues: Vec<Option<SubmissionQueue>>,
    pub(crate) completion_queues: Vec<Option<CompletionQueue>>,
    /// Asynchronous event requests that wait.
    pub(crate) events: Vec<u16>,

    pub(crate) ready: VecDeque<Request>,
    pub(crate) pending: BTreeMap<u64, Pending>,
    pub(crate) next_token: u64,
    /// The submission queue served last.
    pub(crate) turn: u16,
    /// The flush of a shutdown in progress.
    shutdown: Option<u64>,
    served: u64,
}

impl Nvme {
    /// A controller with one namespace. `notify` wakes the worker that takes requests.
    pub fn new(memory: GuestMemory, sink: MsiSink, notify: Notify, disk: NvmeConfig) -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0010,
            class: 0x01,
            subclass: 0x08,
            prog_if: 0x02,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        config.add_bar(0, BarKind::Memory64 { prefetchable: false }, BAR_SIZE);
        let msix = MsiX::new(&mut config, sink, QUEUES, 0, MSIX_TABLE, MSIX_PENDING);
        let block_shift = disk.geometry.block_size.max(512).ilog2();
        let namespace =
            Namespace { blocks: disk.geometry.capacity >> block_shift, block_shift, uuid: disk.uuid };
        Self {
            config,
            msix,
            memory,
            notify,
            geometry: disk.geometry,
            namespace,
            serial: disk.serial,
            state: State::Disabled,
            cc: 0,
            csts: 0,
            masked: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            features: feature_defaults(disk.geometry.write_cache),
            submission_queues: no_queues(),
            completion_queues: no_queues(),
            events: Vec::new(),
            ready: VecDeque::new(),
            pending: BTreeMap::new(),
            next_token: 0,
            turn: 0,
            shutdown: None,
            served: 0,
        }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.state == State::Ready && self.csts & csts::FATAL == 0
    }

    /// Whether the guest lets the controller use its memory (the command register's bus master bit). Without, commands
    /// stay in their rings and completions wait; requests that the worker has taken already go on to their end.
    pub(crate) fn may_use_memory(&self) -> bool {
        self.config.bus_master()
    }

    /// The guest's rings are unusable: only a reset helps.
    pub(crate) fn fail(&mut self) {
        self.csts |= csts::FATAL;
    }

    fn set_configuration(&mut self, value: u32) {
        let before = std::mem::replace(&mut self.cc, value);
        let enable = value & cc::ENABLE != 0;
        if enable && self.state == State::Disabled {
            self.enable();
        } else if !enable && self.state == State::Ready {
            self.disable();
        } else if !enable && self.state == State::Disabled {
            // An enable that failed is forgotten.
            self.csts &= !csts::FATAL;
        }
        if value & cc::SHUTDOWN != 0 && before & cc::SHUTDOWN == 0 {
            self.begin_shutdown();
        } else if value & cc::SHUTDOWN == 0 {
            self.csts &= !csts::SHUTDOWN;
        }
    }

    fn enable(&mut self) {
        let entries = |bits: u32| (bits & 0xfff) as u16;
        let (submission, completion) = (entries(self.aqa), entries(self.aqa >> 16));
        // Memory page size 4 KiB, NVM command set, entries of 64 and 16 bytes (the last two may still be unset).
        let unsupported = self.cc & 0x7f0 != 0;
        let sound = |last: u16| last > 0 && last < 4096;
        if unsupported || !sound(submission) || !sound(completion) || (self.asq | self.acq) & 0xfff != 0 {
            self.csts |= csts::FATAL;
            return;
        }
        let queue = SubmissionQueue::new(self.asq, submission.wrapping_add(1), 0);
        let completions = CompletionQueue::new(self.acq, completion.wrapping_add(1), Some(0));
        self.submission_queues = no_queues();
        self.completion_queues = no_queues();
        if let (Some(first), Some(second)) =
            (self.submission_queues.first_mut(), self.completion_queues.first_mut())
        {
            (*first, *second) = (Some(queue), Some(completions));
        }
        self.csts = csts::READY;
        self.state = State::Ready;
    }

    fn disable(&mut self) {
        self.state = State::Draining;
        // What the worker has not taken yet is forgotten; what it has must come back first.
        let taken = self.taken_parts();
        self.ready.clear();
        self.pending.retain(|token, pending| {
            pending.abandoned = true;
            pending.rest.clear();
            pending.parts = taken.get(token).copied().unwrap_or(0);
            pending.parts > 0
        });
        self.drained();
    }

    /// Called when a command has ended: a disable that waited for it may be complete.
    pub(crate) fn drained(&mut self) {
        if self.state == State::Draining && self.pending.is_empty() {
            self.state = State::Disabled;
            self.csts = 0;
            self.masked = 0;
            self.features = feature_defaults(self.geometry.write_cache);
            self.submission_queues = no_queues();
            self.completion_queues = no_queues();
            self.events.clear();
            self.shutdown = None;
            self.update_interrupt();
        }
    }

    fn begin_shutdown(&mut self) {
        self.csts = self.csts & !csts::SHUTDOWN | csts::SHUTDOWN_OCCURRING;
        if self.shutdown.is_some() {
            // Asked for again before the flush has ended: one is enough.
            return;
        }
        if self.state != State::Ready {
            self.csts = self.csts & !csts::SHUTDOWN | csts::SHUTDOWN_COMPLETE;
            return;
        }
        // What the write cache holds becomes stable before the controller says that it is off.
        self.hand_out(Origin { queue: 0, command: 0 }, vec![(Operation::Flush, 0, 0, Vec::new())]);
        self.shutdown = Some(self.next_token);
        if let Some(pending) = self.pending.get_mut(&self.next_token) {
            pending.abandoned = true;
        }
        self.notify.notify();
    }

    fn doorbell(&mut self, index: u64, value: u32) {
        let Ok(queue) = u16::try_from(index / 2) else { return };
        if !self.is_enabled() {
            return;
        }
        let slot = usize::from(queue);
        if index.is_multiple_of(2) {
            let rung = match self.submission_queues.get_mut(slot) {
                Some(Some(ring)) => ring.set_tail(value),
                _ => return,
            };
            match (rung, queue) {
                // A value that is no index is an asynchronous error event at most; nothing is done.
                (false, _) => {}
                (true, 0) => self.run_admin(),
                (true, _) => self.notify.notify(),
            }
        } else if let Some(Some(ring)) = self.completion_queues.get_mut(slot)
            && ring.set_head(value)
        {
            let was_stuck = ring.is_stuck();
            self.post(queue);
            self.update_interrupt();
            if was_stuck && !self.is_stuck(queue) {
                // Commands that were left alone for want of room for their completions.
                if queue == 0 { self.run_admin() } else { self.notify.notify() }
            }
        }
    }

    /// Posts the completions of a queue that wait, if they may.
    fn post(&mut self, queue: u16) {
        if !self.may_use_memory() {
            return;
        }
        let Some(Some(ring)) = self.completion_queues.get_mut(usize::from(queue)) else { return };
        match ring.post(&self.memory) {
            Ok(true) => self.interrupt(queue),
            Ok(false) => {}
            Err(_) => self.fail(),
        }
    }

    /// The guest has made the controller a bus master: what waited for that goes on.
    fn memory_allowed(&mut self) {
        for queue in 0..QUEUES {
            self.post(queue);
        }
        self.run_admin();
        self.notify.notify();
    }

    fn run_admin(&mut self) {
        // At most what the ring can hold: a guest that moves the doorbell meanwhile has to ring it again.
        for _ in 0..4096 {
            if !self.is_enabled() || !self.may_use_memory() || self.is_stuck(0) {
                return;
            }
            let Some(Some(ring)) = self.submission_queues.first_mut() else { return };
            let command = match ring.pop(&self.memory) {
                None => return,
                Some(Ok(command)) => command,
                Some(Err(_)) => return self.fail(),
            };
            let origin = Origin { queue: 0, command: command.id() };
            match self.admin_command(&command) {
                Answer::Done(Ok(result)) => self.complete_command(origin, result, Status::SUCCESS),
                Answer::Done(Err(status)) => self.complete_command(origin, 0, status),
                Answer::Later => {}
            }
        }
    }

    /// Whether completions wait for room in a queue. Then no more commands are taken that would end there: a guest
    /// that rings doorbells and never looks at completions must not fill our memory with them.
    pub(crate) fn is_stuck(&self, completion_queue: u16) -> bool {
        let ring = self.completion_queues.get(usize::from(completion_queue));
        matches!(ring, Some(Some(ring)) if ring.is_stuck())
    }

    /// Tells the guest that a command has ended.
    pub(crate) fn complete_command(&mut self, origin: Origin, result: u32, status: Status) {
        let Some(Some(ring)) = self.submission_queues.get(usize::from(origin.queue)) else { return };
        let (head, completion_queue) = (ring.head(), ring.completion_queue);
        let completion = Completion {
            result,
            submission_queue: origin.queue,
            submission_head: head,
            command: origin.command,
            status,
        };
        let Some(Some(ring)) = self.completion_queues.get_mut(usize::from(completion_queue)) else { return };
        self.served = self.served.wrapping_add(1);
        ring.push(completion);
        self.post(completion_queue);
    }

    /// What the worker has not taken of a submission queue's commands is not done any more; those that are not begun end now.
    pub(crate) fn abort_queue(&mut self, queue: u16) {
        let taken = self.taken_parts();
        let pending = &self.pending;
        self.ready.retain(|request| {
            pending.get(&request.token).is_none_or(|pending| pending.origin.queue != queue)
        });
        let mut ended = Vec::new();
        self.pending.retain(|token, pending| {
            if pending.origin.queue != queue {
                return true;
            }
            let parts = taken.get(token).copied().unwrap_or(0);
            let whole = parts == pending.parts && pending.rest.is_empty();
            if !whole && pending.status == Status::SUCCESS {
                pending.status = Status::ABORTED_QUEUE_DELETED;
            }
            pending.rest.clear();
            pending.parts = parts;
            if parts == 0 {
                ended.push((pending.origin, pending.status));
            }
            parts > 0
        });
        for (origin, status) in ended {
            self.complete_command(origin, 0, status);
        }
    }

    /// Submission queues that are being deleted are gone once nobody works on their commands.
    pub(crate) fn finish_deletions(&mut self) {
        if !self.is_enabled() {
            return;
        }
        for id in 1..QUEUES {
            let Some(slot @ Some(_)) = self.submission_queues.get_mut(usize::from(id)) else { continue };
            let busy = || self.pending.values().any(|pending| pending.origin.queue == id);
            let Some(queue) = slot.take_if(|queue| queue.closing.is_some() && !busy()) else { continue };
            if let Some(Some(used)) = self.completion_queues.get_mut(usize::from(queue.completion_queue)) {
                used.users = used.users.saturating_sub(1);
            }
            let command = queue.closing.unwrap_or_default();
            self.complete_command(Origin { queue: 0, command }, 0, Status::SUCCESS);
        }
    }

    fn interrupt(&mut self, completion_queue: u16) {
        let Some(Some(ring)) = self.completion_queues.get(usize::from(completion_queue)) else { return };
        if self.msix.enabled() {
            if let Some(vector) = ring.vector {
                self.msix.notify(vector);
            }
        } else {
            self.update_interrupt();
        }
    }

    /// The level of the INTx pin: some queue of vector 0 has entries that the guest has not taken.
    fn update_interrupt(&mut self) {
        let waiting = self.completion_queues.iter().flatten();
        let waiting = waiting.filter(|ring| ring.vector.is_some() && ring.has_entries()).count() > 0;
        self.config.set_interrupt(waiting && !self.msix.enabled() && self.masked & 1 == 0);
    }

    /// How many requests of each token are neither answered nor in `ready`.
    fn taken_parts(&self) -> BTreeMap<u64, u32> {
        let mut taken: BTreeMap<u64, u32> =
            self.pending.iter().map(|(token, pending)| (*token, pending.parts)).collect();
        for request in &self.ready {
            if let Some(parts) = taken.get_mut(&request.token) {
                *parts = parts.saturating_sub(1);
            }
        }
        taken
    }
}

fn no_queues<T>() -> Vec<Option<T>> {
    (0..QUEUES).map(|_| None).collect()
}

/// Set Features' values after a reset: temperature threshold 343 K, the volatile write cache as the disk has it.
fn feature_defaults(write_cache: bool) -> [u32; 16] {
    let mut features = [0; 16];
    features[4] = 343;
    features[WRITE_CACHE] = u32::from(write_cache);
    features
}

/// Puts `value` of `size` bytes at `offset` into a register of 8 bytes at `at`.
fn merge(register: u64, at: u64, offset: u64, size: u8, value: u64) -> u64 {
    let shift = offset.saturating_sub(at).saturating_mul(8).min(63);
    let mask = if size >= 8 { u64::MAX } else { (1u64 << size.saturating_mul(8).min(63)).wrapping_sub(1) };
    register & !(mask << shift) | (value & mask) << shift
}

impl Function for Nvme {
    fn name(&self) -> &'static str {
        "nvme"
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_written(&mut self, offset: u16) {
        self.msix.sync(&self.config);
        self.update_interrupt();
        // The command register may have made the controller a bus master, with commands waiting since before.
        if offset & !3 == 4 && self.may_use_memory() {
            self.memory_allowed();
        }
    }

    fn bar_read(&mut self, bar: u8, offset: u64, size: u8, _now: VmTime) -> u64 {
        if let Some(value) = self.msix.read(bar, offset, size) {
            return value;
        }
        let eight = match offset & !7 {
            register::CAP => CAPABILITIES,
            register::VS => u64::from(VERSION) | u64::from(self.masked) << 32,
            register::INTMC => u64::from(self.masked) | u64::from(self.cc) << 32,
            // CSTS is the upper half of the eight bytes at 0x18.
            0x18 => u64::from(self.csts) << 32,
            0x20 => u64::from(self.aqa) << 32,
            register::ASQ => self.asq,
            register::ACQ => self.acq,
            _ => 0,
        };
        let mask =
            if size >= 8 { u64::MAX } else { (1u64 << size.saturating_mul(8).min(63)).wrapping_sub(1) };
        eight >> (offset & 7).saturating_mul(8) & mask
    }

    fn bar_write(&mut self, bar: u8, offset: u64, size: u8, value: u64, _now: VmTime) {
        if self.msix.write(bar, offset, size, value) {
            return;
        }
        let low = value as u32;
        match offset {
            register::INTMS => self.masked |= low,
            register::INTMC => self.masked &= !low,
            register::CC => self.set_configuration(low),
            register::AQA => self.aqa = low & 0x0fff_0fff,
            register::ASQ..0x30 => self.asq = merge(self.asq, register::ASQ, offset, size, value),
            register::ACQ..0x38 => self.acq = merge(self.acq, register::ACQ, offset, size, value),
            register::DOORBELLS..0x2000 if offset.is_multiple_of(4) => {
                self.doorbell(offset.wrapping_sub(register::DOORBELLS) / 4, low);
            }
            _ => {}
        }
        if matches!(offset, register::INTMS | register::INTMC) {
            self.update_interrupt();
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset();
        self.cc = 0;
        if self.state == State::Ready {
            self.disable();
        }
        if self.state == State::Disabled {
            (self.csts, self.masked) = (0, 0);
        }
        (self.aqa, self.asq, self.acq) = (0, 0, 0);
    }

    fn inspect(&self) -> serde_json::Value {
        let queues = |rings: usize| rings.saturating_sub(1);
        serde_json::json!({
            "state": format!("{:?}", self.state).to_lowercase(),
            "cc": self.cc,
            "csts": self.csts,
            "capacity": self.geometry.capacity,
            "io_submission_queues": queues(self.submission_queues.iter().flatten().count()),
            "io_completion_queues": queues(self.completion_queues.iter().flatten().count()),
            "commands_in_flight": self.pending.len(),
            "commands_served": self.served,
            "msix": self.msix.inspect(),
        })
    }
}

impl Controller for Nvme {
    fn next_request(&mut self) -> Option<Request> {
        self.fetch()
    }

    fn complete(&mut self, token: u64, outcome: Outcome) {
        if self.shutdown == Some(token) {
            self.shutdown = None;
            // A cache that could not be flushed leaves the shutdown visibly incomplete.
            if outcome == Outcome::Ok {
                self.csts = self.csts & !csts::SHUTDOWN | csts::SHUTDOWN_COMPLETE;
            }
        }
        self.request_done(token, outcome);
    }
}

const _: () = assert!(QUEUE_ENTRIES_MAX <= 4096 && QUEUES as u64 * 8 <= 0x1000);

/// Drives a controller by bytes: register accesses, RAM content and worker answers, as a guest out of its mind would.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Ok(memory) = GuestMemory::new(&[(0, 0x20000)], memory::Backing::Private) else { return };
    let geometry =
        Geometry { capacity: 1 << 20, block_size: 512, read_only: false, discard: true, write_cache: true };
    let disk = NvmeConfig { geometry, serial: "fuzz".into(), uuid: [7; 16] };
    let mut nvme = Nvme::new(memory.clone(), MsiSink::unconnected(), Notify::unconnected(), disk);
    nvme.config_mut().write(4, 2, u32::from(command::MEMORY | command::BUS_MASTER));
    nvme.config_written(4);
    let mut taken = Vec::new();
    for step in data.chunks(16) {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(step) {
            *to = *from;
        }
        let [kind, size, a, b, value @ .., _, _, _, _] = bytes;
        let value = u64::from_le_bytes(value);
        let at = u64::from(u16::from_le_bytes([a, b]));
        match kind % 6 {
            0 => nvme.bar_write(0, at % BAR_SIZE, 1 << (size % 4), value, VmTime(0)),
            1 => {
                nvme.bar_read(0, at % BAR_SIZE, 1 << (size % 4), VmTime(0));
            }
            2 | 3 => {
                let _ = memory.write(at, &bytes);
            }
            4 => taken.extend(nvme.next_request()),
            _ => {
                if let Some(request) = taken.pop() {
                    nvme.complete(request.token, if size & 1 == 0 { Outcome::Ok } else { Outcome::IoError });
                }
            }
        }
    }
}
