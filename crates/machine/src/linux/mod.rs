//! What can be known of a Linux guest from outside, without its help: its symbols and the process that a vCPU runs.
//!
//! Everything here reads guest memory that a hostile guest may have arranged: lengths are bounded, answers may be lies, and
//! nothing but names in a report depends on them.

mod btf;
mod kallsyms;
mod paging;

use kallsyms::Symbols;
pub(crate) use paging::Space;

/// Where Linux maps its image: the top 2 GiB, the first half of which is for the kernel, the second for modules.
pub(crate) const KERNEL: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
const MODULES: std::ops::Range<u64> = 0xffff_ffff_c000_0000..0xffff_ffff_ff00_0000;
/// The kernel's half of the address space.
const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;
/// No kernel's image and no BTF is larger.
const IMAGE_BYTES_MAX: u64 = 192 << 20;
const BTF_BYTES_MAX: u64 = 32 << 20;
/// Bytes of `task_struct::comm`.
const NAME_BYTES: usize = 16;

/// A process, as the guest's kernel names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Process {
    /// Process id in the guest (`tgid`).
    pub(crate) id: u32,
    /// The running thread's name.
    pub(crate) name: String,
}

/// Where the kernel keeps what runs on a CPU.
#[derive(Debug, Clone, Copy)]
struct Tasks {
    /// Of the pointer to the running task, from the CPU's GS base.
    current: u64,
    name: u64,
    id: u64,
}

/// A Linux guest's names.
#[derive(Debug)]
pub(crate) struct Linux {
    symbols: Symbols,
    tasks: Option<Tasks>,
}

impl Linux {
    /// Looks for the kernel in an address space that maps it; takes a fraction of a second.
    pub(crate) fn find(space: &Space<'_>) -> Option<Self> {
        let (base, image) = space.image(KERNEL, IMAGE_BYTES_MAX)?;
        let symbols = Symbols::find(base, &image)?;
        drop(image);
        let tasks = tasks(space, &symbols);
        Some(Self { symbols, tasks })
    }

    /// How many functions have names.
    pub(crate) fn functions(&self) -> usize {
        self.symbols.functions()
    }

    /// Whether processes can be told apart.
    pub(crate) fn knows_processes(&self) -> bool {
        self.tasks.is_some()
    }

    /// The function at a kernel address.
    pub(crate) fn function(&self, address: u64) -> &str {
        if MODULES.contains(&address) {
            return "(a module)";
        }
        self.symbols.function(address).unwrap_or("(unknown)")
    }

    /// What runs on the CPU with this GS base (that of the kernel).
    pub(crate) fn process(&self, space: &Space<'_>, gs_base: u64) -> Option<Process> {
        let tasks = self.tasks.filter(|_| gs_base >= KERNEL_HALF)?;
        let task = space.load_u64(gs_base.wrapping_add(tasks.current))?;
        if task < KERNEL_HALF {
            return None;
        }
        let mut name = [0; NAME_BYTES];
        space.read(task.wrapping_add(tasks.name), &mut name)?;
        let mut id = [0; 4];
        space.read(task.wrapping_add(tasks.id), &mut id)?;
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).replace(char::is_control, "?");
        Some(Process { id: u32::from_le_bytes(id), name })
    }
}

/// The kernel's own description of its types says where a task's fields are.
fn tasks(space: &Space<'_>, symbols: &Symbols) -> Option<Tasks> {
    let (start, end) = (symbols.other("__start_BTF")?, symbols.other("__stop_BTF")?);
    let length = end.checked_sub(start).filter(|&length| length <= BTF_BYTES_MAX)?;
    let mut types = vec![0; usize::try_from(length).ok()?];
    space.read(start, &mut types)?;
    // Linux 6.2 moved the pointer to the beginning of `pcpu_hot`.
    let current = symbols.other("current_task").or_else(|| symbols.other("pcpu_hot"))?;
    let field = |name| btf::member(&types, "task_struct", name);
    Some(Tasks { current, name: field("comm")?, id: field("tgid")? })
}
