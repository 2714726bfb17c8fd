//! Templates of the instructions that are not copied: stack, control flow, addresses.

use super::emit::{Mem, cc, r};
use super::generate::{Check, Generator, NewJump, Origin, Place, Site, host};
use super::hints::STACK;
use super::template::{Kind, Template};
use super::thunk::{linked, spill};
use iced_x86::{Code, Instruction, InstructionInfoFactory, OpKind, Register};

/// Second temporary slot: the first belongs to the checks.
const KEPT: usize = 1;
/// What an indirect call's return address has replaced.
pub(super) const OVERWRITTEN: usize = 2;

impl Generator {
    /// Translates one instruction. `None` if it is for the single-step tier after all.
    pub(super) fn instruction(
        &mut self,
        instruction: &Instruction,
        template: &Template,
        bytes: &[u8],
        info: &mut InstructionInfoFactory,
        site: Site,
    ) -> Option<()> {
        match template.kind {
            Kind::Step => return None,
            Kind::Copy => return self.copy(instruction, template, bytes, info, site),
            Kind::Divide => {
                self.out.store_imm(false, linked!(division), u32::from(site.offset));
                return self.copy(instruction, template, bytes, info, site);
            }
            Kind::BitString => {
                if instruction.op0_kind() == OpKind::Memory {
                    return self.bit_string(instruction, site);
                }
                return self.copy(instruction, template, bytes, info, site);
            }
            // Other vCPUs' writes to code are looked for by the single-step tier.
            Kind::Nop if instruction.code() == Code::Serialize && !self.single_cpu => return None,
            Kind::Nop => {}
            Kind::Lea => return self.lea_of(instruction),
            Kind::Absolute => return self.absolute(instruction, site),
            Kind::PushRegister => self.push_register(instruction.op0_register().number() as u8, site),
            Kind::PushImmediate => {
                let top = self.push_check(site);
                let value = instruction.immediate(0) as u32;
                self.out.store_imm(true, top, value);
                self.move_stack(-8);
            }
            Kind::PushMemory => {
                self.load_operand(instruction, site)?;
                self.out.store(kept(), r::ADDR);
                let top = self.push_check(site);
                self.out.load(r::T1, kept());
                self.out.store(top, r::T1);
                self.move_stack(-8);
            }
            Kind::PopRegister => self.pop_register(instruction.op0_register().number() as u8, site),
            Kind::Leave => {
                let place = Place { register: r::BP, disp: 0, hint: STACK[self.class] };
                let saved = self.reach(place, Check::read(8), site);
                self.out.lea(r::GUEST_SP, Mem::at(r::BP, 8));
                self.out.load(r::BP, saved);
            }
            Kind::PushFlags => self.push_flags(site),
            Kind::PopFlags => self.pop_flags(site),
            Kind::ClearFlag => return self.clear_flag(instruction, site),
            Kind::SetInterrupt => return self.set_interrupt(site),
            Kind::ReadClock => self.read_clock(instruction, site),
            Kind::Repeat => return self.repeat(instruction, site),
            Kind::SwapBase => self.swap_base(),
            Kind::ReadSelector => return self.read_selector(instruction),
            Kind::ReadBase => self.read_base(instruction),
            Kind::WriteBase => self.write_base(instruction, site),
            Kind::VerifyWrite => return self.verify_write(instruction, site),
            Kind::Return => {
                let top = self.pop_check(site);
                self.out.load(r::ADDR, top);
                let extra = if instruction.op_count() > 0 { i32::from(instruction.immediate16()) } else { 0 };
                self.move_stack(8 + extra);
                self.jump_found(Origin::new(site.offset, -8 - i64::from(extra)));
            }
            Kind::Jump => self.jump_direct(instruction, site),
            Kind::JumpIf => self.jump_conditional(instruction, site),
            Kind::JumpCount => self.jump_count(instruction, bytes, site)?,
            Kind::Call => {
                self.push_return(site, false);
                self.jump_direct(instruction, site);
            }
            Kind::JumpIndirect => {
                self.load_operand(instruction, site)?;
                self.jump_found(Origin::new(site.offset, 0));
            }
            Kind::CallIndirect => {
                self.load_operand(instruction, site)?;
                self.out.store(kept(), r::ADDR);
                self.push_return(site, true);
                self.out.load(r::ADDR, kept());
                self.jump_found(Origin::new(site.offset, 8));
            }
        }
        Some(())
    }

    pub(super) fn move_stack(&mut self, by: i32) {
        self.out.lea(r::GUEST_SP, Mem::at(r::GUEST_SP, by));
    }

    /// Checks the quadword below the stack pointer for writing.
    pub(super) fn push_check(&mut self, site: Site) -> Mem {
        let place = Place { register: r::GUEST_SP, disp: -8, hint: STACK[self.class] };
        self.reach(place, Check::write(8), site)
    }

    /// Checks the quadword at the stack pointer for reading.
    pub(super) fn pop_check(&mut self, site: Site) -> Mem {
        let place = Place { register: r::GUEST_SP, disp: 0, hint: STACK[self.class] };
        self.reach(place, Check::read(8), site)
    }

    fn push_register(&mut self, guest: u8, site: Site) {
        let top = self.push_check(site);
        let from = self.operand(guest, r::T1);
        self.out.store(top, from);
        self.move_stack(-8);
    }

    fn pop_register(&mut self, guest: u8, site: Site) {
        let top = self.pop_check(site);
        // Before the load, which wins if it is RSP that is popped.
        self.move_stack(8);
        let top = Mem { disp: -8, ..top };
        match host(guest) {
            Some(to) => self.out.load(to, top),
            None => {
                self.out.load(r::T1, top);
                self.out.store(spill(guest), r::T1);
            }
        }
    }

    /// Pushes the address of the next instruction; `keep` what was there, for a call that faults after all.
    fn push_return(&mut self, site: Site, keep: bool) {
        let top = self.push_check(site);
        if keep {
            self.out.load(r::T1, top);
            self.out.store(overwritten(), r::T1);
        }
        self.out.load(r::T1, linked!(page_base));
        self.out.lea(r::T1, Mem::at(r::T1, i32::from(site.next)));
        self.out.store(top, r::T1);
        self.move_stack(-8);
    }

    /// The 64-bit register or memory operand to ADDR.
    fn load_operand(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        if instruction.op0_kind() == OpKind::Register {
            let from = self.operand(instruction.op0_register().number() as u8, r::ADDR);
            self.out.mov(r::ADDR, from);
            return Some(());
        }
        let place = self.place(instruction, false, false)?;
        let operand = self.reach(place, Check::read(8), site);
        self.out.load(r::ADDR, operand);
        Some(())
    }

    fn lea_of(&mut self, instruction: &Instruction) -> Option<()> {
        let to = instruction.op0_register();
        let guest = to.number() as u8;
        match (host(guest), to.size()) {
            (Some(register), 8) => self.effective(instruction, register, None),
            _ => {
                self.effective(instruction, r::ADDR, None)?;
                self.assign(to);
                Some(())
            }
        }
    }

    /// MOV between the accumulator and a 64-bit absolute address.
    fn absolute(&mut self, instruction: &Instruction, site: Site) -> Option<()> {
        if !matches!(instruction.memory_segment(), Register::DS | Register::SS | Register::ES | Register::CS)
        {
            return None;
        }
        let (size, write): (u8, _) = match instruction.code() {
            Code::Mov_AL_moffs8 => (1, false),
            Code::Mov_EAX_moffs32 => (4, false),
            Code::Mov_RAX_moffs64 => (8, false),
            Code::Mov_moffs8_AL => (1, true),
            Code::Mov_moffs32_EAX => (4, true),
            Code::Mov_moffs64_RAX => (8, true),
            _ => return None,
        };
        self.out.imm64(r::ADDR, instruction.memory_displacement64());
        let place = Place { register: r::ADDR, disp: 0, hint: self.fresh_hint() };
        let operand = self.reach(place, Check { size, write, align: 0, more: false }, site);
        let opcode = 0x88 | u8::from(!write) << 1 | u8::from(size > 1);
        self.out.op_mem(size == 8, &[opcode], r::AX, operand);
        Some(())
    }

    fn jump_direct(&mut self, instruction: &Instruction, site: Site) {
        let target = instruction.near_branch_target() as i64;
        self.jump_polled(target, site);
    }

    /// A jump that may close a loop looks for kicks.
    fn jump_polled(&mut self, target: i64, site: Site) {
        let backward = target <= i64::from(site.offset);
        self.jump_page(target, backward.then_some(site.live_after));
    }

    fn jump_conditional(&mut self, instruction: &Instruction, site: Site) {
        let target = instruction.near_branch_target() as i64;
        // The condition code is the low half of the opcode in both encodings.
        let condition = cc::O + condition(instruction);
        if target > i64::from(site.offset) && Self::linked(target) {
            let field = self.out.jump_if(condition);
            self.links.push(NewJump { at: field, target: target as u16, note: 0 });
        } else {
            let past = self.out.jump_if(condition ^ 1);
            self.jump_polled(target, site);
            self.out.bind(past);
        }
        if site.last {
            self.jump_page(i64::from(site.next), None);
        }
    }

    fn jump_count(&mut self, instruction: &Instruction, bytes: &[u8], site: Site) -> Option<()> {
        let opcode = *bytes.get(bytes.len().checked_sub(2)?)?;
        if bytes.contains(&0x67)
            && matches!(
                instruction.code(),
                Code::Jecxz_rel8_64
                    | Code::Loop_rel8_64_ECX
                    | Code::Loope_rel8_64_ECX
                    | Code::Loopne_rel8_64_ECX
            )
        {
            self.out.byte(0x67);
        }
        let taken = self.out.short(opcode);
        if Self::linked(i64::from(site.next)) {
            self.jump_page(i64::from(site.next), None);
            self.out.bind_short(taken);
        } else {
            // The way through the jump cache is long.
            let not_taken = self.out.jump();
            self.out.bind_short(taken);
            let target = instruction.near_branch_target() as i64;
            self.jump_polled(target, site);
            self.out.bind(not_taken);
            self.jump_page(i64::from(site.next), None);
            return Some(());
        }
        self.jump_polled(instruction.near_branch_target() as i64, site);
        Some(())
    }
}

fn overwritten() -> Mem {
    slot(OVERWRITTEN)
}

pub(super) fn kept() -> Mem {
    slot(KEPT)
}

fn slot(number: usize) -> Mem {
    Mem::state(super::thunk::LINKAGE + std::mem::offset_of!(super::linkage::Linkage, slots) + number * 8)
}

/// The number of a Jcc's condition.
fn condition(instruction: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match instruction.condition_code() {
        C::None | C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}
