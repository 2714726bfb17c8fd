//! Which pages the guest has written: KVM's log, emptied into the page-state table of `memory`.
//!
//! By bitmap: one for each slot, fetched as a whole; where KVM can, pages are protected again only once they have been
//! noted (KVM_CLEAR_DIRTY_LOG), so that fetching is short. By ring: each vCPU has a ring of page numbers that the kernel
//! fills and we empty; a full one ends KVM_RUN, and the vCPU's own thread empties all.
//!
//! Lock order: this log's lock, then nothing (the page-state table is atomics).

use crate::capability::Capabilities;
use crate::engine::{Vm, enable};
use crate::host::{Handle, Mapping, Plain};
use crate::ioctl;
use crate::vcpu::host;
use cpu::Error;
use kvm_bindings as kvm;
use kvm_bindings::kvm_dirty_gfn;
use memory::{PAGE_SIZE, Region};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// Flags of an entry (`linux/kvm.h`, which spells them as shifts that the bindings lack).
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
/// Bytes of an entry; its flags come first.
const ENTRY: usize = size_of::<kvm_dirty_gfn>();
/// Where a vCPU's ring is in its descriptor.
const RING_AT: u64 = kvm::KVM_DIRTY_LOG_PAGE_OFFSET as u64 * PAGE_SIZE;

/// One vCPU's ring.
struct Ring {
    mapping: Mapping,
    next: usize,
}

/// See the module page.
pub(crate) struct DirtyLog {
    /// Entries of each ring; `None`: bitmaps.
    entries: Option<u32>,
    manual: bool,
    rings: Mutex<Vec<Ring>>,
}

impl DirtyLog {
    /// Before the first vCPU.
    pub(crate) fn new(vm: &Handle, capabilities: &Capabilities, ring: Option<u32>) -> Result<Self, Error> {
        let rings = Mutex::default();
        if let Some(entries) = ring {
            let most = capabilities.dirty_ring;
            if !entries.is_power_of_two() || entries > most || entries < 256 {
                let why = format!(
                    "a ring of {entries} dirty pages is none of its sizes (powers of two from 256 to {most}); use bitmaps"
                );
                return Err(Error::Unsupported { engine: "kvm", why });
            }
            let bytes = u64::from(entries).saturating_mul(ENTRY as u64);
            // The one with ordering guarantees is newer; on x86 they are the same.
            enable(vm, kvm::KVM_CAP_DIRTY_LOG_RING, bytes, "KVM_CAP_DIRTY_LOG_RING")?;
            return Ok(Self { entries: Some(entries), manual: false, rings });
        }
        let manual = capabilities.manual_protect & kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let cap = kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            let how = kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
            enable(vm, cap, how, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")?;
        }
        Ok(Self { entries: None, manual, rings })
    }

    /// A new vCPU has a ring, if there are any.
    pub(crate) fn add(&self, vcpu: &Handle) -> std::io::Result<()> {
        if let Some(entries) = self.entries {
            let mapping = vcpu.map(RING_AT, (entries as usize).saturating_mul(ENTRY))?;
            let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
            rings.push(Ring { mapping, next: 0 });
        }
        Ok(())
    }
}

impl Ring {
    /// Takes all pages in the ring: slot and page number in it.
    fn take(&mut self, mut page: impl FnMut(u32, u64)) -> u64 {
        let entries = self.mapping.len().checked_div(ENTRY).unwrap_or(0);
        let mut count = 0u64;
        // No more than a whole turn: the kernel may go on filling.
        for _ in 0..entries {
            let at = self.next.saturating_mul(ENTRY);
            let Some(flags) = self.mapping.atomic_u32(at) else { break };
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                break;
            }
            let kvm_dirty_gfn { slot, offset, .. } = self.mapping.get(at);
            page(slot, offset);
            flags.store(RESET, Ordering::Release);
            self.next = self.next.saturating_add(1).checked_rem(entries).unwrap_or(0);
            count = count.saturating_add(1);
        }
        count
    }
}

impl Vm {
    /// Empties the log; answers how many pages were in it.
    pub(crate) fn collect_dirty(&self) -> Result<u64, Error> {
        if self.dirty.entries.is_some() { self.empty_rings() } else { self.empty_bitmaps() }
    }

    fn empty_rings(&self) -> Result<u64, Error> {
        let mut rings = self.dirty.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = self.memory.regions();
        let mut count = 0u64;
        for ring in rings.iter_mut() {
            // The upper half of a slot's number is the address space: always the first.
            let taken = ring.take(|slot, page| {
                if let Some(region) = regions.get((slot & 0xffff) as usize) {
                    self.memory
                        .written(region.base.saturating_add(page.saturating_mul(PAGE_SIZE)), PAGE_SIZE);
                }
            });
            count = count.saturating_add(taken);
        }
        if count != 0 {
            self.handle.number(ioctl::RESET_DIRTY_RINGS, 0).map_err(host("KVM_RESET_DIRTY_RINGS"))?;
        }
        Ok(count)
    }

    fn empty_bitmaps(&self) -> Result<u64, Error> {
        let _one = self.dirty.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0u64;
        for (slot, region) in (0u32..).zip(self.memory.regions()) {
            let pages = region.len / PAGE_SIZE;
            let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
            let mut bitmap = vec![0u64; words];
            self.fetch(slot, &mut bitmap)?;
            let dirty = bitmap.iter().map(|word| u64::from(word.count_ones())).fold(0, u64::saturating_add);
            if dirty == 0 {
                continue;
            }
            // Protected first, then noted: a write in between is in the next log, never in none.
            if self.dirty.manual {
                self.protect(slot, pages, &mut bitmap)?;
            }
            note(&self.memory, *region, &bitmap);
            count = count.saturating_add(dirty);
        }
        Ok(count)
    }

    #[allow(unsafe_code)]
    fn fetch(&self, slot: u32, bitmap: &mut [u64]) -> Result<(), Error> {
        let mut log = kvm::kvm_dirty_log { slot, ..kvm::kvm_dirty_log::zeroed() };
        log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
        // SAFETY: a bit for every page of the slot, rounded up to a word, as the kernel writes.
        unsafe { self.handle.follow(ioctl::GET_DIRTY_LOG, log) }
            .map_err(host("KVM_GET_DIRTY_LOG"))
            .map(|_| ())
    }

    #[allow(unsafe_code)]
    fn protect(&self, slot: u32, pages: u64, bitmap: &mut [u64]) -> Result<(), Error> {
        let num_pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let mut clear = kvm::kvm_clear_dirty_log { slot, num_pages, ..kvm::kvm_clear_dirty_log::zeroed() };
        clear.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
        // SAFETY: as in `fetch`; the kernel only reads.
        unsafe { self.handle.follow(ioctl::CLEAR_DIRTY_LOG, clear) }
            .map_err(host("KVM_CLEAR_DIRTY_LOG"))
            .map(|_| ())
    }
}

/// Tells the page-state table.
fn note(memory: &memory::GuestMemory, region: Region, bitmap: &[u64]) {
    for (index, &word) in (0u64..).zip(bitmap) {
        let mut left = word;
        while left != 0 {
            let page = index.saturating_mul(64).saturating_add(left.trailing_zeros().into());
            memory.written(region.base.saturating_add(page.saturating_mul(PAGE_SIZE)), PAGE_SIZE);
            left &= left.wrapping_sub(1);
        }
    }
}
