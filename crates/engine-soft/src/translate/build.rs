//! Making one block: from guest bytes to code in the cache, and what others know of it.

use super::block::{self, INSTRUCTIONS_MAX, Mode};
use super::generate;
use super::store::NewBlock;
use super::thunk::reason;
use super::{BLOCK_ROOM, Translator};
use crate::cpu_core::Core;

/// Hints that must be free: more than a block has.
const HINT_ROOM: usize = 4 * INSTRUCTIONS_MAX;

impl Translator {
    /// Translates the block at a guest-physical address, or the instruction there that reaches into a second page.
    pub(super) fn translate(
        &mut self,
        core: &mut Core,
        physical: u64,
        second: Option<u64>,
        mode: Mode,
    ) -> Option<u32> {
        if !self.cache.reserve(BLOCK_ROOM) || !core.state.hints.room(HINT_ROOM) {
            self.flush(core);
            self.cache.reserve(BLOCK_ROOM);
        }
        let (page, start) = (physical & !0xfff, (physical & 0xfff) as u16);
        // Before the bytes are read: no write may pass unseen from here on.
        core.protect_code(page);
        let (own, more) = self.bytes.split_at_mut_checked(4096)?;
        core.mmu.memory.read(page, own).ok()?;
        if let Some(second) = second {
            core.protect_code(second);
            core.mmu.memory.read(second, more).ok()?;
        }
        let options = Core::decoder_options(core.amd);
        let bytes = if second.is_some() { self.bytes.as_slice() } else { own };
        block::plan(&mut self.plan, bytes, (start, options), mode, &mut self.templates);
        let first_hint = core.state.hints.next();
        let bases = [self.cache.next(), self.cache.next_cold()];
        self.generator.start(bases, first_hint, usize::from(mode.user));
        self.generator.unsteady.clear();
        if let Some(unsteady) = self.unsteady.get(&(physical, mode.bits())) {
            self.generator.unsteady.extend(unsteady);
        }
        let entry = self.cache.next();
        self.generator.entry(start);
        let direct = entry + self.generator.out.pos();
        if second.is_some() && self.plan.crosses {
            // Bytes that no CPU takes for an instruction.
            (self.plan.crosses, self.plan.step) = (false, true);
        }
        let step = self.generate(start) == 0;
        let (code, cold) = (&self.generator.out.bytes, &self.generator.seldom.bytes);
        if !self.cache.append(code, cold) {
            return None;
        }
        let hints = self.generator.next_hint.wrapping_sub(first_hint);
        core.state.hints.take(hints);
        self.statistics.blocks += 1;
        self.statistics.host_bytes += code.len() as u64;
        self.statistics.cold_bytes += cold.len() as u64;
        let end = self.plan.items.last().map_or(start, |item| item.next);
        self.statistics.guest_bytes += u64::from(end.wrapping_sub(start));
        let number = self.store.add(NewBlock {
            address: physical,
            mode: mode.bits(),
            entries: [entry, direct],
            step,
            crosses: self.plan.crosses && self.plan.items.is_empty(),
            second: second.map(|second| (second, block::INSTRUCTION_BYTES as u16)),
            hints: (first_hint, hints),
            ranges: self.plan.ranges,
        })?;
        for link in &self.generator.links {
            if !self.single
                && let Some(to) = self.store.find(page | u64::from(link.target), mode.bits())
            {
                self.store.connect(&mut self.cache, link.note, to);
            }
        }
        Some(number)
    }

    /// Generates code for the plan; answers how many instructions it covers.
    fn generate(&mut self, start: u16) -> usize {
        let (mut done, mut end) = (0, start);
        let mut step = self.plan.step;
        let count = self.plan.items.len();
        let mut saved = false;
        for (place, item) in self.plan.items.iter().enumerate() {
            match (saved, item.saved) {
                (false, true) => self.generator.save_flags(),
                (true, false) => self.generator.restore_flags(),
                _ => {}
            }
            saved = item.saved;
            let site = generate::Site {
                offset: item.offset,
                next: item.next,
                live: item.live_before != 0 && !saved,
                saved,
                live_after: item.live_after != 0,
                followed: place + 1 < count || self.plan.step,
                last: place + 1 == count && self.plan.controlled,
            };
            let bytes = self.bytes.get(usize::from(item.offset)..usize::from(item.next)).unwrap_or_default();
            let mark = self.generator.mark();
            if self
                .generator
                .instruction(&item.instruction, &item.template, bytes, &mut self.info, site)
                .is_none()
            {
                self.generator.rewind(mark);
                step = true;
                break;
            }
            self.generator.executed(&item.instruction, &mut self.info);
            done += 1;
            end = item.next;
        }
        if saved {
            self.generator.restore_flags();
        }
        if step {
            self.generator.exit(reason::STEP, u32::from(end));
        } else if !self.plan.controlled {
            self.generator.jump_page(i64::from(end), None);
        }
        self.generator.finish();
        done
    }
}
