//! The state of one vCPU, shared by both tiers.
//!
//! [`CpuState`] is laid out for translated code: while that runs, the host's RSP points at the struct and every field
//! is `[rsp + offset]`. Where each part of the guest's state is:
//!
//! | part | in translated code | in Rust code of this crate (inside `run`) | outside `run` |
//! |---|---|---|---|
//! | GPRs, RIP, flags | host registers and flags, spills in [`CpuState::gpr`] | `gpr`, `rip`, `rflags` | same |
//! | YMM0-15, MXCSR | host registers | [`CpuState::ymm`], [`CpuState::mxcsr`] | same |
//! | x87/MMX | host registers | host registers (Rust code never touches them) | [`CpuState::x87`] |
//!
//! `rflags` always holds the complete architectural value in Rust code.

use crate::translate::hints::Hints;
use crate::translate::linkage::Linkage;
use cpu::{DescriptorTable, Registers, Segment, cr0, cr4, efer, rflags};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Entries of each software TLB table.
pub const TLB_ENTRIES: usize = 1024;
/// Address spaces of the user, told apart by PCID, of which translations are held at a time.
pub const SPACES: usize = 6;
/// A tag that no address has.
pub const TLB_INVALID: u64 = u64::MAX;

/// The bits of an address that number its 4 KiB page.
pub const PAGE_MASK: u64 = !0xfff;
/// One software TLB entry: `tag` is the linear address of the page (low 12 bits zero), and host = linear + `addend`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear page address, or [`TLB_INVALID`].
    pub tag: u64,
    /// Host address less linear address, wrapping.
    pub addend: u64,
}

impl TlbEntry {
    /// The host address of a linear address in the entry's page.
    pub fn host(&self, linear: u64) -> u64 {
        linear.wrapping_add(self.addend)
    }
}

/// One direct-mapped table, indexed by bits 12 and up of the linear address.
#[derive(Clone)]
#[repr(C)]
pub struct TlbTable {
    /// The entries.
    pub entries: [TlbEntry; TLB_ENTRIES],
    /// By entry, 1 if the translation outlives a load of CR3, or need not: translated code may remember it in its
    /// hints. Else 0.
    pub lasting: [u8; TLB_ENTRIES],
}

/// The index of segment registers in [`CpuState::segments`], in encoding order.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// The index of general registers in [`CpuState::gpr`].
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Which instructions may not be interrupted after the one just executed (Intel SDM 3, 7.8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Shadow {
    /// None.
    #[default]
    None,
    /// STI just set IF: external interrupts wait one instruction.
    Sti,
    /// MOV SS or POP SS: interrupts, NMIs and debug traps wait one instruction.
    MovSs,
}

/// MSRs held by the engine, besides those in fields of their own.
#[derive(Debug, Clone, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub tsc_adjust: u64,
    pub xss: u64,
    pub mtrr_def_type: u64,
}

/// What other threads write to while a vCPU runs.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Doorbell {
    /// Why somebody wants the vCPU; translated code polls it where it may close a loop.
    pub kick: AtomicU32,
    /// The salts of the jump cache by privilege class, as indirect jumps use them: none of them is right after a kick,
    /// so that these jumps need not poll.
    pub gates: [AtomicU64; 2],
    /// The process that runs the guest's code now, if one does.
    pub process: AtomicI32,
}

impl Doorbell {
    /// Makes translated code leave soon, to find `bits`.
    pub fn ring(&self, bits: u32) {
        self.kick.fetch_or(bits, Ordering::SeqCst);
        for gate in &self.gates {
            gate.store(0, Ordering::SeqCst);
        }
        let process = self.process.load(Ordering::SeqCst);
        if process != 0 {
            crate::host::interrupt(process);
        }
    }

    /// The reasons to leave, if any.
    pub fn rung(&self) -> u32 {
        self.kick.load(Ordering::Relaxed)
    }
}

/// All of one vCPU that translated code and both tiers touch. See the module page for what is where when.
#[repr(C, align(64))]
pub struct CpuState {
    /// RAX to R15 in encoding order.
    pub gpr: [u64; 16],
    /// Linear-offset instruction pointer.
    pub rip: u64,
    /// The architectural flags.
    pub rflags: u64,
    /// Written by [`cpu::Kick`] from any thread.
    pub doorbell: Doorbell,
    /// Bit set of reasons for the dispatcher to look up before the next block, for the tiers' own use.
    pub attention: u32,
    /// The host's stack pointer while translated code runs.
    pub host_rsp: u64,
    /// Guest TSC less host TSC, divided by `tsc_divisor`.
    pub tsc_offset: u64,
    /// The guest's TSC is so many times slower than the host's; translated code knows 1 only.
    pub tsc_divisor: u64,
    /// Spill slots and parameters of translated code.
    pub scratch: [u64; 16],
    /// MXCSR of the guest.
    pub mxcsr: u32,
    /// MXCSR of the host.
    pub host_mxcsr: u32,
    /// Selector of the host's data segment.
    pub host_data: u16,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0-DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// MSRs without a field of their own.
    pub msrs: Msrs,
    /// Interrupt shadow left by the last instruction.
    pub shadow: Shadow,
    /// An NMI is being handled: no other until IRET.
    pub nmi_blocked: bool,
    /// HLT executed and nothing has ended it yet.
    pub halted: bool,
    /// YMM0-15.
    pub ymm: Vectors,
    /// x87/MMX state outside `run`: an FXSAVE64 image (only its x87 part is used).
    pub x87: X87,
    /// For data reads, and for data writes and read-modify-writes: at CPL 0-2 (`[0]`), and at CPL 3 by address space.
    pub tlb: [[TlbTable; 2]; 1 + SPACES],
    /// The address space of the user that is in force, from 0 on.
    pub space: usize,
    /// Offset in this struct of the TLB tables of that space.
    pub user_tlb: u64,
    /// How translated code is entered, left and chained.
    pub linkage: Linkage,
    /// What translated code remembers of the TLB at each access.
    pub hints: Hints,
}

/// YMM registers as little-endian quadwords.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Vectors(pub [[u64; 4]; 16]);

/// An FXSAVE image.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct X87(pub [u8; 512]);

impl Default for X87 {
    /// After FNINIT, and MXCSR's power-up value.
    fn default() -> Self {
        let mut image = [0; 512];
        image[..2].copy_from_slice(&0x037fu16.to_le_bytes());
        image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self(image)
    }
}

/// A [`CpuState`] in memory of its own, of which only what is used exists: an allocator would fill all of it.
pub struct Owned(std::ptr::NonNull<CpuState>);

#[allow(unsafe_code)]
mod owned {
    use super::{CpuState, Owned};
    use std::ptr::NonNull;

    // SAFETY: it owns what it points to, as a `Box` does, and that is `Send`.
    unsafe impl Send for Owned {}

    impl Owned {
        pub(super) fn zeroed() -> Self {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let size = size_of::<CpuState>();
            // SAFETY: a fresh mapping.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), size, rights, flags, -1, 0) };
            match NonNull::new(at.cast()) {
                Some(state) if at != libc::MAP_FAILED => Self(state),
                _ => std::alloc::handle_alloc_error(std::alloc::Layout::new::<CpuState>()),
            }
        }
    }

    impl Drop for Owned {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's, and the state has nothing to drop.
            unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<CpuState>()) };
        }
    }

    impl std::ops::Deref for Owned {
        type Target = CpuState;

        fn deref(&self) -> &CpuState {
            // SAFETY: valid and owned. All fields are integers, arrays of them, booleans and an enumeration with a variant 0,
            // for which the zeros of a fresh mapping are a value; pages are aligned more strictly than the struct.
            unsafe { self.0.as_ref() }
        }
    }

    impl std::ops::DerefMut for Owned {
        fn deref_mut(&mut self) -> &mut CpuState {
            // SAFETY: as above.
            unsafe { self.0.as_mut() }
        }
    }
}

const _: () = assert!(!std::mem::needs_drop::<CpuState>());

impl CpuState {
    /// The power-up state, on the heap (it is large, and most of it is not touched soon).
    pub fn power_up() -> Owned {
        let mut state = Owned::zeroed();
        for table in state.tlb.iter_mut().flatten() {
            table.entries.fill(TlbEntry { tag: TLB_INVALID, addend: 0 });
        }
        state.select_space(0);
        state.mxcsr = 0x1f80;
        state.host_mxcsr = 0x1f80;
        state.host_data = crate::host::data_segment();
        state.tsc_divisor = 1;
        state.msrs.pat = 0x0007_0406_0007_0406;
        state.msrs.misc_enable = 1;
        state.msrs.mtrr_def_type = 0x806;
        state.x87 = X87::default();
        state.linkage.start();
        state.hints.start(crate::host::random());
        state.set_registers(&Registers::default());
        state
    }

    /// The TLB tables for reads and for writes of the code that runs at CPL 3, or of that at CPL 0-2.
    pub fn tables(&self, user: bool) -> &[TlbTable; 2] {
        &self.tlb[if user { 1 + self.space } else { 0 }]
    }

    /// Puts an address space of the user in force. What translated code remembers of the last one's data must have
    /// been forgotten.
    pub(crate) fn select_space(&mut self, space: usize) {
        self.space = space;
        let tables = std::mem::size_of::<[TlbTable; 2]>();
        self.user_tlb = (std::mem::offset_of!(Self, tlb) + (1 + space) * tables) as u64;
        let bridges = std::mem::offset_of!(Self, linkage) + Linkage::bridges_offset(1 + space);
        self.linkage.user_bridges = bridges as u64;
    }

    /// All registers, in the engine-independent form.
    pub fn registers(&self) -> Registers {
        Registers {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.cr8,
            efer: self.efer,
            xcr0: self.xcr0,
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
        }
    }

    /// Replaces all registers. The caller flushes the TLB.
    pub fn set_registers(&mut self, registers: &Registers) {
        let Registers {
            gpr,
            rip,
            rflags: flags,
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            xcr0,
            dr,
            dr6,
            dr7,
        } = registers;
        self.gpr = *gpr;
        self.rip = *rip;
        self.rflags = *flags | rflags::FIXED;
        self.segments = *segments;
        self.ldtr = *ldtr;
        self.tr = *tr;
        self.gdtr = *gdtr;
        self.idtr = *idtr;
        (self.cr0, self.cr2, self.cr3, self.cr4, self.cr8) = (*cr0, *cr2, *cr3, *cr4, *cr8);
        (self.efer, self.xcr0) = (*efer, *xcr0);
        (self.dr, self.dr6, self.dr7) = (*dr, *dr6, *dr7);
    }

    /// Current privilege level: the DPL of SS (Intel SDM 3, 5.5), 3 in virtual-8086 mode, 0 in real mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 {
            0
        } else if self.rflags & rflags::VM != 0 {
            3
        } else {
            (self.segments[seg::SS].attr >> cpu::attr::DPL_SHIFT & 3) as u8
        }
    }

    /// Long mode is active (64-bit or compatibility code).
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Executing 64-bit code.
    pub fn code64(&self) -> bool {
        self.long_mode() && self.segments[seg::CS].attr & cpu::attr::L != 0
    }

    /// Paging is on.
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// Whether `CR4` has all of `bits`.
    pub fn cr4_has(&self, bits: u64) -> bool {
        self.cr4 & bits == bits
    }

    /// Whether interrupts of the maskable kind can be taken before the next instruction.
    pub fn interruptible(&self) -> bool {
        self.rflags & rflags::IF != 0 && self.shadow == Shadow::None
    }

    /// Supervisor-mode access prevention is in force for explicit supervisor accesses now.
    pub fn smap_active(&self) -> bool {
        self.cr4_has(cr4::SMAP) && self.rflags & rflags::AC == 0
    }
}
