//! Finding the extent of a block, and which status flags matter where in it.

use super::template::{Domain, Kind, Template, Templates};
use super::{copy, flags};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, OpKind};

/// Longest block in instructions.
pub(crate) const INSTRUCTIONS_MAX: usize = 64;
/// How far liveness looks into successors, in instructions.
const AHEAD_MAX: usize = 16;
/// Accesses for which live flags are saved once instead of being kept from harm at each.
const SAVED_ACCESSES_MIN: usize = 3;
const PAGE: usize = 4096;
/// Most bytes of one instruction, and so of the next page that are looked at.
pub(super) const INSTRUCTION_BYTES: usize = 15;
/// Instructions that start here or later may reach into the next page.
pub(super) const MAY_CROSS: u16 = (PAGE - INSTRUCTION_BYTES + 1) as u16;

/// What may run now besides integer instructions; also which TLB tables are used. Blocks are made for one mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Mode {
    pub user: bool,
    pub x87: bool,
    pub sse: bool,
    pub avx: bool,
    /// RDTSC is allowed.
    pub clock: bool,
    /// RDFSBASE and its kin exist.
    pub bases: bool,
}

impl Mode {
    /// How many bits a mode's number has.
    pub(super) const BITS: usize = 6;

    pub(super) fn bits(self) -> u8 {
        let bits: [bool; Self::BITS] = [self.user, self.x87, self.sse, self.avx, self.clock, self.bases];
        bits.iter().rev().fold(0, |number, &bit| number << 1 | u8::from(bit))
    }

    /// Whether a number that [`Mode::bits`] made is of user mode.
    pub(super) fn is_user(bits: u8) -> bool {
        bits & 1 != 0
    }

    fn allows(self, template: &Template) -> bool {
        let system =
            matches!(template.kind, Kind::PopFlags | Kind::SetInterrupt | Kind::SwapBase | Kind::VerifyWrite);
        let absent = match template.kind {
            Kind::ReadClock => !self.clock,
            Kind::ReadBase | Kind::WriteBase => !self.bases,
            _ => false,
        };
        if self.user && system || absent {
            return false;
        }
        match template.domain {
            Domain::Integer => true,
            Domain::X87 => self.x87,
            Domain::Sse => self.sse,
            Domain::Avx => self.avx,
        }
    }
}

pub(super) struct Item {
    pub instruction: Instruction,
    pub template: Template,
    /// Page offsets of its first byte and of the next instruction.
    pub offset: u16,
    pub next: u16,
    /// Status flags live before and after it.
    pub live_before: u32,
    pub live_after: u32,
    /// The live flags are in memory while it runs: it leaves them alone, and checks of accesses need not.
    pub saved: bool,
}

/// A byte range of the page, from and to.
pub(super) type Range = (u16, u16);

/// A decoded block.
#[derive(Default)]
pub(super) struct Plan {
    pub items: Vec<Item>,
    /// The last item does not go on to the next instruction by itself.
    pub controlled: bool,
    /// The instruction after the last item is for the single-step tier.
    pub step: bool,
    /// The instruction after the last item reaches into the next page.
    pub crosses: bool,
    /// Bytes on which the translation depends.
    pub ranges: [Range; 3],
}

/// Decodes the block at an offset of the page, with the decoder's options for the vendor's CPUs: an operand-size prefix
/// of a near branch means something to AMD's only. If there is more than the page, it decodes only the instruction that
/// reaches there.
pub(super) fn plan(
    into: &mut Plan,
    bytes: &[u8],
    (start, options): (u16, u32),
    mode: Mode,
    templates: &mut Templates,
) {
    into.items.clear();
    (into.controlled, into.step, into.crosses) = (false, false, false);
    let most = if bytes.len() > PAGE { 1 } else { INSTRUCTIONS_MAX };
    let page = bytes.get(..PAGE).unwrap_or_default();
    let bytes = bytes.get(usize::from(start)..).unwrap_or_default();
    let mut decoder = Decoder::with_ip(64, bytes, u64::from(start), options);
    while into.items.len() < most && decoder.can_decode() {
        let mut instruction = Instruction::default();
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            into.crosses = true;
            break;
        }
        let template = if instruction.is_invalid() { None } else { Some(templates.get(instruction.code())) };
        let at = usize::from((instruction.ip() as u16).wrapping_sub(start));
        let idle = bytes.get(at..at + instruction.len()).is_some_and(copy::has_idle_rex);
        let Some(template) = template.filter(|t| t.kind != Kind::Step && mode.allows(t) && !idle) else {
            into.step = true;
            break;
        };
        let (offset, next) = (instruction.ip() as u16, instruction.next_ip() as u16);
        into.items.push(Item {
            instruction,
            template,
            offset,
            next,
            live_before: 0,
            live_after: 0,
            saved: false,
        });
        if controls(template.kind) && !passed(&instruction) {
            into.controlled = true;
            break;
        }
    }
    // There is nothing to go on with after a jump.
    into.controlled |= into.items.last().is_some_and(|item| controls(item.template.kind)) && !into.step;
    let end = into.items.last().map_or(start, |item| item.next);
    into.ranges = [(start, end.saturating_add(15).min(PAGE as u16)), (0, 0), (0, 0)];
    liveness(into, page);
    stretches(into);
}

/// A block goes on after this conditional jump, which it leaves where it is taken: one that skips something. One that
/// closes a loop is the block's end.
pub(crate) fn passed(instruction: &Instruction) -> bool {
    instruction.is_jcc_short_or_near() && instruction.near_branch_target() as i64 > instruction.ip() as i64
}

/// The instruction ends a block, or leaves it.
fn controls(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Return
            | Kind::Jump
            | Kind::JumpIf
            | Kind::JumpCount
            | Kind::Call
            | Kind::JumpIndirect
            | Kind::CallIndirect
    )
}

fn liveness(plan: &mut Plan, page: &[u8]) {
    let Some(last) = plan.items.last() else { return };
    let next = i64::from(last.next);
    let target = last.instruction.near_branch_target() as i64;
    let mut live = flags::STATUS;
    let (one, two) = (&mut (0, 0), &mut (0, 0));
    if plan.controlled {
        live = match last.template.kind {
            Kind::Jump => ahead(page, target, one),
            Kind::JumpIf | Kind::JumpCount => ahead(page, target, one) | ahead(page, next, two),
            _ => live,
        };
    } else if !plan.step && !plan.crosses {
        live = ahead(page, next, one);
    }
    (plan.ranges[1], plan.ranges[2]) = (*one, *two);
    let last = plan.items.len() - 1;
    for (place, item) in plan.items.iter_mut().enumerate().rev() {
        if place != last && controls(item.template.kind) {
            // What reads the flags where it leads is not looked for.
            live = flags::STATUS;
        }
        item.live_after = live;
        live = flags::before(&item.instruction, live);
        item.live_before = live;
    }
}

/// Finds stretches of instructions that pass live flags on and access memory more often than saving the flags is worth.
fn stretches(plan: &mut Plan) {
    let passes = |item: &Item| item.live_before != 0 && passes(item);
    for stretch in plan.items.chunk_by_mut(|a, b| passes(a) && passes(b)) {
        let accesses = stretch.iter().filter(|item| accesses(item)).count();
        if accesses >= SAVED_ACCESSES_MIN && stretch.iter().all(passes) {
            stretch.iter_mut().for_each(|item| item.saved = true);
        }
    }
}

/// The instruction neither reads nor writes status flags, nor ends the block.
fn passes(item: &Item) -> bool {
    let quiet = matches!(
        item.template.kind,
        Kind::Copy
            | Kind::Lea
            | Kind::Nop
            | Kind::Absolute
            | Kind::PushRegister
            | Kind::PushImmediate
            | Kind::PushMemory
            | Kind::PopRegister
            | Kind::Leave
    );
    quiet && (item.instruction.rflags_read() | item.instruction.rflags_modified()) & flags::STATUS == 0
}

fn accesses(item: &Item) -> bool {
    let memory = (0..item.instruction.op_count()).any(|i| item.instruction.op_kind(i) == OpKind::Memory);
    memory && item.template.kind != Kind::Lea && item.template.kind != Kind::Nop
        || item.instruction.is_stack_instruction()
}

/// Status flags live at a page offset, as far as a short look tells; notes the bytes looked at.
fn ahead(page: &[u8], at: i64, range: &mut Range) -> u32 {
    let Some(bytes) = usize::try_from(at).ok().and_then(|at| page.get(at..)) else { return flags::STATUS };
    let mut decoder = Decoder::with_ip(64, bytes, at as u64, DecoderOptions::NONE);
    let (mut live, mut open) = (0, flags::STATUS);
    for _ in 0..AHEAD_MAX {
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        live |= flags::read(&instruction) & open;
        if instruction.flow_control() != iced_x86::FlowControl::Next {
            break;
        }
        open &= !flags::killed(&instruction);
        if open & !live == 0 {
            open = 0;
            break;
        }
    }
    *range = (at as u16, decoder.ip() as u16);
    live | open
}
