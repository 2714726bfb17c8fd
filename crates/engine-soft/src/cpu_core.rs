//! [`Core`]: one vCPU as both tiers see it.
//!
//! Between two instructions the whole guest state is in [`Core::state`], but for x87, which lives in the host's
//! registers between [`Core::enter`] and [`Core::leave`].

use crate::exception::{Stop, vector};
use crate::fetch::FetchCache;
use crate::io::IoLog;
use crate::mmu::Mmu;
use crate::state::{CpuState, Owned, Shadow};
use crate::step::Checkpoint;
use crate::step::model::Mtrrs;
use crate::step::native::{Stubs, arena};
use cpu::Error;
use cpu::cpuid::CpuidTable;
use memory::GuestMemory;
use std::sync::Arc;

/// Bits of [`CpuState::attention`].
#[allow(missing_docs)]
pub mod attention {
    /// [`super::Core::code_writes`] is not empty.
    pub const CODE_WRITES: u32 = 1 << 0;
    /// The mode of execution may have changed (CS, CR0, CR4, EFER, breakpoints, shadows): look at everything anew.
    pub const MODE: u32 = 1 << 1;
}

/// Events that wait for the boundary of an instruction.
#[derive(Debug, Clone, Default)]
pub struct Pending {
    /// An external interrupt, accepted from the interrupt controller.
    pub interrupt: Option<u8>,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// DR6 bits of debug traps to deliver after the instruction that met them.
    pub debug: u64,
    /// Those of the instruction before, held back by MOV SS.
    pub held: u64,
    /// Report when an interrupt could be taken.
    pub window: bool,
}

/// What happened so far, for people.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Instructions of the single-step tier.
    pub steps: u64,
    /// Of those, executed by the host CPU.
    pub native: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
}

/// One vCPU.
pub struct Core {
    /// Registers and TLB.
    pub state: Owned,
    /// The MMU.
    pub mmu: Mmu,
    /// What CPUID answers.
    pub cpuid: Arc<CpuidTable>,
    /// Index and initial APIC id.
    pub index: u32,
    /// Frequency of the TSC in Hz.
    pub tsc_hz: u64,
    /// Events that wait.
    pub pending: Pending,
    /// Device accesses of the instruction under way.
    pub io: IoLog,
    /// Writes (guest-physical address, length) to pages that hold translated code; the translator drains it.
    pub code_writes: Vec<(u64, u64)>,
    /// The other vCPUs, if there are some.
    pub(crate) peers: Option<crate::peers::Peers>,
    /// Statistics.
    pub counters: Counters,
    pub(crate) fetch: FetchCache,
    pub(crate) stubs: Stubs,
    pub(crate) mtrrs: Mtrrs,
    pub(crate) before: Checkpoint,
    pub(crate) amd: bool,
    /// Writes to RAM of the single-step tier are noted here, for lock-step.
    pub(crate) writes: Option<crate::verify::WriteLog>,
}

impl Core {
    /// A vCPU in the power-up state.
    pub fn new(memory: GuestMemory, cpuid: Arc<CpuidTable>, index: u32, tsc_hz: u64) -> Result<Self, Error> {
        // Physical address width: CPUID 8000_0008h EAX, bits 0-7.
        let bits = cpuid.get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff).clamp(32, 52);
        let amd = cpuid.get(0, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Auth"));
        Ok(Self {
            state: CpuState::power_up(),
            mmu: Mmu::new(memory, bits),
            cpuid,
            index,
            tsc_hz,
            pending: Pending::default(),
            io: IoLog::default(),
            code_writes: Vec::new(),
            peers: None,
            counters: Counters::default(),
            fetch: FetchCache::new(Self::decoder_options(amd)),
            stubs: Stubs::new()?,
            mtrrs: Mtrrs::default(),
            before: Checkpoint::default(),
            amd,
            writes: None,
        })
    }

    /// A vCPU in flat 64-bit mode at CPL 0 without an IDT, for tests of single instructions: identity paging of the
    /// first 4 GiB by global 1 GiB pages, tables at 0x1000 and 0x2000 of `memory`; SSE, AVX and x87 enabled.
    pub fn flat64(memory: GuestMemory) -> Result<Self, Error> {
        use cpu::{Segment, attr, cr0, cr4, efer};
        let topology = cpu::cpuid::Topology { apic_id: 0, cpus: 1 };
        let hz = 1_000_000_000;
        let table = cpu::cpuid::Model::named("host").and_then(|model| model.table(topology, hz));
        let table = table.map_err(|error| Error::Unsupported { engine: "soft", why: error.to_string() })?;
        let mut core = Self::new(memory, Arc::new(table), 0, hz)?;
        // A table that does not fit in RAM makes every access fault, which a test sees at once.
        let ram = core.mmu.memory.clone();
        let _ = ram.write(0x1000, &0x2007u64.to_le_bytes());
        for gib in 0..4u64 {
            let _ = ram.write(0x2000 + gib * 8, &(gib << 30 | 0x187).to_le_bytes());
        }
        let state = &mut core.state;
        state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::MP | cr0::ET;
        state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE | cr4::FSGSBASE;
        state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        state.cr3 = 0x1000;
        state.xcr0 = 7;
        let flat = Segment { base: 0, limit: u32::MAX, selector: 0x10, attr: attr::DATA };
        state.segments = [flat; 6];
        state.segments[crate::state::seg::CS] =
            Segment { base: 0, limit: u32::MAX, selector: 8, attr: attr::CODE64 };
        state.rip = 0x10_0000;
        Ok(core)
    }

    /// Power-up values of what INIT leaves alone: FPU, vectors, MSRs.
    pub(crate) fn reset_extended(&mut self) {
        let fresh = CpuState::power_up();
        self.state.msrs = fresh.msrs.clone();
        self.state.ymm = fresh.ymm;
        self.state.x87 = fresh.x87;
        self.state.mxcsr = fresh.mxcsr;
        self.mtrrs = Mtrrs::default();
    }

    /// Makes the guest's x87 state the host's. Before the first step; the thread stays the same until
    /// [`Self::leave`].
    pub fn enter(&mut self) {
        arena::load_x87(&mut self.state);
    }

    /// Keeps the guest's x87 state and gives the host a clean one.
    pub fn leave(&mut self) {
        arena::store_x87(&mut self.state);
    }

    /// There are other vCPUs.
    pub(crate) fn set_peers(&mut self, peers: crate::peers::Peers) {
        self.mmu.set_peers(peers.clone());
        self.peers = Some(peers);
    }

    /// A page is about to be translated from: no write to it by any vCPU may pass unseen from here on.
    pub(crate) fn protect_code(&mut self, page: u64) {
        if self.mmu.memory.host_page(page).is_none() {
            // No code is there, and nobody would tell when the page may be forgotten.
            return;
        }
        match self.peers.clone() {
            None => self.mmu.protect_code(&mut self.state, page),
            Some(peers) => peers.protect(&mut self.mmu, &mut self.state, page),
        }
    }

    /// Delivers what waits, if the guest can take it now. Called between instructions.
    pub fn deliver_pending(&mut self) -> Stop {
        if !self.io.is_empty() {
            // Half of an instruction has happened: the other half first.
            return Stop::Continue;
        }
        if self.pending.nmi && !self.state.nmi_blocked && self.state.shadow != Shadow::MovSs {
            self.pending.nmi = false;
            self.state.nmi_blocked = true;
            return self.interrupt(vector::NMI);
        }
        if let Some(vector) = self.pending.interrupt
            && self.state.interruptible()
        {
            self.pending.interrupt = None;
            self.counters.interrupts += 1;
            return self.interrupt(vector);
        }
        Stop::Continue
    }
}
