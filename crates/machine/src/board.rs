//! The board: which devices there are, at which addresses, on which wires.
//!
//! A PC as kernels expect it, without what only BIOS-era guests need: 16550 UART, two interrupt controllers, PIT,
//! ACPI fixed hardware, real-time clock, one PCI bus with ECAM. ISA interrupts reach both the 8259A pair and the I/O
//! APIC; the PIT's is pin 2 of the I/O APIC, as the MADT says.

use crate::buses::{Buses, DEVICES_MAX, FUNCTIONS_MAX};
use crate::clock::Clock;
use crate::config::MachineConfig;
use crate::lifecycle::{Lifecycle, Outcome};
use crate::panic_watch::{PanicWatch, WatchedPort, WatchedUart};
use crate::port::{Port, Wake};
use crate::timers::Timers;
use chipset::ioapic::{IoApic, PINS};
use chipset::local_apic::{ApicConfig, Apics, LocalApic};
use chipset::pci::{Host, Window};
use chipset::pic8259::Pic8259;
use chipset::pit8254::Pit8254;
use chipset::power::{Power, PowerEvent, PowerSink};
use chipset::pvpanic::{PanicEvent, PvPanic};
use chipset::rtc::Rtc;
use chipset::test_devices::{DebugExit, PcTestDevice};
use chipset::uart16550::Uart16550;
use chipset::{acpi, board as at, msi};
use cpu::Space;
use device::{Device, Line, MsiSink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Ranges outside RAM that the memory map shows as reserved.
pub(crate) const RESERVED: [(u64, u64); 1] = [(at::ECAM.base, at::ECAM.len)];

/// The parts that other modules need by name.
pub(crate) struct Board {
    pub(crate) buses: Buses,
    pub(crate) apics: Apics,
    pub(crate) ioapic: IoApic,
    pub(crate) pic: Pic8259,
    pub(crate) pci: Host,
    pub(crate) msi: MsiSink,
    pub(crate) power: Arc<Mutex<Power>>,
    pub(crate) serial: Port,
    pub(crate) serial_wake: Wake,
    pub(crate) resets: Resets,
    /// Of the 8259A pair, where the local APICs are the engine's.
    pub(crate) external: Arc<AtomicBool>,
    description: at::Board,
}

/// What the guest's wish for a reset leads to. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Resets {
    lifecycle: Arc<Lifecycle>,
    watch: PanicWatch,
    /// Resets restart the guest instead of ending the machine.
    restart: bool,
}

impl Resets {
    /// The guest resets the machine. The last thing a kernel that panicked does may be a reset: that is its end.
    pub(crate) fn reset(&self) {
        if self.watch.panicked() {
            self.lifecycle.end(Outcome::GuestPanic);
        } else if self.restart {
            self.lifecycle.restart();
        } else {
            self.lifecycle.end(Outcome::Reset);
        }
    }

    /// Whether the guest has said on its console that it restarts now, or that it panicked.
    pub(crate) fn announced(&self) -> bool {
        self.watch.restarting() || self.watch.panicked()
    }
}

/// What the board is made with.
pub(crate) struct Parts<'a> {
    pub(crate) config: &'a MachineConfig,
    /// NUMA nodes, if the guest is to know of any.
    pub(crate) nodes: &'a [at::Node],
    pub(crate) clock: Arc<Clock>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) tsc_hz: u64,
    pub(crate) physical_address_bits: u8,
    /// Where large BARs are.
    pub(crate) mmio64: Window,
    /// Makes a vCPU look at its APIC.
    pub(crate) wake: Wakes,
    /// The engine's own local APICs, if it has them: then the board has none.
    pub(crate) engines: Option<Arc<dyn cpu::LocalApics>>,
}

/// Makes the vCPU of this number look at its APIC soon.
pub(crate) type Wakes = Arc<dyn Fn(usize) + Send + Sync>;

/// How many timer slots a machine of `cpus` needs.
pub(crate) fn timer_slots(cpus: usize) -> usize {
    cpus.saturating_add(DEVICES_MAX).saturating_add(FUNCTIONS_MAX)
}

/// An address range that a board gives twice: a mistake in this file.
pub(crate) type WiringError = device::RangeTaken;

/// Frequency of the APIC timers' clock.
const APIC_TIMER_HZ: u64 = 1_000_000_000;

impl Board {
    /// Wires everything that every machine has.
    pub(crate) fn new(parts: Parts<'_>) -> Result<Self, WiringError> {
        let cpus = parts.config.cpus as usize;
        let wake = parts.wake.clone();
        let apics = Apics::new(local_apics(&parts), move |index| wake(index));
        let msi = match &parts.engines {
            None => msi::sink(&apics),
            Some(engines) => engines_sink(engines),
        };
        let ioapic = IoApic::new(0, PINS, msi.clone());
        let external = Arc::default();
        let output = match &parts.engines {
            None => lint0(&apics, &parts.wake),
            Some(engines) => {
                watch_pins(&ioapic, engines);
                external_wire(&external, &parts.wake)
            }
        };
        let pic = Pic8259::new(output);
        let watch = PanicWatch::default();
        let resets = Resets {
            lifecycle: parts.lifecycle.clone(),
            watch: watch.clone(),
            restart: parts.config.restart,
        };
        let power_sink = power_sink(&resets);
        let intx = at::INTX_GSIS.map(|gsi| (gsi, ioapic.line(gsi.into())));
        let pci = Host::new(intx, power_sink.reset_control());
        let mut buses = Buses::new(pci.clone(), parts.timers.clone(), parts.clock, cpus);
        let isa = |irq: u8| at::isa_line(&pic, &ioapic, irq);

        let serial_wake = Wake::default();
        let uart = Arc::new(Mutex::new(Uart16550::new(isa(at::COM1.irq), serial_wake.notify())));
        let serial = Port::new(uart.clone(), 0, serial_wake.clone());
        let ending = parts.lifecycle.clone();
        let uart = shared(WatchedUart::new(uart, watch, move || ending.end(Outcome::GuestPanic)));
        put(&mut buses, uart, &[(Space::Port, at::COM1.port.into(), Uart16550::LEN, 0)])?;
        put(&mut buses, shared(ioapic.clone()), &[(Space::Mmio, at::IOAPIC, IoApic::LEN, 0)])?;
        put(
            &mut buses,
            shared(pic.clone()),
            &[
                (Space::Port, at::PIC_MASTER, 2, Pic8259::MASTER),
                (Space::Port, at::PIC_SLAVE, 2, Pic8259::SLAVE),
                (Space::Port, at::PIC_ELCR, 2, Pic8259::ELCR),
            ],
        )?;
        put(
            &mut buses,
            shared(Pit8254::new(isa(0))),
            &[(Space::Port, at::PIT, 4, Pit8254::COUNTERS), (Space::Port, at::SPEAKER, 1, Pit8254::SPEAKER)],
        )?;
        let sci = ioapic.line(at::SCI_GSI.into());
        let power = Arc::new(Mutex::new(Power::new(sci, power_sink)));
        put(
            &mut buses,
            power.clone(),
            &[
                (Space::Port, at::PM, chipset::power::pm::LEN, Power::PM),
                (Space::Port, at::I8042_DATA, 1, Power::I8042_DATA),
                (Space::Port, at::I8042, 1, Power::I8042),
                (Space::Port, at::PORT_92, 1, Power::PORT_92),
            ],
        )?;
        let wall = i64::try_from(crate::vcpu::paravirtual::wall_clock_ns()).unwrap_or(i64::MAX);
        put(&mut buses, shared(Rtc::new(wall, isa(at::RTC_IRQ))), &[(Space::Port, at::RTC, Rtc::LEN, 0)])?;
        put(
            &mut buses,
            shared(pci.clone()),
            &[
                (Space::Port, at::PCI_PORTS, 8, Host::PORTS),
                (Space::Mmio, at::ECAM.base, at::ECAM.len, Host::ECAM),
            ],
        )?;
        let panic = shared(WatchedPort::new(pvpanic(&parts.lifecycle), resets.watch.clone()));
        put(&mut buses, panic, &[(Space::Port, at::PVPANIC, PvPanic::LEN, 0)])?;
        let mut description = at::Board { mmio64: parts.mmio64, ..at::Board::pc(parts.config.cpus) };
        description.serial = vec![at::COM1];
        description.nodes = parts.nodes.to_vec();
        if parts.config.test_devices {
            test_devices(&mut buses, &parts.lifecycle, &pic, &ioapic)?;
        }
        Ok(Self {
            buses,
            apics,
            ioapic,
            pic,
            pci,
            msi,
            power,
            serial,
            serial_wake,
            resets,
            external,
            description,
        })
    }

    /// What firmware would do, after the last PCI function is attached: addresses for BARs.
    pub(crate) fn assign_addresses(&self) -> Result<(), String> {
        let fits = self.pci.assign_resources(at::PCI_IO, at::MMIO32, self.description.mmio64);
        if fits { Ok(()) } else { Err("their registers do not fit into the address space".into()) }
    }

    /// The ACPI tables, with the address of the root pointer.
    pub(crate) fn tables(&self) -> acpi::Tables {
        acpi::build(&self.description, at::ACPI_TABLES)
    }
}

fn shared(device: impl Device + 'static) -> Arc<Mutex<dyn Device>> {
    Arc::new(Mutex::new(device))
}

fn put(
    buses: &mut Buses,
    device: Arc<Mutex<dyn Device>>,
    windows: &[(Space, u64, u64, u16)],
) -> Result<(), WiringError> {
    let number = buses.add(device);
    windows.iter().try_for_each(|&(space, base, len, window)| buses.map(space, base, len, number, window))
}

/// Messages go to the engine's local APICs.
fn engines_sink(engines: &Arc<dyn cpu::LocalApics>) -> MsiSink {
    let engines = engines.clone();
    MsiSink::new(move |message| engines.send(message.address, message.data))
}

/// The engine's local APICs tell the end of interrupts only of vectors that they know to be level-triggered.
fn watch_pins(ioapic: &IoApic, engines: &Arc<dyn cpu::LocalApics>) {
    let engines = engines.clone();
    ioapic.set_watch(Box::new(move |pins| {
        let messages: Vec<_> = pins.iter().map(|message| (message.address, message.data)).collect();
        engines.set_pins(&messages);
    }));
}

/// The 8259A's output, where the boot processor's thread asks the engine whether it may be taken.
fn external_wire(wire: &Arc<AtomicBool>, wake: &Wakes) -> Line {
    let (wire, wake) = (wire.clone(), wake.clone());
    Line::new(move |high| {
        if wire.swap(high, Ordering::SeqCst) != high && high {
            wake(0);
        }
    })
}

fn local_apics(parts: &Parts<'_>) -> Vec<Arc<Mutex<LocalApic>>> {
    let count = if parts.engines.is_some() { 0 } else { parts.config.cpus };
    (0..count)
        .map(|id| {
            Arc::new(Mutex::new(LocalApic::new(ApicConfig {
                id,
                bsp: id == 0,
                timer_hz: APIC_TIMER_HZ,
                tsc: crate::vcpu::tsc_clock(parts.tsc_hz),
                physical_address_bits: parts.physical_address_bits,
                x2apic: true,
            })))
        })
        .collect()
}

/// The 8259A's output: LINT0 of the boot processor.
fn lint0(apics: &Apics, wake: &Wakes) -> Line {
    let (apics, wake) = (apics.clone(), wake.clone());
    Line::new(move |high| {
        let Some(apic) = apics.get(0) else { return };
        let news = apic.lock().unwrap_or_else(PoisonError::into_inner).set_lint(0, high);
        if news {
            wake(0);
        }
    })
}

fn power_sink(resets: &Resets) -> PowerSink {
    let resets = resets.clone();
    PowerSink::new(move |event| match event {
        PowerEvent::Off => resets.lifecycle.end(Outcome::PoweredOff),
        PowerEvent::Reset => resets.reset(),
    })
}

/// A guest that panicked does nothing more, unless its crash kernel takes over.
fn pvpanic(lifecycle: &Arc<Lifecycle>) -> PvPanic {
    let lifecycle = lifecycle.clone();
    PvPanic::new(move |event| {
        if event == PanicEvent::Panicked {
            lifecycle.end(Outcome::GuestPanic);
        }
    })
}

fn test_devices(
    buses: &mut Buses,
    lifecycle: &Arc<Lifecycle>,
    pic: &Pic8259,
    ioapic: &IoApic,
) -> Result<(), WiringError> {
    let ending = lifecycle.clone();
    let exit = DebugExit::new(move |code| ending.end(Outcome::DebugExit(code)));
    put(buses, shared(exit), &[(Space::Port, at::DEBUG_EXIT, DebugExit::LEN, 0)])?;
    let lines = (0..PINS)
        .map(|pin| match u8::try_from(pin) {
            Ok(irq) if irq < 16 => at::isa_line(pic, ioapic, irq),
            _ => ioapic.line(pin),
        })
        .collect();
    put(
        buses,
        shared(PcTestDevice::new(lines)),
        &[
            (Space::Port, at::TEST_IRQS, PINS as u64, PcTestDevice::IRQS),
            (Space::Port, at::TEST_SCRATCH, 4, PcTestDevice::SCRATCH),
            (Space::Port, at::TEST_FLUSH, 4, PcTestDevice::FLUSH),
            (Space::Mmio, at::TEST_MEMORY, PcTestDevice::MEMORY_LEN, PcTestDevice::MEMORY),
        ],
    )
}

/// Presses the power button.
pub(crate) fn press(power: &Mutex<Power>) {
    power.lock().unwrap_or_else(PoisonError::into_inner).press_power_button();
}
