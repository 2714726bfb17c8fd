//! Templates of the system instructions that kernels execute often, and of bit strings in memory.
//!
//! IF, DF and the other flags that are not arithmetic live in `state.rflags` only. While an event waits for the guest
//! to become interruptible, STI and POPF that would let it in are left to the single-step tier, which knows the
//! interrupt shadow.

use super::control::kept;
use super::emit::{Emitter, Mem, cc, r};
use super::generate::{Check, Generator, Place, Site};
use super::thunk::{self, linked};
use crate::state::CpuState;
use cpu::rflags;
use iced_x86::{Code, Instruction, OpKind, Register};
use std::mem::offset_of;

/// 32 bits of the state's RFLAGS: no flag is above.
fn flags_field() -> Mem {
    Mem::state(offset_of!(CpuState, rflags))
}

/// `and`, `or` of memory with an immediate: opcode 81 and its extension.
fn imm_mem(out: &mut Emitter, extension: u8, mem: Mem, value: u32) {
    out.op_mem(false, &[0x81], extension, mem);
    out.dword(value);
}

fn imm_reg(out: &mut Emitter, extension: u8, register: u8, value: u32) {
    out.op_reg(false, &[0x81], extension, register);
    out.dword(value);
}

const OR: u8 = 1;
const AND: u8 = 4;

impl Generator {
    /// PUSHFQ: VM and RF are pushed as zero (Intel SDM 2, PUSHF).
    pub(super) fn push_flags(&mut self, site: Site) {
        let top = self.push_check(site);
        let out = &mut self.out;
        out.store(linked!(slots), r::AX);
        thunk::save_flags(out);
        out.store32(linked!(flags_saved), r::AX);
        // T1 = OF in its place; EAX = the others.
        out.op_reg(false, &[0x0f, 0xb6], r::T1, r::AX);
        out.op_reg(false, &[0xc1], 4, r::T1);
        out.byte(11);
        out.raw(&[0x0f, 0xb6, 0xc4]); // movzx eax, ah
        out.and_imm(false, r::AX, 0xd5);
        out.op_reg(false, &[0x09], r::T1, r::AX);
        out.load32(r::T1, flags_field());
        imm_reg(out, AND, r::T1, !((rflags::STATUS | rflags::RF | rflags::VM) as u32));
        out.op_reg(false, &[0x09], r::AX, r::T1);
        out.store(top, r::T1);
        if site.live_after {
            out.load32(r::AX, linked!(flags_saved));
            thunk::restore_flags(out);
        }
        out.load(r::AX, linked!(slots));
        self.move_stack(-8);
    }

    /// POPFQ at CPL 0: everything but VM, RF, VIF and VIP comes from the stack.
    pub(super) fn pop_flags(&mut self, site: Site) {
        let top = self.pop_check(site);
        let changed =
            rflags::STATUS | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
        self.out.load(r::ADDR, top);
        self.out.mov32(r::T1, r::ADDR);
        self.out.op_mem(false, &[0x23], r::T1, linked!(popf_stop));
        self.step_if(cc::NE, site);
        let out = &mut self.out;
        out.mov32(r::T1, r::ADDR);
        imm_reg(out, AND, r::T1, changed as u32);
        imm_reg(out, OR, r::T1, rflags::FIXED as u32);
        out.store(flags_field(), r::T1);
        self.move_stack(8);
        if site.live_after {
            let out = &mut self.out;
            out.store(linked!(slots), r::AX);
            // AH = the low byte, AL = OF.
            out.mov32(r::AX, r::ADDR);
            out.raw(&[0xc1, 0xe0, 8]);
            out.op_reg(false, &[0x0f, 0xba], 4, r::ADDR); // bt r14d, 11
            out.byte(11);
            out.raw(&[0x0f, 0x92, 0xc0]); // setc al
            thunk::restore_flags(out);
            out.load(r::AX, linked!(slots));
        }
    }

    /// CLI and CLD.
    pub(super) fn clear_flag(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        let flag = if instruction.code() == Code::Cld { rflags::DF } else { rflags::IF };
        if flag == rflags::IF && self.class != 0 {
            return None;
        }
        if site.live_after {
            self.without_flag(flag)?;
            self.out.store(flags_field(), r::T1);
        } else {
            imm_mem(&mut self.out, AND, flags_field(), !(flag as u32));
        }
        Some(())
    }

    /// T1 = RFLAGS without a flag, the status flags of the host unharmed. Uses T2.
    fn without_flag(&mut self, flag: u64) -> Option<()> {
        if !self.bmi2 {
            return None;
        }
        self.out.imm64(r::T2, !flag);
        // PEXT, then PDEP with the same mask.
        self.out.load(r::T1, flags_field());
        self.out.vex38_reg(2, 0xf5, r::T1, r::T1, r::T2);
        self.out.vex38_reg(3, 0xf5, r::T1, r::T1, r::T2);
        Some(())
    }

    /// STI with nothing waiting. The next instruction must follow without a look for events: the interrupt shadow.
    pub(super) fn set_interrupt(&mut self, site: Site) -> Option<()> {
        if !site.followed {
            return None;
        }
        if !site.live {
            self.out.op_mem(false, &[0x83], 7, linked!(waiting));
            self.out.byte(0);
            self.step_if(cc::NE, site);
            imm_mem(&mut self.out, OR, flags_field(), rflags::IF as u32);
            return Some(());
        }
        self.without_flag(rflags::IF)?;
        let out = &mut self.out;
        out.lea(r::T1, Mem::at(r::T1, rflags::IF as i32));
        out.mov(r::T2, r::CX);
        out.load32(r::CX, linked!(waiting));
        let none = out.short(0xe3);
        out.mov(r::CX, r::T2);
        self.exit(thunk::reason::STEP, u32::from(site.offset));
        let out = &mut self.out;
        out.bind_short(none);
        out.mov(r::CX, r::T2);
        out.store(flags_field(), r::T1);
        Some(())
    }

    /// RDTSC and RDTSCP: the host's, less the guest's zero.
    pub(super) fn read_clock(&mut self, instruction: &Instruction, site: Site) {
        if site.live {
            self.save_flags();
        }
        let out = &mut self.out;
        out.raw(&[0x0f, 0x31]);
        out.raw(&[0x48, 0xc1, 0xe2, 32, 0x48, 0x09, 0xd0]); // shl rdx, 32; or rax, rdx
        out.op_mem(true, &[0x03], r::AX, Mem::state(offset_of!(CpuState, tsc_offset)));
        out.raw(&[0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 32, 0x89, 0xc0]); // mov rdx, rax; shr rdx, 32; mov eax, eax
        if instruction.code() == Code::Rdtscp {
            let identity = offset_of!(CpuState, msrs) + offset_of!(crate::state::Msrs, tsc_aux);
            out.load32(r::CX, Mem::state(identity));
        }
        if site.live {
            self.restore_flags();
        }
    }

    /// MOVS and STOS with REP and DF clear, as far as they access whole elements in one page each; then the next pages.
    /// The rest is for the single-step tier.
    pub(super) fn repeat(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        let (opcode, log, copies) = match instruction.code() {
            Code::Stosb_m8_AL => (&[0xf3, 0xaa][..], 0, false),
            Code::Stosw_m16_AX => (&[0x66, 0xf3, 0xab][..], 1, false),
            Code::Stosd_m32_EAX => (&[0xf3, 0xab][..], 2, false),
            Code::Stosq_m64_RAX => (&[0xf3, 0x48, 0xab][..], 3, false),
            Code::Movsb_m8_m8 => (&[0xf3, 0xa4][..], 0, true),
            Code::Movsw_m16_m16 => (&[0x66, 0xf3, 0xa5][..], 1, true),
            Code::Movsd_m32_m32 => (&[0xf3, 0xa5][..], 2, true),
            Code::Movsq_m64_m64 => (&[0xf3, 0x48, 0xa5][..], 3, true),
            _ => return None,
        };
        let plain = |i: u32| match instruction.op_kind(i) {
            OpKind::MemoryESRDI => true,
            OpKind::MemorySegRSI => !matches!(instruction.memory_segment(), Register::FS | Register::GS),
            kind => kind == OpKind::Register,
        };
        if !instruction.has_rep_prefix() || !plain(0) || !plain(1) {
            return None;
        }
        let saved = site.live;
        if saved {
            self.save_flags();
        }
        self.out.op_mem(false, &[0xf7], 0, flags_field()); // test
        self.out.dword(rflags::DF as u32);
        let backward = self.out.jump_if(cc::NE);
        self.step_when(backward, site, saved);
        let again = self.out.pos();
        self.out.op_reg(true, &[0x85], r::CX, r::CX);
        let done = self.out.jump_if(cc::E);
        self.kick_when(site, saved);
        let place = |this: &mut Self, register| Place { register, disp: 0, hint: this.fresh_hint() };
        // The addends: RDI's in the slot of what is kept, RSI's in ADDR.
        let to = place(self, r::DI);
        self.reach_plain(to, Check { more: true, ..Check::write(1) }, site, saved);
        self.out.store(kept(), r::ADDR);
        if copies {
            let from = place(self, r::SI);
            self.reach_plain(from, Check::read(1), site, saved);
        }
        // T2 = the elements that are all in the page.
        self.out.mov(r::T2, r::CX);
        let pointers: &[u8] = if copies { &[r::DI, r::SI] } else { &[r::DI] };
        for &pointer in pointers {
            self.out.mov32(r::T1, pointer);
            self.out.op_reg(false, &[0xf7], 2, r::T1); // not
            self.out.and_imm(false, r::T1, 0xfff);
            self.out.lea(r::T1, Mem::at(r::T1, 1));
            self.out.shr32(r::T1, log);
            self.out.op_reg(true, &[0x39], r::T1, r::T2); // cmp T2, T1
            self.out.op_reg(true, &[0x0f, 0x47], r::T2, r::T1); // cmova T2, T1
        }
        self.out.op_reg(true, &[0x85], r::T2, r::T2);
        let crossing = self.out.jump_if(cc::E);
        self.step_when(crossing, site, saved);
        // CX = those, T2 = the others.
        self.out.op_reg(true, &[0x29], r::T2, r::CX); // sub
        self.out.op_reg(true, &[0x87], r::T2, r::CX); // xchg
        self.out.load(r::T1, kept());
        self.out.op_reg(true, &[0x01], r::T1, r::DI);
        if copies {
            self.out.op_reg(true, &[0x01], r::ADDR, r::SI);
        }
        self.out.raw(opcode);
        self.out.op_reg(true, &[0x29], r::T1, r::DI);
        if copies {
            self.out.op_reg(true, &[0x29], r::ADDR, r::SI);
        }
        self.out.mov(r::CX, r::T2);
        self.out.jump_to(self.out.base + again);
        self.out.bind(done);
        if saved {
            self.restore_flags();
        }
        Some(())
    }

    /// VERW of a selector of the GDT in memory. Kernels execute it before each return to the user on CPUs that must be told to
    /// forget what is in their buffers, so the host's CPU is told too.
    pub(super) fn verify_write(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        if instruction.op0_kind() != OpKind::Memory {
            return None;
        }
        let saved = site.live;
        if saved {
            self.save_flags();
        }
        let place = self.place(instruction, false, false)?;
        let selector = self.reach_plain(place, Check::read(2), site, saved);
        self.out.op_mem(false, &[0x0f, 0xb7], r::T2, selector);
        // In the GDT, not null, asked for by CPL 0 itself, and inside the limit.
        self.out.lea(r::T1, Mem::at(r::T2, -8));
        imm_reg(&mut self.out, AND, r::T1, !0xfff8);
        let odd = self.out.jump_if(cc::NE);
        self.step_when(odd, site, saved);
        let table = offset_of!(CpuState, gdtr);
        let limit = Mem::state(table + offset_of!(cpu::DescriptorTable, limit));
        self.out.op_mem(false, &[0x0f, 0xb7], r::T1, limit);
        self.out.lea(r::ADDR, Mem::at(r::T2, 7));
        self.out.op_reg(false, &[0x39], r::T1, r::ADDR); // cmp ADDR, T1
        let beyond = self.out.jump_if(cc::A);
        self.step_when(beyond, site, saved);
        self.out.load(r::ADDR, Mem::state(table + offset_of!(cpu::DescriptorTable, base)));
        self.out.op_reg(true, &[0x01], r::T2, r::ADDR); // add ADDR, T2
        let place = Place { register: r::ADDR, disp: 0, hint: self.fresh_hint() };
        let descriptor = self.reach_plain(place, Check::read(8), site, saved);
        let out = &mut self.out;
        out.load(r::T1, descriptor);
        out.op_mem(false, &[0x0f, 0x00], 5, Mem::state(offset_of!(CpuState, host_data)));
        out.op_reg(true, &[0xc1], 5, r::T1); // shr T1, 32
        out.byte(32);
        // A writable data segment: S and W, but not "code" (Intel SDM 3, 3.4.5.1).
        out.and_imm(false, r::T1, 0x1a00);
        out.cmp_imm(r::T1, 0x1200);
        if saved && site.live_after {
            const ZF_IN_AH: u8 = 14;
            out.op_reg(false, &[0x0f, 0x94], 0, r::T1); // sete
            out.op_reg(false, &[0x0f, 0xb6], r::T1, r::T1);
            out.op_reg(false, &[0xc1], 4, r::T1);
            out.byte(ZF_IN_AH);
            imm_mem(out, AND, linked!(flags_saved), !(1 << ZF_IN_AH));
            out.op_mem(false, &[0x09], r::T1, linked!(flags_saved));
            self.restore_flags();
        }
        Some(())
    }

    /// BT, BTS, BTR, BTC of a bit string in memory: the register's upper bits move the address.
    pub(super) fn bit_string(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        if !self.bmi2 || narrow(instruction) {
            return None;
        }
        let (opcode, bytes, write) = match instruction.code() {
            Code::Bt_rm32_r32 => (0xa3, 4, false),
            Code::Bt_rm64_r64 => (0xa3, 8, false),
            Code::Bts_rm32_r32 => (0xab, 4, true),
            Code::Bts_rm64_r64 => (0xab, 8, true),
            Code::Btr_rm32_r32 => (0xb3, 4, true),
            Code::Btr_rm64_r64 => (0xb3, 8, true),
            Code::Btc_rm32_r32 => (0xbb, 4, true),
            Code::Btc_rm64_r64 => (0xbb, 8, true),
            _ => return None,
        };
        let wide = bytes == 8;
        let (shift, scale) = if wide { (6, 3) } else { (5, 2) };
        let offset = instruction.op1_register().number() as u8;
        let Place { register, disp, .. } = self.place(instruction, write, false)?;
        let from = self.operand(offset, r::T1);
        // T1 = the index of the word, signed.
        self.out.imm32(r::T2, shift);
        if wide {
            self.out.vex38_reg(2, 0xf7, r::T1, r::T2, from); // sarx
        } else {
            self.out.op_reg(true, &[0x63], r::T1, from); // movsxd
            self.out.vex38_reg(2, 0xf7, r::T1, r::T2, r::T1);
        }
        self.out.lea(r::ADDR, Mem::at(register, disp).with_index(r::T1, scale));
        let place = Place { register: r::ADDR, disp: 0, hint: self.fresh_hint() };
        let word = self.reach(place, Check { size: bytes, write, align: 0, more: false }, site);
        let from = self.operand(offset, r::T1);
        self.out.imm32(r::T2, u32::from(bytes) * 8 - 1);
        self.out.vex38_reg(2, 0xf5, r::T1, from, r::T2); // pext: the bit in the word
        if instruction.has_lock_prefix() {
            self.out.byte(0xf0);
        }
        self.out.op_mem(wide, &[0x0f, opcode], r::T1, word);
        Some(())
    }
}

/// Whether addresses are of 32 bits: the sum of one and the index of a word of a bit string wraps around at 4 GiB, which
/// is left to the single-step tier.
fn narrow(instruction: &Instruction) -> bool {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let absolute = base == Register::None && index == Register::None;
    base.is_gpr32() || index.is_gpr32() || absolute && instruction.memory_displ_size() == 4
}
