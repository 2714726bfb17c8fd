//! The local APIC of one vCPU (Intel SDM 3, chapter 12): one state behind two views, the xAPIC page and the x2APIC
//! MSRs.
//!
//! States: disabled, xAPIC, x2APIC (12.12.5), moved by [`LocalApic::set_base`]. Besides fixed interrupts it holds
//! what else can be sent to a processor: NMI, INIT and start-up, external interrupts of an 8259A.
//!
//! Who calls what: the vCPU's thread asks [`LocalApic::pending`] and then [`LocalApic::acknowledge`]s; it passes
//! register accesses and acts on their [`Effect`]; anybody may send through [`Apics::route`].
//!
//! Lock order: I/O APIC -> local APIC. An [`Effect`] is acted upon with this APIC unlocked.

mod ipi;
mod saved;
#[cfg(test)]
mod test;
mod timer;
mod vectors;

pub use ipi::{Apics, Delivery, Destination, Ipi, Trigger};
pub use saved::LocalApicState;
pub use timer::TscClock;

use device::VmTime;
use serde_json::{Value, json};
use timer::{Mode, Timer};
use vectors::Vectors;

/// MSR of register 0 of the x2APIC view.
const X2APIC_FIRST: u32 = 0x800;

/// Register numbers: offset in the page divided by 16, or MSR minus 0x800 (12.4.1, table 12-1).
mod register {
    pub(super) const ID: u32 = 0x02;
    pub(super) const VERSION: u32 = 0x03;
    pub(super) const TPR: u32 = 0x08;
    pub(super) const APR: u32 = 0x09;
    pub(super) const PPR: u32 = 0x0a;
    pub(super) const EOI: u32 = 0x0b;
    pub(super) const RRD: u32 = 0x0c;
    pub(super) const LDR: u32 = 0x0d;
    pub(super) const DFR: u32 = 0x0e;
    pub(super) const SVR: u32 = 0x0f;
    pub(super) const ISR: u32 = 0x10;
    pub(super) const TMR: u32 = 0x18;
    pub(super) const IRR: u32 = 0x20;
    pub(super) const ESR: u32 = 0x28;
    pub(super) const ICR_LOW: u32 = 0x30;
    pub(super) const ICR_HIGH: u32 = 0x31;
    pub(super) const LVT_TIMER: u32 = 0x32;
    pub(super) const LVT_THERMAL: u32 = 0x33;
    pub(super) const LVT_PERFORMANCE: u32 = 0x34;
    pub(super) const LVT_LINT0: u32 = 0x35;
    pub(super) const LVT_LINT1: u32 = 0x36;
    pub(super) const LVT_ERROR: u32 = 0x37;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const CURRENT_COUNT: u32 = 0x39;
    pub(super) const DIVIDE_CONFIG: u32 = 0x3e;
    pub(super) const SELF_IPI: u32 = 0x3f;
}
use register as r;

/// Version 0x14 with six LVT entries, no EOI broadcast suppression.
const VERSION: u32 = 0x0005_0014;
const LVT_MASKED: u32 = 1 << 16;
/// Delivery modes ExtINT and NMI, unmasked.
const LVT_EXTERNAL: u32 = 7 << 8;
const LVT_NMI: u32 = 4 << 8;
const SVR_ENABLE: u32 = 1 << 8;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

/// Bits of the APIC_BASE MSR (12.4.4, 12.12.1).
mod base {
    pub(super) const BSP: u64 = 1 << 8;
    pub(super) const X2APIC: u64 = 1 << 10;
    pub(super) const ENABLE: u64 = 1 << 11;
}

/// Reserved bits of ICR in x2APIC mode; writing one is #GP.
const ICR_RESERVED: u64 = 0xfff3_2000;
/// Delivery status: always idle, messages arrive at once.
const ICR_BUSY: u32 = 1 << 12;

/// What is left to do after a register write, with the APIC unlocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Send it with [`Apics::route`].
    Ipi(Ipi),
    /// Tell the I/O APIC that a level-triggered vector has ended.
    Eoi(u8),
}

/// What start-up messages ask of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Startup {
    /// Reset the processor as INIT does; the APIC has been. It then waits for start-up, unless it is the BSP, which
    /// starts from the reset vector.
    Init,
    /// Start in real mode at page `.0`.
    Sipi(u8),
}

/// What an APIC is made with.
#[derive(Debug, Clone, Copy)]
pub struct ApicConfig {
    /// x2APIC id; the low eight bits are the xAPIC id.
    pub id: u32,
    /// The processor that boots the machine.
    pub bsp: bool,
    /// Frequency of the timer before the divider, Hz (CPUID leaf 0x15 may tell the guest).
    pub timer_hz: u64,
    /// The vCPU's TSC.
    pub tsc: TscClock,
    /// MAXPHYADDR, for the reserved bits of APIC_BASE.
    pub physical_address_bits: u8,
    /// Whether CPUID offers x2APIC.
    pub x2apic: bool,
}

/// A local APIC.
#[derive(Debug, Clone)]
pub struct LocalApic {
    config: ApicConfig,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    /// Errors not yet latched by a write to ESR.
    errors: u32,
    esr: u32,
    icr: u64,
    /// LVT_TIMER to LVT_ERROR.
    lvt: [u32; 6],
    timer: Timer,
    lint: [bool; 2],
    nmi: bool,
    external: bool,
    init: bool,
    wait_for_sipi: bool,
    sipi: Option<u8>,
}

impl LocalApic {
    /// Where the page is after reset.
    pub const BASE: u64 = 0xfee0_0000;
    /// Bytes of the page.
    pub const LEN: u64 = 0x1000;

    /// An APIC in the power-up state: xAPIC mode; all but the BSP wait for start-up.
    pub fn new(config: ApicConfig) -> Self {
        let mut apic = Self {
            config,
            base: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            errors: 0,
            esr: 0,
            icr: 0,
            lvt: [0; 6],
            timer: Timer::new(config.timer_hz, config.tsc),
            lint: [false; 2],
            nmi: false,
            external: false,
            init: false,
            wait_for_sipi: false,
            sipi: None,
        };
        apic.reset();
        apic
    }

    /// Back to the power-up state. The levels of the LINT pins are the board's and stay. The BSP is then in virtual
    /// wire mode as firmware, which this machine has none of, would leave it (MultiProcessor Specification 1.4,
    /// 3.6.2.2): a kernel that knows only the 8259A gets its interrupts.
    pub fn reset(&mut self) {
        self.base = Self::BASE | base::ENABLE | if self.config.bsp { base::BSP } else { 0 };
        self.nmi = false;
        self.external = false;
        self.init = false;
        self.sipi = None;
        self.wait_for_sipi = !self.config.bsp;
        self.reset_registers();
        if self.config.bsp {
            self.svr |= SVR_ENABLE;
            self.lvt[3] = LVT_EXTERNAL;
            self.lvt[4] = LVT_NMI;
        }
    }

    /// The state of the registers after power-up and INIT (12.4.7.1).
    fn reset_registers(&mut self) {
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.irr = Vectors::default();
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.errors = 0;
        self.esr = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        self.timer.reset();
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// The value of the APIC_BASE MSR.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Where the xAPIC page is now, if it answers.
    pub fn page(&self) -> Option<u64> {
        (self.base & base::ENABLE != 0 && !self.is_x2apic()).then_some(self.base & !0xfff)
    }

    /// Whether the MSR view is active.
    pub fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    /// Writes the APIC_BASE MSR; `None` is #GP: reserved bits or a transition that 12.12.5 forbids.
    pub fn set_base(&mut self, value: u64) -> Option<()> {
        let address_mask = 1u64.checked_shl(self.config.physical_address_bits.into()).unwrap_or(0);
        let allowed = (address_mask.wrapping_sub(1) & !0xfff)
            | base::BSP
            | base::ENABLE
            | if self.config.x2apic { base::X2APIC } else { 0 };
        let mode = |value: u64| (value & base::ENABLE != 0, value & base::X2APIC != 0);
        let (old, new) = (mode(self.base), mode(value));
        if value & !allowed != 0
            || matches!(
                (old, new),
                (_, (false, true)) | ((true, true), (true, false)) | ((false, false), (true, true))
            )
        {
            return None;
        }
        if old.0 && !new.0 {
            self.reset_registers();
        }
        self.base = value;
        Some(())
    }

    /// Tells the APIC how its TSC runs from now on (the guest wrote the TSC).
    pub fn set_tsc_clock(&mut self, tsc: TscClock) {
        self.config.tsc = tsc;
        self.timer.tsc = tsc;
    }

    // What the vCPU's thread asks.

    /// The highest vector that the processor should take now, by priority; its interrupt flag is not known here.
    pub fn pending(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// The processor takes `vector`.
    pub fn acknowledge(&mut self, vector: u8) {
        self.irr.remove(vector);
        self.isr.insert(vector);
    }

    /// Whether an 8259A's interrupt should be taken: the board asks it for the vector and calls
    /// [`Self::acknowledge_external`].
    pub fn external_pending(&self) -> bool {
        if self.base & base::ENABLE == 0 {
            // A disabled APIC leaves the processor's INTR and NMI pins (12.4.3).
            return self.lint[0];
        }
        let lvt = self.lvt[3];
        self.external
            || (self.lint[0]
                && lvt & LVT_MASKED == 0
                && Delivery::from_field(lvt >> 8) == Some(Delivery::External))
    }

    /// The 8259A's interrupt has been taken.
    pub fn acknowledge_external(&mut self) {
        self.external = false;
    }

    /// Takes the NMI, if one is waiting.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether an NMI is waiting.
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Whether the processor must not run until start-up.
    pub fn waiting_for_sipi(&self) -> bool {
        self.wait_for_sipi
    }

    /// Takes the next INIT or start-up, if one is waiting.
    pub fn take_startup(&mut self) -> Option<Startup> {
        if std::mem::take(&mut self.init) {
            // INIT keeps the mode and the id (12.12.5.1), and does not touch what arrived after it.
            self.reset_registers();
            self.nmi = false;
            self.external = false;
            return Some(Startup::Init);
        }
        self.sipi.take().map(Startup::Sipi)
    }

    /// Whether there is anything that ends HLT for a processor with its interrupt flag set, or that must be acted
    /// on at once.
    pub fn has_work(&self) -> bool {
        self.pending().is_some() || self.nmi || self.init || self.sipi.is_some() || self.external_pending()
    }

    /// Ends the interrupt in service; answers its vector if it was level-triggered (see [`Effect::Eoi`]).
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        self.tmr.contains(vector).then_some(vector)
    }

    /// Whether the guest may skip the EOI of the interrupt in service: edge-triggered, nothing waits behind it
    /// (the condition of KVM's PV_EOI protocol). The machine calls [`Self::eoi`] for the guest later.
    pub fn eoi_skippable(&self) -> bool {
        self.irr.highest().is_none() && self.isr.highest().is_some_and(|vector| !self.tmr.contains(vector))
    }

    /// The task priority (CR8 is its upper four bits).
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task priority.
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    /// The processor priority (12.8.3.1).
    pub fn ppr(&self) -> u8 {
        let service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr >> 4 >= service >> 4 { self.tpr } else { service }
    }

    /// When [`Self::tick`] is due. A masked timer needs nobody.
    pub fn deadline(&self) -> Option<VmTime> {
        if self.lvt[0] & LVT_MASKED != 0 { None } else { self.timer.deadline() }
    }

    /// Time has passed; whether there is a new interrupt.
    pub fn tick(&mut self, now: VmTime) -> bool {
        let lvt = self.lvt[0];
        self.timer.expire(now) && lvt & LVT_MASKED == 0 && self.deliver(lvt as u8, Trigger::Edge)
    }

    // What arrives.

    /// Whether fixed interrupts are accepted: enabled by base and by software.
    pub fn accepts_fixed(&self) -> bool {
        self.base & base::ENABLE != 0 && self.svr & SVR_ENABLE != 0
    }

    /// A fixed interrupt arrives; whether it is news.
    pub fn deliver(&mut self, vector: u8, trigger: Trigger) -> bool {
        if !self.accepts_fixed() {
            return false;
        }
        if vector < 16 {
            return self.error(ERROR_RECEIVE_VECTOR);
        }
        match trigger {
            Trigger::Edge => self.tmr.remove(vector),
            Trigger::Level => {
                self.tmr.insert(vector);
            }
        }
        self.irr.insert(vector)
    }

    /// A message for this APIC arrives; whether the processor should be woken.
    pub fn receive(&mut self, ipi: &Ipi) -> bool {
        match ipi.delivery {
            Delivery::Fixed | Delivery::LowestPriority => self.deliver(ipi.vector, ipi.trigger),
            Delivery::Smi => false,
            Delivery::Nmi => !std::mem::replace(&mut self.nmi, true),
            Delivery::Init => {
                self.init = true;
                self.wait_for_sipi = !self.config.bsp;
                self.sipi = None;
                true
            }
            Delivery::Startup => {
                // Only the first start-up after INIT counts.
                if self.wait_for_sipi {
                    self.wait_for_sipi = false;
                    self.sipi = Some(ipi.vector);
                    true
                } else {
                    false
                }
            }
            Delivery::External => !std::mem::replace(&mut self.external, true),
        }
    }

    /// Whether a message is for this APIC (12.6.2, 12.12.10.2).
    pub fn addressed_by(&self, destination: Destination) -> bool {
        match destination {
            Destination::All
            | Destination::Physical(Destination::BROADCAST)
            | Destination::Logical(Destination::BROADCAST) => true,
            Destination::AllButSelf { sender } => sender != self.config.id,
            Destination::Physical(id) => id == self.config.id,
            Destination::Logical(set) if self.is_x2apic() => {
                let own = self.logical_id();
                set >> 16 == own >> 16 && set & own & 0xffff != 0
            }
            Destination::Logical(set) if set <= 0xff => {
                let own = self.ldr >> 24;
                if self.dfr >> 28 == 0xf {
                    set & own != 0
                } else {
                    set >> 4 == own >> 4 && set & own & 0xf != 0
                }
            }
            Destination::Logical(_) => false,
        }
    }

    /// Sets the level of pin LINT0 or LINT1 (`pin` 0 or 1); whether the processor should be woken.
    pub fn set_lint(&mut self, pin: usize, high: bool) -> bool {
        let Some(level) = self.lint.get_mut(pin & 1) else { return false };
        let rising = high && !std::mem::replace(level, high);
        if !high {
            *level = false;
        }
        if self.base & base::ENABLE == 0 {
            return rising && (pin & 1 == 0 || self.receive_local(Delivery::Nmi, 0));
        }
        let lvt = if pin & 1 == 0 { self.lvt[3] } else { self.lvt[4] };
        if !rising || lvt & LVT_MASKED != 0 {
            return false;
        }
        match Delivery::from_field(lvt >> 8) {
            // The level itself is looked at in `external_pending`.
            Some(Delivery::External) => true,
            Some(delivery @ (Delivery::Fixed | Delivery::Nmi)) => self.receive_local(delivery, lvt as u8),
            _ => false,
        }
    }

    fn receive_local(&mut self, delivery: Delivery, vector: u8) -> bool {
        let destination = Destination::Physical(self.config.id);
        self.receive(&Ipi { delivery, vector, trigger: Trigger::Edge, destination })
    }

    fn error(&mut self, bit: u32) -> bool {
        self.errors |= bit;
        let lvt = self.lvt[5];
        // A bad vector here would be an error about the error: 12.5.3 leaves it at the first.
        lvt & LVT_MASKED == 0 && lvt as u8 >= 16 && self.deliver(lvt as u8, Trigger::Edge)
    }

    fn logical_id(&self) -> u32 {
        if self.is_x2apic() {
            ((self.config.id >> 4) << 16) | (1 << (self.config.id & 0xf))
        } else {
            self.ldr
        }
    }

    // Registers.

    /// Reads the xAPIC page. Registers are 32 bits wide at multiples of 16; other bytes read as zero.
    pub fn page_read(&mut self, offset: u64, now: VmTime) -> u32 {
        if offset & 0xc != 0 {
            return 0;
        }
        let shift = (offset as u32 & 3).wrapping_mul(8);
        match self.read((offset as u32 >> 4) & 0xff, now) {
            Some(value) => value as u32 >> shift,
            None => {
                self.error(ERROR_REGISTER);
                0
            }
        }
    }

    /// Writes the xAPIC page.
    pub fn page_write(&mut self, offset: u64, value: u32, now: VmTime) -> Effect {
        if offset & 0xf != 0 {
            return Effect::None;
        }
        let register = (offset as u32 >> 4) & 0xff;
        match register {
            r::ICR_HIGH => self.icr = (self.icr & 0xffff_ffff) | (u64::from(value) << 32),
            r::ICR_LOW => return self.send((self.icr & !0xffff_ffff) | u64::from(value)),
            r::LDR => self.ldr = value & 0xff00_0000,
            r::DFR => self.dfr = value | 0x0fff_ffff,
            r::SVR => self.set_svr(value & 0x1ff),
            r::TPR => self.tpr = value as u8,
            r::ESR => self.latch_errors(),
            r::EOI => return self.eoi().map_or(Effect::None, Effect::Eoi),
            r::LVT_TIMER..=r::LVT_ERROR => self.set_lvt(register, value, now),
            r::INITIAL_COUNT => self.timer.set_initial(value, now),
            r::DIVIDE_CONFIG => self.timer.set_divide_config(value, now),
            // Read-only registers ignore writes.
            r::ID | r::VERSION | r::APR | r::PPR | r::RRD | r::ISR..r::ESR | r::CURRENT_COUNT => {}
            _ => {
                self.error(ERROR_REGISTER);
            }
        }
        Effect::None
    }

    /// Reads an x2APIC MSR; `None` is #GP.
    pub fn msr_read(&self, index: u32, now: VmTime) -> Option<u64> {
        let register = index.checked_sub(X2APIC_FIRST)?;
        match register {
            _ if !self.is_x2apic() => None,
            r::APR | r::RRD | r::DFR | r::EOI | r::ICR_HIGH => None,
            r::ICR_LOW => Some(self.icr),
            _ => self.read(register, now),
        }
    }

    /// Writes an x2APIC MSR; `None` is #GP.
    pub fn msr_write(&mut self, index: u32, value: u64, now: VmTime) -> Option<Effect> {
        let register = index.checked_sub(X2APIC_FIRST)?;
        if !self.is_x2apic() {
            return None;
        }
        if register == r::ICR_LOW {
            return (value & ICR_RESERVED == 0).then(|| self.send(value));
        }
        let writable = match register {
            r::TPR | r::SELF_IPI => 0xff,
            r::EOI | r::ESR => 0,
            r::SVR => 0x1ff,
            r::LVT_TIMER => 0x710ff,
            r::LVT_THERMAL | r::LVT_PERFORMANCE => 0x117ff,
            r::LVT_LINT0 | r::LVT_LINT1 => 0x1f7ff,
            r::LVT_ERROR => 0x110ff,
            r::INITIAL_COUNT => u32::MAX.into(),
            r::DIVIDE_CONFIG => 0b1011,
            _ => return None,
        };
        if value & !writable != 0 {
            return None;
        }
        if register == r::SELF_IPI {
            self.deliver(value as u8, Trigger::Edge);
            return Some(Effect::None);
        }
        Some(self.page_write(u64::from(register) << 4, value as u32, now))
    }

    /// The TSC_DEADLINE MSR.
    pub fn tsc_deadline(&self) -> u64 {
        self.timer.tsc_deadline
    }

    /// Writes the TSC_DEADLINE MSR; ignored outside TSC-deadline mode (12.5.4.1). Follow with [`Self::tick`].
    pub fn set_tsc_deadline(&mut self, value: u64) {
        if self.timer.mode == Mode::TscDeadline {
            self.timer.tsc_deadline = value;
        }
    }

    fn read(&self, register: u32, now: VmTime) -> Option<u64> {
        let lvt = |register: u32| {
            let index = register.wrapping_sub(r::LVT_TIMER) as usize;
            self.lvt.get(index).copied().unwrap_or(0)
        };
        let word = |base: u32| register.wrapping_sub(base);
        Some(u64::from(match register {
            r::ID if self.is_x2apic() => self.config.id,
            r::ID => self.config.id << 24,
            r::VERSION => VERSION,
            r::TPR => self.tpr.into(),
            r::APR | r::RRD | r::EOI => 0,
            r::PPR => self.ppr().into(),
            r::LDR => self.logical_id(),
            r::DFR => self.dfr,
            r::SVR => self.svr,
            r::ISR..r::TMR => self.isr.register(word(r::ISR)),
            r::TMR..r::IRR => self.tmr.register(word(r::TMR)),
            r::IRR..r::ESR => self.irr.register(word(r::IRR)),
            r::ESR => self.esr,
            r::ICR_LOW => self.icr as u32,
            r::ICR_HIGH => (self.icr >> 32) as u32,
            r::LVT_TIMER..=r::LVT_ERROR => lvt(register),
            r::INITIAL_COUNT => self.timer.initial,
            r::CURRENT_COUNT => self.timer.count(now),
            r::DIVIDE_CONFIG => self.timer.divide_config,
            _ => return None,
        }))
    }

    fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.errors);
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            // Software disable masks all local entries (12.4.7.2).
            for lvt in &mut self.lvt {
                *lvt |= LVT_MASKED;
            }
        }
    }

    fn set_lvt(&mut self, register: u32, value: u32, now: VmTime) {
        // An expiry that a mask hid stays hidden.
        if register == r::LVT_TIMER {
            self.tick(now);
        }
        let writable = match register {
            r::LVT_TIMER => 0x700ff,
            r::LVT_LINT0 | r::LVT_LINT1 => 0x1a7ff,
            r::LVT_ERROR => 0x100ff,
            _ => 0x107ff,
        };
        let mut value = value & writable;
        if self.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        if let Some(lvt) = self.lvt.get_mut(register.wrapping_sub(r::LVT_TIMER) as usize) {
            *lvt = value;
        }
        if register == r::LVT_TIMER {
            self.timer.set_mode(match (value >> 17) & 3 {
                0 => Mode::OneShot,
                1 => Mode::Periodic,
                _ => Mode::TscDeadline,
            });
        }
    }

    /// A write to ICR: sends (12.6.1).
    fn send(&mut self, icr: u64) -> Effect {
        self.icr = icr & !u64::from(ICR_BUSY);
        let low = icr as u32;
        let vector = low as u8;
        let Some(delivery) = Delivery::from_field(low >> 8) else { return Effect::None };
        let assert = low & (1 << 14) != 0;
        let level = low & (1 << 15) != 0;
        if delivery == Delivery::Init && level && !assert {
            // INIT level de-assert only set arbitration ids, which nothing has.
            return Effect::None;
        }
        if matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) && vector < 16 {
            self.error(ERROR_SEND_VECTOR);
            return Effect::None;
        }
        let logical = low & (1 << 11) != 0;
        let destination = match (low >> 18) & 3 {
            0 if self.is_x2apic() => Destination::wide(logical, (icr >> 32) as u32),
            0 => Destination::narrow(logical, (icr >> 56) as u8),
            1 => Destination::Physical(self.config.id),
            2 => Destination::All,
            _ => Destination::AllButSelf { sender: self.config.id },
        };
        // All IPIs are edge-triggered; the level bit means something for INIT only.
        let ipi = Ipi { delivery, vector, trigger: Trigger::Edge, destination };
        if destination == Destination::Physical(self.config.id) && delivery == Delivery::Fixed {
            self.receive(&ipi);
            return Effect::None;
        }
        Effect::Ipi(ipi)
    }

    /// Mode, priorities, waiting vectors and timer, for people.
    pub fn inspect(&self, now: VmTime) -> Value {
        let list = |set: &Vectors| set.iter().map(|v| format!("{v:#04x}")).collect::<Vec<_>>();
        json!({
            "id": self.config.id,
            "base": format!("{:#x}", self.base),
            "mode": if self.base & base::ENABLE == 0 { "disabled" } else if self.is_x2apic() { "x2apic" } else { "xapic" },
            "software_enabled": self.svr & SVR_ENABLE != 0,
            "tpr": self.tpr,
            "ppr": self.ppr(),
            "ldr": format!("{:#x}", self.logical_id()),
            "irr": list(&self.irr),
            "isr": list(&self.isr),
            "lvt": self.lvt.iter().map(|v| format!("{v:#x}")).collect::<Vec<_>>(),
            "timer": { "mode": format!("{:?}", self.timer.mode), "initial_count": self.timer.initial,
                "current_count": self.timer.count(now), "tsc_deadline": self.timer.tsc_deadline,
                "deadline_ns": self.timer.deadline().map(|d| d.0) },
            "nmi": self.nmi,
            "waiting_for_sipi": self.wait_for_sipi,
        })
    }
}
