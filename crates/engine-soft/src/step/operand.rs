//! Operands of interpreted instructions: registers of every width, effective addresses, memory.

use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::mmu::Privilege;
use crate::state::{reg, seg};
use cpu::{attr, cr0, rflags};
use iced_x86::{Instruction, OpKind, Register};

/// The low `bytes` bytes of all ones.
pub(crate) fn mask(bytes: usize) -> u64 {
    match bytes {
        8.. => u64::MAX,
        _ => (1u64 << (bytes * 8)) - 1,
    }
}

/// Sign-extends from `bytes` bytes.
pub(crate) fn sign_extend(value: u64, bytes: usize) -> u64 {
    let shift = 64 - 8 * bytes.clamp(1, 8) as u32;
    ((value << shift) as i64 >> shift) as u64
}

/// Index in `CpuState::segments`.
pub(crate) fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

impl Core {
    /// A general register of any width, zero-extended.
    pub(crate) fn gpr(&self, register: Register) -> u64 {
        let number = register.number() & 15;
        if register.is_gpr8() {
            if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
                return self.state.gpr[number & 3] >> 8 & 0xff;
            }
            return self.state.gpr[gpr8_number(register)] & 0xff;
        }
        self.state.gpr[number] & mask(register.size())
    }

    /// Writes a general register of any width; 32-bit writes clear the upper half.
    pub(crate) fn set_gpr(&mut self, register: Register, value: u64) {
        if register.is_gpr8() {
            if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
                let cell = &mut self.state.gpr[register.number() & 3];
                *cell = *cell & !0xff00 | (value & 0xff) << 8;
            } else {
                self.set_gpr_sized(gpr8_number(register), value, 1);
            }
            return;
        }
        self.set_gpr_sized(register.number() & 15, value, register.size());
    }

    /// Writes the low `size` bytes of a register by number; 4 clears the upper half.
    pub(crate) fn set_gpr_sized(&mut self, number: usize, value: u64, size: usize) {
        let cell = &mut self.state.gpr[number];
        *cell = match size {
            8 => value,
            4 => value & u64::from(u32::MAX),
            _ => *cell & !mask(size) | value & mask(size),
        };
    }

    /// Width in bytes of the addresses that an instruction's memory operand uses.
    pub(crate) fn address_size(&self, instruction: &Instruction) -> usize {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if base != Register::None {
            return base.size();
        }
        if index.is_gpr() {
            return index.size();
        }
        match instruction.memory_displ_size() {
            2 => 2,
            4 => 4,
            8 => 8,
            _ => self.code_bits() as usize / 8,
        }
    }

    /// The offset of the memory operand in its segment.
    pub(crate) fn effective(&self, instruction: &Instruction) -> u64 {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let mut offset = instruction.memory_displacement64();
        // For RIP-relative operands the decoder's displacement is the address already.
        if base != Register::None && base != Register::RIP && base != Register::EIP {
            offset = offset.wrapping_add(self.gpr(base));
        }
        if index.is_gpr() {
            let scaled = self.gpr(index).wrapping_mul(u64::from(instruction.memory_index_scale()));
            offset = offset.wrapping_add(scaled);
        }
        offset & mask(self.address_size(instruction))
    }

    /// The linear address of `len` bytes of the memory operand, checked.
    pub(crate) fn memory_operand(
        &mut self,
        instruction: &Instruction,
        len: usize,
        write: bool,
    ) -> Result<u64, Trap> {
        let segment = segment_index(instruction.memory_segment());
        let linear = self.linear(segment, self.effective(instruction), len, write)?;
        self.check_alignment(linear, len)?;
        self.check_data_breakpoints(linear, len, write);
        Ok(linear)
    }

    /// #AC, when the guest has asked for it.
    pub(crate) fn check_alignment(&self, linear: u64, len: usize) -> Result<(), Trap> {
        let state = &self.state;
        if state.cr0 & cr0::AM == 0 || state.rflags & rflags::AC == 0 || state.cpl() != 3 {
            return Ok(());
        }
        // AMD APM 2, table 8-7; x87 environments by their word size, vectors by 16 bytes.
        let unit: u64 = match len {
            1 => 1,
            2 | 14 | 94 => 2,
            4 | 28 | 108 => 4,
            8 | 10 => 8,
            16 | 32 => 16,
            _ => 1,
        };
        if linear & (unit - 1) != 0 {
            return Err(Exception::AC.into());
        }
        Ok(())
    }

    /// Reads operand `operand`, a general register, immediate or memory, zero-extended.
    pub(crate) fn operand(&mut self, i: &Instruction, operand: u32) -> Result<u64, Trap> {
        match i.op_kind(operand) {
            OpKind::Register => {
                let register = i.op_register(operand);
                Ok(if register.is_segment_register() {
                    u64::from(self.state.segments[segment_index(register)].selector)
                } else {
                    self.gpr(register)
                })
            }
            OpKind::Memory => {
                let size = i.memory_size().size().clamp(1, 8);
                let linear = self.memory_operand(i, size, false)?;
                self.read_uint(linear, size, self.privilege())
            }
            _ => Ok(i.immediate(operand)),
        }
    }

    /// Writes operand `operand`, a general register or memory of `size` bytes.
    pub(crate) fn set_operand(&mut self, i: &Instruction, operand: u32, value: u64) -> Result<(), Trap> {
        match i.op_kind(operand) {
            OpKind::Register => {
                self.set_gpr(i.op_register(operand), value);
                Ok(())
            }
            _ => {
                let size = i.memory_size().size().clamp(1, 8);
                let linear = self.memory_operand(i, size, true)?;
                self.write_uint(linear, value, size, self.privilege())
            }
        }
    }

    /// Width in bytes of the stack pointer.
    pub(crate) fn stack_size(&self) -> usize {
        if self.state.code64() {
            8
        } else if self.state.segments[seg::SS].attr & attr::DB != 0 {
            4
        } else {
            2
        }
    }

    /// Adds to the stack pointer.
    pub(crate) fn move_stack(&mut self, by: u64) {
        let size = self.stack_size();
        let sp = self.state.gpr[reg::RSP].wrapping_add(by);
        // A 32-bit stack pointer leaves RSP's upper half alone only in that it is always clear there.
        self.set_gpr_sized(reg::RSP, sp, size);
    }

    /// The linear address at `offset` from the stack pointer.
    pub(crate) fn stack_linear(&self, offset: u64, len: usize, write: bool) -> Result<u64, Trap> {
        let at = self.state.gpr[reg::RSP].wrapping_add(offset) & mask(self.stack_size());
        self.linear(seg::SS, at, len, write)
    }

    /// Pushes `size` bytes.
    pub(crate) fn push(&mut self, value: u64, size: usize) -> Result<(), Trap> {
        let down = (size as u64).wrapping_neg();
        let linear = self.stack_linear(down, size, true)?;
        self.check_alignment(linear, size)?;
        self.check_data_breakpoints(linear, size, true);
        self.write_uint(linear, value, size, self.privilege())?;
        self.move_stack(down);
        Ok(())
    }

    /// Pops `size` bytes.
    pub(crate) fn pop(&mut self, size: usize) -> Result<u64, Trap> {
        let value = self.peek(0, size)?;
        self.move_stack(size as u64);
        Ok(value)
    }

    /// Reads the stack at `offset` bytes above its pointer.
    pub(crate) fn peek(&mut self, offset: u64, size: usize) -> Result<u64, Trap> {
        let linear = self.stack_linear(offset, size, false)?;
        self.check_alignment(linear, size)?;
        self.check_data_breakpoints(linear, size, false);
        self.read_uint(linear, size, self.privilege())
    }

    /// Reads for the CPU itself, whatever the CPL.
    pub(crate) fn read_implicit(&mut self, linear: u64, size: usize) -> Result<u64, Trap> {
        let linear = if self.state.long_mode() { linear } else { linear & u64::from(u32::MAX) };
        self.read_uint(linear, size, Privilege::Implicit)
    }
}

/// AL..BL, SPL.., R8L..: number of the whole register.
fn gpr8_number(register: Register) -> usize {
    register.full_register().number() & 15
}
