//! The byte emitter: the few instruction shapes that the translator writes itself (Intel SDM 2, chapter 2).
//!
//! Positions are offsets into the buffer; [`Emitter::base`] is where the buffer will stand in the code cache, so that
//! relative jumps to code already there can be made.

/// Host registers by number.
#[allow(missing_docs)]
pub(super) mod r {
    pub const AX: u8 = 0;
    pub const CX: u8 = 1;
    pub const BX: u8 = 3;
    /// The CPU state, while translated code runs.
    pub const SP: u8 = 4;
    pub const BP: u8 = 5;
    pub const SI: u8 = 6;
    pub const DI: u8 = 7;
    /// The guest's RSP.
    pub const GUEST_SP: u8 = 12;
    /// Scratch: the index of a table, the first spilled operand.
    pub const T1: u8 = 13;
    /// Scratch: linear, then host address of a memory operand.
    pub const ADDR: u8 = 14;
    /// Scratch: page to compare, the second spilled operand.
    pub const T2: u8 = 15;
}

/// A memory operand: base + index * 2^scale + disp; without a base an absolute 32-bit address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mem {
    pub base: Option<u8>,
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

impl Mem {
    pub(super) fn base(base: u8) -> Self {
        Self { base: Some(base), index: None, disp: 0 }
    }

    pub(super) fn at(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }

    /// A field of the CPU state.
    pub(super) fn state(offset: usize) -> Self {
        Self::at(r::SP, offset as i32)
    }

    pub(super) fn with_index(self, index: u8, scale: u8) -> Self {
        Self { index: Some((index, scale)), ..self }
    }
}

/// Conditions of Jcc.
#[allow(missing_docs)]
pub(super) mod cc {
    pub const O: u8 = 0;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
}

#[derive(Debug, Default)]
pub(super) struct Emitter {
    pub bytes: Vec<u8>,
    /// Offset in the code cache of the first byte.
    pub base: usize,
}

impl Emitter {
    pub(super) fn pos(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn dword(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// ModRM, SIB and displacement of a memory operand; `reg` and the registers of `mem` may have bit 3 set.
    pub(super) fn modrm_mem(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            self.byte(reg | 4);
            self.byte(mem.index.map_or(0x25, |(index, scale)| scale << 6 | (index & 7) << 3 | 5));
            return self.dword(mem.disp as u32);
        };
        let mode = match mem.disp {
            0 if base & 7 != 5 => 0,
            -128..=127 => 0x40,
            _ => 0x80,
        };
        match mem.index {
            None if base & 7 != 4 => self.byte(mode | reg | base & 7),
            None => {
                self.byte(mode | reg | 4);
                self.byte(0x20 | base & 7);
            }
            Some((index, scale)) => {
                self.byte(mode | reg | 4);
                self.byte(scale << 6 | (index & 7) << 3 | base & 7);
            }
        }
        match mode {
            0 => {}
            0x40 => self.byte(mem.disp as u8),
            _ => self.dword(mem.disp as u32),
        }
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8) {
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
    }

    /// `opcode` with a register and a memory operand.
    pub(super) fn op_mem(&mut self, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        self.rex(wide, reg, mem.index.map_or(0, |(index, _)| index), mem.base.unwrap_or(0));
        self.raw(opcode);
        self.modrm_mem(reg, mem);
    }

    /// `opcode` with two registers.
    pub(super) fn op_reg(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        self.rex(wide, reg, 0, rm);
        self.raw(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    pub(super) fn mov(&mut self, to: u8, from: u8) {
        if to != from {
            self.op_reg(true, &[0x89], from, to);
        }
    }

    pub(super) fn mov32(&mut self, to: u8, from: u8) {
        self.op_reg(false, &[0x89], from, to);
    }

    pub(super) fn load(&mut self, to: u8, mem: Mem) {
        self.op_mem(true, &[0x8b], to, mem);
    }

    pub(super) fn load32(&mut self, to: u8, mem: Mem) {
        self.op_mem(false, &[0x8b], to, mem);
    }

    pub(super) fn store(&mut self, mem: Mem, from: u8) {
        self.op_mem(true, &[0x89], from, mem);
    }

    pub(super) fn store32(&mut self, mem: Mem, from: u8) {
        self.op_mem(false, &[0x89], from, mem);
    }

    /// `mov dword [mem], value`, or with `wide` the sign-extended quadword.
    pub(super) fn store_imm(&mut self, wide: bool, mem: Mem, value: u32) {
        self.op_mem(wide, &[0xc7], 0, mem);
        self.dword(value);
    }

    pub(super) fn imm32(&mut self, to: u8, value: u32) {
        self.rex(false, 0, 0, to);
        self.byte(0xb8 | to & 7);
        self.dword(value);
    }

    pub(super) fn imm64(&mut self, to: u8, value: u64) {
        self.rex(true, 0, 0, to);
        self.byte(0xb8 | to & 7);
        self.raw(&value.to_le_bytes());
    }

    pub(super) fn lea(&mut self, to: u8, mem: Mem) {
        self.op_mem(true, &[0x8d], to, mem);
    }

    /// `to & value`, sign-extended; writes flags.
    pub(super) fn and_imm(&mut self, wide: bool, to: u8, value: i32) {
        self.rex(wide, 0, 0, to);
        if let Ok(short) = i8::try_from(value) {
            self.raw(&[0x83, 0xe0 | to & 7, short as u8]);
        } else {
            self.raw(&[0x81, 0xe0 | to & 7]);
            self.dword(value as u32);
        }
    }

    /// `to >> count`, 32 bits; writes flags.
    pub(super) fn shr32(&mut self, to: u8, count: u8) {
        self.rex(false, 0, 0, to);
        self.raw(&[0xc1, 0xe8 | to & 7, count]);
    }

    /// A BMI2 instruction of map 0F38 `reg, vvvv, [mem]`, 64 bits.
    pub(super) fn vex38_mem(&mut self, pp: u8, opcode: u8, reg: u8, vvvv: u8, mem: Mem) {
        let index = mem.index.map_or(0, |(index, _)| index);
        let base = mem.base.unwrap_or(0);
        let inverted = (reg >> 3 << 7 | index >> 3 << 6 | base >> 3 << 5) ^ 0xe0;
        self.raw(&[0xc4, inverted | 2, 0x80 | (!vvvv & 15) << 3 | pp, opcode]);
        self.modrm_mem(reg, mem);
    }

    /// A BMI2 instruction of map 0F38 `reg, vvvv, rm`, 64 bits.
    pub(super) fn vex38_reg(&mut self, pp: u8, opcode: u8, reg: u8, vvvv: u8, rm: u8) {
        let inverted = (reg >> 3 << 7 | rm >> 3 << 5) ^ 0xe0;
        self.raw(&[
            0xc4,
            inverted | 2,
            0x80 | (!vvvv & 15) << 3 | pp,
            opcode,
            0xc0 | (reg & 7) << 3 | rm & 7,
        ]);
    }

    /// `pext to, from, [mask]`: no flags.
    pub(super) fn pext(&mut self, to: u8, from: u8, mask: Mem) {
        self.vex38_mem(2, 0xf5, to, from, mask);
    }

    /// `to` = `from` + `disp`: no flags.
    pub(super) fn lea_or_mov(&mut self, to: u8, from: u8, disp: i32) {
        match disp {
            0 => self.mov(to, from),
            _ => self.lea(to, Mem::at(from, disp)),
        }
    }

    /// `ror to, count`, 64 bits; writes flags.
    pub(super) fn ror(&mut self, to: u8, count: u8) {
        self.rex(true, 0, 0, to);
        self.raw(&[0xc1, 0xc8 | to & 7, count]);
    }

    /// `cmp what, value`, 64 bits.
    pub(super) fn cmp_imm(&mut self, what: u8, value: i32) {
        self.rex(true, 0, 0, what);
        match i8::try_from(value) {
            Ok(short) => self.raw(&[0x83, 0xf8 | what & 7, short as u8]),
            Err(_) => {
                self.raw(&[0x81, 0xf8 | what & 7]);
                self.dword(value as u32);
            }
        }
    }

    /// `jmp` to a cache offset already known.
    pub(super) fn jump_to(&mut self, target: usize) {
        self.byte(0xe9);
        let next = self.base + self.pos() + 4;
        self.dword((target as u32).wrapping_sub(next as u32));
    }

    /// `jmp` to be bound later; answers the position of the displacement.
    pub(super) fn jump(&mut self) -> usize {
        self.byte(0xe9);
        self.dword(0);
        self.pos() - 4
    }

    /// `jcc` to be bound later.
    pub(super) fn jump_if(&mut self, condition: u8) -> usize {
        self.raw(&[0x0f, 0x80 | condition]);
        self.dword(0);
        self.pos() - 4
    }

    /// A jump with an 8-bit displacement (Jcc, JRCXZ, LOOP), to be bound with [`Self::bind_short`].
    pub(super) fn short(&mut self, opcode: u8) -> usize {
        self.raw(&[opcode, 0]);
        self.pos() - 1
    }

    /// Lets a jump whose displacement is at `field` come here.
    pub(super) fn bind(&mut self, field: usize) {
        self.bind_to(field, self.base + self.pos());
    }

    pub(super) fn bind_short(&mut self, field: usize) {
        let distance = self.pos() - field - 1;
        debug_assert!(distance < 128);
        if let Some(byte) = self.bytes.get_mut(field) {
            *byte = distance as u8;
        }
    }

    /// Lets a jump whose displacement is at `field` go to `target`, an offset of the cache.
    pub(super) fn bind_to(&mut self, field: usize, target: usize) {
        let distance = (target as u32).wrapping_sub((self.base + field + 4) as u32);
        self.overwrite(field, &distance.to_le_bytes());
    }

    /// Puts bytes in the place of others.
    pub(super) fn overwrite(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// `lea to, [rip + ...]` of an offset of the cache.
    pub(super) fn lea_offset(&mut self, to: u8, offset: usize) {
        self.rex(true, to, 0, 0);
        self.raw(&[0x8d, (to & 7) << 3 | 5]);
        let next = self.base + self.pos() + 4;
        self.dword((offset as u32).wrapping_sub(next as u32));
    }

    /// `jmp [mem]`.
    pub(super) fn jump_mem(&mut self, mem: Mem) {
        self.op_mem(false, &[0xff], 4, mem);
    }
}
