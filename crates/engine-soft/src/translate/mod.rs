//! The template tier: blocks of 64-bit guest code, copied with rewritten operands and run by the host CPU.
//!
//! * [`Translator::run`] runs blocks until an instruction is for the single-step tier or somebody wants the vCPU. It
//!   owns the code; all guest state is in [`Core`] whenever it is not running.
//! * Blocks are made for a guest-physical address and a [`block::Mode`], are position independent, and do not cross
//!   a page. Direct jumps within a page are patched to their target; all others go through the jump cache of
//!   [`linkage`], keyed by linear address and a salt that changes when a translation may have ended.
//! * Writes to bytes that blocks were made from kill exactly those blocks ([`store`]).
//!
//! One translator belongs to one vCPU and runs on its thread; there is no lock.

mod block;
mod build;
mod cache;
mod control;
mod copy;
mod emit;
mod flags;
mod generate;
pub mod hints;
pub mod linkage;
mod segment;
mod store;
mod system;
mod template;
mod thunk;
pub(crate) mod visit;
mod ways;

use crate::access::room_in_page;
use crate::cpu_core::{Core, attention};
use crate::mmu::{Access, Mmu, Privilege, Walk};
use crate::state::{CpuState, PAGE_MASK, SPACES, Shadow};
use block::{Mode, Plan};
use cache::CodeCache;
use cpu::{Error, HostCode, cr0, cr4, rflags};
use emit::Emitter;
use generate::{Descriptor, Generator, Origin};
use iced_x86::InstructionInfoFactory;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use store::{Note, NumberMap, Store, Write};
use template::Templates;
use ways::Ways;

pub(crate) use block::{INSTRUCTIONS_MAX, passed};
pub(crate) use template::must_align;
use thunk::{Thunks, reason};
use visit::Visit;

/// Why [`Translator::run`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The instruction at RIP is for the single-step tier.
    Step,
    /// A kick is waiting, or the blocks asked for have been run.
    Kicked,
}

/// What a translator is made with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Size of the code cache in bytes; memory is taken as it fills.
    pub code_cache_bytes: usize,
    /// There is one vCPU only: LOCK prefixes may be left out.
    pub single_cpu: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { code_cache_bytes: 64 << 20, single_cpu: false }
    }
}

/// What happened so far, for people.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Statistics {
    pub blocks: u64,
    pub guest_bytes: u64,
    pub host_bytes: u64,
    pub cold_bytes: u64,
    pub cache_flushes: u64,
    pub blocks_killed: u64,
    pub slow_writes: u64,
    pub salts: u64,
    pub entries: u64,
    pub exits_step: u64,
    pub exits_link: u64,
    pub exits_bridge: u64,
    pub exits_lookup: u64,
    pub exits_kick: u64,
    pub tlb_misses: u64,
}

/// Room that must be free in the cache before a block is translated: more than the largest block.
const BLOCK_ROOM: usize = 64 << 10;

/// A log of hints that is full after this time has some that are no good.
const SOON: Duration = Duration::from_micros(hints::LOG_ENTRIES as u64 / 12);
/// The fillings that are looked at then.
const RECENT: usize = 1024;
/// Hints filled so often among those are no good.
const UNSTEADY: u32 = 16;

/// The template tier of one vCPU.
pub struct Translator {
    /// Before the cache, so that it ends first.
    _faults: crate::signal::Registration,
    cache: CodeCache,
    thunks: Thunks,
    templates: Templates,
    info: InstructionInfoFactory,
    generator: Generator,
    plan: Plan,
    /// The page that is being translated, and the start of the next for an instruction that reaches there.
    bytes: Box<[u8; 4096 + block::INSTRUCTION_BYTES]>,
    store: Store,
    /// The MMU's generations for which bridges lead somewhere, of the supervisor and by the user's address space.
    generations: [[u64; 2]; 1 + SPACES],
    /// Where code runs, since then.
    ways: Ways,
    /// What the salts were made for, by privilege class: generation and mode.
    salted: [Option<([u64; 2], u8)>; 2],
    /// The jump cache knows supervisor code that a load of CR3 may unmap, of this MMU generation.
    local: Option<u64>,
    /// How often that has ended.
    locals: u64,
    /// The jump cache's salts, by privilege class.
    salts: [u64; 2],
    /// Hints that are no good, counted from the first of their blocks, by the blocks' addresses and modes.
    unsteady: HashMap<(u64, u8), Vec<u32>>,
    /// When hints were last found to be no good.
    settled: Instant,
    /// What the guest cannot guess.
    secret: u64,
    identity: u64,
    /// Leave after every block.
    single: bool,
    /// Somebody wants to know when the page is left that runs now.
    pub(crate) visit: Option<Visit>,
    single_cpu: bool,
    statistics: Statistics,
}

impl Translator {
    /// A translator with an empty cache.
    pub fn new(config: &Config) -> Result<Self, Error> {
        static IDENTITY: AtomicU64 = AtomicU64::new(1);
        let mut cache = CodeCache::new(config.code_cache_bytes.clamp(4 * BLOCK_ROOM, 1 << 30))?;
        let avx = is_x86_feature_detected!("avx");
        let bmi2 = is_x86_feature_detected!("bmi2");
        let thunks = Thunks::emit(&mut cache, avx);
        let _faults = crate::signal::register(cache.range(), thunk::recover)?;
        Ok(Self {
            _faults,
            cache,
            thunks,
            templates: Templates::new(avx),
            info: InstructionInfoFactory::new(),
            generator: Generator::new(thunks, bmi2, config.single_cpu),
            plan: Plan::default(),
            bytes: Box::new([0; 4096 + block::INSTRUCTION_BYTES]),
            store: Store::default(),
            generations: [[u64::MAX; 2]; 1 + SPACES],
            ways: Ways::default(),
            salted: [None; 2],
            local: None,
            locals: 0,
            salts: [1; 2],
            unsteady: HashMap::new(),
            settled: Instant::now(),
            secret: crate::host::random(),
            identity: IDENTITY.fetch_add(1, Ordering::Relaxed),
            single: false,
            visit: None,
            single_cpu: config.single_cpu,
            statistics: Statistics::default(),
        })
    }

    /// Counters.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Bytes of the code cache in use.
    pub fn cache_used(&self) -> usize {
        self.cache.used()
    }

    /// Runs translated code until something else has to happen.
    pub fn run(&mut self, core: &mut Core) -> Outcome {
        self.drain_writes(core);
        let Some(mode) = mode(&core.state) else { return Outcome::Step };
        self.attach(core, mode);
        import_flags(&mut core.state);
        let outcome = self.blocks(core, mode);
        export_flags(&mut core.state);
        outcome
    }

    /// Runs at most one block, or fewer instructions if it is left early; for comparing the tiers.
    pub fn run_block(&mut self, core: &mut Core) -> Outcome {
        let chained = self.single;
        if !chained {
            self.flush(core);
        }
        self.single = true;
        self.run(core)
    }

    /// Where which blocks are.
    pub(crate) fn host_code(&self) -> Vec<HostCode> {
        let ends = self.store.blocks.iter().skip(1).map(store::Block::entry).chain([self.cache.next()]);
        let code = |(block, end): (&store::Block, usize)| HostCode {
            address: self.cache.address(block.entry()),
            len: u32::try_from(end.saturating_sub(block.entry())).unwrap_or(u32::MAX),
            guest: block.address(),
            user: Mode::is_user(block.mode),
        };
        self.store.blocks.iter().zip(ends).map(code).collect()
    }

    /// Forgets all translations.
    pub fn flush(&mut self, core: &mut Core) {
        if self.single_cpu {
            for page in self.store.pages() {
                core.mmu.news.written(page);
                core.mmu.memory.unmark_code(page);
            }
        }
        self.store.clear();
        self.unsteady.clear();
        self.cache.flush();
        core.state.hints.reset();
        self.generations = [[u64::MAX; 2]; 1 + SPACES];
        self.statistics.cache_flushes += 1;
        self.salted = [None; 2];
        self.forget_jumps(&mut core.state);
    }

    fn forget_jumps(&self, state: &mut CpuState) {
        let lookup = self.cache.address(self.thunks.exit(reason::LOOKUP));
        state.linkage.jump_hosts.fill(lookup);
    }

    /// Hears of what this vCPU has written to pages with code.
    pub(crate) fn drain_writes(&mut self, core: &mut Core) {
        if core.code_writes.is_empty() {
            return;
        }
        core.state.attention &= !attention::CODE_WRITES;
        for (address, len) in std::mem::take(&mut core.code_writes) {
            self.written(core, address, len);
        }
    }

    /// Bytes of guest RAM have changed or are about to.
    pub fn written(&mut self, core: &mut Core, address: u64, len: u64) {
        let end = address.saturating_add(len);
        let mut at = address;
        while at < end {
            let part = (4096 - (at & 0xfff)).min(end - at);
            match self.store.classify(at, part) {
                // Nobody else has translated it.
                Write::Free if self.single_cpu => core.mmu.memory.unmark_code(at),
                Write::Free => {}
                Write::Beside => self.beside(core, at),
                Write::Code => self.kill(core, at, part),
            }
            at += part;
        }
    }

    fn kill(&mut self, core: &mut Core, address: u64, len: u64) {
        let linkage = &mut core.state.linkage;
        let (killed, empty) = self.store.invalidate(&mut self.cache, &self.thunks, linkage, (address, len));
        self.statistics.blocks_killed += killed as u64;
        // The mark is the VM's: with more vCPUs another's translator may still need it.
        if empty && self.single_cpu {
            // Whoever has looked through the page hears of writes no longer.
            core.mmu.news.written(address);
            core.mmu.memory.unmark_code(address);
        }
    }

    /// A write to a page with code, but not to code.
    fn beside(&mut self, core: &mut Core, address: u64) {
        self.statistics.slow_writes += 1;
        if self.store.slow_write(address) {
            self.kill(core, address & !0xfff, 4096);
        }
    }

    /// Makes the jump cache of `state` safe to use.
    fn attach(&mut self, core: &mut Core, mode: Mode) {
        let class = usize::from(mode.user);
        let waiting = core.pending.interrupt.is_some() || core.pending.nmi || core.pending.window;
        let link = &mut core.state.linkage;
        link.waiting = u32::from(waiting);
        link.popf_stop = (rflags::TF | if waiting { rflags::IF } else { 0 }) as u32;
        if self.templates.set_cpuid(&core.cpuid) {
            self.flush(core);
        }
        let state = &mut core.state;
        if state.linkage.owner != self.identity {
            state.linkage.owner = self.identity;
            state.linkage.division_exit = self.cache.address(self.thunks.exit(reason::STEP));
            self.forget_jumps(state);
            self.generations = [[u64::MAX; 2]; 1 + SPACES];
        }
        let generation = core.mmu.generation();
        if self.local.is_some_and(|local| local != generation) {
            self.local = None;
            self.locals += 1;
        }
        let array = 1 + state.space;
        for (array, generation) in [(0, [core.mmu.global_generation, self.locals]), (array, [generation, 0])]
        {
            if let Some(known) = self.generations.get_mut(array)
                && *known != generation
            {
                *known = generation;
                self.ways.forget(array);
                self.store.close(array, &self.cache, &mut state.linkage);
            }
        }
        if let Some(&generation) = self.generations.get(if mode.user { array } else { 0 }) {
            self.salt(state, class, (generation, mode.bits()));
        }
    }

    /// Lets the jump cache know only what was remembered of a privilege class under this generation and mode.
    fn salt(&mut self, state: &mut CpuState, class: usize, wanted: ([u64; 2], u8)) {
        let Some(salted) = self.salted.get_mut(class) else { return };
        if *salted == Some(wanted) {
            return;
        }
        *salted = Some(wanted);
        self.statistics.salts += 1;
        let ([one, two], mode) = wanted;
        let parts = [self.statistics.cache_flushes, class as u64, one, two, u64::from(mode)];
        // Zero is what a kick leaves.
        let salt = parts.into_iter().fold(self.secret, |salt, part| mix(salt ^ part)) | 1;
        if let (Some(known), Some(gate)) = (self.salts.get_mut(class), state.doorbell.gates.get(class)) {
            *known = salt;
            gate.store(salt, Ordering::SeqCst);
        }
    }

    /// Lets indirect jumps find their targets again after a kick, unless a visit looks where they lead; `false` if there is a
    /// kick now.
    fn open(&mut self, state: &CpuState, class: usize) -> bool {
        let (Some(&salt), Some(gate)) = (self.salts.get(class), state.doorbell.gates.get(class)) else {
            return false;
        };
        let salt = if self.visit.as_mut().is_some_and(Visit::looks) { 0 } else { salt };
        if gate.load(Ordering::Relaxed) != salt {
            gate.store(salt, Ordering::SeqCst);
        }
        state.doorbell.kick.load(Ordering::SeqCst) == 0
    }

    fn blocks(&mut self, core: &mut Core, mode: Mode) -> Outcome {
        let class = usize::from(mode.user);
        let mut first = true;
        // The block that a link or a bridge was just made to.
        let mut next = None;
        loop {
            if self.visit.as_ref().is_some_and(|visit| visit.over(&core.state)) {
                return Outcome::Kicked;
            }
            if !self.open(&core.state, class) {
                return Outcome::Kicked;
            }
            // Only at first: what translated code did not find must be looked up properly.
            if !std::mem::take(&mut first) || !self.recall(&mut core.state, class) {
                let Some(number) = next.take().or_else(|| self.find(core, mode)) else {
                    return Outcome::Step;
                };
                let Some(found) = self.store.get(number).filter(|b| !b.step()) else { return Outcome::Step };
                core.state.linkage.page_base = core.state.rip & !0xfff;
                core.state.linkage.enter = self.cache.address(found.direct());
            }
            let outcome = loop {
                self.statistics.entries += 1;
                self.thunks.run(&self.cache, &mut core.state);
                let link = core.state.linkage.left();
                match link.reason {
                    reason::MISS => match self.miss(core) {
                        Some(()) => {}
                        None => break Some(Outcome::Step),
                    },
                    reason::LINK => {
                        self.statistics.exits_link += 1;
                        let note = link.payload[0] as u32;
                        let target = Note::read(&self.cache, note).target;
                        core.state.rip = link.page_base.wrapping_add(u64::from(target));
                        if !self.single {
                            next = self.link(core, mode, note);
                        }
                        break None;
                    }
                    reason::BRIDGE => {
                        self.statistics.exits_bridge += 1;
                        let note = link.payload[0] as u32;
                        let target = Note::read(&self.cache, note).target;
                        core.state.rip = link.page_base.wrapping_add(u64::from(target));
                        if !self.single {
                            next = self.span(core, mode, note);
                        }
                        break None;
                    }
                    reason::LOOKUP => {
                        self.statistics.exits_lookup += 1;
                        core.state.rip = link.payload[1];
                        if !Mmu::canonical(core.state.rip)
                            && let Some((offset, stack)) = Origin(link.payload[0]).undo()
                        {
                            // The jump itself faults, and has done nothing.
                            core.state.rip = link.page_base.wrapping_add(offset);
                            let old = core.state.linkage.slots[control::OVERWRITTEN];
                            let slot = core.state.gpr[4];
                            core.state.gpr[4] = slot.wrapping_add(stack);
                            if stack == 8 {
                                // The call's return address was just stored there, so this write succeeds too.
                                let privilege = core.privilege();
                                let _ = core.write_uint(slot, old, 8, privilege);
                            }
                            break Some(Outcome::Step);
                        }
                        break None;
                    }
                    why => {
                        core.state.rip = link.page_base.wrapping_add(u64::from(link.payload[0] as u32));
                        if why == reason::KICK {
                            self.statistics.exits_kick += 1;
                            break Some(Outcome::Kicked);
                        }
                        self.statistics.exits_step += 1;
                        break Some(Outcome::Step);
                    }
                }
            };
            match outcome {
                Some(outcome) => return outcome,
                None if self.single => return Outcome::Kicked,
                None => {}
            }
        }
    }

    /// Connects a link to the block at RIP, making it if need be, and answers that.
    fn link(&mut self, core: &mut Core, mode: Mode, note: u32) -> Option<u32> {
        let flushes = self.statistics.cache_flushes;
        let to = self.find(core, mode)?;
        if flushes == self.statistics.cache_flushes {
            self.store.connect(&mut self.cache, note, to);
        }
        Some(to)
    }

    /// Lets a bridge lead to the block at RIP, made if need be, and answers that.
    fn span(&mut self, core: &mut Core, mode: Mode, note: u32) -> Option<u32> {
        let class = usize::from(mode.user);
        if self.store.bridges(class) == linkage::BRIDGES {
            self.flush(core);
            return None;
        }
        let flushes = self.statistics.cache_flushes;
        let to = self.find(core, mode)?;
        let array = if mode.user { 1 + core.state.space } else { 0 };
        if flushes == self.statistics.cache_flushes && !self.ways.several(array) {
            let linkage = &mut core.state.linkage;
            let number = self.store.bridge(class, note, &mut self.cache, linkage, |number| {
                let mut out = Emitter::default();
                generate::bridge(&mut out, class, number);
                out.bytes
            })?;
            self.store.span(array, number, to, &self.cache, linkage);
        }
        Some(to)
    }

    /// The block at RIP; `None` if the single-step tier has to look at it.
    fn find(&mut self, core: &mut Core, mode: Mode) -> Option<u32> {
        let rip = core.state.rip;
        if !Mmu::canonical(rip) {
            return None;
        }
        let walk = core.mmu.walk(&core.state, rip, Access::Fetch, privilege(mode)).ok()?;
        let mut number = match self.store.find(walk.physical, mode.bits()) {
            Some(number) => number,
            None => self.translate(core, walk.physical, None, mode)?,
        };
        self.fetched(core, rip, &walk, mode);
        let array = if mode.user { 1 + core.state.space } else { 0 };
        if self.ways.seen(array, walk.physical & PAGE_MASK, rip & PAGE_MASK) {
            self.store.close(array, &self.cache, &mut core.state.linkage);
        }
        if self.store.get(number).is_some_and(|block| block.crosses()) {
            let next = (rip | !PAGE_MASK).wrapping_add(1);
            if !Mmu::canonical(next) {
                return None;
            }
            let second = core.mmu.walk(&core.state, next, Access::Fetch, privilege(mode)).ok()?;
            self.fetched(core, next, &second, mode);
            number = match self.store.find_crossing(walk.physical, second.physical, mode.bits()) {
                Some(number) => number,
                None => self.translate(core, walk.physical, Some(second.physical), mode)?,
            };
        }
        if !self.single {
            self.remember(&mut core.state, rip, number, usize::from(mode.user));
        }
        Some(number)
    }

    /// Code at an address is going to be remembered.
    fn fetched(&mut self, core: &mut Core, address: u64, walk: &Walk, mode: Mode) {
        if self.single {
            return;
        }
        if !mode.user && !walk.global && core.state.cr4_has(cr4::PGE) {
            self.local = Some(core.mmu.generation());
        }
        core.mmu.note_fetch(address, walk.page_shift, mode.user);
    }

    /// Looks RIP up in the jump cache, as translated code does; if it is there, prepares to enter the block.
    fn recall(&self, state: &mut CpuState, class: usize) -> bool {
        let Some((at, key)) = self.key(state.rip, class) else { return false };
        let link = &mut state.linkage;
        match (link.jump_keys.get(at), link.jump_hosts.get(at)) {
            (Some(negative), Some(&host)) if negative.wrapping_add(key) == 0 && !self.single => {
                (link.enter, link.payload[1]) = (host, state.rip);
                true
            }
            _ => false,
        }
    }

    /// Index and key of an address in the jump cache.
    fn key(&self, rip: u64, class: usize) -> Option<(usize, u64)> {
        let key = rip.wrapping_add(*self.salts.get(class)?);
        Some(((key >> 1) as usize & (linkage::JUMP_ENTRIES - 1), key))
    }

    /// Enters a block into the jump cache.
    fn remember(&mut self, state: &mut CpuState, rip: u64, number: u32, class: usize) {
        let Some(block) = self.store.get(number).filter(|block| !block.step()) else { return };
        let Some((at, key)) = self.key(rip, class) else { return };
        let link = &mut state.linkage;
        if let (Some(negative), Some(host)) = (link.jump_keys.get_mut(at), link.jump_hosts.get_mut(at)) {
            *negative = key.wrapping_neg();
            *host = self.cache.address(block.entry());
        }
    }

    /// A TLB miss: fills the TLB and arranges to go on, or answers `None` if the single-step tier has to do the
    /// instruction, with RIP at it.
    fn miss(&mut self, core: &mut Core) -> Option<()> {
        self.statistics.tlb_misses += 1;
        let link = &mut core.state.linkage;
        let descriptor = Descriptor(link.payload[0]);
        let (address, go_on) = (link.payload[1], link.payload[2]);
        let class = usize::from(core.state.cpl() == 3);
        if core.state.hints.full(class) {
            self.settle(core, class);
            core.state.hints.end(class);
        }
        let host = self.resolve(core, descriptor, address);
        let state = &mut core.state;
        let link = &mut state.linkage;
        match host {
            Some(host) => {
                link.payload[1] = if descriptor.relative() { host.wrapping_sub(address) } else { host };
                link.enter = go_on;
                Some(())
            }
            None => {
                if descriptor.flags_saved() {
                    link.flags = link.flags_saved;
                }
                state.rip = link.page_base.wrapping_add(descriptor.offset());
                None
            }
        }
    }

    /// The log of hints is full. If that was soon, finds those that are filled again and again, and has their blocks
    /// made without them.
    fn settle(&mut self, core: &mut Core, class: usize) {
        let now = Instant::now();
        let soon = now.duration_since(std::mem::replace(&mut self.settled, now)) < SOON;
        if !soon {
            return;
        }
        let mut fillings: NumberMap<u32> = NumberMap::default();
        for hint in core.state.hints.last(class, RECENT) {
            *fillings.entry(u64::from(hint)).or_default() += 1;
        }
        for (hint, count) in fillings {
            if count < UNSTEADY {
                continue;
            }
            let Some(block) = self.store.owner(hint as u32) else { continue };
            let address = block.address();
            let number = (hint as u32).wrapping_sub(block.first_hint());
            let known = self.unsteady.entry((address, block.mode)).or_default();
            if !known.contains(&number) {
                known.push(number);
                self.kill(core, address, 1);
            }
        }
    }

    fn resolve(&mut self, core: &mut Core, access: Descriptor, address: u64) -> Option<u64> {
        if address & access.align_mask() != 0 || !Mmu::canonical(address) {
            return None;
        }
        if (address & 0xfff) + access.size() > 4096 {
            return if access.write() { None } else { self.gather(core, access, address) };
        }
        let kind = if access.write() { Access::Write } else { Access::Read };
        let privilege = Privilege::of(&core.state);
        let target = core.mmu.resolve(&mut core.state, address, kind, privilege).ok()?;
        let host = target.host? as u64;
        if access.write() && target.code {
            if access.more() {
                return None;
            }
            match self.store.classify(target.physical, access.size()) {
                Write::Code => return None,
                // Flagged by another vCPU's translator: it has to hear of the write.
                Write::Free => return None,
                // Others may have code of these very bytes, and have to hear of it when they are written.
                Write::Beside if core.peers.is_some() => return None,
                Write::Beside => {
                    core.mmu.news.written(target.physical);
                    self.statistics.slow_writes += 1;
                    if self.store.slow_write(target.physical) {
                        // The single-step tier writes and tells us, and then the page is taken for data.
                        return None;
                    }
                }
            }
        }
        Some(host)
    }

    /// A read that leaves its page: puts its bytes together and answers where they are.
    fn gather(&mut self, core: &mut Core, access: Descriptor, address: u64) -> Option<u64> {
        let (user, room) = (core.state.cpl() == 3, room_in_page(address));
        let next = address.wrapping_add(room as u64);
        let rest = (access.size() as usize).checked_sub(room)?;
        let known = |at, len: usize| Mmu::lookup(&core.state, at, len as u64, false, user);
        let (head, tail) = match (known(address, room), known(next, rest)) {
            (Some(head), Some(tail)) => (head, tail),
            _ => {
                let privilege = Privilege::of(&core.state);
                let (first, second) =
                    core.targets(address, access.size() as usize, Access::Read, privilege).ok()?;
                (first.host?, second?.host?)
            }
        };
        let gathered = core.state.linkage.gathered.get_mut(..access.size() as usize)?;
        let (front, back) = gathered.split_at_mut_checked(room)?;
        crate::host::read(head, front);
        crate::host::read(tail, back);
        Some(gathered.as_ptr() as u64)
    }
}

fn privilege(mode: Mode) -> Privilege {
    if mode.user { Privilege::User } else { Privilege::Supervisor }
}

/// SplitMix64's output function: all bits of the result depend on all of the value's.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The mode in which translated code may run now; `None` if it may not.
fn mode(state: &CpuState) -> Option<Mode> {
    let cpl = state.cpl();
    let user = cpl == 3;
    let blocked = cpl == 1
        || cpl == 2
        // RF ends with the next instruction, which translated code does not know.
        || state.rflags & (rflags::TF | rflags::RF) != 0
        || state.shadow != Shadow::None
        || state.dr7 & 0xff != 0
        || user && state.cr0 & cr0::AM != 0 && state.rflags & rflags::AC != 0;
    if blocked || !state.code64() || !state.paging() {
        return None;
    }
    let x87 = state.cr0 & (cr0::EM | cr0::TS) == 0 && thunk::x87_exceptions_masked();
    let sse = x87 && state.cr4_has(cr4::OSFXSR) && state.mxcsr & 0x1f80 == 0x1f80;
    let avx = sse && state.cr4_has(cr4::OSXSAVE) && state.xcr0 & 6 == 6;
    let clock = (!user || !state.cr4_has(cr4::TSD)) && state.tsc_divisor == 1;
    let bases = state.cr4_has(cr4::FSGSBASE);
    Some(Mode { user, x87, sse, avx, clock, bases })
}

/// Whether nothing that a user program may do now is for the single-step tier to refuse.
pub(crate) fn runs_everything(state: &CpuState) -> bool {
    mode(state).is_some_and(|mode| mode.avx && mode.clock && mode.bases)
}

/// AH after LAHF: SF, ZF, AF, PF, CF.
const LAHF: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;

fn import_flags(state: &mut CpuState) {
    let overflow = u32::from(state.rflags & rflags::OF != 0);
    state.linkage.flags = ((state.rflags & LAHF) as u32) << 8 | overflow;
}

fn export_flags(state: &mut CpuState) {
    let flags = u64::from(state.linkage.flags);
    let overflow = if flags & 1 != 0 { rflags::OF } else { 0 };
    state.rflags = state.rflags & !rflags::STATUS | flags >> 8 & LAHF | overflow;
}

#[cfg(test)]
mod test;

#[cfg(test)]
mod native_test;

#[cfg(test)]
mod remembered_test;
