//! The command line: every command and option, in one place, so that completions and man pages come from it.

use crate::exporter::Where;
use crate::host_share::{Limit, Pin, Urgency};
use crate::provision::{Memory, Numa};
use crate::size::Size;
use clap::builder::ValueHint;
use clap::{Args, Parser, Subcommand, ValueEnum};
use image::DetectZeroes;
use image::format::Format;
use image::storage::CacheMode;
use machine::OnError;
use net::gateway::{Forward, MTU_DEFAULT, Transport};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// yado runs virtual machines: a real Debian guest on any x86-64 Linux host
#[derive(Debug, Parser)]
#[command(name = "yado", version = env!("YADO_VERSION"), propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Exit codes: the guest command's own; 0 guest powered off, 2 bad usage, 3 guest panicked, \
4 guest crashed, 125 yado failed, 126 command not executable, 127 command not found, 128+N killed by signal N."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest; with COMMAND, run it inside and leave with its exit code
    Run(Box<Run>),
    /// List guests
    #[command(visible_alias = "ls")]
    Ps(Ps),
    /// Attach to a guest's serial console (Ctrl-] leaves)
    Console(Named),
    /// Run a command in a running guest
    Exec(Exec),
    /// Power a guest off
    Stop(Stop),
    /// Make a guest stand still
    Pause(Named),
    /// Let a paused guest go on
    Resume(Named),
    /// Show what a guest's console printed
    Logs(Logs),
    /// Show a guest's live state as JSON
    Inspect(Named),
    /// Show what a guest's vCPUs do, and where its time goes
    Stats(Stats),
    /// Remove stopped guests with their disks
    Rm(Rm),
    /// Make, inspect, copy and repair disk images
    Image(crate::image::arguments::Image),
    /// Make, watch and change switches: networks of guests
    Switch(crate::switch::arguments::Switch),
    /// Watch what goes through the network
    Net(crate::switch::arguments::Net),
    /// Show what the cache of downloads and images holds
    Cache(Cache),
    /// Tell what this host offers, what is missing, and what to do about it
    Doctor(Doctor),
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Remove control groups, named on standard input, when that ends: `run` starts it
    #[command(hide = true)]
    CgroupKeeper,
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man {
        /// Where to
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

/// What to boot and how.
#[derive(Debug, Args)]
pub struct Run {
    /// `debian` (current stable), `debian:SUITE`, or a raw disk image
    #[arg(value_name = "GUEST", required_unless_present = "kernel")]
    pub guest: Option<String>,

    /// Command to run in the guest, after `--`
    #[arg(last = true, value_name = "COMMAND")]
    pub argv: Vec<std::ffi::OsString>,

    /// Boot this kernel directly: a bzImage, an ELF or a multiboot image
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Boot")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for --kernel (for multiboot: modules, FILE[ ARGS][,FILE...])
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "kernel", help_heading = "Boot")]
    pub initrd: Option<String>,

    /// Kernel command line; with a Debian guest it is added to the default one. To a Linux kernel's, `console=ttyS0`
    /// and `panic=-1` are added unless it names others
    #[arg(long, value_name = "STRING", help_heading = "Boot")]
    pub cmdline: Option<String>,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpus: u32,

    /// Guest RAM: SIZE[,hugepages=off|thp|2M|1G][,prealloc[=THREADS]][,lock[=on|onfault]][,mergeable]. hugepages: large pages where
    /// the host finds some (thp, the default), or pages of its pool (with KVM); prealloc: all of it is found before the guest
    /// starts; lock: it is never paged out; mergeable: pages that are alike may be merged (KSM, with KVM)
    #[arg(long, short = 'm', value_name = "SIZE[,OPTION...]", default_value = "512M")]
    pub memory: Memory,

    /// A NUMA node of the guest, once for each: [cpus=LIST][,memory=SIZE][,host=NODES[,policy=bind|preferred|interleave]]
    /// [,latency=NS][,bandwidth=MB/s]; or `node` for one of which nothing is said; or fake=N: N nodes with equal parts. And
    /// distance=A:B:D between two of them (10 is here, 20 unless said). LIST is as in 0-3+8; host: where the memory comes from
    #[arg(long, value_name = "NODE", help_heading = "Host")]
    pub numa: Vec<Numa>,

    /// CPU model: a versioned name such as x86-64-v3.1, or `host` (`yado doctor` lists them)
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,

    /// CPU engine; auto takes KVM if it really runs kernels here, else soft, and says why
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub engine: Engine,

    /// Another disk: FILE[,format=raw|qcow2|qed|vhd][,readonly][,bus=nvme|virtio][,cache=writeback|none|writethrough|directsync|unsafe]
    /// [,werror=enospc|report|ignore|stop][,rerror=report|ignore|stop][,detect-zeroes=off|on|unmap]. A host without space makes the
    /// guest stand still until there is some, unless werror says otherwise
    #[arg(long, value_name = "FILE[,OPTION...]", value_hint = ValueHint::FilePath)]
    pub disk: Vec<Disk>,

    /// A network card: none, user[,host-loopback][,isolated] (the default), switch=NAME[,vlan=N|trunk=A-B][,port=NAME][,OPTION...]
    /// (see `yado help switch set`), tap=NAME, or vhost-user=SOCKET; each with [,mtu=BYTES][,mac=ADDRESS]. With user
    /// the guest reaches what this user reaches, but not what listens on this host's loopback, unless host-loopback lets it, as
    /// host.yado; guests of this user reach each other as NAME.yado, unless isolated
    #[arg(long, value_name = "KIND[,OPTION...]", help_heading = "Network")]
    pub net: Vec<Net>,

    /// Let a port of this host lead into the guest: [[ADDRESS:]PORT:]GUESTPORT[/tcp|/udp]; ADDRESS is 127.0.0.1 unless
    /// given, PORT 0 is any that is free
    #[arg(long, short = 'p', value_name = "HOST:GUEST", help_heading = "Network")]
    pub publish: Vec<Publish>,

    /// Host CPUs on which threads may run: WHO=LIST, where WHO is numbers of vCPUs, vcpus, others (disks, network, control) or all,
    /// and LIST is as in 0-3+8; repeatable
    #[arg(long, value_name = "WHO=CPUS", help_heading = "Host")]
    pub pin: Vec<Pin>,

    /// How urgently threads run: [vcpus=|others=|all=]nice:N, batch, idle, fifo:N or rr:N (sched(7)); repeatable
    #[arg(long, value_name = "[WHO=]PRIORITY", help_heading = "Host")]
    pub priority: Vec<Urgency>,

    /// What the guest's process may use at most, by a control group of its own: cpu=CPUS (1.5 or 150%), cpu-weight=1-10000 (all have
    /// 100), memory=SIZE (the guest's and yado's own), and of each disk that images are on, each second: io-read=SIZE, io-write=SIZE,
    /// io-reads=N, io-writes=N
    #[arg(long, value_name = "LIMIT[,LIMIT...]", help_heading = "Host")]
    pub limit: Vec<Limit>,

    /// Make the guest's control group below this one instead of yado's own
    #[arg(long, value_name = "PATH", help_heading = "Host")]
    pub cgroup: Option<PathBuf>,

    /// Size of a new Debian guest's disk (sparse)
    #[arg(long, value_name = "SIZE", default_value = "8G")]
    pub disk_size: Size,

    /// Keep the guest and its disk under this name; a second run goes on with it
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Run in the background and print the guest's name
    #[arg(long, short = 'd')]
    pub detach: bool,

    /// Give the command a terminal (default: when stdin and stdout are terminals)
    #[arg(long, short = 't', help_heading = "Command", conflicts_with = "no_tty")]
    pub tty: bool,

    /// Give the command no terminal
    #[arg(long, help_heading = "Command")]
    pub no_tty: bool,

    /// Set an environment variable for the command
    #[arg(long, short = 'e', value_name = "NAME=VALUE", help_heading = "Command")]
    pub env: Vec<String>,

    /// Working directory of the command
    #[arg(
        long,
        short = 'w',
        value_name = "DIR",
        default_value = "",
        hide_default_value = true,
        help_heading = "Command"
    )]
    pub workdir: String,

    /// User of the command: USER or USER:GROUP
    #[arg(
        long,
        short = 'u',
        value_name = "USER",
        default_value = "",
        hide_default_value = true,
        help_heading = "Command"
    )]
    pub user: String,

    /// Give up when the guest does not take commands after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, help_heading = "Command")]
    pub boot_timeout: u64,

    /// Packages' source: the URL of a Debian archive (default: this host's APT sources)
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = "Debian")]
    pub mirror: Vec<String>,

    /// Install this package too (with what it depends on)
    #[arg(long, value_name = "NAME", help_heading = "Debian")]
    pub package: Vec<String>,

    /// Flavour of the Debian kernel
    #[arg(long, value_enum, default_value_t = Flavour::Cloud, help_heading = "Debian")]
    pub flavour: Flavour,

    /// Ask the archive for newer packages now, not once a day
    #[arg(long, help_heading = "Debian")]
    pub refresh: bool,

    /// End with code 0 when the guest reboots, instead of booting it again
    #[arg(long, help_heading = "Boot")]
    pub no_reboot: bool,

    /// Add the test devices of bare test kernels: isa-debug-exit at port 0xf4, pc-testdev
    #[arg(long, help_heading = "Boot")]
    pub test_devices: bool,

    /// Say nothing but errors
    #[arg(long, short = 'q')]
    pub quiet: bool,

    /// Once the guest runs, let its process open no file, reach no other process, and make only the system calls that it needs;
    /// `yado inspect` shows how, `yado doctor` what this host offers for it
    #[arg(long, value_enum, default_value_t = Switched::On, value_name = "on|off")]
    pub sandbox: Switched,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switched {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    Auto,
    Kvm,
    Soft,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Flavour {
    Cloud,
    Generic,
    Rt,
}

/// On which bus a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskBus {
    Nvme,
    Virtio,
}

/// `--disk`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub file: PathBuf,
    pub read_only: bool,
    /// Not said: raw, if the file looks like nothing else.
    pub format: Option<Format>,
    pub cache: CacheMode,
    pub detect_zeroes: DetectZeroes,
    pub write_error: OnError,
    pub read_error: OnError,
    pub bus: DiskBus,
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let file = parts.next().map(|file| file.strip_prefix("file=").unwrap_or(file));
        let file = file.filter(|file| !file.is_empty()).ok_or("a disk begins with a file name")?;
        let mut disk = Self {
            file: file.into(),
            read_only: false,
            format: None,
            cache: CacheMode::default(),
            detect_zeroes: DetectZeroes::default(),
            write_error: OnError::Enospc,
            read_error: OnError::Report,
            bus: DiskBus::Virtio,
        };
        for option in parts {
            match option.split_once('=').unwrap_or((option, "")) {
                ("readonly", "" | "on") => disk.read_only = true,
                ("readonly", "off") => disk.read_only = false,
                ("cache", name) => disk.cache = name.parse()?,
                ("detect-zeroes", name) => disk.detect_zeroes = name.parse()?,
                ("werror", name) => {
                    disk.write_error = name.parse().map_err(|why| format!("werror: {why}"))?;
                }
                ("rerror", "enospc") => {
                    return Err("rerror=enospc: there is always space to read; report, ignore or stop".into());
                }
                ("rerror", name) => {
                    disk.read_error = name.parse().map_err(|why| format!("rerror: {why}"))?;
                }
                ("bus", "nvme") => disk.bus = DiskBus::Nvme,
                ("bus", "virtio") => disk.bus = DiskBus::Virtio,
                ("bus", other) => return Err(format!("bus={other}: nvme or virtio")),
                ("format", name) => disk.format = Some(name.parse()?),
                (other, _) => {
                    return Err(format!(
                        "{other:?} is no disk option; there are readonly, bus=, cache=, detect-zeroes=, format=, rerror=, \
                         werror="
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// `--net`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Net {
    None,
    Card(NetCard),
}

/// What a card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetKind {
    User { host_loopback: bool, isolated: bool },
    Tap(String),
    Switch { name: String, port: Option<String>, spec: Box<net::switch::PortSpec> },
    VhostUser(PathBuf),
}

/// A network card of `--net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetCard {
    pub kind: NetKind,
    pub mtu: u16,
    pub mac: Option<[u8; 6]>,
}

impl Default for NetCard {
    fn default() -> Self {
        Self { kind: NetKind::User { host_loopback: false, isolated: false }, mtu: MTU_DEFAULT, mac: None }
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, options) = text.split_once(',').unwrap_or((text, ""));
        let mut card = NetCard::default();
        match kind.split_once('=').unwrap_or((kind, "")) {
            ("none", "") if options.is_empty() => return Ok(Self::None),
            ("user", "") => {}
            ("tap", name) if !name.is_empty() => card.kind = NetKind::Tap(name.to_owned()),
            ("tap", _) => return Err("tap: which one? tap=NAME".to_owned()),
            ("switch", name) if !name.is_empty() => {
                card.kind = NetKind::Switch { name: name.to_owned(), port: None, spec: Box::default() };
            }
            ("switch", _) => return Err("switch: which one? switch=NAME".to_owned()),
            ("vhost-user", path) if !path.is_empty() => card.kind = NetKind::VhostUser(path.into()),
            (other, _) => {
                return Err(format!(
                    "{other:?} is no kind of network; there are none, user, switch=, tap= and vhost-user="
                ));
            }
        }
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("mtu", value) => {
                    let mtu = value.parse().ok().filter(|mtu| (1280..=65_520).contains(mtu));
                    card.mtu = mtu.ok_or_else(|| format!("mtu={value}: a number from 1280 to 65520"))?;
                }
                ("mac", value) => card.mac = Some(mac(value)?),
                (name, value) if matches!(card.kind, NetKind::Switch { .. }) => {
                    let NetKind::Switch { port, spec, .. } = &mut card.kind else { continue };
                    match spec.apply(name, value) {
                        Some(result) => result?,
                        None if name == "port" && !value.is_empty() => *port = Some(value.to_owned()),
                        None => {
                            let all = net::switch::PORT_OPTIONS;
                            return Err(format!(
                                "{name:?} is no option of --net switch; there are port=NAME, mtu=, {all}"
                            ));
                        }
                    }
                }
                (name @ ("host-loopback" | "isolated"), value @ ("" | "on" | "off"))
                    if matches!(card.kind, NetKind::User { .. }) =>
                {
                    let NetKind::User { host_loopback, isolated } = &mut card.kind else { continue };
                    let option = if name == "isolated" { isolated } else { host_loopback };
                    *option = value != "off";
                }
                (other, _) => {
                    return Err(format!(
                        "{other:?} is no option of --net {kind}; there are mtu= and mac=, and host-loopback and isolated of user"
                    ));
                }
            }
        }
        Ok(Self::Card(card))
    }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    match bytes.as_deref().and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        Some(_) => Err(format!("mac={text}: a card's own address has an even first byte and is not zero")),
        None => Err(format!("mac={text}: six bytes in hexadecimal, such as 02:00:00:00:00:01")),
    }
}

/// `-p`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish(pub Forward);

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ports, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some((_, other)) => return Err(format!("/{other}: there are /tcp and /udp")),
        };
        let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port number"));
        let (host, guest) = ports.rsplit_once(':').unwrap_or((ports, ports));
        let port = number(guest)?;
        if port == 0 {
            return Err("the guest's port cannot be 0".into());
        }
        let (address, host) = match host.rsplit_once(':') {
            None => (IpAddr::from([127, 0, 0, 1]), host),
            Some((address, host)) => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let parsed = bare.unwrap_or(address).parse();
                (parsed.map_err(|_| format!("{address:?} is no address of this host"))?, host)
            }
        };
        Ok(Self(Forward { transport, listen: SocketAddr::new(address, number(host)?), port }))
    }
}

#[derive(Debug, Args)]
pub struct Ps {
    /// Stopped guests too
    #[arg(long, short = 'a')]
    pub all: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Names only
    #[arg(long, short = 'q', conflicts_with = "json")]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Named {
    /// Name of the guest (`yado ps`)
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Stats {
    /// Name of the guest (`yado ps`)
    #[arg(required_unless_present = "prometheus")]
    pub name: Option<String>,
    /// As JSON: all counters
    #[arg(long)]
    pub json: bool,
    /// In Prometheus' text format; without a name, of all guests that run
    #[arg(long, conflicts_with_all = ["json", "watch", "profile", "perf_map"])]
    pub prometheus: bool,
    /// With --prometheus: answer at ADDRESS:PORT, or at a socket unix:PATH, over HTTP with what is at /metrics, until Ctrl-C.
    /// Whoever reaches it may read it
    #[arg(long, value_name = "ADDRESS:PORT|unix:PATH", requires = "prometheus")]
    pub listen: Option<Where>,
    /// Again every second, with what happened in it, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
    /// Look where the guest's time goes for this many seconds, by kernel function and by process
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "5", require_equals = true)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=600), conflicts_with = "watch")]
    pub profile: Option<u64>,
    /// Write which code of the guest's process was made from which function of the guest, for `perf report` of a
    /// `perf record` of that process [default file: /tmp/perf-PID.map]
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[arg(conflicts_with_all = ["watch", "profile", "json"])]
    pub perf_map: Option<Option<std::path::PathBuf>>,
    /// Samples a second of each vCPU for --profile
    #[arg(long, value_name = "HZ", default_value_t = 499, requires = "profile")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=5000))]
    pub rate: u32,
    /// Lines of each table of --profile
    #[arg(long, value_name = "N", default_value_t = 25, requires = "profile")]
    pub top: usize,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// Name of the guest (`yado ps`)
    pub name: String,
    /// Command and arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub argv: Vec<std::ffi::OsString>,
    /// Give the command a terminal (default: when stdin and stdout are terminals)
    #[arg(long, short = 't', conflicts_with = "no_tty")]
    pub tty: bool,
    /// Give the command no terminal
    #[arg(long)]
    pub no_tty: bool,
    /// Set an environment variable
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(long, short = 'w', value_name = "DIR", default_value = "", hide_default_value = true)]
    pub workdir: String,
    /// USER or USER:GROUP
    #[arg(long, short = 'u', value_name = "USER", default_value = "", hide_default_value = true)]
    pub user: String,
    /// Wait this many seconds for the guest to take commands
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// Names of the guests
    #[arg(required = true)]
    pub names: Vec<String>,
    /// At once, as if the power failed
    #[arg(long, short = 'f')]
    pub force: bool,
    /// Seconds to wait for the guest before it is stopped by force
    #[arg(long, short = 't', value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// Name of the guest
    pub name: String,
    /// Go on as the guest prints
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Only the last N lines
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<usize>,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// Names of the guests
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Stop running guests first, at once
    #[arg(long, short = 'f')]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Cache {
    #[command(subcommand)]
    pub command: Option<CacheCommand>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Remove images that newer ones replaced, and what nobody has used for 30 days
    Prune {
        /// Everything but the images of kept guests
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn disks_are_read_and_nonsense_refused() {
        let disk: Disk = "a.img,readonly,bus=nvme".parse().unwrap();
        assert_eq!(
            disk,
            Disk {
                file: "a.img".into(),
                read_only: true,
                format: None,
                cache: CacheMode::default(),
                detect_zeroes: DetectZeroes::Off,
                write_error: OnError::Enospc,
                read_error: OnError::Report,
                bus: DiskBus::Nvme
            }
        );
        let disk: Disk = "a.img,cache=none".parse().unwrap();
        assert_eq!(disk.cache, CacheMode::None);
        assert!("a.img,cache=some".parse::<Disk>().is_err());
        let disk: Disk = "a.img,werror=stop,rerror=ignore,detect-zeroes=unmap".parse().unwrap();
        assert_eq!((disk.write_error, disk.read_error), (OnError::Stop, OnError::Ignore));
        assert_eq!(disk.detect_zeroes, DetectZeroes::Unmap);
        for bad in ["a.img,werror=later", "a.img,rerror=enospc", "a.img,detect-zeroes=yes"] {
            assert!(bad.parse::<Disk>().is_err(), "{bad}");
        }
        let disk: Disk = "file=a.qcow2,format=qcow2".parse().unwrap();
        assert_eq!((disk.file, disk.format), ("a.qcow2".into(), Some(Format::Qcow2)));
        assert!("".parse::<Disk>().is_err());
        assert!("a,bus=ide".parse::<Disk>().is_err());
        assert!("a,colour=red".parse::<Disk>().is_err());
    }

    #[test]
    fn networks_are_read_and_nonsense_refused() {
        assert_eq!("none".parse(), Ok(Net::None));
        assert_eq!("user".parse(), Ok(Net::Card(NetCard::default())));
        let kind = NetKind::User { host_loopback: true, isolated: false };
        let card = NetCard { kind, mtu: 9000, mac: Some([2, 0, 0, 0, 0, 0xaf]) };
        assert_eq!("user,mtu=9000,mac=02:00:00:00:00:aF,host-loopback".parse(), Ok(Net::Card(card)));
        let tap = NetCard { kind: NetKind::Tap("tap0".into()), ..NetCard::default() };
        assert_eq!("tap=tap0".parse(), Ok(Net::Card(tap)));
        for wrong in [
            "",
            "bridge",
            "none,mtu=1500",
            "user,mtu=100",
            "user,mac=01:0:0:0:0:0",
            "user,mac=2",
            "user,x",
            "tap",
            "tap=a,host-loopback",
        ] {
            assert!(wrong.parse::<Net>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_read_and_nonsense_refused() {
        let publish = |text: &str| {
            let Publish(Forward { transport, listen, port }) = text.parse().unwrap();
            format!("{transport} {listen} {port}")
        };
        assert_eq!(publish("22"), "tcp 127.0.0.1:22 22");
        assert_eq!(publish("2222:22"), "tcp 127.0.0.1:2222 22");
        assert_eq!(publish("0:53/udp"), "udp 127.0.0.1:0 53");
        assert_eq!(publish("0.0.0.0:8080:80/tcp"), "tcp 0.0.0.0:8080 80");
        assert_eq!(publish("[::1]:8080:80"), "tcp [::1]:8080 80");
        for wrong in ["", "a", "80:", "1:0", "70000:1", "80:80/sctp", "host:80:80"] {
            assert!(wrong.parse::<Publish>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_command_follows_two_dashes() {
        let arguments = Arguments::parse_from(["yado", "run", "debian", "-m", "1G", "--", "ls", "-l"]);
        let Command::Run(run) = arguments.command else { panic!() };
        assert_eq!(run.argv, ["ls", "-l"]);
        assert_eq!(run.memory.size.0, 1 << 30);
        assert!(Arguments::try_parse_from(["yado", "run"]).is_err());
    }
}
