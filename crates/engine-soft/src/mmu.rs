//! The memory-management unit: page walks, page faults, and the software TLB that translated code checks inline.
//!
//! Linear addresses become guest-physical ones by a walk of the guest's page tables (Intel SDM 3, chapter 4), with
//! accessed and dirty bits set by compare-and-swap as a CPU does. The TLB tables live in [`CpuState`]; an entry is
//! only made for plain RAM whose access needs no further attention: not for MMIO, not for writes to pages that hold
//! translated code, not for user pages reached by the supervisor under SMAP. Everything else takes the slow path,
//! each time.

use crate::direct::news::News;
use crate::peers::Peers;
use crate::state::{CpuState, PAGE_MASK, SPACES, TLB_ENTRIES, TLB_INVALID, TlbEntry, TlbTable, seg};
use cpu::{cr0, cr4, efer, rflags};
use memory::{GuestMemory, PAGE_SIZE, PageFlags};
use std::sync::atomic::Ordering;

/// Bits of a page-fault error code.
#[allow(missing_docs)]
pub mod fault {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

/// A translation that the page tables refuse: #PF with this error code; CR2 is the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFault {
    /// The linear address.
    pub address: u64,
    /// Error code.
    pub code: u32,
}

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write or read-modify-write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// With whose rights an access is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0-2.
    Supervisor,
    /// By the CPU itself on behalf of any CPL: descriptor tables, TSS, stacks of interrupt delivery. SMAP applies
    /// whatever AC says.
    Implicit,
}

impl Privilege {
    /// The rights of ordinary accesses of the code that runs now.
    pub fn of(state: &CpuState) -> Self {
        if state.cpl() == 3 { Self::User } else { Self::Supervisor }
    }
}

/// Where a linear address leads.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Guest-physical address.
    pub physical: u64,
    /// Host address of that very byte; `None` if it is not RAM.
    pub host: Option<*mut u8>,
    /// The page holds translated code: tell the translator before writing.
    pub code: bool,
}

/// A successful walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walk {
    /// Guest-physical address.
    pub physical: u64,
    /// log2 of the page's size: 12, 21, 22 or 30.
    pub page_shift: u32,
    /// The mapping survives a CR3 load.
    pub global: bool,
    /// Every level of the mapping has U/S set.
    pub user: bool,
}

/// See [`Mmu::look`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Guest-physical address of the page.
    pub physical: u64,
    /// Log2 of the size of the page that it is, or is part of.
    pub shift: u32,
    /// It can be written, and has been.
    pub write: bool,
    /// Code can be fetched from it.
    pub execute: bool,
}

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// The part of the MMU that translated code does not see.
pub struct Mmu {
    /// The guest's RAM.
    pub memory: GuestMemory,
    peers: Option<Peers>,
    /// Width of guest-physical addresses in bits, as CPUID says.
    pub physical_bits: u32,
    /// What is known of the supervisor's translations, and of those of the user's address spaces.
    known: [Known; 1 + SPACES],
    /// The address space of the user that is in force, from 0 on, as [`CpuState::space`].
    space: usize,
    /// Counts loads of CR3, to find the address space not used for longest.
    loads: u64,
    /// The supervisor may have global translations of addresses of the lower half, which are the user's with all known
    /// systems.
    low: bool,
    /// The last generation given to anything.
    newest: u64,
    /// A new one after every flush, and every invalidation of a page that supervisor code was fetched from, that
    /// global translations do not survive.
    pub global_generation: u64,
    /// For those who hold translations elsewhere.
    pub(crate) news: News,
}

/// Translations of the supervisor, or of one address space of the user.
struct Known {
    /// The PCID; `None` if nothing is held.
    pcid: Option<u16>,
    /// When it was last put in force.
    used: u64,
    /// A new one after every flush, and every invalidation of a page that code was fetched from, so that others who
    /// remember translations of code can tell.
    generation: u64,
    /// A flush of what is not global has something to forget.
    passing: bool,
    /// Large pages of which the TLB may hold parts.
    large: Pages,
    /// Pages that code was fetched from since the last flush.
    fetched: Pages,
}

impl Known {
    const NONE: Self =
        Self { pcid: None, used: 0, generation: 0, passing: false, large: Pages::NONE, fetched: Pages::NONE };
}

/// A set of pages, by hash: it may claim pages that are not in it. A data page that the guest invalidates, as at
/// every copy on write, then costs nobody who remembers translations of code anything.
struct Pages {
    /// 4 KiB pages, by the low bits of their number.
    small: [u64; 128],
    /// Larger pages, by 2 MiB.
    large: [u64; 16],
    /// Those of 1 GiB.
    huge: [u64; 16],
}

impl Pages {
    const NONE: Self = Self { small: [0; 128], large: [0; 16], huge: [0; 16] };

    fn insert(&mut self, address: u64, page_shift: u32) {
        match page_shift {
            12 => self.small[(address >> 18) as usize % 128] |= 1 << (address >> 12 & 63),
            21 | 22 => self.large[(address >> 27) as usize % 16] |= 1 << (address >> 21 & 63),
            _ => self.huge[(address >> 36) as usize % 16] |= 1 << (address >> 30 & 63),
        }
    }

    fn contains(&self, address: u64) -> bool {
        self.small[(address >> 18) as usize % 128] >> (address >> 12 & 63) & 1 != 0
            || self.contains_large(address)
    }

    fn contains_large(&self, address: u64) -> bool {
        let large = |address: u64| self.large[(address >> 27) as usize % 16] >> (address >> 21 & 63) & 1 != 0;
        // The other half of a 4 MiB page of 32-bit paging, too.
        large(address)
            || large(address ^ 1 << 21)
            || self.huge[(address >> 36) as usize % 16] >> (address >> 30 & 63) & 1 != 0
    }
}

impl Mmu {
    /// An MMU over `memory`.
    pub fn new(memory: GuestMemory, physical_bits: u32) -> Self {
        Self {
            memory,
            peers: None,
            physical_bits,
            known: [const { Known::NONE }; 1 + SPACES],
            space: 0,
            loads: 0,
            low: false,
            newest: 0,
            global_generation: 0,
            news: News::default(),
        }
    }

    /// A number that is another after every flush, and every invalidation of a page that code was fetched from; and
    /// that is the same again when CR3 is loaded with an address space whose translations are still held.
    pub fn generation(&self) -> u64 {
        self.known[1 + self.space].generation
    }

    /// Translates for one access, fills the TLB where an entry may be made, and says where the byte is.
    pub fn resolve(
        &mut self,
        state: &mut CpuState,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Target, PageFault> {
        let walk = self.walk(state, address, access, privilege)?;
        if access == Access::Fetch {
            self.note_fetch(address, walk.page_shift, privilege == Privilege::User);
        }
        let page = match access {
            Access::Write => {
                let look = || self.memory.host_page_for_write(walk.physical);
                self.peers.as_ref().map_or_else(look, |peers| peers.to_write(walk.physical, look))
            }
            _ => self.memory.host_page(walk.physical),
        };
        let Some(page) = page else {
            return Ok(Target { physical: walk.physical, host: None, code: false });
        };
        let code = page.flags.contains(PageFlags::CODE);
        let target = Target {
            physical: walk.physical,
            host: Some(page.host.wrapping_add((address & (PAGE_SIZE - 1)) as usize)),
            code,
        };
        let guarded = walk.user && privilege != Privilege::User && state.cr4_has(cr4::SMAP);
        let class = match privilege {
            Privilege::User => 1,
            Privilege::Supervisor => 0,
            Privilege::Implicit => return Ok(target),
        };
        if access == Access::Fetch || guarded || (access == Access::Write && code) {
            return Ok(target);
        }
        let linear = address & PAGE_MASK;
        let lasting = class == 1 || walk.global;
        let entry = TlbEntry { tag: linear, addend: (page.host as u64).wrapping_sub(linear) };
        let set = if class == 0 { 0 } else { 1 + self.space };
        let table = &mut state.tlb[set][usize::from(access == Access::Write)];
        table.entries[index(linear)] = entry;
        table.lasting[index(linear)] = u8::from(lasting);
        self.known[set].passing |= class == 1 || !lasting;
        self.low |= class == 0 && lasting && address >> 63 == 0;
        if walk.page_shift > 12 {
            self.known[set].large.insert(address, walk.page_shift);
        }
        Ok(target)
    }

    /// As [`Self::resolve`] for an access that hits the TLB: `None` on a miss, or if the access leaves the page.
    pub fn lookup(state: &CpuState, address: u64, len: u64, write: bool, user: bool) -> Option<*mut u8> {
        let entry = &state.tables(user)[usize::from(write)].entries[index(address)];
        let last = address.wrapping_add(len.wrapping_sub(1)) & PAGE_MASK;
        (entry.tag == last && entry.tag == address & PAGE_MASK).then(|| entry.host(address) as *mut u8)
    }

    /// Walks the page tables without the TLB, setting accessed and dirty bits.
    pub fn walk(
        &self,
        state: &CpuState,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Walk, PageFault> {
        if !state.paging() {
            let physical = address & u64::from(u32::MAX);
            return Ok(Walk { physical, page_shift: 12, global: false, user: false });
        }
        let nx = state.efer & efer::NXE != 0;
        let mut code = 0;
        if access == Access::Write {
            code |= fault::WRITE;
        }
        if privilege == Privilege::User {
            code |= fault::USER;
        }
        if access == Access::Fetch && (nx || state.cr4_has(cr4::SMEP)) {
            code |= fault::FETCH;
        }
        Walker { mmu: self, state, address, access, privilege, code, nx }.run()
    }

    /// What 4-level page tables say of a page of the user's that has been accessed, without a trace of having looked.
    pub(crate) fn look(&self, state: &CpuState, address: u64) -> Option<Seen> {
        let mut table = state.cr3 & 0x000f_ffff_ffff_f000;
        let reserved = reserved(self.physical_bits, state.efer & efer::NXE != 0);
        let mut seen = Seen { physical: 0, shift: 12, write: true, execute: true };
        let mut shift = 39;
        loop {
            let entry = self.memory.load_u64(table + (address >> shift & 0x1ff) * 8).ok()?;
            let leaf = shift == 12 || entry & PS != 0;
            let inner = if leaf && shift > 12 { (1u64 << shift) - (1 << 13) } else { 0 };
            let wrong = inner | reserved | if shift == 39 { PS } else { 0 };
            if entry & (P | U | A) != P | U | A || leaf && shift > 30 || entry & wrong != 0 {
                return None;
            }
            seen.write &= entry & W != 0;
            seen.execute &= entry & NX == 0;
            table = entry & 0x000f_ffff_ffff_f000;
            if leaf {
                seen.write &= entry & D != 0;
                seen.shift = shift;
                let inside = (1u64 << shift) - 1;
                seen.physical = table & !inside | address & inside & PAGE_MASK;
                return Some(seen);
            }
            shift -= 9;
        }
    }

    /// Whether 4-level page tables have anything in the 2 MiB around an address.
    pub(crate) fn has_tables(&self, state: &CpuState, address: u64) -> bool {
        let mut table = state.cr3 & 0x000f_ffff_ffff_f000;
        for shift in [39, 30, 21] {
            let entry = self.memory.load_u64(table + (address >> shift & 0x1ff) * 8).unwrap_or(0);
            if entry & P == 0 || entry & PS != 0 {
                return entry & P != 0;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        true
    }

    /// Forgets all translations, e.g. after a write to CR0, CR4's paging bits, EFER, or by another CPU's request.
    pub fn flush_all(&mut self, state: &mut CpuState) {
        self.empty(state, 0);
        self.low = false;
        self.renew(0);
        self.global_generation = self.newest;
        self.flush_spaces(state);
    }

    /// Forgets all but global translations, of all address spaces.
    pub fn flush_non_global(&mut self, state: &mut CpuState) {
        if !state.cr4_has(cr4::PGE) {
            return self.flush_all(state);
        }
        self.flush_passing(state);
        self.flush_spaces(state);
    }

    fn flush_spaces(&mut self, state: &mut CpuState) {
        for set in 1..=SPACES {
            self.empty(state, set);
            self.renew(set);
            self.known[set].pcid = None;
        }
        let pcid = if state.cr4_has(cr4::PCIDE) { state.cr3 & 0xfff } else { 0 };
        self.known[1 + self.space].pcid = Some(pcid as u16);
    }

    /// Forgets the supervisor's translations that are not global. They are not told apart by PCID.
    fn flush_passing(&mut self, state: &mut CpuState) {
        if std::mem::take(&mut self.known[0].passing) {
            for table in &mut state.tlb[0] {
                for (entry, lasting) in table.entries.iter_mut().zip(&table.lasting) {
                    entry.tag |= u64::from(*lasting).wrapping_sub(1);
                }
            }
        }
    }

    /// CR3 has been loaded: `pcid` is in force (0 without PCIDs); `keep` its translations, if some are held.
    pub fn load(&mut self, state: &mut CpuState, pcid: u16, keep: bool) {
        if !state.cr4_has(cr4::PGE) {
            return self.flush_all(state);
        }
        self.flush_passing(state);
        self.loads += 1;
        let held = (1..=SPACES).find(|&set| self.known[set].pcid == Some(pcid));
        let oldest = (1..=SPACES).min_by_key(|&set| (self.known[set].pcid.is_some(), self.known[set].used));
        let set = held.or(oldest).unwrap_or(1);
        if self.space != set - 1 {
            state.hints.end(1);
            self.space = set - 1;
            state.select_space(self.space);
        }
        self.known[set].used = self.loads;
        if !(keep && held.is_some()) {
            self.known[set].pcid = Some(pcid);
            self.empty(state, set);
            self.renew(set);
        }
    }

    /// Forgets the translations of a PCID that are not global.
    pub fn flush_pcid(&mut self, state: &mut CpuState, pcid: u16) {
        for set in 1..=SPACES {
            if self.known[set].pcid == Some(pcid) {
                self.empty(state, set);
                self.renew(set);
            }
        }
        self.flush_passing(state);
    }

    /// Empties the data TLB of the supervisor (0) or of an address space.
    fn empty(&mut self, state: &mut CpuState, set: usize) {
        if let Some(space) = set.checked_sub(1) {
            self.news.flushed(space);
        }
        if std::mem::take(&mut self.known[set].passing) || set == 0 {
            state.tlb[set].iter_mut().for_each(clear);
        }
        if set == 0 {
            state.hints.end(0);
        } else if set == 1 + self.space {
            state.hints.end(1);
        }
        self.known[set].large = Pages::NONE;
    }

    /// Gives a new generation: what others remember of code is not to be used any more.
    fn renew(&mut self, set: usize) {
        self.newest += 1;
        self.known[set].generation = self.newest;
        self.known[set].fetched = Pages::NONE;
    }

    /// Somebody is about to remember where code at `address` is, in a page of this size.
    pub fn note_fetch(&mut self, address: u64, page_shift: u32, user: bool) {
        let set = if user { 1 + self.space } else { 0 };
        self.known[set].fetched.insert(address, page_shift);
    }

    /// Forgets one page, global or not, of the supervisor and of all address spaces: INVLPG.
    pub fn invalidate_page(&mut self, state: &mut CpuState, address: u64) {
        self.news.invalidated(address);
        let supervisor = self.known[0].fetched.contains(address);
        for set in 0..=SPACES {
            if self.known[set].large.contains_large(address) {
                // The page may be large, and its parts are spread over the tables.
                self.empty(state, set);
            } else {
                for table in &mut state.tlb[set] {
                    let entry = &mut table.entries[index(address)];
                    if entry.tag == address & PAGE_MASK {
                        entry.tag = TLB_INVALID;
                    }
                }
            }
            if supervisor || self.known[set].fetched.contains(address) {
                self.renew(set);
            }
        }
        state.hints.end_page(1, address);
        if self.low || address >> 63 != 0 {
            state.hints.end_page(0, address);
        }
        if supervisor {
            self.global_generation = self.newest;
        }
    }

    /// The page at `physical` now holds translated code: no write of this vCPU, the only one, may pass unseen from here
    /// on.
    pub fn protect_code(&mut self, state: &mut CpuState, physical: u64) {
        if !self.memory.mark_code(physical) {
            self.forget_writes(state, physical);
        }
    }

    /// There are other vCPUs: they want to know to which pages this one may write.
    pub(crate) fn set_peers(&mut self, peers: Peers) {
        self.peers = Some(peers);
    }

    /// Forgets all translations for writes to a page of RAM.
    pub fn forget_writes(&mut self, state: &mut CpuState, physical: u64) {
        let Some(page) = self.memory.host_page(physical) else { return };
        self.news.protected(physical);
        for (set, tables) in state.tlb.iter_mut().enumerate() {
            // Of an address space nothing may be held.
            if set > 0 && !self.known[set].passing {
                continue;
            }
            for entry in &mut tables[1].entries {
                if entry.host(entry.tag) == page.host as u64 {
                    entry.tag = TLB_INVALID;
                }
            }
        }
        state.hints.end_host(page.host as u64);
    }

    /// Whether `address` is canonical for 48-bit linear addresses.
    pub fn canonical(address: u64) -> bool {
        ((address as i64) << 16 >> 16) as u64 == address
    }
}

fn clear(table: &mut TlbTable) {
    for entry in &mut table.entries {
        entry.tag = TLB_INVALID;
    }
}

fn index(address: u64) -> usize {
    (address >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Error code of an entry that another CPU changed before its accessed or dirty bit could be set: never reported.
const CHANGED: u32 = u32::MAX;

struct Walker<'a> {
    mmu: &'a Mmu,
    state: &'a CpuState,
    address: u64,
    access: Access,
    privilege: Privilege,
    code: u32,
    nx: bool,
}

/// What the levels so far allow.
#[derive(Clone, Copy)]
struct Rights {
    write: bool,
    user: bool,
    execute: bool,
}

impl Walker<'_> {
    fn run(&self) -> Result<Walk, PageFault> {
        loop {
            let found = if self.state.long_mode() {
                self.long()
            } else if self.state.cr4_has(cr4::PAE) {
                self.pae()
            } else {
                self.legacy()
            };
            // An entry changed under the walk: what was read of it no longer counts. Each turn means that another
            // CPU has got on.
            match found {
                Err(PageFault { code: CHANGED, .. }) => {}
                found => return found,
            }
        }
    }

    fn fault(&self, bits: u32) -> PageFault {
        PageFault { address: self.address, code: self.code | bits }
    }

    fn entry(&self, address: u64) -> Result<u64, PageFault> {
        // A table outside RAM reads as nothing present.
        let entry = self.mmu.memory.load_u64(address).unwrap_or(0);
        if entry & P == 0 { Err(self.fault(0)) } else { Ok(entry) }
    }

    /// Bits that must be zero in every 8-byte entry.
    fn reserved(&self) -> u64 {
        reserved(self.mmu.physical_bits, self.nx)
    }

    fn long(&self) -> Result<Walk, PageFault> {
        let mut table = self.state.cr3 & 0x000f_ffff_ffff_f000;
        let mut rights = Rights { write: true, user: true, execute: true };
        let mut shift = 39;
        loop {
            let at = table + (self.address >> shift & 0x1ff) * 8;
            let entry = self.entry(at)?;
            let leaf = shift == 12 || (entry & PS != 0 && shift <= 30);
            let mut reserved = self.reserved();
            if shift == 39 {
                reserved |= PS;
            }
            if leaf && shift > 12 {
                // Bit 12 is PAT; the bits from 13 up to the page's size are reserved.
                reserved |= (1u64 << shift) - (1 << 13);
            }
            if entry & reserved != 0 {
                return Err(self.fault(fault::PRESENT | fault::RESERVED));
            }
            rights.write &= entry & W != 0;
            rights.user &= entry & U != 0;
            rights.execute &= entry & NX == 0;
            if leaf {
                self.check(rights)?;
                self.mark(at, entry, true)?;
                let base = entry & 0x000f_ffff_ffff_f000 & !((1u64 << shift) - 1);
                return Ok(self.found(base, shift, entry & G != 0, rights));
            }
            self.mark(at, entry, false)?;
            table = entry & 0x000f_ffff_ffff_f000;
            shift -= 9;
        }
    }

    fn pae(&self) -> Result<Walk, PageFault> {
        let address = self.address & u64::from(u32::MAX);
        let pointer = self.state.cr3 & 0xffff_ffe0;
        // The four page-directory pointers have no rights of their own.
        let mut table = self.entry(pointer + (address >> 30) * 8)? & 0x000f_ffff_ffff_f000;
        let mut rights = Rights { write: true, user: true, execute: true };
        for shift in [21, 12] {
            let at = table + (address >> shift & 0x1ff) * 8;
            let entry = self.entry(at)?;
            let leaf = shift == 12 || entry & PS != 0;
            let large = if leaf && shift == 21 { (1u64 << 21) - (1 << 13) } else { 0 };
            if entry & (self.reserved() | large) != 0 {
                return Err(self.fault(fault::PRESENT | fault::RESERVED));
            }
            rights.write &= entry & W != 0;
            rights.user &= entry & U != 0;
            rights.execute &= entry & NX == 0;
            if leaf {
                self.check(rights)?;
                self.mark(at, entry, true)?;
                let base = entry & 0x000f_ffff_ffff_f000 & !((1u64 << shift) - 1);
                return Ok(self.found(base, shift, entry & G != 0, rights));
            }
            self.mark(at, entry, false)?;
            table = entry & 0x000f_ffff_ffff_f000;
        }
        Err(self.fault(0))
    }

    fn legacy(&self) -> Result<Walk, PageFault> {
        let address = self.address & u64::from(u32::MAX);
        let mut table = self.state.cr3 & 0xffff_f000;
        let mut rights = Rights { write: true, user: true, execute: true };
        for shift in [22, 12] {
            let at = table + (address >> shift & 0x3ff) * 4;
            let entry = u64::from(self.mmu.memory.load_u32(at).unwrap_or(0));
            if entry & P == 0 {
                return Err(self.fault(0));
            }
            rights.write &= entry & W != 0;
            rights.user &= entry & U != 0;
            let large = shift == 22 && entry & PS != 0 && self.state.cr4_has(cr4::PSE);
            if large && entry & (1 << 21) != 0 {
                return Err(self.fault(fault::PRESENT | fault::RESERVED));
            }
            if shift == 12 || large {
                self.check(rights)?;
                self.mark32(at, entry, true)?;
                let base = if large {
                    // PSE-36: bits 13 to 20 of the entry are bits 32 to 39 of the address.
                    entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
                } else {
                    entry & 0xffff_f000
                };
                return Ok(self.found(base, shift, entry & G != 0, rights));
            }
            self.mark32(at, entry, false)?;
            table = entry & 0xffff_f000;
        }
        Err(self.fault(0))
    }

    fn found(&self, base: u64, shift: u32, global: bool, rights: Rights) -> Walk {
        let inside = (1u64 << shift) - 1;
        let global = global && self.state.cr4_has(cr4::PGE);
        Walk { physical: base | self.address & inside, page_shift: shift, global, user: rights.user }
    }

    /// Access rights (Intel SDM 3, 4.6).
    fn check(&self, rights: Rights) -> Result<(), PageFault> {
        let supervisor = self.privilege != Privilege::User;
        let allowed = match self.access {
            Access::Read => !supervisor || !rights.user || !self.smap(),
            Access::Write if supervisor => {
                (rights.write || self.state.cr0 & cr0::WP == 0) && (!rights.user || !self.smap())
            }
            Access::Write => rights.write,
            Access::Fetch => {
                (rights.execute || !self.nx) && !(supervisor && rights.user && self.state.cr4_has(cr4::SMEP))
            }
        };
        if allowed && (supervisor || rights.user) { Ok(()) } else { Err(self.fault(fault::PRESENT)) }
    }

    /// Supervisor accesses to user pages are forbidden now.
    fn smap(&self) -> bool {
        let explicit = self.privilege == Privilege::Supervisor && self.state.rflags & rflags::AC != 0;
        self.state.cr4_has(cr4::SMAP) && !explicit
    }

    fn mark(&self, at: u64, entry: u64, leaf: bool) -> Result<(), PageFault> {
        let bits = self.wanted(leaf);
        if entry & bits == bits {
            return Ok(());
        }
        // Fails only if the table is not RAM, and then `entry` was not present.
        let set = self.mmu.memory.atomic_u64(at, |cell| {
            cell.compare_exchange(entry, entry | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        if set == Ok(false) { Err(self.fault(CHANGED)) } else { Ok(()) }
    }

    fn mark32(&self, at: u64, entry: u64, leaf: bool) -> Result<(), PageFault> {
        let (old, bits) = (entry as u32, self.wanted(leaf) as u32);
        if old & bits == bits {
            return Ok(());
        }
        let set = self.mmu.memory.atomic_u32(at, |cell| {
            cell.compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        if set == Ok(false) { Err(self.fault(CHANGED)) } else { Ok(()) }
    }

    fn wanted(&self, leaf: bool) -> u64 {
        if leaf && self.access == Access::Write { A | D } else { A }
    }
}

/// The linear address of `offset` in segment `segment` for 64-bit code: only FS and GS have a base.
pub fn linear64(state: &CpuState, segment: usize, offset: u64) -> u64 {
    if segment >= seg::FS { offset.wrapping_add(state.segments[segment].base) } else { offset }
}

/// Bits that must be zero in every 8-byte entry.
fn reserved(physical_bits: u32, nx: bool) -> u64 {
    let above = !0u64 << physical_bits & !(0xfff << 52);
    if nx { above } else { above | NX }
}
