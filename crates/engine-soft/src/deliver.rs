//! Delivery of exceptions and interrupts (Intel SDM 3, chapter 7; AMD APM 2, chapter 8).

use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Stop, Trap, vector};
use crate::mmu::{Access, Mmu, Privilege};
use crate::segmentation::{Descriptor, null_stack, system};
use crate::state::{Shadow, reg, seg};
use crate::step::operand::mask;
use cpu::{Error, Exit, Segment, attr, cr0, rflags};

/// Where an event comes from; decides privilege checks and the EXT bit of error codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A fault or trap that an instruction met.
    Exception,
    /// INT n, INT3, INTO.
    Software,
    /// INT1: an exception that needs no DPL check.
    Icebp,
    /// An interrupt or NMI.
    External,
}

/// Where the handler runs.
struct Entry {
    cs: Segment,
    rip: u64,
    ss: Option<Segment>,
    sp: u64,
    cpl: u8,
    /// Bytes of each pushed item.
    size: usize,
    /// An interrupt gate, which clears IF.
    masks: bool,
}

impl Core {
    /// Delivers an exception that the instruction at RIP met: also as a double fault, up to shutdown.
    pub fn raise(&mut self, exception: Exception) -> Stop {
        let mut current = exception;
        loop {
            self.counters.exceptions += 1;
            match current.vector {
                vector::PF => self.state.cr2 = current.detail,
                vector::DB => self.note_debug(current.detail),
                _ => {}
            }
            match self.deliver(current.vector, current.error, Source::Exception) {
                Ok(()) => return Stop::Continue,
                Err(Trap::Exit(exit)) => return Stop::Exit(exit),
                Err(Trap::Fail(error)) => return Stop::Fail(error),
                Err(Trap::Exception(second)) => match escalate(current, second) {
                    Some(next) => current = next,
                    None => return Stop::Exit(Exit::Shutdown),
                },
            }
        }
    }

    /// Delivers an external interrupt or NMI.
    pub(crate) fn interrupt(&mut self, vector: u8) -> Stop {
        self.state.halted = false;
        match self.deliver(vector, None, Source::External) {
            Ok(()) => Stop::Continue,
            Err(Trap::Exception(exception)) => self.raise(exception),
            Err(Trap::Exit(exit)) => Stop::Exit(exit),
            Err(Trap::Fail(error)) => Stop::Fail(error),
        }
    }

    /// One attempt at delivery; nothing has changed if it fails (but the bytes of a half-pushed frame).
    pub(crate) fn deliver(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Trap> {
        let segments = self.state.segments;
        let delivered = if self.state.cr0 & cr0::PE == 0 {
            self.deliver_real(vector)
        } else {
            self.deliver_protected(vector, error, source)
        };
        match delivered {
            Ok(()) => {
                self.state.shadow = Shadow::None;
                self.state.attention |= attention::MODE;
                Ok(())
            }
            Err(trap) => {
                self.state.segments = segments;
                Err(match trap {
                    Trap::Exception(inner) => external(inner, source).into(),
                    other => other,
                })
            }
        }
    }

    fn deliver_real(&mut self, vector: u8) -> Result<(), Trap> {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.state.idtr.limit) {
            return Err(Exception::coded(vector::GP, u32::from(vector) * 8 + 2).into());
        }
        let pointer = self.read_implicit(self.state.idtr.base.wrapping_add(at), 4)?;
        let sp = self.state.gpr[reg::RSP];
        let flags = self.state.rflags;
        let cs = self.state.segments[seg::CS].selector;
        let pushed = self
            .push(flags, 2)
            .and_then(|()| self.push(u64::from(cs), 2))
            .and_then(|()| self.push(self.state.rip, 2));
        if pushed.is_err() {
            self.state.gpr[reg::RSP] = sp;
            return pushed;
        }
        self.state.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.state.segments[seg::CS] = self.real_mode_segment(seg::CS, (pointer >> 16) as u16);
        self.state.rip = pointer & 0xffff;
        Ok(())
    }

    fn deliver_protected(&mut self, vector: u8, error: Option<u32>, source: Source) -> Result<(), Trap> {
        let long = self.state.long_mode();
        let mut entry = self.gate(vector, source, long)?;
        let flags = self.flags_to_push(vector, source);
        let (old_ss, old_sp) = (self.state.segments[seg::SS].selector, self.state.gpr[reg::RSP]);
        let from_vm = flags & rflags::VM != 0;
        let mut frame: Vec<u64> = Vec::with_capacity(10);
        if from_vm {
            for segment in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(u64::from(self.state.segments[segment].selector));
            }
        }
        if long || entry.ss.is_some() {
            frame.extend([u64::from(old_ss), old_sp]);
        }
        frame.extend([flags, u64::from(self.state.segments[seg::CS].selector), self.state.rip]);
        frame.extend(error.map(u64::from));
        let sp = self.push_frame(&entry, &frame, long)?;
        if let Some(ss) = entry.ss {
            self.state.segments[seg::SS] = ss;
        }
        if from_vm {
            for segment in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.state.segments[segment] = Segment::default();
            }
        }
        entry.cs.selector = entry.cs.selector & !3 | u16::from(entry.cpl);
        self.state.segments[seg::CS] = entry.cs;
        let width = self.stack_size();
        self.set_gpr_sized(reg::RSP, sp, width);
        self.state.rip = entry.rip;
        self.state.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if entry.masks {
            self.state.rflags &= !rflags::IF;
        }
        Ok(())
    }

    /// RF is set in the image of a fault, so that its instruction can be restarted past an instruction breakpoint; not
    /// in that of traps, aborts and #DB.
    fn flags_to_push(&self, vector: u8, source: Source) -> u64 {
        let trap = matches!(vector, vector::DB | vector::BP | vector::OF | vector::DF | vector::MC);
        if source == Source::Exception && !trap { self.state.rflags | rflags::RF } else { self.state.rflags }
    }

    fn gate(&mut self, number: u8, source: Source, long: bool) -> Result<Entry, Trap> {
        let code = u32::from(number) * 8 + 2;
        let refused = || Trap::from(Exception::coded(vector::GP, code));
        let size: u64 = if long { 16 } else { 8 };
        let at = u64::from(number) * size;
        if at + size - 1 > u64::from(self.state.idtr.limit) {
            return Err(refused());
        }
        let at = self.state.idtr.base.wrapping_add(at);
        let low = self.read_implicit(at, 8)?;
        let high = if long { self.read_implicit(at.wrapping_add(8), 8)? } else { 0 };
        let gate = Descriptor(low);
        let kind = gate.kind();
        let wide = matches!(kind, system::INTERRUPT_GATE | system::TRAP_GATE);
        let narrow = matches!(kind, system::INTERRUPT_GATE16 | system::TRAP_GATE16) && !long;
        let task = kind == system::TASK_GATE && !long;
        if gate.segment() || !(wide || narrow || task) {
            return Err(refused());
        }
        if source == Source::Software && gate.dpl() < self.state.cpl() {
            return Err(refused());
        }
        if !gate.present() {
            return Err(Exception::coded(vector::NP, code).into());
        }
        if task {
            return Err(task_switch(self.state.rip));
        }
        let mut offset = low & 0xffff | (high << 32) | if wide { low >> 32 & 0xffff_0000 } else { 0 };
        if !long {
            offset &= u64::from(u32::MAX);
        }
        let selector = (low >> 16) as u16;
        if selector & !3 == 0 {
            return Err(Exception::GP.into());
        }
        let target = self.descriptor(selector, Exception::gp)?;
        let cpl = self.state.cpl();
        let wrong_mode = long && target.attr() & (attr::L | attr::DB) != attr::L;
        if !target.code() || target.dpl() > cpl || wrong_mode {
            return Err(Exception::gp(selector).into());
        }
        if !target.present() {
            return Err(Exception::np(selector).into());
        }
        let new_cpl = if target.conforming() { cpl } else { target.dpl() };
        if self.state.rflags & rflags::VM != 0 && new_cpl != 0 {
            return Err(Exception::gp(selector).into());
        }
        let target = self.set_accessed(selector, target)?;
        let size = if long {
            8
        } else if wide {
            4
        } else {
            2
        };
        let ist = if long { (low >> 32 & 7) as u8 } else { 0 };
        let (ss, sp) = self.handler_stack(new_cpl, cpl, ist, long)?;
        let valid = if long { Mmu::canonical(offset) } else { offset <= u64::from(target.limit()) };
        if !valid {
            return Err(Exception::GP.into());
        }
        let masks = matches!(kind, system::INTERRUPT_GATE | system::INTERRUPT_GATE16);
        Ok(Entry { cs: target.load(selector), rip: offset, ss, sp, cpl: new_cpl, size, masks })
    }

    fn handler_stack(
        &mut self,
        new_cpl: u8,
        cpl: u8,
        ist: u8,
        long: bool,
    ) -> Result<(Option<Segment>, u64), Trap> {
        if long {
            let sp = if ist != 0 {
                self.tss_stack64(28 + u64::from(ist) * 8)?
            } else if new_cpl < cpl {
                self.tss_stack64(4 + u64::from(new_cpl) * 8)?
            } else {
                self.state.gpr[reg::RSP]
            };
            let ss = (new_cpl < cpl).then(|| null_stack(u16::from(new_cpl), new_cpl));
            return Ok((ss, sp & !15));
        }
        if new_cpl < cpl {
            let (selector, sp) = self.tss_stack32(new_cpl)?;
            let ss = self.checked_stack(selector, new_cpl, Exception::ts)?;
            return Ok((Some(ss), sp));
        }
        Ok((None, self.state.gpr[reg::RSP]))
    }

    /// A stack pointer of the 64-bit TSS.
    pub(crate) fn tss_stack64(&mut self, offset: u64) -> Result<u64, Trap> {
        let tr = self.state.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(Exception::ts(tr.selector).into());
        }
        let sp = self.read_implicit(tr.base.wrapping_add(offset), 8)?;
        if Mmu::canonical(sp) { Ok(sp) } else { Err(Exception::SS.into()) }
    }

    /// Stack segment and pointer of the legacy TSS.
    pub(crate) fn tss_stack32(&mut self, cpl: u8) -> Result<(u16, u64), Trap> {
        let tr = self.state.tr;
        let wide = tr.attr & 8 != 0;
        let (offset, size) = if wide { (4 + u64::from(cpl) * 8, 4) } else { (2 + u64::from(cpl) * 4, 2) };
        if offset + 2 * size > u64::from(tr.limit) + 1 {
            return Err(Exception::ts(tr.selector).into());
        }
        let sp = self.read_implicit(tr.base.wrapping_add(offset), size as usize)?;
        let ss = self.read_implicit(tr.base.wrapping_add(offset + size), 2)?;
        Ok((ss as u16, sp))
    }

    /// Writes the frame (first item at the highest address) on the handler's stack; answers the new stack pointer.
    fn push_frame(&mut self, entry: &Entry, frame: &[u64], long: bool) -> Result<u64, Trap> {
        let mut bytes = Vec::with_capacity(80);
        for item in frame.iter().rev() {
            bytes.extend_from_slice(&item.to_le_bytes()[..entry.size]);
        }
        let stack = entry.ss.unwrap_or(self.state.segments[seg::SS]);
        let width = if long {
            8
        } else if stack.attr & attr::DB != 0 {
            4
        } else {
            2
        };
        let sp = entry.sp.wrapping_sub(bytes.len() as u64) & mask(width);
        let linear = if long {
            let top = sp.wrapping_add(bytes.len() as u64 - 1);
            if !Mmu::canonical(sp) || !Mmu::canonical(top) {
                return Err(Exception::SS.into());
            }
            sp
        } else {
            if let Some(ss) = entry.ss {
                self.state.segments[seg::SS] = ss;
            }
            let code = entry.ss.map_or(0, |ss| ss.selector);
            self.linear(seg::SS, sp, bytes.len(), true).map_err(|_| Trap::from(Exception::ss(code)))?
        };
        let privilege = if entry.cpl == 3 { Privilege::User } else { Privilege::Implicit };
        self.probe(linear, bytes.len(), Access::Write, privilege)?;
        self.write(linear, &bytes, privilege)?;
        Ok(sp)
    }
}

/// Hardware task switches are not part of this CPU model.
pub(crate) fn task_switch(rip: u64) -> Trap {
    Trap::Fail(Error::Guest { engine: "soft", rip, why: "the guest uses a hardware task switch".into() })
}

/// Error codes of faults met while delivering an event that the program did not ask for have EXT set.
fn external(exception: Exception, source: Source) -> Exception {
    let selects = matches!(exception.vector, vector::TS | vector::NP | vector::SS | vector::GP);
    if source == Source::Software || !selects {
        return exception;
    }
    Exception { error: exception.error.map(|code| code | 1), ..exception }
}

/// Intel SDM 3, table 7-5. `None` is a triple fault.
fn escalate(first: Exception, second: Exception) -> Option<Exception> {
    let double = Some(Exception::coded(vector::DF, 0));
    let page = |e: &Exception| e.vector == vector::PF;
    match first.vector {
        vector::DF => None,
        _ if first.contributory() && second.contributory() => double,
        vector::PF if page(&second) || second.contributory() => double,
        _ => Some(second),
    }
}
