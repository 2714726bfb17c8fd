//! Templates of the instructions that read selectors, and read and write the bases of FS and GS: kernels execute them at each
//! switch from one process to another.

use super::emit::{Mem, cc, r};
use super::generate::{Generator, Site, host};
use super::template::Kind;
use super::thunk::spill;
use crate::state::{CpuState, seg};
use cpu::Segment;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::mem::{offset_of, size_of};

/// Bits that an address has: those above are copies of the highest (Intel SDM 1, 3.3.7.1).
const ADDRESS_BITS: u8 = 48;

/// How an instruction of this sort is translated.
pub(super) fn kind(code: Code) -> Option<Kind> {
    match code.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => Some(Kind::ReadBase),
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => Some(Kind::WriteBase),
        _ => match code {
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => Some(Kind::ReadSelector),
            _ => None,
        },
    }
}

fn segment(number: usize, field: usize) -> Mem {
    Mem::state(offset_of!(CpuState, segments) + number * size_of::<Segment>() + field)
}

fn base_of(instruction: &Instruction) -> Mem {
    let number = match instruction.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS,
        _ => seg::GS,
    };
    segment(number, offset_of!(Segment, base))
}

impl Generator {
    /// SWAPGS.
    pub(super) fn swap_base(&mut self) {
        let gs = segment(seg::GS, offset_of!(Segment, base));
        let kernel = Mem::state(offset_of!(CpuState, msrs) + offset_of!(crate::state::Msrs, kernel_gs_base));
        self.out.load(r::T1, gs);
        self.out.load(r::T2, kernel);
        self.out.store(gs, r::T2);
        self.out.store(kernel, r::T1);
    }

    /// MOV of a selector to a register, of which 16 bits change with an operand size of 16 (Intel SDM 2, MOV).
    pub(super) fn read_selector(&mut self, instruction: &Instruction) -> Option<()> {
        if instruction.op0_kind() != OpKind::Register {
            return None;
        }
        let number = match instruction.op1_register() {
            Register::ES => seg::ES,
            Register::CS => seg::CS,
            Register::SS => seg::SS,
            Register::DS => seg::DS,
            Register::FS => seg::FS,
            Register::GS => seg::GS,
            _ => return None,
        };
        let selector = segment(number, offset_of!(Segment, selector));
        self.out.op_mem(false, &[0x0f, 0xb7], r::ADDR, selector);
        self.assign(instruction.op0_register());
        Some(())
    }

    /// RDFSBASE and RDGSBASE.
    pub(super) fn read_base(&mut self, instruction: &Instruction) {
        self.out.load(r::ADDR, base_of(instruction));
        self.assign(instruction.op0_register());
    }

    /// WRFSBASE and WRGSBASE; an address that is not canonical is for the single-step tier.
    pub(super) fn write_base(&mut self, instruction: &Instruction, site: Site) {
        let register = instruction.op0_register();
        let from = self.operand(register.number() as u8, r::T1);
        if register.size() == 4 {
            self.out.mov32(r::T1, from);
            self.out.store(base_of(instruction), r::T1);
            return;
        }
        if site.live {
            self.save_flags();
        }
        let out = &mut self.out;
        out.mov(r::T1, from);
        out.mov(r::T2, r::T1);
        for shift in [4, 7] {
            // shl, then sar
            out.op_reg(true, &[0xc1], shift, r::T2);
            out.byte(64 - ADDRESS_BITS);
        }
        out.op_reg(true, &[0x39], r::T1, r::T2); // cmp
        let odd = out.jump_if(cc::NE);
        self.step_when(odd, site, site.live);
        self.out.store(base_of(instruction), r::T1);
        if site.live {
            self.restore_flags();
        }
    }

    /// A register of the guest's takes what is in ADDR, in the register's size. Uses T1.
    pub(super) fn assign(&mut self, to: Register) {
        let guest = to.number() as u8;
        let out = &mut self.out;
        match (host(guest), to.size()) {
            (Some(register), 8) => out.mov(register, r::ADDR),
            (None, 8) => out.store(spill(guest), r::ADDR),
            (Some(register), 4) => out.mov32(register, r::ADDR),
            (None, 4) => {
                out.mov32(r::T1, r::ADDR);
                out.store(spill(guest), r::T1);
            }
            (Some(register), _) => {
                out.byte(0x66);
                out.mov32(register, r::ADDR);
            }
            (None, _) => {
                out.byte(0x66);
                out.store32(spill(guest), r::ADDR);
            }
        }
    }
}
