//! KVM's binary statistics (Linux `Documentation/virt/kvm/api.rst`, 4.133): counters by file descriptor, named by the kernel.

use crate::host::{Handle, Plain, bytes_of};
use crate::ioctl::GET_STATS_FD;
use kvm_bindings::kvm_stats_header;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// A descriptor without its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR: usize = 16;
/// More than any kernel has.
const DESCRIPTORS_MAX: usize = 1024;
const NAME_MAX: usize = 256;
/// Histograms have more than one value and are left out.
const KIND: u32 = 0xf;
const KIND_LINEAR_HISTOGRAM: u32 = 3;

/// One vCPU's counters.
pub(crate) struct Statistics {
    handle: Handle,
    /// Name and place of each.
    rows: Vec<(&'static str, u64)>,
    /// Where they begin and end in the file.
    data: (u64, usize),
}

/// The kernel's name for as long as the process lives; there are a few dozen.
fn intern(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    match names.get(name) {
        Some(known) => known,
        None => {
            let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
            names.insert(name);
            name
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Name and offset of the descriptor in these bytes, if it is one number.
fn row(bytes: &[u8]) -> Option<(&'static str, u64)> {
    let flags = word(bytes, 0)?;
    let size = word(bytes, 4)? >> 16;
    let offset = word(bytes, 8)?;
    let name = bytes.get(DESCRIPTOR..)?.split(|&byte| byte == 0).next()?;
    let single = size == 1 && flags & KIND < KIND_LINEAR_HISTOGRAM;
    single.then_some((intern(std::str::from_utf8(name).ok()?), offset.into()))
}

impl Statistics {
    /// Of a VM's or vCPU's descriptor; `None` if this kernel's answer makes no sense.
    pub(crate) fn of(of: &Handle) -> Option<Self> {
        let handle = of.make(GET_STATS_FD, 0).ok()?;
        let mut header = kvm_stats_header::zeroed();
        handle.read_at(0, bytes_of(&mut header)).ok()?;
        let (count, name) = (header.num_desc as usize, header.name_size as usize);
        if count > DESCRIPTORS_MAX || name > NAME_MAX {
            return None;
        }
        let each = DESCRIPTOR.checked_add(name)?;
        let mut bytes = vec![0; count.checked_mul(each)?];
        let read = handle.read_at(header.desc_offset.into(), &mut bytes).ok()?;
        let rows: Vec<_> = bytes.get(..read)?.chunks_exact(each).filter_map(row).collect();
        let end = rows.iter().map(|(_, offset)| offset.saturating_add(8)).max()?;
        let length = usize::try_from(end).ok().filter(|&length| length <= 1 << 20)?;
        Some(Self { handle, rows, data: (header.data_offset.into(), length) })
    }

    /// The counters now.
    pub(crate) fn read(&self) -> Vec<(&'static str, u64)> {
        let (at, length) = self.data;
        let mut bytes = vec![0; length];
        if self.handle.read_at(at, &mut bytes).is_err() {
            return Vec::new();
        }
        let value = |offset: u64| {
            let at = usize::try_from(offset).ok()?;
            bytes.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
        };
        self.rows.iter().filter_map(|&(name, offset)| Some((name, value(offset)?))).collect()
    }
}
