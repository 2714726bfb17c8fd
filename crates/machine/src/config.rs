//! What a machine is made from.

use crate::numa::NumaConfig;
use std::path::PathBuf;

/// Which CPU engine runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// yado's own engine.
    #[default]
    Soft,
    /// /dev/kvm.
    Kvm,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskInterface {
    /// NVMe: its driver is built into Debian's kernels.
    #[default]
    Nvme,
    /// virtio-blk: a module in Debian's kernels.
    Virtio,
}

/// What the guest's request does that the host could not do: QEMU's `werror` and `rerror`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The guest gets an I/O error.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The machine stands still; the request is done again when somebody lets it go on.
    Stop,
    /// As `Stop` if the host has no space, and then as soon as it has; other errors are reported.
    Enospc,
}

impl OnError {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Report, Self::Ignore, Self::Stop, Self::Enospc];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }
}

impl std::str::FromStr for OnError {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|what| what.name() == name);
        known.ok_or_else(|| format!("{name:?} is none of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image or block device.
    pub path: PathBuf,
    /// Its format. Nobody guesses: a guest can write anything into a raw image.
    pub format: image::format::Format,
    /// The guest cannot write.
    pub read_only: bool,
    /// What stands between the guest's writes and stable storage; the guest may switch its part of it.
    pub cache: image::storage::CacheMode,
    /// What becomes of zeroes that the guest writes.
    pub detect_zeroes: image::DetectZeroes,
    /// What becomes of what cannot be written...
    pub write_error: OnError,
    /// ...and read; there is always space to read.
    pub read_error: OnError,
    /// Writes go to a file without a name in this directory and are gone with the machine.
    pub overlay: Option<PathBuf>,
    /// Where the guest finds it.
    pub interface: DiskInterface,
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkKind {
    /// yado's user-mode gateway.
    User(net::gateway::Config),
    /// A tap of the host's, by its name.
    Tap(String),
    /// Another process.
    BackEnd(BackEnd),
}

/// Who carries a card's frames in another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackEnd {
    /// A switch of yado's.
    Switch {
        /// Its control socket.
        control: PathBuf,
        /// The name of the port.
        port: String,
        /// What the port is allowed.
        spec: Box<net::switch::PortSpec>,
    },
    /// Whoever listens at a socket, with vhost-user.
    Socket(PathBuf),
}

impl std::fmt::Display for BackEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Switch { control, port, .. } => {
                write!(f, "port {port} of the switch at {}", control.display())
            }
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

impl MachineConfig {
    /// Whether other processes have to reach guest RAM.
    pub(crate) fn shares_memory(&self) -> bool {
        self.networks.iter().any(|network| matches!(network.kind, NetworkKind::BackEnd(_)))
    }
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Its address.
    pub address: [u8; 6],
    /// The longest packet, in bytes.
    pub mtu: u16,
    /// Where its frames go.
    pub kind: NetworkKind,
}

/// How the host holds the guest's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryPolicy {
    /// In which pages.
    pub pages: memory::Pages,
    /// All of it is found before the guest starts, by so many threads.
    pub populate: Option<usize>,
    /// Whether it may be paged out.
    pub lock: memory::Lock,
    /// The kernel may merge pages that are alike (KSM).
    pub mergeable: bool,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// vCPUs.
    pub cpus: u32,
    /// RAM in bytes, rounded up to whole mebibytes.
    pub memory: u64,
    /// How the host holds it.
    pub memory_policy: MemoryPolicy,
    /// Which vCPUs and which RAM are near to each other.
    pub numa: NumaConfig,
    /// On which CPUs of the host its threads run, and how urgently; prepared.
    pub scheduling: resources::Scheduling,
    /// Control groups that its process is in: only shown.
    pub groups: resources::Groups,
    /// The engine.
    pub engine: EngineKind,
    /// CPU model (`cpu::cpuid`), the best this host can offer if `None`.
    pub cpu_model: Option<String>,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initrd; for a multiboot kernel a comma-separated list of modules, each followed by its arguments.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network cards, in the order in which the guest finds them.
    pub networks: Vec<NetworkConfig>,
    /// Names of virtio-console ports (`/dev/virtio-ports/NAME` in the guest); none: no such device.
    pub ports: Vec<String>,
    /// A virtio-rng device.
    pub entropy: bool,
    /// A guest that resets the machine boots again; else the machine ends.
    pub restart: bool,
    /// QEMU's isa-debug-exit and pc-testdev.
    pub test_devices: bool,
    /// The software engine translates hot code; else it single-steps everything, many times slower.
    pub translate: bool,
    /// The software engine compares every translated block with the single-step tier: very slow, one vCPU.
    pub verify: bool,
    /// The guest's clocks run so many times slower than the host's, so that one in lock-step finds itself in time. Software
    /// engine only.
    pub clock_divisor: u32,
    /// Print every exit to standard error: for those who work on engines and devices.
    pub log_exits: bool,
}

impl DiskConfig {
    /// A raw image that the guest writes, as any disk is by default.
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: image::format::Format::Raw,
            read_only: false,
            cache: Default::default(),
            detect_zeroes: Default::default(),
            write_error: OnError::Enospc,
            read_error: OnError::Report,
            overlay: None,
            interface: DiskInterface::default(),
        }
    }
}

impl MachineConfig {
    /// One vCPU, 512 MiB, this kernel, nothing else.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            cpus: 1,
            memory: 512 << 20,
            memory_policy: MemoryPolicy::default(),
            numa: NumaConfig::default(),
            scheduling: resources::Scheduling::default(),
            groups: resources::Groups::default(),
            engine: EngineKind::default(),
            cpu_model: None,
            kernel: kernel.into(),
            initrd: None,
            command_line: String::new(),
            disks: Vec::new(),
            networks: Vec::new(),
            ports: Vec::new(),
            entropy: true,
            restart: true,
            test_devices: false,
            translate: true,
            verify: false,
            clock_divisor: 1,
            log_exits: false,
        }
    }
}
