//! Copied instructions: the guest's own bytes with other register numbers and a host address for the memory operand.

use super::emit::{Mem, r};
use super::generate::{Check, Generator, Site, host};
use super::template::{Domain, Fields, Template};
use super::thunk::spill;
use iced_x86::{ConditionCode, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

/// The parts of an instruction's encoding.
struct Raw<'a> {
    /// Legacy prefixes but segment and address size.
    prefixes: Vec<u8>,
    /// Bits W, R, X, B of REX or VEX.
    wide: bool,
    ext_r: u8,
    ext_b: u8,
    rex: bool,
    vex: Option<Vex>,
    opcode: &'a [u8],
    modrm: u8,
    /// What follows ModRM, SIB and displacement.
    tail: &'a [u8],
}

#[derive(Clone, Copy)]
struct Vex {
    map: u8,
    /// W, inverted vvvv, L and pp of the third byte.
    last: u8,
}

impl<'a> Raw<'a> {
    fn parse(bytes: &'a [u8], modrm: bool) -> Option<Self> {
        let mut at = 0;
        let mut prefixes = Vec::new();
        loop {
            match *bytes.get(at)? {
                byte @ (0x66 | 0xf2 | 0xf3 | 0xf0) => prefixes.push(byte),
                0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x67 => {}
                _ => break,
            }
            at += 1;
        }
        let mut raw = Self {
            prefixes,
            wide: false,
            ext_r: 0,
            ext_b: 0,
            rex: false,
            vex: None,
            opcode: &[],
            modrm: 0,
            tail: &[],
        };
        let first = *bytes.get(at)?;
        match first {
            0xc4 => {
                let (second, third) = (*bytes.get(at + 1)?, *bytes.get(at + 2)?);
                (raw.ext_r, raw.ext_b) = (!second >> 7 & 1, !second >> 5 & 1);
                raw.vex = Some(Vex { map: second & 31, last: third });
                at += 3;
            }
            0xc5 => {
                let second = *bytes.get(at + 1)?;
                raw.ext_r = !second >> 7 & 1;
                raw.vex = Some(Vex { map: 1, last: second & 0x7f });
                at += 2;
            }
            0x40..=0x4f => {
                raw.rex = true;
                raw.wide = first & 8 != 0;
                (raw.ext_r, raw.ext_b) = (first >> 2 & 1, first & 1);
                at += 1;
            }
            _ => {}
        }
        let opcode = at;
        if raw.vex.is_none() && *bytes.get(at)? == 0x0f {
            at += if matches!(*bytes.get(at + 1)?, 0x38 | 0x3a) { 2 } else { 1 };
        }
        at += 1;
        raw.opcode = bytes.get(opcode..at)?;
        if modrm {
            raw.modrm = *bytes.get(at)?;
            at += 1;
            let mode = raw.modrm >> 6;
            if mode != 3 {
                let mut disp = [0, 1, 4, 0][usize::from(mode)];
                let mut base = raw.modrm & 7;
                if base == 4 {
                    base = *bytes.get(at)? & 7;
                    at += 1;
                }
                if mode == 0 && base == 5 {
                    disp = 4;
                }
                at += disp;
            }
        }
        raw.tail = bytes.get(at..)?;
        Some(raw)
    }

    fn reg(&self) -> u8 {
        self.modrm >> 3 & 7 | self.ext_r << 3
    }

    fn rm(&self) -> u8 {
        self.modrm & 7 | self.ext_b << 3
    }

    fn vvvv(&self) -> u8 {
        self.vex.map_or(0, |vex| !vex.last >> 3 & 15)
    }
}

/// Whether an instruction has a REX prefix that is not its last prefix: it counts only right before the opcode (Intel SDM 2,
/// 2.2.1), and nobody writes this.
pub(super) fn has_idle_rex(instruction: &[u8]) -> bool {
    let rex = |byte: u8| byte >> 4 == 4;
    let prefix =
        |byte: u8| rex(byte) || matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let prefixes = instruction.iter().take_while(|&&byte| prefix(byte)).count();
    instruction.iter().take(prefixes.saturating_sub(1)).any(|&byte| rex(byte))
}

/// Spilled registers of one instruction in scratch registers.
#[derive(Default)]
struct Spills {
    /// (guest register, scratch, written).
    used: [(u8, u8, bool); 3],
    count: usize,
}

/// The encoding with new register numbers, ready to be written.
struct Fixed {
    reg: u8,
    /// Register operand of ModRM.rm; `None` for the memory operand.
    rm: Option<u8>,
    memory: Mem,
    vvvv: u8,
    /// Number in the opcode byte.
    opcode: Option<u8>,
}

impl Generator {
    /// Translates an instruction by copying it. `None` if it has a shape that is not copied; what was emitted so far
    /// is then to be dropped.
    pub(super) fn copy(
        &mut self,
        instruction: &Instruction,
        template: &Template,
        bytes: &[u8],
        info: &mut InstructionInfoFactory,
        site: Site,
    ) -> Option<()> {
        let fields = template.fields;
        let raw = Raw::parse(bytes, fields.modrm)?;
        let facts = info.info(instruction);
        let memory = (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory);
        let high = has_high_byte(instruction);
        let mut reached = Mem::base(r::ADDR);
        if let Some(operand) = memory {
            let size = u8::try_from(instruction.memory_size().size()).ok().filter(|&s| s > 0 && s <= 64)?;
            let write = match facts.op_access(operand) {
                OpAccess::Read | OpAccess::CondRead => false,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
                _ => return None,
            };
            let align = if template.aligned { size.trailing_zeros() as u8 } else { 0 };
            let place = self.place(instruction, write, high)?;
            reached = self.reach(place, Check { size, write, align, more: false }, site);
        } else if (0..instruction.op_count()).any(|i| is_implicit_memory(instruction.op_kind(i))) {
            return None;
        }
        let lone = memory.is_none()
            && fields.rm.is_some()
            && !(fields.reg.is_some() && raw.reg() == raw.rm())
            && spilled_in_place(instruction, template);
        let mut spills = Spills::default();
        let reg8 = |number: u8| !raw.rex && raw.vex.is_none() && (4..8).contains(&number);
        let mut field = |this: &mut Self, number: u8, operand: Option<u8>, byte: bool| {
            let Some(operand) = operand else { return Some(number) };
            if byte && reg8(number) {
                return Some(number);
            }
            this.field(
                &mut spills,
                number,
                facts.op_access(u32::from(operand)),
                instruction,
                memory.is_some(),
            )
        };
        let mut fixed = Fixed { reg: raw.reg(), rm: None, memory: reached, vvvv: raw.vvvv(), opcode: None };
        fixed.reg = field(self, fixed.reg, fields.reg, fields.reg8)?;
        match host(raw.rm()) {
            None if lone => fixed.memory = spill(raw.rm()),
            _ if memory.is_none() => fixed.rm = Some(field(self, raw.rm(), fields.rm, fields.rm8)?),
            _ => {}
        }
        fixed.vvvv = field(self, fixed.vvvv, fields.vvvv, false)?;
        if fields.opcode.is_some() {
            let number = raw.opcode.last()? & 7 | raw.ext_b << 3;
            fixed.opcode = Some(field(self, number, fields.opcode, fields.rm8)?);
        }
        if high && memory.is_some() {
            // AH to BH cannot be named beside R14: lend the address RSI.
            self.out.mov(r::T1, r::SI);
            self.out.mov(r::SI, r::ADDR);
            fixed.memory = Mem::base(r::SI);
        } else if high && (fixed.reg >= 8 || fixed.rm.is_some_and(|rm| rm >= 8)) {
            return None;
        }
        self.write(&raw, &fixed, fields, high);
        if high && memory.is_some() {
            self.out.mov(r::SI, r::T1);
        }
        for &(guest, scratch, written) in spills.used.iter().take(spills.count) {
            if written {
                self.out.store(spill(guest), scratch);
            }
        }
        Some(())
    }

    /// The host register for a field that names guest register `number`.
    fn field(
        &mut self,
        spills: &mut Spills,
        number: u8,
        access: OpAccess,
        instruction: &Instruction,
        memory: bool,
    ) -> Option<u8> {
        if let Some(host) = host(number) {
            return Some(host);
        }
        let written = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        if let Some(known) = spills.used.iter_mut().take(spills.count).find(|spill| spill.0 == number) {
            known.2 |= written;
            return Some(known.1);
        }
        let pool: &[u8] = if memory { &[r::T1, r::T2] } else { &[r::T1, r::T2, r::ADDR] };
        let scratch = *pool.get(spills.count)?;
        let fresh = access == OpAccess::Write
            && matches!(
                instruction.mnemonic(),
                Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd
            )
            && instruction.op0_register().size() >= 4
            && (instruction.op1_kind() != OpKind::Register
                || instruction.op1_register().full_register() != instruction.op0_register().full_register());
        if !fresh {
            self.out.load(scratch, spill(number));
        }
        *spills.used.get_mut(spills.count)? = (number, scratch, written);
        spills.count += 1;
        Some(scratch)
    }

    fn write(&mut self, raw: &Raw<'_>, fixed: &Fixed, fields: Fields, high: bool) {
        let b = fixed.opcode.or(fixed.rm).or(fixed.memory.base).unwrap_or(0);
        // Without ModRM and without an opcode register, B means nothing.
        let b = if fields.opcode.is_some() || fields.modrm { b } else { 0 };
        let x = match fixed.memory.index {
            Some((index, _)) if fields.modrm && fixed.rm.is_none() => index >> 3,
            _ => 0,
        };
        // LOCK too, even of one vCPU: it keeps reads behind writes, and drivers count on that when they tell a device
        // something and look what the device has said (Linux's smp_mb() is a locked addition).
        raw.prefixes.iter().for_each(|prefix| self.out.byte(*prefix));
        if let Some(vex) = raw.vex {
            let inverted = !(fixed.reg >> 3 << 7 | x << 6 | b >> 3 << 5) & 0xe0;
            let last = vex.last & 0x87 | (!fixed.vvvv & 15) << 3;
            self.out.raw(&[0xc4, inverted | vex.map, last]);
        } else {
            let rex = u8::from(raw.wide) << 3 | fixed.reg >> 3 << 2 | x << 1 | b >> 3;
            if (rex != 0 || raw.rex) && !high {
                self.out.byte(0x40 | rex);
            }
        }
        let (last, head) = raw.opcode.split_last().unwrap_or((&0x90, &[]));
        self.out.raw(head);
        self.out.byte(fixed.opcode.map_or(*last, |number| last & 0xf8 | number & 7));
        if fields.modrm {
            match fixed.rm {
                Some(rm) => self.out.byte(0xc0 | (fixed.reg & 7) << 3 | rm & 7),
                None => self.out.modrm_mem(fixed.reg, fixed.memory),
            }
        }
        self.out.raw(raw.tail);
    }
}

fn is_implicit_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

/// Whether a register operand in ModRM.rm may stand in memory instead, where spilled registers are: the instruction must
/// mean the same, and its result must be all of the register, or leave the rest alone.
fn spilled_in_place(instruction: &Instruction, template: &Template) -> bool {
    use Mnemonic as M;
    if template.domain != Domain::Integer {
        return false;
    }
    let reads = match instruction.mnemonic() {
        M::Cmp | M::Test | M::Movzx | M::Movsx | M::Movsxd | M::Imul | M::Popcnt | M::Lzcnt | M::Tzcnt => {
            true
        }
        M::Mul | M::Div | M::Idiv | M::Bsf | M::Bsr => true,
        M::Mov | M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor => false,
        M::Inc | M::Dec | M::Neg | M::Not | M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror => false,
        _ if instruction.condition_code() != ConditionCode::None => false,
        _ => return false,
    };
    // A 32-bit result is zero-extended; the destination is the first operand, and may be the other register.
    let is_destination = instruction.op0_kind() == OpKind::Register
        && instruction.op_count() > 0
        && template.fields.rm == Some(0);
    reads || !is_destination || instruction.op0_register().size() != 4
}

/// AH to BH is an operand.
fn has_high_byte(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|i| {
        instruction.op_kind(i) == OpKind::Register
            && matches!(instruction.op_register(i), Register::AH | Register::CH | Register::DH | Register::BH)
    })
}
