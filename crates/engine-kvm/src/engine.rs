//! [`KvmEngine`]: one VM of KVM's, its memory and its local APICs.
//!
//! The irqchip is *split*: local APICs in the kernel, where their timers and messages cost no exit and the processor may
//! help; I/O APIC and 8259A are the board's own, the same models as on the software engine. That leaves the rarely used
//! and historically most broken part of the kernel's interrupt code out of the guest's reach.
//!
//! Lock order: each lock alone.

use crate::capability::Capabilities;
use crate::cpuid::Supported;
use crate::dirty::DirtyLog;
use crate::doorbell::Bells;
use crate::host::{Handle, Host, Linux, MsrFilter, Plain};
use crate::ioctl;
use crate::routing::Apics;
use crate::vcpu::{KvmVcpu, host};
use cpu::cpuid::CpuidTable;
use cpu::{Doorbells, Engine, Error, LocalApics, Vcpu, VcpuConfig};
use kvm_bindings as kvm;
use kvm_bindings::{kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region};
use memory::GuestMemory;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The only version there has been since Linux 2.6.22.
const API_VERSION: u32 = 12;
/// Pins of the board's I/O APIC.
const IOAPIC_PINS: u64 = 24;
/// Three pages that KVM needs on Intel processors without unrestricted guests, and one more; below the top of the 4 GiB
/// space, where the board has nothing.
const TSS: u64 = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
/// vCPU ids are 32 bits wide; a message to number 255 is not one to all.
const X2APIC_FLAGS: u64 =
    (kvm::KVM_X2APIC_API_USE_32BIT_IDS | kvm::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) as u64;
/// Capabilities without a choice take 1 for on.
const ON: u64 = 1;

/// How the engine works.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// CPUID has every feature of KVM's own interface, not only those that all engines have.
    pub all_paravirtual: bool,
    /// Pages that guests modify are logged in rings of this many entries, one for each vCPU (a power of two, at most what
    /// this KVM has), instead of a bitmap for each slot.
    pub dirty_ring: Option<u32>,
}

/// What the vCPUs of one VM share.
pub(crate) struct Vm {
    // In the order of their end: the VM before the memory that it maps.
    pub(crate) handle: Handle,
    pub(crate) memory: GuestMemory,
    pub(crate) run_len: usize,
    pub(crate) capabilities: Capabilities,
    pub(crate) msr_indices: Vec<u32>,
    /// kvmclock and the host's TSC when the machine came to stand, and how far TSCs are to be moved back in all.
    standing: Mutex<Standing>,
    pub(crate) dirty: DirtyLog,
}

#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    since: Option<(u64, u64)>,
    /// Of all times that the machine stood: a vCPU that did not run between two of them has both to make up for.
    tsc_back: u64,
}

/// The KVM engine of one VM.
pub struct KvmEngine {
    /// Made with the VM, for only vCPUs tell the TSC's frequency on kernels before 5.18.
    first: Mutex<Option<Handle>>,
    supported: Supported,
    options: Options,
    tsc_hz: u64,
    apics: Arc<Apics>,
    vm: Arc<Vm>,
}

impl KvmEngine {
    /// An engine over `memory`.
    pub fn new(memory: GuestMemory, options: Options) -> Result<Self, Error> {
        Self::on(Arc::new(Linux), memory, options)
    }

    pub(crate) fn on(
        host_kernel: Arc<dyn Host>,
        memory: GuestMemory,
        options: Options,
    ) -> Result<Self, Error> {
        let device = open(host_kernel)?;
        let handle = retried(|| device.make(ioctl::CREATE_VM, 0)).map_err(host("KVM_CREATE_VM"))?;
        let capabilities = Capabilities::of(&handle)?;
        let run_len = device.number(ioctl::GET_VCPU_MMAP_SIZE, 0).map_err(host("KVM_GET_VCPU_MMAP_SIZE"))?;
        let run_len = run_len as usize;
        if run_len < size_of::<kvm::kvm_run>() {
            let why = format!("its kvm_run has {run_len} bytes only; use --engine soft");
            return Err(Error::Unsupported { engine: "kvm", why });
        }
        let supported = supported(&device)?;
        let msr_indices = device.msr_indices().map_err(host("KVM_GET_MSR_INDEX_LIST"))?;
        set_up(&handle, &capabilities)?;
        let dirty = DirtyLog::new(&handle, &capabilities, options.dirty_ring)?;
        let standing = Mutex::default();
        let vm = Arc::new(Vm { handle, memory, run_len, capabilities, msr_indices, standing, dirty });
        vm.map_memory(0)?;
        let first = vm.handle.make(ioctl::CREATE_VCPU, 0).map_err(host("KVM_CREATE_VCPU"))?;
        let khz = first.number(ioctl::GET_TSC_KHZ, 0).map_err(host("KVM_GET_TSC_KHZ"))?;
        let apics = Arc::new(Apics::new(vm.clone()));
        Ok(Self {
            first: Mutex::new(Some(first)),
            supported,
            options,
            tsc_hz: u64::from(khz).saturating_mul(1000),
            apics,
            vm,
        })
    }
}

fn open(host_kernel: Arc<dyn Host>) -> Result<Handle, Error> {
    let device = Handle::open(host_kernel).map_err(host("opening /dev/kvm"))?;
    match device.number(ioctl::GET_API_VERSION, 0).map_err(host("KVM_GET_API_VERSION"))? {
        API_VERSION => Ok(device),
        version => Err(Error::Unsupported {
            engine: "kvm",
            why: format!("/dev/kvm speaks version {version} of its interface, not {API_VERSION}"),
        }),
    }
}

/// Making a VM is interrupted by signals on some kernels.
fn retried(make: impl Fn() -> io::Result<Handle>) -> io::Result<Handle> {
    const TRIES: usize = 16;
    let mut last = io::Error::from(io::ErrorKind::Interrupted);
    for _ in 0..TRIES {
        match make() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => last = error,
            other => return other,
        }
    }
    Err(last)
}

fn supported(device: &Handle) -> Result<Supported, Error> {
    let mut room = 128;
    loop {
        let entries = vec![kvm::kvm_cpuid_entry2::zeroed(); room];
        match device.list(ioctl::GET_SUPPORTED_CPUID, &entries) {
            Ok((entries, _)) => return Ok(Supported::new(entries)),
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) && room < 4096 => {
                room = room.saturating_mul(2);
            }
            Err(error) => return Err(host("KVM_GET_SUPPORTED_CPUID")(error)),
        }
    }
}

/// Switches a capability of a VM or vCPU on.
pub(crate) fn enable(of: &Handle, cap: u32, argument: u64, what: &'static str) -> Result<(), Error> {
    let mut asked = kvm_enable_cap { cap, ..kvm_enable_cap::zeroed() };
    if let Some(first) = asked.args.first_mut() {
        *first = argument;
    }
    of.set(ioctl::ENABLE_CAP, asked).map_err(host(what)).map(|_| ())
}

/// Everything that must be said before there are vCPUs.
fn set_up(vm: &Handle, capabilities: &Capabilities) -> Result<(), Error> {
    vm.number(ioctl::SET_TSS_ADDR, TSS).map_err(host("KVM_SET_TSS_ADDR"))?;
    vm.set(ioctl::SET_IDENTITY_MAP_ADDR, IDENTITY_MAP).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
    enable(vm, kvm::KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS, "KVM_CAP_SPLIT_IRQCHIP")?;
    if capabilities.x2apic_api {
        enable(vm, kvm::KVM_CAP_X2APIC_API, X2APIC_FLAGS, "KVM_CAP_X2APIC_API")?;
    }
    let reasons = u64::from(kvm::KVM_MSR_EXIT_REASON_UNKNOWN | kvm::KVM_MSR_EXIT_REASON_FILTER);
    enable(vm, kvm::KVM_CAP_X86_USER_SPACE_MSR, reasons, "KVM_CAP_X86_USER_SPACE_MSR")?;
    filter_msrs(vm)?;
    if capabilities.triple_fault {
        enable(vm, kvm::KVM_CAP_X86_TRIPLE_FAULT_EVENT, ON, "KVM_CAP_X86_TRIPLE_FAULT_EVENT")?;
    }
    Ok(())
}

/// MSRs that the machine answers although KVM knows them, so that guests see the same on both engines: AMD's HWCR, of
/// which KVM before 6.7 forgets that the TSC counts at P0 frequency (bit 24), which Linux complains of.
const MACHINES: [u32; 1] = [0xc001_0015];

/// Lets all MSRs pass but [`MACHINES`].
#[allow(unsafe_code)]
fn filter_msrs(vm: &Handle) -> Result<(), Error> {
    // A bitmap of one MSR each: bit 0 is clear, the access goes to the machine.
    let denied = [0u8; 8];
    let mut filter = MsrFilter::zeroed();
    filter.flags = kvm::KVM_MSR_FILTER_DEFAULT_ALLOW;
    for (range, base) in filter.ranges.iter_mut().zip(MACHINES) {
        range.flags = kvm::KVM_MSR_FILTER_READ | kvm::KVM_MSR_FILTER_WRITE;
        (range.nmsrs, range.base) = (1, base);
        range.bitmap = denied.as_ptr() as u64;
    }
    // SAFETY: the kernel copies each bitmap, of one bit rounded up to a long, before the call returns.
    unsafe { vm.follow(ioctl::X86_SET_MSR_FILTER, filter) }
        .map_err(host("KVM_X86_SET_MSR_FILTER"))
        .map(|_| ())
}

impl Vm {
    /// Gives the VM all RAM, one slot for each region. Told again with other flags, slots change them.
    #[allow(unsafe_code)]
    pub(crate) fn map_memory(&self, flags: u32) -> Result<(), Error> {
        for (slot, region) in (0u32..).zip(self.memory.regions()) {
            let at = self.memory.host_range(region.base, region.len, false);
            let at = at.map_err(|_| host("finding guest RAM")(io::ErrorKind::NotFound.into()))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.base,
                memory_size: region.len,
                userspace_addr: at as u64,
            };
            // SAFETY: the range is a mapping of `memory`, which this VM owns a handle of and outlives it with.
            unsafe { self.handle.follow(ioctl::SET_USER_MEMORY_REGION, region) }
                .map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// kvmclock in nanoseconds: where it stands, or now. `None` if the kernel has none.
    pub(crate) fn clock_ns(&self) -> Option<u64> {
        let standing = self.standing();
        match standing.since {
            Some((clock, _)) => Some(clock),
            None => self.handle.get(ioctl::GET_CLOCK).ok().map(|clock: kvm_clock_data| clock.clock),
        }
    }

    /// kvmclock goes on from there: when the machine does, if it stands.
    pub(crate) fn set_clock_ns(&self, clock: u64) -> Result<(), Error> {
        let mut standing = self.standing();
        if let Some((stands_at, _)) = &mut standing.since {
            *stands_at = clock;
            return Ok(());
        }
        let clock = kvm_clock_data { clock, ..kvm_clock_data::zeroed() };
        self.handle.set(ioctl::SET_CLOCK, clock).map_err(host("KVM_SET_CLOCK")).map(|_| ())
    }

    /// How far TSCs are to be moved back since the VM was made.
    pub(crate) fn tsc_back(&self) -> u64 {
        self.standing().tsc_back
    }

    /// Moves a vCPU's TSC back; `None` if this kernel cannot.
    #[allow(unsafe_code)]
    pub(crate) fn move_tsc(&self, vcpu: &Handle, back: u64) -> Option<()> {
        let mut word = 0u64;
        let offset = &raw mut word;
        let attribute = kvm::kvm_device_attr {
            group: kvm::KVM_VCPU_TSC_CTRL,
            attr: kvm::KVM_VCPU_TSC_OFFSET.into(),
            addr: offset as u64,
            ..kvm::kvm_device_attr::zeroed()
        };
        // SAFETY: this attribute is eight bytes, and `word` lives until after both calls.
        unsafe {
            vcpu.follow(ioctl::GET_DEVICE_ATTR, attribute).ok()?;
            offset.write(offset.read().wrapping_sub(back));
            vcpu.follow(ioctl::SET_DEVICE_ATTR, attribute).ok()?;
        }
        Some(())
    }
}

/// The host's time-stamp counter.
#[allow(unsafe_code)]
fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error> {
        let VcpuConfig { index, cpuid } = config;
        let max = self.vm.capabilities.vcpus_max;
        if index >= max {
            let why = format!("its KVM allows {max} vCPUs; use fewer --cpus");
            return Err(Error::Unsupported { engine: "kvm", why });
        }
        let first = match index {
            0 => self.first.lock().unwrap_or_else(PoisonError::into_inner).take(),
            _ => None,
        };
        let handle = match first {
            Some(handle) => handle,
            None => self.vm.handle.make(ioctl::CREATE_VCPU, index.into()).map_err(host("KVM_CREATE_VCPU"))?,
        };
        Ok(Box::new(KvmVcpu::new(handle, index, &cpuid, self.vm.clone())?))
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    fn offer(&self, table: CpuidTable) -> CpuidTable {
        self.supported.offer(table, self.options.all_paravirtual, self.vm.capabilities.tsc_deadline)
    }

    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        Some(self.apics.clone())
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(Bells::new(self.vm.clone())))
    }

    fn log_writes(&self, wanted: bool) -> Result<(), Error> {
        self.vm.map_memory(if wanted { kvm::KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn collect_writes(&self) -> Result<u64, Error> {
        self.vm.collect_dirty()
    }

    fn stand(&self) {
        let clock: io::Result<kvm_clock_data> = self.vm.handle.get(ioctl::GET_CLOCK);
        self.vm.standing().since = clock.ok().map(|clock| (clock.clock, host_tsc()));
    }

    fn go_on(&self) {
        let mut standing = self.vm.standing();
        let Some((clock, tsc)) = standing.since.take() else { return };
        standing.tsc_back = standing.tsc_back.wrapping_add(host_tsc().wrapping_sub(tsc));
        drop(standing);
        // Refused only if the kernel has no clock to set, and then the guest has none to see.
        let _ = self.vm.handle.set(ioctl::SET_CLOCK, kvm_clock_data { clock, ..kvm_clock_data::zeroed() });
    }
}
