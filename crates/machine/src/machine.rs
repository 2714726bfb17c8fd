//! A whole machine and its life.
//!
//! States: built (the kernel is loaded, nothing runs), running, paused, restarting, ended. Threads: one per vCPU, one for
//! timers, some per disk, one per network card; all start with the machine and are joined when it is dropped.
//!
//! Lock order: `threads` alone.

use crate::board::{self, Board, Parts};
use crate::boot;
use crate::clock::Clock;
use crate::config::{EngineKind, MachineConfig};
use crate::functions::{self, Slots, Workers};
use crate::kernel::Kernel;
use crate::lifecycle::{Lifecycle, Outcome};
use crate::notice::{Notice, Notices};
use crate::numa;
use crate::port::{Port, Wake};
use crate::ram::{self, Ram};
use crate::restart::Restart;
use crate::standstill::{Brakes, Standstill};
use crate::timers::Timers;
use crate::vcpu::paravirtual::SystemClock;
use crate::vcpu::report::Report;
use crate::vcpu::slot::Slot;
use crate::vcpu::{Common, Runner};
use chipset::board::Node;
use chipset::power::Power;
use cpu::cpuid::{CpuidTable, MODELS, Model, ModelError, Topology};
use cpu::{Engine, Vcpu, VcpuConfig};
use memory::GuestMemory;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Why a machine could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// Kernel, initrd...
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A kernel that cannot be loaded.
    #[error("cannot boot {}: {source}", path.display())]
    Boot {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: boot::Error,
    },
    /// More memory than the host has.
    #[error("the guest's {} MiB are more than this host's {} MiB; use a smaller --memory", wanted >> 20, host >> 20)]
    TooMuchMemory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes of the host.
        host: u64,
    },
    /// More memory than an address reaches.
    #[error(
        "RAM up to {end:#x} and the devices above it are more than the {bits} address bits of this CPU reach; use a smaller --memory"
    )]
    BeyondReach {
        /// Where it would end.
        end: u64,
        /// Physical address bits.
        bits: u8,
    },
    /// Guest RAM cannot be made.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Huge pages that the software engine cannot use.
    #[error(
        "huge pages of the host's pool need --engine kvm: the software engine maps 4 KiB pages of the guest's RAM one by one; \
         hugepages=thp works on both"
    )]
    HugePagesOfPool,
    /// NUMA nodes that make no sense.
    #[error(transparent)]
    Numa(#[from] crate::numa::Error),
    /// A vCPU cannot run where or how it is to.
    #[error(transparent)]
    Scheduling(#[from] resources::scheduling::Error),
    /// A CPU model that this host cannot offer.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] cpu::Error),
    /// Too many or too few vCPUs.
    #[error("a machine has 1 to {CPUS_MAX} vCPUs, not {0}; choose another --cpus")]
    Cpus(u32),
    /// Devices that do not fit on the board.
    #[error("too many devices: {0}; use fewer disks")]
    Devices(String),
    /// A disk or another function that cannot be attached.
    #[error(transparent)]
    Function(#[from] functions::Error),
    /// The host has no thread or timer left.
    #[error("the host cannot give a {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// The most vCPUs that one machine may have: what KVM gives on most hosts. From 256 on guests need x2APIC, as Linux has it.
pub const CPUS_MAX: u32 = 1024;
/// With more than these, messages need wider destinations than xAPIC has.
const XAPIC_CPUS_MAX: u32 = 255;

#[derive(Default)]
struct Threads {
    /// vCPUs that do not run (yet, or any more).
    idle: Vec<Box<dyn Vcpu>>,
    running: Vec<JoinHandle<Box<dyn Vcpu>>>,
    timer: Option<JoinHandle<()>>,
    started: bool,
}

/// One virtual machine. Shared by whoever controls it.
pub struct Machine {
    common: Arc<Common>,
    standstill: Standstill,
    /// vCPU threads that were started.
    running: Arc<AtomicUsize>,
    cpus: usize,
    power: Arc<Mutex<Power>>,
    serial: Port,
    /// The virtio console, then its named ports.
    ports: Vec<Port>,
    wakes: Vec<Wake>,
    threads: Mutex<Threads>,
    workers: Mutex<Workers>,
    engine: Arc<dyn Engine>,
    config: MachineConfig,
    nodes: Vec<Node>,
    _memory: GuestMemory,
}

impl Machine {
    /// Makes a machine and loads its kernel. Nothing runs until [`Self::start`].
    pub fn new(config: MachineConfig) -> Result<Self, Error> {
        Self::prepared(config, |_, _| {})
    }

    /// The same; `progress` hears how many bytes of how many of its RAM the host has found, if it is to find all now.
    pub fn prepared(config: MachineConfig, progress: impl FnMut(u64, u64)) -> Result<Self, Error> {
        if config.cpus == 0 || config.cpus > CPUS_MAX {
            return Err(Error::Cpus(config.cpus));
        }
        let ram = ram::make(&config, progress)?;
        let engine = make_engine(&config, &ram.memory)?;
        Self::with_engine(config, ram, engine)
    }

    fn with_engine(config: MachineConfig, ram: Ram, engine: Arc<dyn Engine>) -> Result<Self, Error> {
        let Ram { memory, nodes } = ram;
        let cpus = config.cpus as usize;
        let clock = Arc::new(Clock::slower(config.clock_divisor));
        let timers = Timers::new(clock.clone(), board::timer_slots(cpus))
            .map(Arc::new)
            .map_err(|source| Error::Host { what: "timer", source })?;
        let lifecycle = Arc::new(Lifecycle::default());
        let slots: Arc<[Slot]> = (0..cpus).map(|_| Slot::default()).collect();
        let (wake, all) = (slots.clone(), slots.clone());
        lifecycle.set_wake_all(move || all.iter().for_each(Slot::wake));
        let tables = cpuid_tables(&config, numa::package(&nodes, config.cpus), &*engine)?;
        let bits = tables.first().map_or(36, |table| table.query(0x8000_0008, 0).eax & 0xff);
        let physical_address_bits = u8::try_from(bits).unwrap_or(36);
        let regions = memory.regions().iter();
        let end = regions.map(|region| region.base.saturating_add(region.len)).max().unwrap_or(0);
        let mmio64 = chipset::board::mmio64(end, physical_address_bits)
            .ok_or(Error::BeyondReach { end, bits: physical_address_bits })?;
        let board = Board::new(Parts {
            config: &config,
            nodes: &nodes,
            clock: clock.clone(),
            timers: timers.clone(),
            lifecycle: lifecycle.clone(),
            tsc_hz: engine.tsc_hz(),
            physical_address_bits,
            mmio64,
            wake: Arc::new(move |index| {
                if let Some(slot) = wake.get(index) {
                    slot.wake();
                }
            }),
            engines: engine.local_apics(),
        })
        .map_err(|error| Error::Devices(error.to_string()))?;
        let mut workers = Workers::default();
        let notices = Notices::default();
        let standstill = Standstill::default();
        let slots_on_bus = Slots {
            pci: &board.pci,
            msi: &board.msi,
            memory: &memory,
            notices: &notices,
            standstill: &standstill,
            doorbells: engine.doorbells(),
        };
        slots_on_bus.disks(&config.disks, config.cpus, &mut workers)?;
        let mut wakes = vec![board.serial_wake.clone()];
        let mut ports = Vec::new();
        if !config.ports.is_empty() {
            let wake = Wake::default();
            ports = slots_on_bus.console(&config.ports, &wake)?;
            wakes.push(wake);
        }
        if config.entropy {
            slots_on_bus.entropy()?;
        }
        slots_on_bus.networks(&config.networks, config.cpus, &mut workers)?;
        board.assign_addresses().map_err(Error::Devices)?;
        let kernel = Kernel::open(&config)?;
        let restart =
            Restart::new(kernel, board.tables(), workers.traffic.clone(), workers.lent.clone(), &memory)?;
        let mut vcpus = Vec::with_capacity(cpus);
        for (index, table) in (0u32..).zip(tables) {
            let mut vcpu = engine.create_vcpu(VcpuConfig { index, cpuid: Arc::new(table) })?;
            if index == 0 {
                vcpu.set_registers(&restart.registers());
            }
            vcpus.push(vcpu);
        }
        let pic = board.pic.clone();
        let common = Common {
            memory: memory.clone(),
            buses: board.buses,
            apics: board.apics,
            ioapic: board.ioapic,
            external: Box::new(move || Some(pic.acknowledge())),
            external_wire: board.external,
            clock,
            timers,
            system_clock: SystemClock::new(engine.tsc_hz()),
            slots,
            lifecycle,
            resets: board.resets,
            restart,
            notices,
            tsc_hz: engine.tsc_hz(),
            log_exits: config.log_exits,
            profile: Mutex::default(),
        };
        let common = Arc::new(common);
        let running = Arc::new(AtomicUsize::new(0));
        standstill.set_brakes(Handbrake {
            common: Arc::downgrade(&common),
            engine: engine.clone(),
            running: running.clone(),
        });
        Ok(Self {
            common,
            standstill,
            running,
            cpus,
            power: board.power,
            serial: board.serial,
            ports,
            wakes,
            threads: Mutex::new(Threads { idle: vcpus, ..Threads::default() }),
            workers: Mutex::new(workers),
            engine,
            config,
            nodes,
            _memory: memory,
        })
    }

    /// A machine on an engine of the caller's, and its first vCPU's loop, to be played by hand instead of started.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn on_script(config: MachineConfig, engine: Arc<dyn Engine>) -> Result<(Self, Runner), Error> {
        let ram = ram::make(&config, |_, _| {})?;
        let machine = Self::with_engine(config, ram, engine)?;
        machine.common.clock.run();
        let vcpu = machine.threads().idle.pop().ok_or(Error::Cpus(0))?;
        let runner = Runner::new(vcpu, 0, machine.common.clone()).ok_or(Error::Cpus(0))?;
        machine.running.store(1, Ordering::SeqCst);
        Ok((machine, runner))
    }

    /// Starts the machine. A second start does nothing.
    pub fn start(&self) -> Result<(), Error> {
        let mut threads = self.threads();
        if std::mem::replace(&mut threads.started, true) {
            return Ok(());
        }
        let host = |source| Error::Host { what: "thread", source };
        self.common.clock.run();
        let common = self.common.clone();
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).start().map_err(host)?;
        let cpus = self.cpus;
        let fire = move |timer: usize| match common.slots.get(timer).filter(|_| timer < cpus) {
            Some(slot) => slot.wake(),
            None => common.buses.tick(timer),
        };
        threads.timer = Some(self.common.timers.spawn(fire).map_err(host)?);
        self.common.timers.resume();
        for (index, vcpu) in std::mem::take(&mut threads.idle).into_iter().enumerate() {
            let Some(runner) = Runner::new(vcpu, index, self.common.clone()) else { continue };
            let lifecycle = self.common.lifecycle.clone();
            let (scheduling, (scheduled, outcome)) = (self.config.scheduling.clone(), mpsc::channel());
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                let taken = scheduling.take(u32::try_from(index).unwrap_or(u32::MAX));
                sandbox::narrow(sandbox::Role::Vcpu);
                // Whoever does not listen knows that nothing can go wrong.
                let _ = scheduled.send(taken);
                let vcpu = runner.run();
                lifecycle.leave();
                vcpu
            });
            threads.running.push(thread.map_err(host)?);
            self.running.fetch_add(1, Ordering::SeqCst);
            if !self.config.scheduling.is_default()
                && let Ok(taken) = outcome.recv()
            {
                taken?;
            }
        }
        Ok(())
    }

    /// Waits until the machine has ended.
    pub fn wait(&self) -> Outcome {
        self.wait_for(None).unwrap_or(Outcome::Stopped)
    }

    /// Waits until the machine has ended, at most `limit`.
    pub fn wait_timeout(&self, limit: Duration) -> Option<Outcome> {
        self.wait_for(Some(limit))
    }

    fn wait_for(&self, limit: Option<Duration>) -> Option<Outcome> {
        let running = self.threads().running.len();
        let outcome = self.common.lifecycle.wait(running, limit);
        if outcome.is_some() {
            // What the guest wrote is on the images before anybody hears of its end.
            self.workers.lock().unwrap_or_else(PoisonError::into_inner).end();
            // Whoever reads a console sees its end.
            self.wakes.iter().for_each(Wake::close);
        }
        outcome
    }

    /// How the machine ended, if it did.
    pub fn outcome(&self) -> Option<Outcome> {
        self.common.lifecycle.outcome()
    }

    /// Ends the machine at once, as if the power failed.
    pub fn stop(&self) {
        self.common.lifecycle.end(Outcome::Stopped);
    }

    /// Presses the power button: a guest that listens shuts down. One that is paused goes on first, for it hears nothing.
    pub fn power_button(&self) {
        self.expect_off();
        self.standstill.release();
        board::press(&self.power);
    }

    /// The guest has been asked to power off: should it reset instead within two minutes, the machine ends.
    pub fn expect_off(&self) {
        self.common.lifecycle.ask_off();
    }

    /// Lets the machine stand still: vCPUs, VM time and timers. Answers whether it does.
    pub fn pause(&self) -> bool {
        // Not between the vCPUs of one that starts.
        let _started = self.threads();
        self.standstill.ask()
    }

    /// Lets a paused machine go on. One that stands still because a disk waits goes on if what it waits for can be done.
    pub fn resume(&self) {
        self.standstill.release();
    }

    /// Names who hears what happens to the machine while it runs. Only the first call counts.
    pub fn on_notice(&self, listener: impl Fn(Notice) + Send + Sync + 'static) {
        self.common.notices.listen(Box::new(listener));
    }

    /// How often the guest has been started: once, and once more for every reset.
    pub fn starts(&self) -> u64 {
        self.common.lifecycle.restarts().saturating_add(1)
    }

    /// The serial console.
    pub fn serial(&self) -> Port {
        self.serial.clone()
    }

    /// The guest's `/dev/hvc0`, if there are virtio ports.
    pub fn virtio_console(&self) -> Option<Port> {
        self.ports.first().cloned()
    }

    /// The virtio port called `name` in the configuration: `/dev/virtio-ports/NAME` in the guest.
    pub fn port(&self, name: &str) -> Option<Port> {
        let at = self.config.ports.iter().position(|port| port == name)?;
        self.ports.get(at.checked_add(1)?).cloned()
    }

    /// The live tree of the whole machine.
    pub fn inspect(&self) -> serde_json::Value {
        let now = self.common.clock.now();
        let apics: Vec<_> = (0..self.cpus)
            .filter_map(|index| self.common.apics.get(index))
            .map(|apic| apic.lock().unwrap_or_else(PoisonError::into_inner).inspect(now))
            .collect();
        serde_json::json!({
            "engine": self.engine.name(),
            "sandbox": sandbox::report(),
            "cpus": self.cpus,
            "memory_bytes": self.common.memory.len(),
            "memory": ram::inspect(&self.config, &self.common.memory, &self.nodes),
            "scheduling": self.config.scheduling,
            "control_groups": self.config.groups,
            "kernel": self.config.kernel,
            "command_line": self.config.command_line,
            "starts": self.starts(),
            "vm_time_ns": self.common.clock.now().0,
            "tsc_hz": self.common.tsc_hz,
            "stands_still": self.standstill.inspect(),
            "outcome": self.outcome().map(|outcome| format!("{outcome:?}")),
            "next_deadline_ns": self.common.timers.next().map(|at| at.0),
            "vcpus": self.reports().iter().map(Report::inspect).collect::<Vec<_>>(),
            "local_apics": apics,
            "devices": self.common.buses.inspect(),
            "networks": self.networks(),
        })
    }

    fn networks(&self) -> Vec<serde_json::Value> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.monitors.iter().map(|monitor| monitor.inspect()).collect()
    }

    /// What goes through each card whose frames this process carries: as a port of a switch would have it, received is from
    /// the guest.
    pub fn traffic_of_cards(&self) -> serde_json::Value {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let cards = workers.cards.iter().map(|(name, kind, card)| {
            card.lock().unwrap_or_else(PoisonError::into_inner).device().about_as_port(name, kind)
        });
        let cards: Vec<_> = cards.collect();
        let gateways: Vec<_> = workers.monitors.iter().map(|monitor| monitor.inspect()).collect();
        serde_json::json!({ "cards": cards, "gateways": gateways })
    }

    /// Looks at the frames of those cards, each cut after `snap` bytes.
    pub fn capture(&self, snap: u32) -> Result<net::watch::View, net::watch::Error> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).watch.open(snap)
    }

    /// Of the CPU engine.
    pub(crate) fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// What all vCPUs and the timers share.
    pub(crate) fn common(&self) -> &Common {
        &self.common
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a machine stand still.
struct Handbrake {
    common: Weak<Common>,
    engine: Arc<dyn Engine>,
    running: Arc<AtomicUsize>,
}

impl Brakes for Handbrake {
    fn stand(&self) -> bool {
        let Some(common) = self.common.upgrade() else { return false };
        if !common.lifecycle.pause(self.running.load(Ordering::SeqCst)) {
            return false;
        }
        common.clock.stand();
        common.system_clock.forget();
        self.engine.stand();
        true
    }

    fn go_on(&self) {
        let Some(common) = self.common.upgrade() else { return };
        self.engine.go_on();
        common.clock.run();
        common.timers.resume();
        common.lifecycle.resume();
    }
}

impl crate::control::Operations for Machine {
    fn inspect(&self) -> serde_json::Value {
        Self::inspect(self)
    }

    fn statistics(&self) -> serde_json::Value {
        Self::statistics(self)
    }

    fn profile(&self, length: Duration, rate_hz: u32) -> Result<serde_json::Value, String> {
        Self::profile(self, length, rate_hz).map_err(|error| error.to_string())
    }

    fn perf_map(&self) -> String {
        Self::perf_map(self)
    }

    fn networks(&self) -> serde_json::Value {
        self.traffic_of_cards()
    }

    fn capture(&self, snap: u32) -> Result<net::watch::View, String> {
        Self::capture(self, snap).map_err(|error| error.to_string())
    }

    fn power_button(&self) {
        Self::power_button(self);
    }

    fn stop(&self) {
        Self::stop(self);
    }

    fn pause(&self) {
        Self::pause(self);
    }

    fn resume(&self) {
        Self::resume(self);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        let mut threads = std::mem::take(&mut *self.threads());
        for thread in threads.running.drain(..) {
            // A thread that panicked has nothing left to clean up.
            let _ = thread.join();
        }
        self.common.timers.close();
        if let Some(timer) = threads.timer {
            let _ = timer.join();
        }
        self.wakes.iter().for_each(Wake::close);
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).end();
    }
}

fn make_engine(config: &MachineConfig, memory: &GuestMemory) -> Result<Arc<dyn Engine>, Error> {
    match config.engine {
        EngineKind::Soft => {
            let options = engine_soft::Options {
                translate: config.translate,
                verify: config.verify,
                clock_divisor: config.clock_divisor,
                single_cpu: config.cpus == 1,
                ..engine_soft::Options::default()
            };
            Ok(Arc::new(engine_soft::SoftEngine::new(memory.clone(), options)?))
        }
        EngineKind::Kvm => {
            let all_paravirtual = config.cpu_model.as_deref() == Some(HOST_MODEL);
            let options = engine_kvm::Options { all_paravirtual, ..engine_kvm::Options::default() };
            Ok(Arc::new(engine_kvm::KvmEngine::new(memory.clone(), options)?))
        }
    }
}

/// Tells the guest that messages of devices reach all processors: their addresses, and the I/O APIC's entries, have seven more
/// bits (KVM_FEATURE_MSI_EXT_DEST_ID). The board does that, whatever the engine.
fn widen(table: &mut CpuidTable) {
    const FEATURES: u32 = 0x4000_0001;
    const MSI_EXT_DEST_ID: u32 = 1 << 15;
    if let Some(mut leaf) = table.get(FEATURES, 0) {
        leaf.eax |= MSI_EXT_DEST_ID;
        table.set(FEATURES, None, leaf);
    }
}

/// The model that is whatever this host has.
const HOST_MODEL: &str = "host";

/// What CPUID answers on each vCPU, of a model as far as the engine offers it.
fn cpuid_tables(config: &MachineConfig, package: u32, engine: &dyn Engine) -> Result<Vec<CpuidTable>, Error> {
    let tables = |model: Model| -> Result<Vec<_>, ModelError> {
        (0..config.cpus)
            .map(|apic_id| {
                let table = model.table(Topology { apic_id, cpus: package }, engine.tsc_hz())?;
                let mut table = engine.offer(table);
                if config.cpus > XAPIC_CPUS_MAX {
                    widen(&mut table);
                }
                model.missing_in(&table).map(|()| table)
            })
            .collect()
    };
    if let Some(name) = &config.cpu_model {
        return Ok(tables(Model::named(name)?)?);
    }
    // The best that the engine offers whole; the last of all, the host's own, is what there is.
    let best = MODELS.iter().rev().skip(1).find_map(|model| tables(*model).ok());
    match best {
        Some(best) => Ok(best),
        None => Ok(tables(Model::named(HOST_MODEL)?)?),
    }
}
