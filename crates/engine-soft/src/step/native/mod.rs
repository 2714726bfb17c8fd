//! Instructions that the host CPU executes on guest state, one at a time.
//!
//! Each distinct instruction is re-encoded once ([`emit`]) and kept in a bounded [`arena`], found by its bytes. Its
//! memory operand is guest RAM itself where that lies in one page, or a bounce buffer (a crossing, a device) with the
//! same alignment, read before and written after.

pub(crate) mod arena;
mod emit;
mod window;

use super::feature;
use super::operand::segment_index;
use crate::access::room_in_page;
use crate::cpu_core::Core;
use crate::exception::{Exception, Trap, vector};
use crate::fetch::Decoded;
use crate::mmu::{Access, Mmu, Privilege, Target};
use arena::Arena;
use cpu::{Error, cr0, cr4, rflags};
use emit::{ADDRESS, BIT, FLAGS};
use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use window::Window;

const SLOTS: usize = 4096;
/// The largest operand that goes through the bounce buffer: FXSAVE's.
const BOUNCE: usize = 512;

/// What CR0, CR4 and XCR0 must allow (Intel SDM 2, 2.4-2.7; SDM 3, 2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Integer,
    X87,
    Wait,
    Mmx,
    Sse,
    /// VEX-encoded on vector registers.
    Avx,
    /// VEX-encoded on general registers: protected mode only.
    VexInteger,
}

#[derive(Debug, Clone, Copy)]
struct Memory {
    size: usize,
    read: bool,
    write: bool,
    /// In one with respect to all others.
    atomic: bool,
}

/// A stub with what must be checked and prepared.
#[derive(Debug, Clone, Copy)]
struct Prepared {
    entry: usize,
    unit: Unit,
    vector: bool,
    flags: bool,
    bit: bool,
    memory: Option<Memory>,
    /// Address bits that must be zero, else #GP: before any page fault.
    align: u64,
    /// MXCSR.MM lifts that.
    lenient: bool,
    /// Raises pending x87 exceptions first.
    waits: bool,
    /// Pointers of the last x87 instruction in the image it stores: (offset, length).
    pointers: Option<(usize, usize)>,
}

struct Slot {
    bytes: u128,
    bitness: u32,
    generation: u64,
    prepared: Prepared,
}

/// The stubs of one vCPU.
pub(crate) struct Stubs {
    arena: Arena,
    slots: Box<[Option<Slot>]>,
    generation: u64,
    avx: bool,
    factory: InstructionInfoFactory,
}

#[repr(C, align(64))]
struct Bounce([u8; BOUNCE + 64]);

impl Stubs {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self {
            arena: Arena::new()?,
            slots: (0..SLOTS).map(|_| None).collect(),
            generation: 0,
            avx: std::arch::is_x86_feature_detected!("avx"),
            factory: InstructionInfoFactory::new(),
        })
    }
}

fn hash(bytes: u128, bitness: u32) -> usize {
    let folded =
        (bytes as u64 ^ (bytes >> 64) as u64 ^ u64::from(bitness)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (folded >> 40) as usize % SLOTS
}

/// Executes an instruction by a stub.
pub(crate) fn execute(core: &mut Core, decoded: &Decoded) -> Result<(), Trap> {
    let i = &decoded.instruction;
    let prepared = prepare(core, decoded)?;
    check_unit(core, prepared.unit)?;
    core.counters.native += 1;
    let Some(memory) = prepared.memory else {
        return run(core, &prepared, 0);
    };
    if prepared.waits {
        // Before anything that the operand may meet; the stub would say so too late.
        pending_x87()?;
    }
    let segment = segment_index(i.memory_segment());
    let mut offset = core.effective(i);
    if prepared.bit {
        let size = memory.size as u64;
        let index = super::operand::sign_extend(core.gpr(i.op1_register()), memory.size);
        let bits = size * 8;
        offset = offset.wrapping_add(((index as i64).div_euclid(bits as i64) as u64).wrapping_mul(size));
        offset &= super::operand::mask(core.address_size(i));
        core.state.scratch[BIT] = index & (bits - 1);
    }
    let linear = core.linear(segment, offset, memory.size, memory.write)?;
    let lifted = prepared.lenient && core.state.mxcsr & 1 << 17 != 0;
    if linear & prepared.align != 0 && !lifted {
        return Err(Exception::GP.into());
    }
    core.check_alignment(linear, memory.size)?;
    core.check_data_breakpoints(linear, memory.size, memory.write);
    with_memory(core, &prepared, memory, linear)
}

/// Runs with the memory operand at `linear`.
fn with_memory(core: &mut Core, prepared: &Prepared, memory: Memory, linear: u64) -> Result<(), Trap> {
    let user = core.state.cpl() == 3;
    if prepared.pointers.is_none()
        && let Some(host) = Mmu::lookup(&core.state, linear, memory.size as u64, memory.write, user)
    {
        if memory.write {
            core.note_write(host, memory.size);
        }
        return run(core, prepared, host as u64);
    }
    let access = if memory.write { Access::Write } else { Access::Read };
    let privilege = if user { Privilege::User } else { Privilege::Supervisor };
    let (first, second) = core.targets(linear, memory.size, access, privilege)?;
    if prepared.pointers.is_none()
        && second.is_none()
        && let Some(host) = first.host
    {
        if memory.write {
            core.note_write(host, memory.size);
        }
        run(core, prepared, host as u64)?;
        if memory.write && first.code {
            core.notify_code_write(first.physical, memory.size as u64);
        }
        return Ok(());
    }
    if memory.atomic
        && core.peers.is_some()
        && let Some(second) = second
        && let (Some(one), Some(two)) = (first.host, second.host)
        && let Some(window) = adjoin(core, [first, second])
    {
        let head = room_in_page(linear).min(memory.size);
        core.note_write(one, head);
        core.note_write(two, memory.size - head);
        run(core, prepared, window.at((linear & 0xfff) as usize))?;
        for (target, len) in [(first, head), (second, memory.size - head)] {
            if target.code {
                core.notify_code_write(target.physical, len as u64);
            }
        }
        return Ok(());
    }
    // A crossing, or a device: the same alignment as the guest's address, so that the host judges it alike.
    let mut bounce = Bounce([0; BOUNCE + 64]);
    let start = (linear & 63) as usize;
    let Some(buffer) = bounce.0.get_mut(start..start + memory.size) else {
        return Err(unencodable(core, "its memory operand is too large"));
    };
    let head = room_in_page(linear).min(memory.size);
    let (low, high) = buffer.split_at_mut(head);
    if memory.read || first.host.is_some() {
        core.read_target(first, low)?;
    }
    if let Some(second) = second
        && (memory.read || second.host.is_some())
    {
        core.read_target(second, high)?;
    }
    let saved = core.state.ymm;
    let gpr = core.state.gpr;
    let mmx = prepared.unit == Unit::Mmx || prepared.unit == Unit::X87;
    let x87 = (memory.write && mmx).then(|| {
        arena::peek_x87(&mut core.state);
        core.state.x87
    });
    run(core, prepared, buffer.as_mut_ptr() as u64)?;
    if let Some((at, len)) = prepared.pointers
        && let Some(pointers) = buffer.get_mut(at..at + len)
    {
        // They would be the addresses of our stubs.
        pointers.fill(0);
    }
    if memory.write {
        let (low, high) = buffer.split_at(head);
        let done = core.write_target(first, low).and_then(|()| match second {
            Some(second) => core.write_target(second, high),
            None => Ok(()),
        });
        if done.is_err() {
            // The device write leaves and the instruction runs again: as if it had not.
            core.state.ymm = saved;
            core.state.gpr = gpr;
            if let Some(x87) = x87 {
                core.state.x87 = x87;
                arena::load_x87(&mut core.state);
            }
        }
        return done;
    }
    Ok(())
}

/// The pages of two targets, one behind the other.
fn adjoin(core: &Core, targets: [Target; 2]) -> Option<Window> {
    let memory = &core.mmu.memory;
    let [first, second] = targets.map(|target| memory.file_offset(target.physical));
    Window::new(memory.file()?, [first?, second?])
}

/// The checks of CPUID and of the execution unit alone.
pub(crate) fn check(core: &mut Core, i: &Instruction) -> Result<(), Trap> {
    if !i.cpuid_features().iter().all(|&f| feature::supported(f, &core.cpuid)) {
        return Err(Exception::UD.into());
    }
    let (unit, _) = unit_of(i, &mut core.stubs.factory);
    check_unit(core, unit)
}

/// Number of the register at the top of the x87 stack.
pub(crate) fn mmx_top(core: &mut Core) -> usize {
    arena::peek_x87(&mut core.state);
    usize::from(core.state.x87.0[3] >> 3 & 7)
}

/// Bits 0 to 63 of ST(`number`), as MMX registers are with the top of the stack at 0.
pub(crate) fn mmx(core: &mut Core, number: usize) -> u64 {
    arena::peek_x87(&mut core.state);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&core.state.x87.0[32 + 16 * number..40 + 16 * number]);
    u64::from_le_bytes(bytes)
}

/// What MMX instructions check before their operands.
pub(crate) fn pending_x87() -> Result<(), Trap> {
    if arena::x87_pending() { Err(Exception::plain(vector::MF).into()) } else { Ok(()) }
}

/// MASKMOVQ leaves x87 state as every MMX instruction does.
pub(crate) fn mmx_used() {
    arena::touch_mmx();
}

/// Saves the live state as XSAVE or XSAVEC does.
pub(crate) fn save_area(core: &mut Core, area: &mut super::xstate::Area, components: u64, compact: bool) {
    arena::save_area(&mut core.state, area.0.as_mut_ptr(), components, compact, core.stubs.avx);
}

/// Loads the live state as XRSTOR does; `false` if the host refuses the contents.
pub(crate) fn load_area(core: &mut Core, area: &super::xstate::Area, components: u64) -> bool {
    arena::load_area(&mut core.state, area.0.as_ptr(), components, core.stubs.avx)
}

#[allow(unsafe_code)]
fn run(core: &mut Core, prepared: &Prepared, address: u64) -> Result<(), Trap> {
    let state = &mut *core.state;
    state.scratch[ADDRESS] = address;
    let flags = state.rflags;
    if prepared.flags {
        state.scratch[FLAGS] = (flags & 0xff) << 8 | flags >> 11 & 1;
    }
    // SAFETY: the entry is a stub of the current generation of this core's arena; `address` covers the operand.
    let trap = unsafe { arena::run(state, prepared.entry, prepared.vector, core.stubs.avx) };
    if trap != 0 {
        return Err(exception(core, trap - 1));
    }
    if prepared.flags {
        let out = state.scratch[FLAGS];
        const LOW: u64 = rflags::STATUS & 0xff;
        state.rflags = flags & !rflags::STATUS | out >> 8 & LOW | (out & 1) << 11;
    }
    Ok(())
}

/// The guest's exception for a trap of the host.
fn exception(core: &Core, trap: u64) -> Trap {
    match trap as u8 {
        vector::DE => Exception::DE,
        vector::MF => Exception::plain(vector::MF),
        vector::XM if !core.state.cr4_has(cr4::OSXMMEXCPT) => Exception::UD,
        vector::XM => Exception::plain(vector::XM),
        vector::GP => Exception::GP,
        vector::AC => Exception::AC,
        vector::NM => Exception::NM,
        _ => Exception::UD,
    }
    .into()
}

fn check_unit(core: &Core, unit: Unit) -> Result<(), Trap> {
    let state = &core.state;
    let (emulated, switched) = (state.cr0 & cr0::EM != 0, state.cr0 & cr0::TS != 0);
    let (undefined, unavailable) = match unit {
        Unit::Integer => return Ok(()),
        Unit::X87 => (false, emulated || switched),
        Unit::Wait => (false, switched && state.cr0 & cr0::MP != 0),
        Unit::Mmx => (emulated, switched),
        Unit::Sse => (emulated || !state.cr4_has(cr4::OSFXSR), switched),
        Unit::Avx => (!core.protected() || !state.cr4_has(cr4::OSXSAVE) || state.xcr0 & 6 != 6, switched),
        Unit::VexInteger => (!core.protected(), false),
    };
    if undefined {
        Err(Exception::UD.into())
    } else if unavailable {
        Err(Exception::NM.into())
    } else {
        Ok(())
    }
}

fn unencodable(core: &Core, why: &str) -> Trap {
    Trap::Fail(Error::Guest {
        engine: "soft",
        rip: core.state.rip,
        why: format!("cannot execute an instruction: {why}"),
    })
}

fn prepare(core: &mut Core, decoded: &Decoded) -> Result<Prepared, Trap> {
    let bitness = core.code_bits();
    let len = decoded.instruction.len();
    let bytes = decoded.bytes & u128::MAX >> (128 - 8 * len);
    let at = hash(bytes, bitness);
    if let Some(Some(slot)) = core.stubs.slots.get(at)
        && slot.bytes == bytes
        && slot.bitness == bitness
        && slot.generation == core.stubs.generation
    {
        return Ok(slot.prepared);
    }
    let prepared = build(core, &decoded.instruction)?;
    let generation = core.stubs.generation;
    core.stubs.slots[at] = Some(Slot { bytes, bitness, generation, prepared });
    Ok(prepared)
}

fn build(core: &mut Core, i: &Instruction) -> Result<Prepared, Trap> {
    if i.is_privileged() || !i.cpuid_features().iter().all(|&f| feature::supported(f, &core.cpuid)) {
        return Err(Exception::UD.into());
    }
    // Only operands that a stub can replace: an implicit address would be the host's.
    let known = |kind| matches!(kind, OpKind::Register | OpKind::Memory) || is_immediate(kind);
    if !i.op_kinds().all(known) {
        return Err(unencodable(core, &format!("{:?} has an implicit memory operand", i.code())));
    }
    let (unit, vector) = unit_of(i, &mut core.stubs.factory);
    let memory = memory_of(i, &mut core.stubs.factory);
    if memory.is_some_and(|m| m.size == 0 || m.size > BOUNCE) {
        return Err(unencodable(core, &format!("{:?} has an operand of unknown size", i.code())));
    }
    let Some(stub) = emit::emit(i) else {
        return Err(unencodable(core, &format!("{:?} has no 64-bit form", i.code())));
    };
    let entry = match core.stubs.arena.store(&stub.code) {
        Some(entry) => entry,
        None => {
            core.stubs.arena.clear();
            core.stubs.generation += 1;
            core.stubs.arena.store(&stub.code).ok_or_else(|| unencodable(core, "its stub is too large"))?
        }
    };
    // SHA's operands are aligned on some CPUs only: the host knows.
    let aligned = matches!(memory, Some(Memory { size: 512, .. }))
        || crate::translate::must_align(i.code()) && !i.cpuid_features().contains(&CpuidFeature::SHA);
    let align = memory.filter(|_| aligned).map_or(0, |m| m.size.clamp(1, 32) as u64 - 1);
    let align = if i.encoding() == EncodingKind::Legacy { align & 15 } else { align };
    let silent =
        matches!(i.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw | Mnemonic::Fnstenv | Mnemonic::Fnsave);
    let mmx = (0..i.op_count()).any(|op| i.op_register(op).is_mm());
    let x87 = matches!(unit, Unit::X87) && !i.cpuid_features().contains(&CpuidFeature::FXSR);
    let waits = (x87 || mmx) && !silent;
    let pointers = pointers_of(i);
    let (flags, bit, lenient) = (stub.flags, stub.bit, lenient(i));
    Ok(Prepared { entry, unit, vector, flags, bit, memory, align, lenient, waits, pointers })
}

/// MXCSR.MM lifts the alignment rule of SSE's instructions that compute, not that of moves (AMD APM 1, 4.2.2).
fn lenient(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.encoding() == EncodingKind::Legacy
        && !matches!(
            i.mnemonic(),
            M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa
        )
        && !matches!(i.mnemonic(), M::Cmpxchg16b | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64)
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Where the image that an instruction stores has FIP and FDP.
fn pointers_of(i: &Instruction) -> Option<(usize, usize)> {
    match i.mnemonic() {
        Mnemonic::Fnstenv | Mnemonic::Fnsave => match i.memory_size().size() {
            28 | 108 => Some((12, 16)),
            _ => Some((6, 8)),
        },
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => Some((8, 16)),
        _ => None,
    }
}

fn memory_of(i: &Instruction, factory: &mut InstructionInfoFactory) -> Option<Memory> {
    let operand = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory)?;
    let access = factory.info(i).op_access(operand);
    let size = match i.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => 512,
        _ => i.memory_size().size(),
    };
    let read = !matches!(access, OpAccess::Write | OpAccess::NoMemAccess | OpAccess::None);
    let write = matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    );
    let atomic = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
    Some(Memory { size, read, write, atomic })
}

fn unit_of(i: &Instruction, factory: &mut InstructionInfoFactory) -> (Unit, bool) {
    use CpuidFeature as F;
    let features = i.cpuid_features();
    if matches!(i.mnemonic(), Mnemonic::Wait) {
        return (Unit::Wait, false);
    }
    if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387)) {
        return (Unit::X87, false);
    }
    if features.contains(&F::FXSR) {
        return (Unit::X87, true);
    }
    let (mut vector, mut mmx) = (false, false);
    for part in factory.info(i).used_registers() {
        vector |= part.register().is_vector_register();
        mmx |= matches!(part.register(), r if r >= Register::MM0 && r <= Register::MM7);
    }
    let mxcsr = matches!(
        i.mnemonic(),
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
    );
    // These may have no vector register, but the control bits of MXCSR apply to them, and they set its flags.
    let converts = matches!(
        i.mnemonic(),
        Mnemonic::Cvtss2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Cvtsd2si
            | Mnemonic::Cvttsd2si
            | Mnemonic::Vcvtss2si
            | Mnemonic::Vcvttss2si
            | Mnemonic::Vcvtsd2si
            | Mnemonic::Vcvttsd2si
            | Mnemonic::Cvtps2pi
            | Mnemonic::Cvttps2pi
            | Mnemonic::Cvtpd2pi
            | Mnemonic::Cvttpd2pi
    );
    vector |= converts || mxcsr || matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    match i.encoding() {
        EncodingKind::VEX | EncodingKind::XOP if vector => (Unit::Avx, true),
        EncodingKind::VEX | EncodingKind::XOP => (Unit::VexInteger, false),
        _ if vector => (Unit::Sse, true),
        _ if mmx || i.mnemonic() == Mnemonic::Emms => (Unit::Mmx, false),
        _ => (Unit::Integer, false),
    }
}
