//! How the host holds guest RAM: in which pages, when it finds them, from which of its nodes, and whether it may take them
//! away again.
//!
//! The order matters: [`Placement`]s and the size of pages must be known before a page is touched; then RAM is
//! [populated](GuestMemory::populate), then [locked](GuestMemory::lock).

use crate::mapping::Backing;
use crate::{GuestMemory, PAGE_SIZE};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

/// In which pages the host holds guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// Of 4 KiB.
    Small,
    /// Large ones where the host finds some (`Documentation/admin-guide/mm/transhuge.rst` of Linux).
    #[default]
    Transparent,
    /// Of 2 MiB, from the host's pool (`Documentation/admin-guide/mm/hugetlbpage.rst`).
    Huge2M,
    /// Of 1 GiB, from the host's pool.
    Huge1G,
}

impl Pages {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Small, Self::Transparent, Self::Huge2M, Self::Huge1G];

    /// As options call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "off",
            Self::Transparent => "thp",
            Self::Huge2M => "2M",
            Self::Huge1G => "1G",
        }
    }

    /// Bytes of a page, the least that there are.
    pub fn size(self) -> u64 {
        match self {
            Self::Small | Self::Transparent => PAGE_SIZE,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }

    /// Of which pool's size they are, if they are of a pool.
    pub(crate) fn of_pool(self) -> Option<u64> {
        matches!(self, Self::Huge2M | Self::Huge1G).then(|| self.size())
    }
}

/// Whether the host may page guest RAM out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lock {
    /// It may.
    #[default]
    Off,
    /// Not what the guest has touched.
    OnFault,
    /// Not at all: all of it is resident from the start.
    On,
}

impl Lock {
    /// As options call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::OnFault => "onfault",
            Self::On => "on",
        }
    }
}

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Provision {
    /// Private, or shared with other processes. Pages of a pool are always shared.
    pub backing: Backing,
    /// In which pages.
    pub pages: Pages,
    /// The kernel may merge pages that are alike (KSM); only of private memory.
    pub mergeable: bool,
}

/// Why the host does not hold guest RAM as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// RAM, or a node of it, has a size or place that its pages do not fit.
    #[error(
        "{len} bytes of guest RAM from {base:#x} on are not made of whole {} pages: choose another --memory, or hugepages=thp",
        pages.name()
    )]
    Whole {
        /// Guest-physical start.
        base: u64,
        /// Bytes.
        len: u64,
        /// The pages.
        pages: Pages,
    },
    /// The pool is too small.
    #[error(
        "the host's pool has not {count} free huge pages of {} ({source}): as root, write how many there shall be to \
         /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages, or use hugepages=thp",
        pages.name(), pages.size() >> 10
    )]
    Pool {
        /// How many are wanted.
        count: u64,
        /// Which.
        pages: Pages,
        /// The host's answer.
        source: io::Error,
    },
    /// Shared memory cannot be merged.
    #[error(
        "mergeable needs memory that is this process's own, but the software engine, huge pages of the pool and cards of other \
         processes (--net switch, vhost-user) need memory that is shared: leave out one of them"
    )]
    Shared,
    /// The host's kernel merges nothing.
    #[error("this host's kernel has no KSM ({0}): leave out mergeable")]
    Merging(io::Error),
    /// There is not as much memory now.
    #[error("the host cannot give all of guest RAM now ({0}): use a smaller --memory, or leave out prealloc")]
    Populate(io::Error),
    /// Memory cannot be locked.
    #[error(
        "the host does not let {len} bytes of guest RAM be locked ({source}): raise the limit (ulimit -l), or run yado with \
         CAP_IPC_LOCK, or leave out lock"
    )]
    Lock {
        /// Bytes.
        len: u64,
        /// The host's answer.
        source: io::Error,
    },
    /// Memory cannot come from there.
    #[error("guest RAM cannot come from {placement} ({source}); this host has memory on nodes {have}")]
    Place {
        /// What was asked for.
        placement: Placement,
        /// What there is.
        have: String,
        /// The host's answer.
        source: io::Error,
    },
}

impl Provision {
    /// Whether memory of that layout can be held so at all.
    pub(crate) fn check(&self, layout: &[(u64, u64)]) -> Result<(), Error> {
        let size = self.pages.size();
        for &(base, len) in layout {
            if !base.is_multiple_of(size) || !len.is_multiple_of(size) {
                return Err(Error::Whole { base, len, pages: self.pages });
            }
        }
        if self.mergeable && (self.backing == Backing::Shared || self.pages.of_pool().is_some()) {
            return Err(Error::Shared);
        }
        Ok(())
    }

    /// What the failure of a mapping of `len` bytes means; gives it back if it means nothing special.
    pub(crate) fn explain(&self, len: u64, source: io::Error) -> Result<Error, io::Error> {
        let invalid = source.raw_os_error() == Some(libc::EINVAL);
        match self.pages.of_pool() {
            Some(size) => {
                let count = len.checked_div(size).unwrap_or(0);
                Ok(Error::Pool { count, pages: self.pages, source })
            }
            None if self.mergeable && invalid => Ok(Error::Merging(source)),
            None => Err(source),
        }
    }
}

/// How memory is spread over nodes of the host (set_mempolicy(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// From these nodes only.
    #[default]
    Bind,
    /// From this node while it has some.
    Preferred,
    /// From these nodes in turn.
    Interleave,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bind, Self::Preferred, Self::Interleave];

    /// As options call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Preferred => "preferred",
            Self::Interleave => "interleave",
        }
    }
}

/// From which nodes of the host memory comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// How.
    pub policy: Policy,
    /// Numbers of nodes, below [`Placement::NODES_MAX`].
    pub nodes: Vec<u32>,
}

impl Placement {
    /// Linux has at most so many nodes.
    pub const NODES_MAX: u32 = 1024;

    /// The number of the policy (`linux/mempolicy.h`).
    pub(crate) fn mode(&self) -> libc::c_int {
        match self.policy {
            Policy::Preferred => libc::MPOL_PREFERRED,
            Policy::Bind => libc::MPOL_BIND,
            Policy::Interleave => libc::MPOL_INTERLEAVE,
        }
    }

    /// A bit for each node.
    pub(crate) fn mask(&self) -> [u64; 16] {
        let mut mask = [0u64; 16];
        for &node in &self.nodes {
            if let Some(word) = mask.get_mut((node / 64) as usize) {
                *word |= 1u64.wrapping_shl(node);
            }
        }
        mask
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes: Vec<_> = self.nodes.iter().map(u32::to_string).collect();
        write!(f, "host node {} ({})", nodes.join(", "), self.policy.name())
    }
}

/// What one thread populates at a time: a page at least.
const STEP: u64 = 64 << 20;

impl GuestMemory {
    /// How the host holds this memory.
    pub fn provision(&self) -> Provision {
        self.0.provision
    }

    /// Has the host find all of RAM now, with `threads` threads; `progress` hears of bytes that are done.
    pub fn populate(&self, threads: usize, mut progress: impl FnMut(u64)) -> Result<(), Error> {
        let step = STEP.max(self.provision().pages.size());
        let (next, len) = (AtomicU64::new(0), self.len());
        let mapping = &self.0.mapping;
        std::thread::scope(|scope| {
            let (done, each) = mpsc::channel();
            for _ in 0..threads.max(1) {
                let (done, next) = (done.clone(), &next);
                scope.spawn(move || {
                    loop {
                        let from = next.fetch_add(step, Ordering::Relaxed);
                        let bytes = step.min(len.saturating_sub(from));
                        let (Ok(offset), Ok(size)) = (usize::try_from(from), usize::try_from(bytes)) else {
                            break;
                        };
                        if bytes == 0 {
                            break;
                        }
                        let result = mapping.populate(offset, size).map(|()| bytes);
                        let failed = result.is_err();
                        if done.send(result).is_err() || failed {
                            break;
                        }
                    }
                });
            }
            drop(done);
            // The first failure counts; the others' sends fail then, and they end.
            each.into_iter().try_for_each(|result| result.map(&mut progress)).map_err(Error::Populate)
        })
    }

    /// Keeps the host from paging RAM out.
    pub fn lock(&self, lock: Lock) -> Result<(), Error> {
        self.0.mapping.lock(lock).map_err(|source| Error::Lock { len: self.len(), source })
    }

    /// Says where a range of RAM comes from that nobody has touched yet.
    pub fn place(&self, base: u64, len: u64, placement: &Placement) -> Result<(), Error> {
        let pages = self.provision().pages;
        let whole = base.is_multiple_of(pages.size()) && len.is_multiple_of(pages.size());
        let range = self.offset(base, len).ok().filter(|_| whole).zip(usize::try_from(len).ok());
        let (offset, bytes) = range.ok_or(Error::Whole { base, len, pages })?;
        self.0.mapping.place(offset, bytes, placement).map_err(|source| Error::Place {
            placement: placement.clone(),
            have: host_nodes(),
            source,
        })
    }
}

/// Which nodes of this host have memory, as the kernel writes it.
fn host_nodes() -> String {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let nodes = nodes.trim();
    if nodes.is_empty() { "0 only".to_owned() } else { nodes.to_owned() }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::fs;

    const RAM: u64 = 16 << 20;

    fn provided(provision: Provision) -> Result<GuestMemory, crate::Error> {
        GuestMemory::provided(&[(0, RAM)], provision)
    }

    /// Of the mapping that holds `memory`: a line of the kernel's account of this process.
    fn account(memory: &GuestMemory, field: &str) -> String {
        let start = format!("{:x}-", memory.host_page(0).unwrap().host as usize);
        let text = fs::read_to_string("/proc/self/smaps").unwrap();
        let from = text.find(&format!("\n{start}")).map_or(0, |at| at + 1);
        assert!(text[from..].starts_with(&start), "the mapping begins at guest RAM");
        text[from..].lines().find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
    }

    fn kib(memory: &GuestMemory, field: &str) -> u64 {
        account(memory, field).split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn nothing_is_resident_until_it_is_populated_and_then_all_is() {
        for backing in [Backing::Private, Backing::Shared] {
            for threads in [1, 3] {
                let memory = provided(Provision { backing, pages: Pages::Small, mergeable: false }).unwrap();
                assert_eq!(kib(&memory, "Rss:"), 0);
                memory.write(0x5000, b"kept").unwrap();
                let mut done = 0;
                memory.populate(threads, |bytes| done += bytes).unwrap();
                assert_eq!((done, kib(&memory, "Rss:")), (RAM, RAM >> 10));
                assert_eq!(&memory.read_array::<4>(0x5000).unwrap(), b"kept");
            }
        }
    }

    #[test]
    fn kernels_without_populate_touch_every_page() {
        let memory = provided(Provision { pages: Pages::Small, ..Provision::default() }).unwrap();
        memory.write(0x5000, b"kept").unwrap();
        memory.0.mapping.touch(0, RAM as usize).unwrap();
        assert_eq!(kib(&memory, "Rss:"), RAM >> 10);
        assert_eq!(&memory.read_array::<4>(0x5000).unwrap(), b"kept");
    }

    #[test]
    fn the_kernel_hears_what_is_wanted() {
        let flags = |provision| account(&provided(provision).unwrap(), "VmFlags:");
        let has = |flags: &str, flag: &str| flags.split_whitespace().any(|word| word == flag);
        if fs::exists("/sys/kernel/mm/transparent_hugepage/enabled").unwrap() {
            assert!(has(&flags(Provision::default()), "hg"));
            assert!(has(&flags(Provision { pages: Pages::Small, ..Provision::default() }), "nh"));
        }
        if fs::exists("/sys/kernel/mm/ksm/run").unwrap() {
            assert!(has(&flags(Provision { mergeable: true, ..Provision::default() }), "mg"));
            assert!(!has(&flags(Provision::default()), "mg"));
        }
        let shared = Provision { backing: Backing::Shared, mergeable: true, ..Provision::default() };
        assert!(matches!(provided(shared), Err(crate::Error::Provision(Error::Shared))));
    }

    #[test]
    fn locked_memory_is_locked() {
        let memory = provided(Provision::default()).unwrap();
        match memory.lock(Lock::On) {
            Ok(()) => assert_eq!(kib(&memory, "Locked:"), RAM >> 10),
            // A user without the right hears how to get it.
            Err(error) => assert!(error.to_string().contains("ulimit -l"), "{error}"),
        }
    }

    #[test]
    fn pages_of_the_pool_need_whole_ones_and_a_pool() {
        for pages in [Pages::Huge2M, Pages::Huge1G] {
            let provision = Provision { pages, ..Provision::default() };
            let odd = GuestMemory::provided(&[(0, 3 << 20)], provision).unwrap_err().to_string();
            assert!(odd.contains(&format!("whole {} pages", pages.name())), "{odd}");
        }
        // More than any host has.
        let provision = Provision { pages: Pages::Huge1G, ..Provision::default() };
        let none = GuestMemory::provided(&[(0, 1 << 44)], provision).unwrap_err().to_string();
        assert!(none.contains("hugepages-1048576kB/nr_hugepages"), "{none}");
    }

    #[test]
    fn pages_of_the_pool_are_taken_where_the_host_has_some() {
        let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let free: u64 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        if free < RAM >> 21 {
            eprintln!("skipped: this host's pool has {free} free huge pages");
            return;
        }
        let memory = provided(Provision { pages: Pages::Huge2M, ..Provision::default() }).unwrap();
        assert!(memory.file().is_some());
        memory.write(RAM - 4, b"last").unwrap();
        memory.populate(2, |_| {}).unwrap();
        assert_eq!(kib(&memory, "KernelPageSize:"), 2048);
        assert_eq!(kib(&memory, "Shared_Hugetlb:") + kib(&memory, "Private_Hugetlb:"), RAM >> 10);
        assert_eq!(&memory.read_array::<4>(RAM - 4).unwrap(), b"last");
        memory.discard(RAM - 0x1000, 0x1000).unwrap();
        assert_eq!(memory.read_array::<4>(RAM - 4).unwrap(), [0; 4]);
    }

    #[test]
    fn memory_comes_from_nodes_that_there_are() {
        let memory = provided(Provision { pages: Pages::Small, ..Provision::default() }).unwrap();
        if !fs::exists("/sys/devices/system/node/node0").unwrap() {
            eprintln!("skipped: this host's kernel knows no nodes");
            return;
        }
        for policy in Policy::ALL {
            memory.place(0, RAM / 2, &Placement { policy, nodes: vec![0] }).unwrap();
        }
        memory.place(0, RAM / 2, &Placement { policy: Policy::Bind, nodes: vec![0] }).unwrap();
        let start = format!("\n{:x} bind:0", memory.host_page(0).unwrap().host as usize);
        let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
        assert!(maps.contains(&start), "{maps}");
        let nowhere = Placement { policy: Policy::Bind, nodes: vec![1000] };
        let why = memory.place(0, RAM, &nowhere).unwrap_err().to_string();
        assert!(why.contains("host node 1000 (bind)") && why.contains("memory on nodes"), "{why}");
    }

    #[test]
    fn masks_have_a_bit_for_each_node() {
        let mask = Placement { policy: Policy::Bind, nodes: vec![0, 3, 64, 1023, 5000] }.mask();
        assert_eq!((mask[0], mask[1], mask[15]), (0b1001, 1, 1 << 63));
        assert_eq!(mask.iter().map(|word| word.count_ones()).sum::<u32>(), 4);
    }
}
