//! User code of the guest on the host's own CPU, in a process of its own.
//!
//! Guest and host speak the same instruction set, and a user program asks for nothing but its memory, until it calls the
//! kernel. So code at CPL 3 that computes for a while runs in a process whose memory is the guest's ([`mirror`]), and each
//! stop of that process (system call, fault, signal) brings it back to the other tiers with all its registers. They make
//! the instruction at RIP, whatever it is; nothing is decided here but what is mapped.
//!
//! * [`process`] makes and drives such a process: what can be done in it, and what not.
//! * [`mirror`] is what is mapped there; the MMU's [`news`] say what must be forgotten.
//! * [`scan`] finds instructions that may not run natively, since the host's CPU would answer for itself.
//! * [`rewritten`] are the pages of programs that write code and run it.
//! * [`policy`] says which of the guest's processes are worth it.
//!
//! Where the host forbids such processes, all user code runs in the other tiers, as if this were not here.

mod mirror;
pub(crate) mod news;
mod policy;
mod process;
mod rewritten;
mod scan;

use crate::cpu_core::{Core, attention};
use crate::exception::Exception;
use crate::mmu::{Access, Privilege, Seen};
use crate::state::{CpuState, SPACES, seg};
use crate::step::model::host_tsc;
use crate::step::native::arena;
use cpu::{Error, rflags};
use memory::PageFlags;
use mirror::{EXECUTE, Mirror, READ, Rights, WRITE, Wanted};
use policy::Policy;
use process::{Process, Stop};
use scan::Sites;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::Ordering;

/// Pages around one that is brought in that come along, if the guest has used them: a power of two.
const AROUND: u64 = 32;
const PAGE: u64 = 4096;
/// Pages of a large page.
const LARGE: u64 = 512;

/// Flags that user code can change.
const USER_FLAGS: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;

/// `si_code` of a signal for an exception that is not of the host's page tables.
const SI_KERNEL: i32 = 0x80;

/// `si_code` of SIGTRAP for one of our breakpoints.
const TRAP_HWBKPT: i32 = 4;
/// And of the trap that TF asks for, after an instruction.
const TRAP_TRACE: i32 = 2;

/// Parts of an XSAVE image in standard form (Intel SDM 1, 13.4).
const XSTATE_BV: usize = 512;
const X87_SSE_AVX: u64 = 7;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The single-step tier does the instruction at RIP.
    Step,
    /// The translator goes on from RIP.
    Translate,
    /// Somebody wants the vCPU.
    Kicked,
    /// The instruction before RIP has been executed with TF set.
    SingleStepped,
}

/// How many times what happened, for people.
#[derive(Debug, Default, Clone)]
#[allow(missing_docs)]
pub(crate) struct Statistics {
    pub entries: u64,
    pub stops: u64,
    pub pages: u64,
    pub steps: u64,
}

/// The processes of one vCPU.
pub(crate) struct Direct {
    mirrors: [Option<Mirror>; SPACES],
    /// What in pages with code is not for the host's CPU, by guest-physical address, until they are written to.
    known: HashMap<u64, Known>,
    /// An address space and a page of it that the guest has to do something about.
    awaited: Option<(usize, u64)>,
    /// Large pages of guest-physical memory that the host was asked to hold in one piece.
    large: HashSet<u64>,
    /// Those that cannot be used any more.
    retired: Vec<Mirror>,
    policy: Policy,
    /// The thread that made the processes, and only it can drive them.
    thread: libc::pid_t,
    /// Why there can be none.
    off: Option<String>,
    /// Where the upper halves of YMM registers are in an XSAVE image.
    ymm_high: usize,
    seconds: f64,
    pub statistics: Statistics,
}

impl Direct {
    /// None of the processes is made before it is wanted. `hz` is the frequency of the host's TSC.
    pub(crate) fn new(hz: u64) -> Self {
        let off =
            if is_x86_feature_detected!("avx") { None } else { Some("the host's CPU has no AVX".into()) };
        Self {
            mirrors: Default::default(),
            known: HashMap::new(),
            awaited: None,
            large: HashSet::new(),
            retired: vec![],
            policy: Policy::default(),
            thread: 0,
            off,
            ymm_high: cpu::cpuid::host(0xd, 2).ebx as usize,
            seconds: 1.0 / hz as f64,
            statistics: Statistics::default(),
        }
    }

    /// Why user code does not run directly on this host, if so.
    pub(crate) fn off(&self) -> Option<&str> {
        self.off.as_deref()
    }

    fn now(&self) -> f64 {
        host_tsc() as f64 * self.seconds
    }

    /// An interrupt is about to be delivered: who is running?
    pub(crate) fn sample(&mut self, state: &CpuState) {
        if self.off.is_none() && state.long_mode() {
            self.policy.sample(tables(state), state.cpl() == 3, self.now());
        }
    }

    /// Whether the code at RIP is to run directly: that of a process that is worth it, in a state that the host's kernel can
    /// be asked for.
    pub(crate) fn wants(&mut self, state: &CpuState) -> bool {
        let segment = |index: usize| u64::from(state.segments[index].selector);
        state.cpl() == 3
            && self.off.is_none()
            && self.policy.active(tables(state))
            && (segment(seg::CS), segment(seg::SS)) == (process::USER_CS, process::USER_SS)
            && [seg::DS, seg::ES, seg::FS, seg::GS].into_iter().all(|index| segment(index) == 0)
            && [seg::FS, seg::GS].into_iter().all(|index| state.segments[index].base < process::TOP)
            && state.rip < process::TOP
            // The host's kernel would not obey CLI, nor show what it did.
            && state.rflags & (rflags::IOPL | rflags::IF) == rflags::IF
            && crate::translate::runs_everything(state)
    }

    /// Runs user code until something else has to be done.
    pub(crate) fn run(&mut self, core: &mut Core) -> Result<Next, Error> {
        let began = self.now();
        self.statistics.entries += 1;
        let space = core.state.space;
        self.settle_thread();
        match self.ready(core, space) {
            Ok(true) => {}
            Ok(false) => return Ok(Next::Translate),
            Err(error) => {
                self.off = Some(error.to_string());
                self.retire();
                core.mmu.news = news::News::default();
                return Ok(Next::Translate);
            }
        }
        let stops = self.statistics.stops;
        let (next, inside) = self.code(core, space).map_err(|error| Error::Host {
            what: "running the guest's user code in a process of its own",
            source: error,
        })?;
        if self.off.is_some() {
            self.retire();
            core.mmu.news = news::News::default();
        }
        let now = self.now();
        let stops = (self.statistics.stops - stops) as u32;
        self.statistics.steps += u64::from(next == Next::Step);
        let (mirror, seconds) = (self.mirrors.get_mut(space).and_then(Option::as_mut), self.seconds);
        // A process that cannot say has come to an end: the next run shows it.
        let cost = || mirror.and_then(|mirror| mirror.process.stop_cost().ok()).unwrap_or(0) as f64 * seconds;
        let times = (now - began, inside);
        self.policy.ran(tables(&core.state), times, (stops, next != Next::Kicked), now, cost);
        Ok(next)
    }

    /// Processes belong to the thread that made them.
    fn settle_thread(&mut self) {
        #[allow(unsafe_code)]
        // SAFETY: no arguments, cannot fail.
        let thread = unsafe { libc::gettid() };
        if self.thread != thread {
            self.thread = thread;
            self.retire();
        }
    }

    /// Lets go of all processes, but keeps them: somebody may be about to signal one.
    fn retire(&mut self) {
        self.known.clear();
        self.retired.extend(self.mirrors.iter_mut().filter_map(Option::take));
    }

    /// Whether there is a process for the address space whose own pages are not where the guest has some.
    fn ready(&mut self, core: &mut Core, space: usize) -> io::Result<bool> {
        let Some(place) = self.mirrors.get_mut(space) else { return Ok(false) };
        let has = |page| core.mmu.has_tables(&core.state, page);
        if let Some(mirror) = place.take_if(|mirror| mirror.process.ours().into_iter().any(has)) {
            if self.retired.len() >= RETIRED_MAX {
                // For programs that leave it room.
                *place = Some(mirror);
                return Ok(false);
            }
            self.retired.push(mirror);
        }
        if place.is_none() {
            let file = core.mmu.memory.file();
            let file = file.ok_or_else(|| io::Error::other("the guest's memory cannot be shared"))?;
            let ram: u64 = core.mmu.memory.regions().iter().map(|region| region.len).sum();
            *place = Some(Mirror::new(Process::new(file)?, (ram / PAGE) as usize));
        }
        if let Some(news) = core.mmu.news.spaces.get_mut(space) {
            news.mirrored = true;
        }
        Ok(true)
    }

    /// Has the mirrors forget what the MMU has. That all of an address space is forgotten means only that its page tables have to
    /// be looked at again; this is done when they are in force.
    fn hear(&mut self, core: &mut Core, current: usize) {
        let Core { mmu, state, .. } = core;
        let all = mmu.news.spaces.get_mut(current).is_some_and(|space| std::mem::take(&mut space.all));
        if let Some(mirror) = self.mirrors.get_mut(current).and_then(Option::as_mut)
            && all
        {
            mirror.check(tables(state), |linear| {
                let seen = mmu.look(state, linear)?;
                Some((seen, rights(&seen, mmu.memory.host_page(seen.physical)?.flags)))
            });
        }
        let news = &mut mmu.news;
        if std::mem::take(&mut news.lost) {
            self.known.clear();
            self.mirrors.iter_mut().flatten().for_each(Mirror::clear);
        }
        for (mirror, space) in self.mirrors.iter_mut().zip(&mut news.spaces) {
            let Some(mirror) = mirror else { continue };
            for page in space.pages.drain(..) {
                mirror.invalidate(page);
            }
            for &page in &news.protected {
                mirror.forget_physical(page, WRITE);
            }
            for &page in &news.written {
                if !mirror.rewritten.is_open(page) && mirror.forget_physical(page, EXECUTE) {
                    mirror.rewritten.turned(page);
                }
            }
        }
        for page in news.written.drain(..) {
            self.known.remove(&page);
        }
        news.protected.clear();
    }

    /// Runs code; also answers how long it was inside the process, in seconds.
    fn code(&mut self, core: &mut Core, space: usize) -> io::Result<(Next, f64)> {
        let mut registers = registers(&core.state);
        let id = self.mirrors.get(space).and_then(Option::as_ref).map(|mirror| mirror.id);
        if id.is_some_and(|id| (id ^ registers.eflags) & rflags::ID != 0) {
            // Before the process has any of the program's registers: it would give back its own.
            return Ok((Next::Translate, 0.0));
        }
        if let Some((of, page)) = self.awaited.take()
            && of == space
            && core.mmu.look(&core.state, page).is_some()
        {
            // The guest's kernel has dealt with the fault, and the access is about to be made again.
            self.hear(core, space);
            self.page_in(core, space, page, registers.rip);
            self.awaited = None;
        }
        let (mut loaded, mut vectors) = (false, false);
        let mut inside = 0u64;
        let next = loop {
            self.hear(core, space);
            let Some(mirror) = self.mirrors.get_mut(space).and_then(Option::as_mut) else {
                break Next::Translate;
            };
            mirror.process.follow();
            if !vectors {
                load_vectors(&mut core.state, mirror, self.ymm_high)?;
                vectors = true;
            }
            match mirror.settle() {
                Ok(false) if loaded => {}
                Ok(_) => {
                    mirror.process.set_registers(&registers)?;
                    loaded = true;
                }
                Err(error) => {
                    // The guest is where it was: the other tiers go on.
                    self.off = Some(error.to_string());
                    break Next::Translate;
                }
            }
            core.state.doorbell.process.store(mirror.process.pid(), Ordering::SeqCst);
            let stop = if core.state.doorbell.kick.load(Ordering::SeqCst) == 0 {
                let entered = host_tsc();
                let stop = mirror.process.run();
                inside += host_tsc() - entered;
                stop
            } else {
                Ok(Stop::Sent)
            };
            core.state.doorbell.process.store(0, Ordering::SeqCst);
            self.statistics.stops += 1;
            let stop = stop?;
            registers = mirror.process.registers()?;
            mirror.id = registers.eflags & rflags::ID;
            let strange = is_strange(&registers);
            match stop {
                Stop::Sent => break Next::Kicked,
                Stop::Call => {
                    // Both forms, and SYSENTER, have two bytes.
                    registers.rip = registers.rip.wrapping_sub(2);
                    registers.rax = registers.orig_rax;
                    break Next::Step;
                }
                Stop::Raised { signal: libc::SIGSEGV | libc::SIGBUS, code, address }
                    if code != SI_KERNEL && !strange =>
                {
                    match self.page_in(core, space, address, registers.rip) {
                        None => {}
                        Some(next) => break next,
                    }
                }
                Stop::Raised { signal: libc::SIGTRAP, code: TRAP_HWBKPT, .. } => break Next::Step,
                Stop::Raised { signal: libc::SIGTRAP, code: TRAP_TRACE, .. } => break Next::SingleStepped,
                // The vsyscall page, from which the host's kernel has returned already.
                Stop::Raised { signal: libc::SIGSYS, address, .. } => {
                    registers.rip = address;
                    registers.rsp = registers.rsp.wrapping_sub(8);
                    break Next::Step;
                }
                Stop::Raised { signal: libc::SIGTRAP, .. } => {
                    registers.rip = trapped(core, registers.rip);
                    break Next::Step;
                }
                Stop::Raised { .. } => break Next::Step,
            }
        };
        let now = self.now();
        if let Some(mirror) = self.mirrors.get_mut(space).and_then(Option::as_mut) {
            store_vectors(&mut core.state, mirror, self.ymm_high)?;
            for page in mirror.rewritten.due(now) {
                let places = mirror.places(page);
                let Some((&linear, others)) = places.split_first() else { continue };
                let sites = sites_now(core, page, starts(core, linear));
                let sites = mirror.runs(linear + PAGE).map_or(sites, |next| joined(core, sites, page, next));
                match sites.offsets() {
                    Some(offsets) => {
                        mirror.stop_at(linear, offsets);
                        if !offsets.is_empty() {
                            others.iter().for_each(|&other| mirror.forget(other));
                        }
                    }
                    None => {
                        mirror.rewritten.close(page);
                        mirror.forget_physical(page, EXECUTE);
                    }
                }
            }
        }
        store(core, &registers);
        Ok((next, inside as f64 * self.seconds))
    }

    /// Has the process stop at what is not for the host's CPU in a page that comes in to run, at a linear and a guest-physical
    /// address. Whether the page is open, or what has to be done instead of running it.
    fn watch(
        &mut self,
        core: &mut Core,
        space: usize,
        (page, physical): (u64, u64),
        rip: u64,
    ) -> Result<bool, Next> {
        let mirror = self.mirrors.get_mut(space).and_then(Option::as_mut).ok_or(Next::Translate)?;
        // What is written to and run at once is looked through whenever it comes in to run.
        let mut open = mirror.rewritten.is_open(physical);
        let mut sites = None;
        if open {
            sites =
                Some(sites_now(core, physical, starts(core, page))).filter(|sites| sites.offsets().is_some());
            if sites.is_none() {
                mirror.rewritten.close(physical);
                mirror.forget_physical(physical, EXECUTE);
                open = false;
            }
        }
        let sites = sites.unwrap_or_else(|| look_through(&mut self.known, core, page, physical));
        let sites = mirror.runs(page + PAGE).map_or(sites, |next| joined(core, sites, physical, next));
        let offsets = sites.offsets().ok_or(Next::Translate)?;
        // Its breakpoint would not be met: the CPU sets RF for an instruction that could not be fetched.
        let at_rip =
            |page: u64, offsets: &[u16]| offsets.iter().any(|&offset| page + u64::from(offset) == rip);
        if at_rip(page, offsets) {
            return Err(Next::Step);
        }
        let own = rip & !(PAGE - 1);
        let ran = mirror.rights(own) & EXECUTE != 0;
        // Instructions that begin in the page before can be seen whole from now on.
        let before = page.wrapping_sub(PAGE);
        if let Some(physical_before) = mirror.runs(before) {
            let alone = match mirror.rewritten.is_open(physical_before) {
                true => sites_now(core, physical_before, starts(core, before)),
                false => look_through(&mut self.known, core, before, physical_before),
            };
            let sites = joined(core, alone, physical_before, physical);
            match sites.offsets() {
                _ if sites == alone => {}
                Some(offsets) if at_rip(before, offsets) => return Err(Next::Step),
                Some(offsets) => mirror.stop_at(before, offsets),
                None => mirror.forget(before),
            }
        }
        mirror.stop_at(page, offsets);
        if open {
            mirror.process.stop_at_more();
        }
        // One instruction in two pages that cannot both be watched?
        if ran && mirror.rights(own) & EXECUTE == 0 { Err(Next::Step) } else { Ok(open) }
    }

    /// Brings in the page of an access that failed, and some of its neighbours. What has to be done instead, if the guest has to
    /// hear of it or somebody else has to make the access.
    fn page_in(&mut self, core: &mut Core, space: usize, address: u64, rip: u64) -> Option<Next> {
        let page = address & !(PAGE - 1);
        if !(process::LOWEST..process::TOP).contains(&page) {
            return Some(Next::Step);
        }
        let mirror = self.mirrors.get_mut(space)?.as_mut()?;
        let ours = mirror.process.ours();
        if ours.contains(&page) {
            return Some(Next::Step);
        }
        mirror.make_room(LARGE);
        let known = mirror.rights(page);
        // An instruction may begin at the end of the page before.
        let fetch = known & EXECUTE == 0 && address.wrapping_sub(rip) < 16;
        let access = match () {
            () if fetch => Access::Fetch,
            () if known & READ != 0 => Access::Write,
            () => Access::Read,
        };
        if known & WRITE != 0 && access == Access::Write {
            return Some(Next::Step);
        }
        let Ok(walk) = core.mmu.walk(&core.state, page, access, Privilege::User) else {
            self.awaited = Some((space, page));
            return Some(Next::Step);
        };
        let mut open = mirror.rewritten.is_open(walk.physical);
        if fetch {
            open = match self.watch(core, space, (page, walk.physical), rip) {
                Ok(open) => open,
                Err(next) => return Some(next),
            };
        }
        let mirror = self.mirrors.get_mut(space)?.as_mut()?;
        let pages = if walk.page_shift > 12 { LARGE } else { AROUND };
        if pages == LARGE && self.large.insert(walk.physical & !(LARGE * PAGE - 1)) {
            // Once for each: the host's TLB holds it as the guest means it.
            core.mmu.memory.enlarge(walk.physical & !(LARGE * PAGE - 1), LARGE * PAGE);
        }
        let first = page & !(pages * PAGE - 1);
        let mut wanted: Vec<Wanted> = Vec::with_capacity(pages as usize);
        for linear in (first..first + pages * PAGE).step_by(PAGE as usize) {
            let here = linear == page;
            let known = mirror.rights(linear);
            if !(process::LOWEST..process::TOP).contains(&linear)
                || ours.contains(&linear)
                || !here && known != 0 && access != Access::Fetch
            {
                continue;
            }
            let Some(seen) = core.mmu.look(&core.state, linear) else { continue };
            let physical = seen.physical;
            let host = match &core.peers {
                Some(peers) if seen.write => peers.to_write(physical, || core.mmu.memory.host_page(physical)),
                _ => core.mmu.memory.host_page(physical),
            };
            let (Some(offset), Some(host)) = (core.mmu.memory.file_offset(physical), host) else { continue };
            let allowed = rights(&seen, host.flags);
            let mut rights = READ;
            // To look through a page takes longer than to bring it in.
            let plain = |page: u64, next: u64| {
                self.known
                    .get(&page)
                    .is_some_and(|known| joined(core, known.sites, page, next) == known.sites)
            };
            let runs = fetch
                && (here || {
                    let before = wanted
                        .last()
                        .filter(|page| page.linear + PAGE == linear && page.rights & EXECUTE != 0);
                    let before =
                        before.map(|page| page.physical).or_else(|| mirror.runs(linear.wrapping_sub(PAGE)));
                    let next = linear + PAGE;
                    let next = if next == page { Some(walk.physical) } else { mirror.runs(next) };
                    self.known.get(&physical).is_some_and(|known| known.sites.none())
                        && before.is_none_or(|before| plain(before, physical))
                        && next.is_none_or(|next| plain(physical, next))
                });
            if runs {
                rights |= allowed & EXECUTE;
            }
            if allowed & WRITE != 0 && (rights & EXECUTE == 0 || here && open) {
                core.mmu.memory.host_page_for_write(physical);
                rights |= WRITE;
            }
            if rights & !known != 0 {
                wanted.push(Wanted { linear, physical, offset, rights, shift: seen.shift });
            }
        }
        if !wanted.iter().any(|wanted| wanted.linear == page) {
            // Not RAM, or a write to a page with code.
            if access == Access::Write {
                core.drop_code(walk.physical);
            }
            return Some(Next::Step);
        }
        self.statistics.pages += wanted.len() as u64;
        mirror.map(&wanted);
        None
    }
}

/// So many processes are given up for having their pages where a program has some: they are at random places, and more are no
/// accident.
const RETIRED_MAX: usize = 16;

/// Where the page tables are, which stands for the guest's process.
fn tables(state: &CpuState) -> u64 {
    state.cr3 & 0x000f_ffff_ffff_f000
}

/// What page tables and flags of the host's page allow.
fn rights(seen: &Seen, flags: PageFlags) -> Rights {
    let write = seen.write && !flags.contains(PageFlags::CODE);
    READ | if write { WRITE } else { 0 } | if seen.execute { EXECUTE } else { 0 }
}

/// Pages that are remembered.
const KNOWN_MAX: usize = 1 << 16;

/// What of a page is known: its sites, and whether it was known where its code begins.
#[derive(Debug, Clone, Copy)]
struct Known {
    sites: Sites,
    sure: bool,
}

/// What in a page is not for the host's CPU. The page is watched from now on.
fn look_through(known: &mut HashMap<u64, Known>, core: &mut Core, linear: u64, physical: u64) -> Sites {
    let page = physical & !(PAGE - 1);
    if let Some(known) = known.get(&page)
        && (known.sure || known.sites.none() || starts(core, linear).is_none())
    {
        return known.sites;
    }
    if known.len() == KNOWN_MAX {
        known.clear();
    }
    // Before the bytes are read: no write may pass unseen from here on.
    core.protect_code(page);
    let starts = starts(core, linear);
    let sites = sites_now(core, page, starts);
    known.insert(page, Known { sites, sure: starts.is_some() });
    sites
}

/// Where instructions begin in a page, if the page before it has code too.
fn starts(core: &Core, linear: u64) -> Option<scan::Starts> {
    let before = core.mmu.look(&core.state, linear.wrapping_sub(PAGE)).filter(|before| before.execute)?;
    let page = core.mmu.look(&core.state, linear)?;
    let mut seam = [0; scan::BEFORE + scan::LONGEST];
    let (end, begin) = seam.split_at_mut(scan::BEFORE);
    let memory = &core.mmu.memory;
    memory.read(before.physical + PAGE - scan::BEFORE as u64, end).ok()?;
    memory.read(page.physical, begin).ok()?;
    Some(scan::starts(&seam))
}

/// What in a page is not for the host's CPU, as of now.
fn sites_now(core: &Core, page: u64, starts: Option<scan::Starts>) -> Sites {
    let mut bytes = [0; PAGE as usize];
    // What cannot be read is not RAM, and cannot be brought in.
    let _ = core.mmu.memory.read(page, &mut bytes);
    scan::sites(&bytes, starts.unwrap_or(scan::ANYWHERE))
}

/// A page's sites, with those of instructions that begin there and end in the page behind it.
fn joined(core: &Core, sites: Sites, page: u64, next: u64) -> Sites {
    let mut seam = [0; 2 * scan::REACH];
    let (end, begin) = seam.split_at_mut(scan::REACH);
    let memory = &core.mmu.memory;
    let _ = memory.read(page + PAGE - scan::REACH as u64, end).and_then(|()| memory.read(next, begin));
    sites.across(&seam)
}

/// RIP for the single-step tier after a SIGTRAP: the breakpoint instruction's, if that has been.
fn trapped(core: &mut Core, rip: u64) -> u64 {
    let byte = |core: &mut Core, back: u64| {
        let at = rip.wrapping_sub(back);
        core.read_uint(at, 1, Privilege::User).ok()
    };
    match byte(core, 1) {
        Some(0xcc | 0xf1) => rip.wrapping_sub(1),
        Some(3) if byte(core, 2) == Some(0xcd) => rip.wrapping_sub(2),
        _ => rip,
    }
}

fn registers(state: &CpuState) -> libc::user_regs_struct {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    libc::user_regs_struct {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        // No system call of the process's own is to be made again.
        orig_rax: u64::MAX,
        cs: process::USER_CS,
        ss: process::USER_SS,
        ds: 0,
        es: 0,
        fs: 0,
        gs: 0,
        fs_base: state.segments[seg::FS].base,
        gs_base: state.segments[seg::GS].base,
        eflags: state.rflags & USER_FLAGS | rflags::FIXED | rflags::IF,
    }
}

/// The process has loaded segments of its own, or bases that the host's kernel does not take back: it cannot go on here.
fn is_strange(of: &libc::user_regs_struct) -> bool {
    (of.cs, of.ss) != (process::USER_CS, process::USER_SS)
        || of.ds | of.es | of.fs | of.gs != 0
        || of.fs_base.max(of.gs_base) >= process::TOP
}

/// Registers of the process become the guest's.
fn store(core: &mut Core, from: &libc::user_regs_struct) {
    let state = &mut core.state;
    state.gpr = [
        from.rax, from.rcx, from.rdx, from.rbx, from.rsp, from.rbp, from.rsi, from.rdi, from.r8, from.r9,
        from.r10, from.r11, from.r12, from.r13, from.r14, from.r15,
    ];
    state.rip = from.rip;
    state.rflags = state.rflags & !USER_FLAGS | from.eflags & USER_FLAGS;
    // Instructions of FSGSBASE may have changed these.
    state.segments[seg::FS].base = from.fs_base;
    state.segments[seg::GS].base = from.gs_base;
    if is_strange(from) {
        store_segments(core, from);
    }
}

/// What the process has loaded by selector comes from the guest's tables. A selector that they do not have, where the host's do,
/// leaves the register as it was: the instruction that should have failed is over.
fn store_segments(core: &mut Core, from: &libc::user_regs_struct) {
    let code = from.cs as u16;
    if from.cs != process::USER_CS
        && let Ok(descriptor) = core.descriptor(code, Exception::gp)
        && (descriptor.code() && descriptor.present() && descriptor.dpl() == 3 && code & 3 == 3)
        && let Ok(descriptor) = core.set_accessed(code, descriptor)
    {
        core.state.segments[seg::CS] = descriptor.load(code);
        core.state.attention |= attention::MODE;
    }
    let loaded = [(seg::DS, from.ds), (seg::ES, from.es), (seg::FS, from.fs), (seg::GS, from.gs)];
    let stack = (from.ss != process::USER_SS).then_some((seg::SS, from.ss));
    for (segment, selector) in loaded.into_iter().filter(|loaded| loaded.1 != 0).chain(stack) {
        let _ = core.load_segment(segment, selector as u16);
    }
}

/// The guest's vector and x87 registers become those of the process, if they are not already.
fn load_vectors(state: &mut CpuState, mirror: &mut Mirror, ymm_high: usize) -> io::Result<()> {
    arena::peek_x87(state);
    let image = &mut mirror.vectors;
    let before = image.get(..XSTATE_BV + 64).map(<[u8]>::to_vec).unwrap_or_default();
    let before_high = image.get(ymm_high..ymm_high + 256).map(<[u8]>::to_vec).unwrap_or_default();
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = image.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, state.x87.0.get(..8).unwrap_or_default());
    // The addresses of the last x87 instruction and of its operand: the process's own, or of this process, which none of the
    // guest's is to see.
    if before.get(8..24) != state.x87.0.get(8..24) {
        put(8, &[0; 16]);
    }
    put(24, &state.mxcsr.to_le_bytes());
    put(32, state.x87.0.get(32..160).unwrap_or_default());
    for (number, [a, b, c, d]) in state.ymm.0.iter().enumerate() {
        put(160 + number * 16, &a.to_le_bytes());
        put(168 + number * 16, &b.to_le_bytes());
        put(ymm_high + number * 16, &c.to_le_bytes());
        put(ymm_high + number * 16 + 8, &d.to_le_bytes());
    }
    put(XSTATE_BV, &X87_SSE_AVX.to_le_bytes());
    let same = image.get(..XSTATE_BV + 64) == Some(before.as_slice())
        && image.get(ymm_high..ymm_high + 256) == Some(before_high.as_slice());
    if same { Ok(()) } else { mirror.process.set_xsave(image) }
}

/// And back.
fn store_vectors(state: &mut CpuState, mirror: &mut Mirror, ymm_high: usize) -> io::Result<()> {
    let Some(image) = mirror.vectors.get_mut(..ymm_high + 256) else { return Ok(()) };
    mirror.process.xsave(image)?;
    let quad = |at: usize| {
        let bytes = image.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    for (number, lanes) in state.ymm.0.iter_mut().enumerate() {
        let (low, high) = (160 + number * 16, ymm_high + number * 16);
        *lanes = [quad(low), quad(low + 8), quad(high), quad(high + 8)];
    }
    state.mxcsr = quad(24) as u32;
    if let (Some(from), Some(to)) = (image.get(..24), state.x87.0.get_mut(..24)) {
        to.copy_from_slice(from);
    }
    if let (Some(from), Some(to)) = (image.get(32..160), state.x87.0.get_mut(32..160)) {
        to.copy_from_slice(from);
    }
    arena::load_x87(state);
    // What the kernel gave is what it would be given, but for what it says of itself.
    for (at, value) in [(XSTATE_BV, X87_SSE_AVX), (XSTATE_BV + 8, 0)] {
        if let Some(place) = image.get_mut(at..at + 8) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
    if let Some(reserved) = image.get_mut(416..XSTATE_BV) {
        reserved.fill(0);
    }
    Ok(())
}

#[cfg(test)]
mod test;
