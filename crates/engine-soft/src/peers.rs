//! What the vCPUs of a VM must tell each other about code: which pages are translated by whom, who may write to them
//! unseen, and what was written.
//!
//! States of a page: *data*, until a translator reads code from it; *being protected*, while the vCPUs that may hold
//! translations for writes to it forget them; *code*, while any translator has blocks of it: every write is told to those
//! translators; and data again, once it was written so often that all of them have dropped their blocks. The page's flag
//! in `memory` is set from the second state on.
//!
//! Lock order: a shard of [`Pages`], then the list of vCPUs or one vCPU's requests; none is held while code is changed.
#![allow(unsafe_code)]

use crate::mmu::Mmu;
use crate::state::{CpuState, Doorbell};
use cpu::Kick;
use memory::{CodeWatch, GuestMemory, HostPage, PageFlags};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

/// Bits of [`Doorbell::kick`].
pub(crate) mod kick {
    /// Somebody wants `run` to return.
    pub(crate) const LEAVE: u32 = 1 << 0;
    /// Somebody wrote to a code page.
    pub(crate) const CODE: u32 = 1 << 1;
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The doorbell inside a vCPU's state, for other threads: gone when the vCPU is.
pub(crate) struct Flag(Mutex<Option<*const Doorbell>>);

// SAFETY: the pointer is to atomics, and is only followed under the lock, which the vCPU takes to clear it.
unsafe impl Send for Flag {}
// SAFETY: as above.
unsafe impl Sync for Flag {}

impl Flag {
    pub(crate) fn new(state: &CpuState) -> Self {
        Self(Mutex::new(Some(&raw const state.doorbell)))
    }

    fn set(&self, bits: u32) {
        let guard = locked(&self.0);
        if let Some(flag) = *guard {
            // SAFETY: the vCPU clears the pointer under this lock before its state goes away.
            unsafe {
                (*flag).ring(bits);
            }
        }
    }

    /// The vCPU goes away.
    pub(crate) fn end(&self) {
        *locked(&self.0) = None;
    }
}

impl Kick for Flag {
    fn kick(&self) {
        self.set(kick::LEAVE);
    }
}

/// Bytes that one bit of [`Written`] stands for.
const GRANULE: u64 = 32;

/// What was written of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Written {
    /// By granules of 32 bytes.
    granules: u128,
    /// All blocks of the page are to be dropped, for good.
    drop: bool,
}

impl Written {
    fn add(&mut self, offset: u64, len: u64) {
        let first = offset / GRANULE;
        let last = (offset + len.max(1) - 1).min(0xfff) / GRANULE;
        let count = (last - first + 1) as u32;
        let run = u128::MAX >> (128 - count);
        self.granules |= run << first;
    }

    /// Offsets and lengths in bytes.
    pub(crate) fn runs(self) -> impl Iterator<Item = (u64, u64)> {
        let mut left = if self.drop { u128::MAX } else { self.granules };
        std::iter::from_fn(move || {
            let first = left.trailing_zeros();
            if first == 128 {
                return None;
            }
            let count = (left >> first).trailing_ones();
            left &= !((u128::MAX >> (128 - count)) << first);
            Some((u64::from(first) * GRANULE, u64::from(count) * GRANULE))
        })
    }

    pub(crate) fn drops(self) -> bool {
        self.drop
    }
}

/// What others ask of a vCPU about code, until it looks: at least at every kick.
pub(crate) struct Requests {
    list: Mutex<List>,
    /// How many of the requests to forget have been done.
    done: AtomicU64,
    /// The vCPU is in `run`. If not, it looks before anything else there.
    inside: AtomicBool,
    flag: Arc<Flag>,
}

#[derive(Default)]
struct List {
    /// By page: what was written there.
    written: HashMap<u64, Written>,
    /// Pages that hold code now: translations for writes to them must be forgotten.
    protected: Vec<u64>,
    /// How many pages were ever put there.
    asked: u64,
}

impl Requests {
    pub(crate) fn new(flag: Arc<Flag>) -> Self {
        Self { list: Mutex::default(), done: AtomicU64::new(0), inside: AtomicBool::new(false), flag }
    }

    /// The vCPU enters or leaves `run`.
    pub(crate) fn set_inside(&self, inside: bool) {
        self.inside.store(inside, Ordering::SeqCst);
    }

    fn push(&self, page: u64, offset: u64, len: u64, drop: bool) {
        let mut list = locked(&self.list);
        let written = list.written.entry(page).or_default();
        written.add(offset, len);
        written.drop |= drop;
        std::mem::drop(list);
        self.flag.set(kick::CODE);
    }

    /// Asks the vCPU to forget translations for writes to a page; answers the number of the request.
    fn protect(&self, page: u64) -> u64 {
        let mut list = locked(&self.list);
        list.protected.push(page);
        list.asked += 1;
        let asked = list.asked;
        drop(list);
        self.flag.set(kick::CODE);
        asked
    }

    /// The vCPU has done a request, or will before it runs anything.
    fn has_done(&self, number: u64) -> bool {
        self.done.load(Ordering::SeqCst) >= number || !self.inside.load(Ordering::SeqCst)
    }

    /// Does what is asked of this vCPU's TLB.
    pub(crate) fn forget(&self, mmu: &mut Mmu, state: &mut CpuState) {
        let mut list = locked(&self.list);
        for page in std::mem::take(&mut list.protected) {
            mmu.forget_writes(state, page);
        }
        self.done.store(list.asked, Ordering::SeqCst);
    }

    /// What was written, by page.
    pub(crate) fn take_written(&self) -> HashMap<u64, Written> {
        std::mem::take(&mut locked(&self.list).written)
    }
}

/// vCPUs by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Set([u64; VCPUS_MAX / 64]);

/// The most vCPUs of a VM.
pub(crate) const VCPUS_MAX: usize = 1024;

impl Set {
    fn insert(&mut self, index: usize) -> bool {
        let word = &mut self.0[index / 64 % (VCPUS_MAX / 64)];
        let before = *word;
        *word |= 1 << (index % 64);
        before != *word
    }

    fn remove(&mut self, index: usize) {
        self.0[index / 64 % (VCPUS_MAX / 64)] &= !(1 << (index % 64));
    }

    fn contains(self, index: usize) -> bool {
        self.0[index / 64 % (VCPUS_MAX / 64)] >> (index % 64) & 1 != 0
    }
}

/// A page that translators read code from.
#[derive(Debug, Default)]
struct CodePage {
    owners: Set,
    /// Owners that have been asked to drop the page and have not yet.
    leaving: Set,
    /// No vCPU holds a translation for writes to it.
    settled: bool,
    /// Tells this time as a code page from others.
    number: u64,
    writes: u32,
}

/// After so many writes a code page is taken for data.
const WRITES_MAX: u32 = 64;
const SHARDS: usize = 64;

type Shard = HashMap<u64, CodePage>;

/// All of a VM's vCPUs and code pages.
pub(crate) struct Watch {
    vcpus: RwLock<Vec<Weak<Requests>>>,
    pages: Box<[Mutex<Shard>]>,
    /// RAM's regions: first address, length, index of the first page in `writers`.
    regions: Vec<(u64, u64, usize)>,
    /// By page of RAM: bits of the vCPUs, by index modulo 64, that may hold translations for writes.
    writers: Box<[AtomicU64]>,
    numbers: AtomicU64,
}

/// So many zeroes, without touching them.
fn zeroes(count: usize) -> Box<[AtomicU64]> {
    let zeroes = Box::into_raw(vec![0u64; count].into_boxed_slice());
    // SAFETY: AtomicU64 has the size, alignment and values of u64, and the allocation is this function's.
    unsafe { Box::from_raw(zeroes as *mut [AtomicU64]) }
}

impl Watch {
    /// For the vCPUs that share `memory`, one or several.
    pub(crate) fn new(memory: &GuestMemory, several: bool) -> Self {
        let (mut regions, mut pages) = (Vec::new(), 0);
        for region in memory.regions().iter().filter(|_| several) {
            regions.push((region.base, region.len, pages));
            pages += (region.len >> 12) as usize;
        }
        Self {
            vcpus: RwLock::default(),
            pages: (0..SHARDS).map(|_| Mutex::default()).collect(),
            regions,
            writers: zeroes(pages),
            numbers: AtomicU64::new(1),
        }
    }

    /// The vCPU of this index exists.
    pub(crate) fn add(&self, index: usize, requests: &Arc<Requests>) {
        let mut vcpus = self.vcpus.write().unwrap_or_else(PoisonError::into_inner);
        if vcpus.len() <= index {
            vcpus.resize_with(index + 1, Weak::new);
        }
        vcpus[index] = Arc::downgrade(requests);
    }

    fn vcpu(&self, index: usize) -> Option<Arc<Requests>> {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner).get(index)?.upgrade()
    }

    fn vcpus(&self) -> usize {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, Shard> {
        locked(&self.pages[(page >> 12) as usize % SHARDS])
    }

    /// Who may write to a page; `None` if it is not RAM.
    fn writer(&self, page: u64) -> Option<&AtomicU64> {
        let inside = |&&(base, len, _): &&(u64, u64, usize)| page.wrapping_sub(base) < len;
        let &(base, _, first) = self.regions.iter().find(inside)?;
        self.writers.get(first + (page.wrapping_sub(base) >> 12) as usize)
    }

    /// Tells of a write inside one page to the translators that read code from it, but for `writer`. Answers whether the
    /// writer itself is to drop the page.
    fn tell(&self, writer: Option<(usize, &GuestMemory)>, address: u64, len: u64) -> bool {
        let (page, offset) = (address & !0xfff, address & 0xfff);
        let mut shard = self.shard(page);
        let Some(code) = shard.get_mut(&page) else { return false };
        code.writes = code.writes.saturating_add(1);
        let drop = code.writes > WRITES_MAX;
        let mut own = false;
        for index in 0..self.vcpus() {
            if !code.owners.contains(index) || code.leaving.contains(index) {
                continue;
            }
            if drop {
                code.leaving.insert(index);
            }
            if writer.is_some_and(|writer| writer.0 == index) {
                own = drop;
            } else if let Some(vcpu) = self.vcpu(index) {
                vcpu.push(page, offset, len, drop);
            }
        }
        // Those that sleep drop it before they run anything: nobody waits for them.
        if let Some((_, memory)) = writer.filter(|_| drop && code.owners == code.leaving) {
            let inside = |index| self.vcpu(index).is_some_and(|vcpu| vcpu.inside.load(Ordering::SeqCst));
            if !(0..self.vcpus()).any(|index| code.owners.contains(index) && inside(index)) {
                shard.remove(&page);
                memory.unmark_code(page);
            }
        }
        own
    }

    /// The next write to the page is the last that anybody is told of.
    fn give_up(&self, page: u64) {
        if let Some(code) = self.shard(page).get_mut(&page) {
            code.writes = WRITES_MAX;
        }
    }

    /// A vCPU has dropped all its blocks of a page.
    fn dropped(&self, index: usize, page: u64, memory: &GuestMemory) {
        let mut shard = self.shard(page);
        let Some(code) = shard.get_mut(&page) else { return };
        code.owners.remove(index);
        code.leaving.remove(index);
        if code.owners == Set::default() {
            shard.remove(&page);
            memory.unmark_code(page);
        }
    }
}

impl CodeWatch for Watch {
    fn written(&self, address: u64, len: u64) {
        let vcpus = self.vcpus();
        if vcpus == 1 {
            // A single vCPU keeps its pages itself.
            if let Some(vcpu) = self.vcpu(0) {
                parts(address, len).for_each(|(at, len)| vcpu.push(at & !0xfff, at & 0xfff, len, false));
            }
            return;
        }
        parts(address, len).for_each(|(at, len)| {
            self.tell(None, at, len);
        });
    }
}

/// A range cut at the ends of pages.
fn parts(address: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = address;
    let end = address.saturating_add(len);
    std::iter::from_fn(move || {
        let part = (4096 - (at & 0xfff)).min(end.saturating_sub(at));
        let this = (at, part);
        at = at.saturating_add(part);
        (part != 0).then_some(this)
    })
}

/// The vCPUs of a VM, as one of them sees them.
#[derive(Clone)]
pub(crate) struct Peers {
    watch: Arc<Watch>,
    own: Arc<Requests>,
    index: usize,
}

impl Peers {
    pub(crate) fn new(watch: Arc<Watch>, own: Arc<Requests>, index: usize) -> Self {
        Self { watch, own, index }
    }

    fn bit(&self) -> u64 {
        1 << (self.index % 64)
    }

    /// Looks whether a page holds code; if not, this vCPU may remember where to write to it.
    pub(crate) fn to_write(&self, page: u64, look: impl Fn() -> Option<HostPage>) -> Option<HostPage> {
        let bit = self.bit();
        let Some(writer) = self.watch.writer(page) else { return look() };
        loop {
            if writer.load(Ordering::Relaxed) & bit == 0 {
                // A full barrier: whoever flags the page sees this bit, or this vCPU sees the flag.
                writer.fetch_or(bit, Ordering::SeqCst);
            }
            let seen = look();
            let code = seen.as_ref().is_some_and(|page| page.flags.contains(PageFlags::CODE));
            // The page may have been code, and this vCPU's bit taken away, between the two: then it is asked of it again.
            if code || writer.load(Ordering::SeqCst) & bit != 0 {
                return seen;
            }
        }
    }

    /// This vCPU has written to a code page.
    pub(crate) fn written(&self, address: u64, len: u64, memory: &GuestMemory) {
        for (at, len) in parts(address, len) {
            if self.watch.tell(Some((self.index, memory)), at, len) {
                self.own.push(at & !0xfff, at & 0xfff, len, true);
            }
        }
    }

    /// The next write to a code page makes data of it.
    pub(crate) fn give_up(&self, address: u64) {
        self.watch.give_up(address & !0xfff);
    }

    /// All of this vCPU's blocks of a page are gone.
    pub(crate) fn dropped(&self, page: u64, memory: &GuestMemory) {
        self.watch.dropped(self.index, page, memory);
    }

    /// This vCPU's translator is about to read code from a page: comes back when no vCPU can write there without all
    /// that have code of it hearing of it. Meanwhile this vCPU does what the others ask of it, or two would wait for each
    /// other.
    pub(crate) fn protect(&self, mmu: &mut Mmu, state: &mut CpuState, page: u64) {
        let page = page & !0xfff;
        let number = {
            let mut shard = self.watch.shard(page);
            let code = shard.entry(page).or_default();
            code.owners.insert(self.index);
            if code.number == 0 {
                code.number = self.watch.numbers.fetch_add(1, Ordering::Relaxed);
                mmu.memory.mark_code(page);
            }
            if code.settled {
                return;
            }
            code.number
        };
        mmu.forget_writes(state, page);
        // After the flag, with a full barrier in between.
        let writer = self.watch.writer(page);
        let writers = writer.map_or(u64::MAX, |writer| writer.fetch_or(0, Ordering::SeqCst));
        let mut waiting = Vec::new();
        for index in (0..self.watch.vcpus()).filter(|&index| index != self.index) {
            if writers >> (index % 64) & 1 != 0
                && let Some(vcpu) = self.watch.vcpu(index)
            {
                waiting.push((vcpu.protect(page), vcpu));
            }
        }
        for (number, other) in waiting {
            let mut turns = 0u32;
            while !other.has_done(number) {
                self.own.forget(mmu, state);
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        }
        // All of these have forgotten it, and while this vCPU owns the page nobody remembers it again.
        if let Some(writer) = writer {
            writer.fetch_and(!writers, Ordering::SeqCst);
        }
        if let Some(code) = self.watch.shard(page).get_mut(&page)
            && code.number == number
        {
            code.settled = true;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::{Backing, PageFlags};

    #[test]
    fn what_was_written_is_told_in_runs() {
        let mut written = Written::default();
        written.add(0, 1);
        written.add(31, 2);
        written.add(0xffe, 2);
        written.add(0x100, 0x40);
        assert_eq!(written.runs().collect::<Vec<_>>(), [(0, 64), (0x100, 0x40), (0xfe0, 32)]);
        written.drop = true;
        assert_eq!(written.runs().collect::<Vec<_>>(), [(0, 4096)]);
        let mut whole = Written::default();
        whole.add(0, 4096);
        assert_eq!(whole.runs().collect::<Vec<_>>(), [(0, 4096)]);
        assert_eq!(Written::default().runs().count(), 0);
        assert_eq!(
            parts(0xff0, 0x1020).collect::<Vec<_>>(),
            [(0xff0, 0x10), (0x1000, 0x1000), (0x2000, 0x10)]
        );
    }

    struct Vcpu {
        state: crate::state::Owned,
        mmu: Mmu,
        requests: Arc<Requests>,
        peers: Peers,
    }

    fn vcpus(memory: &GuestMemory, count: usize) -> Vec<Vcpu> {
        let watch = Arc::new(Watch::new(memory, true));
        memory.set_code_watch(watch.clone());
        let vcpus = (0..count).map(|index| {
            let state = CpuState::power_up();
            let requests = Arc::new(Requests::new(Arc::new(Flag::new(&state))));
            watch.add(index, &requests);
            let peers = Peers::new(watch.clone(), requests.clone(), index);
            Vcpu { state, mmu: Mmu::new(memory.clone(), 40), requests, peers }
        });
        vcpus.collect()
    }

    fn is_code(memory: &GuestMemory, page: u64) -> bool {
        memory.host_page(page).unwrap().flags.contains(PageFlags::CODE)
    }

    #[test]
    fn only_those_hear_of_writes_that_have_code_of_the_page() {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let mut vcpus = vcpus(&memory, 300);
        for index in [1, 257] {
            let Vcpu { state, mmu, peers, .. } = &mut vcpus[index];
            peers.clone().protect(mmu, state, 0x3000);
        }
        assert!(is_code(&memory, 0x3000));
        vcpus[1].peers.written(0x3010, 4, &memory);
        memory.write(0x2ffe, &[0; 4]).unwrap();
        let heard = |index: usize| vcpus[index].requests.take_written();
        assert_eq!(heard(257)[&0x3000].runs().collect::<Vec<_>>(), [(0, 32)]);
        assert_eq!(heard(1)[&0x3000].runs().collect::<Vec<_>>(), [(0, 32)], "of the device's write");
        assert!(heard(0).is_empty() && heard(5).is_empty());
        assert_ne!(vcpus[257].state.doorbell.rung() & kick::CODE, 0);
        assert_eq!(vcpus[5].state.doorbell.rung(), 0);
        vcpus[1].peers.dropped(0x3000, &memory);
        memory.write(0x3000, &[0; 4]).unwrap();
        assert!(
            !vcpus[257].requests.take_written().is_empty() && vcpus[1].requests.take_written().is_empty()
        );
    }

    #[test]
    fn a_page_that_is_written_again_and_again_is_data_once_all_have_dropped_it() {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let mut vcpus = vcpus(&memory, 2);
        for Vcpu { state, mmu, peers, requests } in &mut vcpus {
            peers.clone().protect(mmu, state, 0x5000);
            requests.set_inside(true);
        }
        for _ in 0..=WRITES_MAX {
            vcpus[0].peers.written(0x5000, 8, &memory);
        }
        for vcpu in &vcpus {
            assert!(vcpu.requests.take_written()[&0x5000].drops());
        }
        vcpus[0].peers.written(0x5000, 8, &memory);
        assert!(vcpus[1].requests.take_written().is_empty(), "it drops the page anyway");
        vcpus[0].peers.dropped(0x5000, &memory);
        assert!(is_code(&memory, 0x5000));
        vcpus[1].peers.dropped(0x5000, &memory);
        assert!(!is_code(&memory, 0x5000));
        let Vcpu { state, mmu, peers, .. } = &mut vcpus[1];
        peers.clone().protect(mmu, state, 0x5000);
        assert!(is_code(&memory, 0x5000));
    }

    #[test]
    fn nobody_waits_for_those_that_sleep() {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let mut vcpus = vcpus(&memory, 2);
        let Vcpu { state, mmu, peers, .. } = &mut vcpus[1];
        peers.clone().protect(mmu, state, 0x5000);
        vcpus[0].requests.set_inside(true);
        for _ in 0..=WRITES_MAX {
            vcpus[0].peers.written(0x5000, 8, &memory);
        }
        assert!(!is_code(&memory, 0x5000));
        // It drops what it has before anything else, whatever the page is by then.
        assert!(vcpus[1].requests.take_written()[&0x5000].drops());
        let Vcpu { state, mmu, peers, .. } = &mut vcpus[0];
        peers.clone().protect(mmu, state, 0x5000);
        vcpus[1].peers.dropped(0x5000, &memory);
        assert!(is_code(&memory, 0x5000));
    }

    #[test]
    fn whose_right_to_write_is_taken_while_it_looks_looks_again() {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let vcpus = vcpus(&memory, 1);
        let writer = vcpus[0].peers.watch.writer(0x7000).unwrap();
        let looks = std::cell::Cell::new(0);
        vcpus[0].peers.to_write(0x7000, || {
            looks.set(looks.get() + 1);
            if looks.get() == 1 {
                writer.store(0, Ordering::SeqCst);
            }
            memory.host_page(0x7000)
        });
        assert_eq!((looks.get(), writer.load(Ordering::SeqCst)), (2, 1));
    }

    #[test]
    fn only_those_who_may_write_are_waited_for() {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let mut vcpus = vcpus(&memory, 3);
        // Two run; one of them may write, and looks as vCPUs do.
        vcpus[1].requests.set_inside(true);
        vcpus[2].requests.set_inside(true);
        vcpus[2].peers.to_write(0x7000, || None);
        let mut writer = vcpus.pop().unwrap();
        let thread = std::thread::spawn(move || {
            while writer.state.doorbell.rung() == 0 {
                std::thread::yield_now();
            }
            writer.requests.forget(&mut writer.mmu, &mut writer.state);
        });
        let Vcpu { state, mmu, peers, .. } = &mut vcpus[0];
        peers.clone().protect(mmu, state, 0x7000);
        thread.join().unwrap();
        assert_eq!(vcpus[1].state.doorbell.rung(), 0, "it may not write there");
    }
}
