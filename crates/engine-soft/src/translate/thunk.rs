//! The way into translated code and out of it: emitted once, at the start of the code cache.
//!
//! While translated code runs, RSP is the address of the [`CpuState`], RAX to R11 but RSP are the guest's, R12 is the
//! guest's RSP, R13 to R15 are scratch, YMM0-15, MXCSR and x87 are the guest's. All exits are jumps to the stubs made
//! here, with the scratch registers saying what the stub's reason means.
#![allow(unsafe_code)]

use super::cache::CodeCache;
use super::emit::{Emitter, Mem, cc, r};
use super::generate::Descriptor;
use super::hints::{Hint, LOG_ENTRIES, hinted};
use super::linkage::Linkage;
use crate::state::{CpuState, TLB_ENTRIES, TlbEntry, TlbTable};
use std::mem::{offset_of, size_of};

/// Why translated code was left.
#[allow(missing_docs)]
pub(super) mod reason {
    /// The instruction at page offset R13 is for the single-step tier.
    pub const STEP: u32 = 0;
    /// The exit of link R13 was taken for the first time.
    pub const LINK: u32 = 1;
    /// The jump cache does not know the target; R14 is its address.
    pub const LOOKUP: u32 = 2;
    /// The TLB does not know the address R14; R13 describes the access, R15 is where to go on.
    pub const MISS: u32 = 3;
    /// A kick was seen before the instruction at page offset R13.
    pub const KICK: u32 = 4;
    /// Bridge R13 was taken for the first time, or its target may have changed.
    pub const BRIDGE: u32 = 5;
    /// How many there are.
    pub const COUNT: usize = 6;
}

/// The stub that looks into the TLB when an access is not where its hint says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewal {
    /// 1 for CPL 3, else 0.
    pub class: usize,
    pub write: bool,
    /// The hint is the stack's, which is renewed from the TLB for writes even by a read.
    pub stack: bool,
    /// The flags are live.
    pub live: bool,
    /// ADDR becomes the addend, not the host address.
    pub relative: bool,
}

impl Renewal {
    const COUNT: usize = 32;

    fn number(self) -> usize {
        [self.class != 0, self.write, self.stack, self.live, self.relative]
            .iter()
            .fold(0, |number, &bit| number << 1 | usize::from(bit))
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(|number| {
            let bit = |place: u32| number >> place & 1 != 0;
            Self { class: number >> 4, write: bit(3), stack: bit(2), live: bit(1), relative: bit(0) }
        })
    }
}

/// Where the stubs are, as offsets into the cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thunks {
    enter: usize,
    exits: [usize; reason::COUNT],
    renewals: [usize; Renewal::COUNT],
}

pub(super) const GPR: usize = offset_of!(CpuState, gpr);
pub(super) const LINKAGE: usize = offset_of!(CpuState, linkage);
const YMM: usize = offset_of!(CpuState, ymm);

/// Offset of a guest register's place in the state.
pub(super) fn spill(register: u8) -> Mem {
    Mem::state(GPR + usize::from(register & 15) * 8)
}

/// A field of [`Linkage`].
macro_rules! linked {
    ($($field:tt)+) => {
        $crate::translate::emit::Mem::state(
            $crate::translate::thunk::LINKAGE
                + std::mem::offset_of!($crate::translate::linkage::Linkage, $($field)+),
        )
    };
}
pub(super) use linked;

impl Thunks {
    /// Emits the stubs; `avx` if the host has it and lets programs use it.
    pub(super) fn emit(cache: &mut CodeCache, avx: bool) -> Self {
        let mut out = Emitter { bytes: Vec::new(), base: cache.next() };
        let enter = out.base;
        emit_enter(&mut out, avx);
        let common = out.pos();
        emit_leave(&mut out, avx);
        let mut exits = [0; reason::COUNT];
        for (why, exit) in exits.iter_mut().enumerate() {
            *exit = out.base + out.pos();
            out.store_imm(false, linked!(reason), why as u32);
            out.jump_to(out.base + common);
        }
        let mut renewals = [0; Renewal::COUNT];
        for (renewal, at) in Renewal::all().zip(&mut renewals) {
            *at = out.base + out.pos();
            emit_renewal(&mut out, renewal, exits[reason::MISS as usize]);
        }
        cache.append(&out.bytes, &[]);
        cache.keep();
        Self { enter, exits, renewals }
    }

    /// Cache offset of a stub that renews hints: ADDR is the linear address, T1 a [`Descriptor`], T2 where to go on.
    pub(super) fn renew(&self, renewal: Renewal) -> usize {
        self.renewals.get(renewal.number()).copied().unwrap_or(self.enter)
    }

    /// Cache offset of the stub for `why`.
    pub(super) fn exit(&self, why: u32) -> usize {
        self.exits.get(why as usize).copied().unwrap_or(self.enter)
    }

    /// Runs translated code from `state.linkage.enter` until it leaves.
    pub(super) fn run(&self, cache: &CodeCache, state: &mut CpuState) {
        // SAFETY: the address is that of the entry stub emitted above, which follows the System V calling convention
        // and was emitted for this layout of `CpuState`; `linkage.enter` was set from an offset of this cache.
        unsafe {
            let enter: extern "sysv64" fn(*mut CpuState) =
                std::mem::transmute(cache.address(self.enter) as usize);
            enter(state);
        }
    }
}

/// The guest's registers that stand in host registers of the same number.
const SAME: [u8; 11] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11];
const CALLEE_SAVED: [u8; 6] = [r::BP, r::BX, 12, 13, 14, 15];

fn push(out: &mut Emitter, register: u8, pop: bool) {
    if register >= 8 {
        out.byte(0x41);
    }
    out.byte(if pop { 0x58 } else { 0x50 } | register & 7);
}

/// A move of all vector registers: `opcode` 0x10 loads, 0x11 stores.
fn vectors(out: &mut Emitter, opcode: u8, base: u8, avx: bool) {
    for i in 0..16u8 {
        let mem = Mem::at(base, (YMM + usize::from(i) * 32) as i32);
        if avx {
            // VMOVUPS ymm.
            let r = if i >= 8 { 0 } else { 0x80 };
            out.raw(&[0xc5, r | 0x7c, opcode]);
            out.modrm_mem(i, mem);
        } else {
            out.op_mem(false, &[0x0f, opcode], i, mem);
        }
    }
}

fn emit_enter(out: &mut Emitter, avx: bool) {
    for register in CALLEE_SAVED {
        push(out, register, false);
    }
    out.store(Mem::at(r::DI, offset_of!(CpuState, host_rsp) as i32), r::SP);
    // STMXCSR, LDMXCSR.
    out.op_mem(false, &[0x0f, 0xae], 3, Mem::at(r::DI, offset_of!(CpuState, host_mxcsr) as i32));
    out.op_mem(false, &[0x0f, 0xae], 2, Mem::at(r::DI, offset_of!(CpuState, mxcsr) as i32));
    out.mov(r::SP, r::DI);
    vectors(out, 0x10, r::SP, avx);
    out.load32(r::AX, linked!(flags));
    restore_flags(out);
    for register in SAME {
        out.load(register, spill(register));
    }
    out.load(r::GUEST_SP, spill(4));
    out.load(r::ADDR, Mem::state(LINKAGE + offset_of!(Linkage, payload) + 8));
    out.jump_mem(linked!(enter));
}

/// Status flags from EAX: `add al, 127` overflows iff AL is 1, SAHF sets the others.
pub(super) fn restore_flags(out: &mut Emitter) {
    out.raw(&[0x04, 0x7f, 0x9e]);
}

/// Status flags to EAX.
pub(super) fn save_flags(out: &mut Emitter) {
    // LAHF; SETO AL.
    out.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
}

fn emit_leave(out: &mut Emitter, avx: bool) {
    for (i, register) in [r::T1, r::ADDR, r::T2].into_iter().enumerate() {
        out.store(Mem::state(LINKAGE + offset_of!(Linkage, payload) + i * 8), register);
    }
    for register in SAME {
        out.store(spill(register), register);
    }
    out.store(spill(4), r::GUEST_SP);
    save_flags(out);
    out.store32(linked!(flags), r::AX);
    vectors(out, 0x11, r::SP, avx);
    if avx {
        // VZEROUPPER: what follows is SSE code.
        out.raw(&[0xc5, 0xf8, 0x77]);
    }
    out.op_mem(false, &[0x0f, 0xae], 3, Mem::state(offset_of!(CpuState, mxcsr)));
    out.op_mem(false, &[0x0f, 0xae], 2, Mem::state(offset_of!(CpuState, host_mxcsr)));
    out.load(r::SP, Mem::state(offset_of!(CpuState, host_rsp)));
    for register in CALLEE_SAVED.into_iter().rev() {
        push(out, register, true);
    }
    out.byte(0xc3);
}

/// Looks into the TLB. What it finds becomes the hint, if it is lasting.
fn emit_renewal(out: &mut Emitter, renewal: Renewal, miss: usize) {
    let kept = [0, 8].map(|at| Mem::state(LINKAGE + offset_of!(Linkage, kept) + at));
    out.store(kept[0], r::AX);
    out.store(kept[1], r::CX);
    if renewal.live {
        save_flags(out);
        out.store32(linked!(flags_saved), r::AX);
    }
    let restore = |out: &mut Emitter| {
        if renewal.live {
            out.load32(r::AX, linked!(flags_saved));
            restore_flags(out);
        }
        out.load(r::AX, kept[0]);
        out.load(r::CX, kept[1]);
    };
    let mut misses = Vec::new();
    // The bits that must be zero.
    out.mov32(r::CX, r::T1);
    out.shr32(r::CX, Descriptor::ALIGN_SHIFT);
    out.op_reg(false, &[0x85], r::CX, r::ADDR);
    misses.push(out.jump_if(cc::NE));
    // CX = the page of the last byte, AX = the offset of the entry of the first one's: an access that leaves its page
    // matches nothing.
    out.mov32(r::CX, r::T1);
    out.shr32(r::CX, Descriptor::SIZE_SHIFT);
    out.op_reg(false, &[0x0f, 0xb6], r::CX, r::CX);
    out.lea(r::CX, Mem::at(r::CX, -1).with_index(r::ADDR, 0));
    out.and_imm(true, r::CX, -4096);
    out.mov32(r::AX, r::ADDR);
    out.shr32(r::AX, 8);
    out.and_imm(false, r::AX, ((TLB_ENTRIES - 1) * size_of::<TlbEntry>()) as i32);
    // AX counts from the tables of the supervisor, or of the user's address space in force.
    let mut tables = offset_of!(CpuState, tlb);
    if renewal.class != 0 {
        tables = 0;
        out.op_mem(true, &[0x03], r::AX, Mem::state(offset_of!(CpuState, user_tlb)));
    }
    let entry = |write: bool, field: usize| {
        Mem::state(tables + usize::from(write) * size_of::<TlbTable>() + field).with_index(r::AX, 0)
    };
    let (tag, addend) = (offset_of!(TlbEntry, tag), offset_of!(TlbEntry, addend));
    let for_writes = renewal.write || renewal.stack;
    out.op_mem(true, &[0x3b], r::CX, entry(for_writes, tag));
    let other = out.jump_if(cc::NE);
    let passing = (renewal.class == 0).then(|| {
        // Whether it is lasting; all of the user's are.
        out.mov32(r::CX, r::AX);
        out.shr32(r::CX, size_of::<TlbEntry>().trailing_zeros() as u8);
        let disp = entry(for_writes, 0).disp + offset_of!(TlbTable, lasting) as i32;
        out.op_mem(false, &[0x0f, 0xb6], r::CX, Mem::at(r::SP, disp).with_index(r::CX, 0));
        out.op_reg(false, &[0x85], r::CX, r::CX);
        out.load(r::AX, entry(for_writes, addend));
        out.jump_if(cc::E)
    });
    if renewal.class != 0 {
        out.load(r::AX, entry(for_writes, addend));
    }
    emit_filling(out, renewal.class, &mut misses);
    let done = out.pos();
    if renewal.relative {
        out.mov(r::ADDR, r::AX);
    } else {
        out.op_reg(true, &[0x01], r::AX, r::ADDR);
    }
    restore(out);
    out.op_reg(false, &[0xff], 4, r::T2); // jmp r15
    if renewal.stack && !renewal.write {
        out.bind(other);
        out.op_mem(true, &[0x3b], r::CX, entry(false, tag));
        misses.push(out.jump_if(cc::NE));
        out.load(r::AX, entry(false, addend));
        out.jump_to(out.base + done);
    } else {
        misses.push(other);
    }
    if let Some(passing) = passing {
        out.bind(passing);
        out.jump_to(out.base + done);
    }
    for field in misses {
        out.bind(field);
    }
    restore(out);
    out.jump_to(miss);
}

/// Fills the hint of the descriptor in T1 with the addend in AX and the page of ADDR, and logs that. Uses T1 and CX.
fn emit_filling(out: &mut Emitter, class: usize, full: &mut Vec<usize>) {
    let filled = Mem::state(hinted!(filled) + class * 4);
    let log = Mem::state(hinted!(logs) + class * LOG_ENTRIES * 4);
    out.op_mem(false, &[0x81], 7, filled); // cmp dword [filled], entries
    out.dword(LOG_ENTRIES as u32);
    full.push(out.jump_if(cc::AE));
    out.op_reg(true, &[0xc1], 5, r::T1); // shr r13, 32
    out.byte(Descriptor::HINT_SHIFT);
    let hint = |field: usize| Mem::at(r::SP, field as i32).with_index(r::T1, 0);
    out.mov(r::CX, r::ADDR);
    out.and_imm(true, r::CX, -4096);
    out.op_reg(true, &[0xf7], 3, r::CX); // neg rcx
    out.store(hint(offset_of!(Hint, negative_page)), r::CX);
    out.store(hint(offset_of!(Hint, addend)), r::AX);
    out.load32(r::CX, filled);
    out.store32(log.with_index(r::CX, 2), r::T1);
    out.op_mem(false, &[0xff], 0, filled); // inc dword [filled]
}

/// Whether all x87 exceptions are masked. x87 state is in the host's registers while the vCPU runs.
pub(super) fn x87_exceptions_masked() -> bool {
    let mut control = 0u16;
    // SAFETY: FNSTCW stores two bytes at the address given.
    unsafe { std::arch::asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control & 0x3f == 0x3f
}

/// A fault in translated code: a division's #DE becomes an exit before the instruction, for the single-step tier to
/// raise. Everything else in translated code would be a defect, and ends the process.
pub(super) fn recover(trap: u64, context: &mut libc::ucontext_t) -> bool {
    const DIVIDE_ERROR: u64 = 0;
    if trap != DIVIDE_ERROR {
        return false;
    }
    let registers = &mut context.uc_mcontext.gregs;
    let state = registers[libc::REG_RSP as usize] as *const CpuState;
    // SAFETY: the handler calls this for a RIP in translated code, where RSP is the address of the state, which the
    // interrupted thread owns.
    let (offset, exit) = unsafe { ((*state).linkage.division, (*state).linkage.division_exit) };
    registers[libc::REG_R13 as usize] = i64::from(offset);
    registers[libc::REG_RIP as usize] = exit as i64;
    true
}
