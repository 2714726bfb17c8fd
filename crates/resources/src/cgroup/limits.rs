//! What may be limited, and how each kind of control groups writes it.

use super::Error;
use super::host::Version;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How long a slice of CPU time is, in microseconds.
const PERIOD_US: u64 = 100_000;
/// The least that the kernel takes.
const QUOTA_LEAST_US: u64 = 1_000;
/// What a weight of 100 is called in version 1.
const SHARES: u64 = 1024;

/// Limits of I/O, each second, of each disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Reads.
    pub reads: Option<u64>,
    /// Writes.
    pub writes: Option<u64>,
}

/// What a guest's process may use. Nothing is limited by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time, in thousandths of a CPU.
    pub cpu_thousandths: Option<u64>,
    /// Its part of CPUs that others want too: 1 to 10,000; everybody has 100.
    pub cpu_weight: Option<u64>,
    /// Bytes of memory: the guest's and the process's own. What goes beyond is taken back where it can be; else the host ends the
    /// process.
    pub memory_bytes: Option<u64>,
    /// Of disks.
    pub io: IoLimits,
    /// Files and devices that I/O limits are for: their disks.
    pub files: Vec<PathBuf>,
}

/// What the kernel calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Cpu,
    Memory,
    Io,
}

impl Controller {
    pub(super) fn name(self, version: Version) -> &'static str {
        match (self, version) {
            (Self::Cpu, _) => "cpu",
            (Self::Memory, _) => "memory",
            (Self::Io, Version::One) => "blkio",
            (Self::Io, Version::Two) => "io",
        }
    }

    /// The option's word.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Io => "io",
        }
    }
}

/// One limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Setting {
    Quota(u64),
    Weight(u64),
    Memory(u64),
    Io((u32, u32), IoLimits),
}

impl Setting {
    /// Control files and what is written to them.
    pub(super) fn lines(&self, version: Version) -> Vec<(&'static str, String)> {
        match (self, version) {
            (Self::Quota(us), Version::One) => {
                vec![("cpu.cfs_period_us", PERIOD_US.to_string()), ("cpu.cfs_quota_us", us.to_string())]
            }
            (Self::Quota(us), Version::Two) => vec![("cpu.max", format!("{us} {PERIOD_US}"))],
            (Self::Weight(weight), Version::One) => {
                vec![("cpu.shares", weight.saturating_mul(SHARES).div_euclid(100).max(2).to_string())]
            }
            (Self::Weight(weight), Version::Two) => vec![("cpu.weight", weight.to_string())],
            (Self::Memory(bytes), Version::One) => vec![("memory.limit_in_bytes", bytes.to_string())],
            (Self::Memory(bytes), Version::Two) => vec![("memory.max", bytes.to_string())],
            (Self::Io((major, minor), limits), version) => {
                io_lines(&format!("{major}:{minor}"), limits, version)
            }
        }
    }
}

fn io_lines(device: &str, limits: &IoLimits, version: Version) -> Vec<(&'static str, String)> {
    let known = [
        ("blkio.throttle.read_bps_device", "rbps", limits.read_bytes),
        ("blkio.throttle.write_bps_device", "wbps", limits.write_bytes),
        ("blkio.throttle.read_iops_device", "riops", limits.reads),
        ("blkio.throttle.write_iops_device", "wiops", limits.writes),
    ];
    let known = known.into_iter().filter_map(|(one, two, value)| Some((one, two, value?)));
    match version {
        Version::One => known.map(|(file, _, value)| (file, format!("{device} {value}"))).collect(),
        Version::Two => {
            let words =
                known.fold(device.to_owned(), |line, (_, word, value)| format!("{line} {word}={value}"));
            vec![("io.max", words)]
        }
    }
}

impl Limits {
    /// What they come to, by controller.
    pub(super) fn settings(&self) -> Result<Vec<(Controller, Vec<Setting>)>, Error> {
        let quota = self.cpu_thousandths.map(|thousandths| {
            let us = thousandths.saturating_mul(PERIOD_US).div_euclid(1000);
            Setting::Quota(us.max(QUOTA_LEAST_US))
        });
        let cpu: Vec<_> = quota.into_iter().chain(self.cpu_weight.map(Setting::Weight)).collect();
        let memory: Vec<_> = self.memory_bytes.map(Setting::Memory).into_iter().collect();
        let mut io = Vec::new();
        if self.io != IoLimits::default() {
            let disks: Result<BTreeSet<_>, _> = self.files.iter().map(|file| disk_of(file)).collect();
            io.extend(disks?.into_iter().map(|disk| Setting::Io(disk, self.io.clone())));
        }
        let all = [(Controller::Cpu, cpu), (Controller::Memory, memory), (Controller::Io, io)];
        Ok(all.into_iter().filter(|(_, settings)| !settings.is_empty()).collect())
    }
}

/// The numbers of the whole disk that a file is on, or that it is (or a part of).
fn disk_of(file: &Path) -> Result<(u32, u32), Error> {
    let none = || Error::NoDevice(file.to_owned());
    let about = fs::metadata(file).map_err(|_| none())?;
    let number = if about.file_type().is_block_device() { about.rdev() } else { about.dev() };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    // File systems without a device have major number 0.
    let link = format!("/sys/dev/block/{major}:{minor}");
    let place = fs::canonicalize(&link).map_err(|_| none())?;
    if !place.join("partition").exists() {
        return Ok((major, minor));
    }
    let whole = place.parent().and_then(|disk| fs::read_to_string(disk.join("dev")).ok()).ok_or_else(none)?;
    let (major, minor) = whole.trim().split_once(':').ok_or_else(none)?;
    Ok((major.parse().map_err(|_| none())?, minor.parse().map_err(|_| none())?))
}
