//! A kernel's double, for tests: answers as KVM on VT-x and SVM hosts is documented to, with what a test wants to happen.
//!
//! What was set is what is got; KVM_RUN does what the test has queued. Everything asked is remembered by name.
//!
//! Unsafe, because it stands where the kernel writes through addresses.
#![allow(unsafe_code)]
#![cfg_attr(fuzzing, allow(dead_code))]

use crate::host::Host;
use crate::ioctl::Request;
use kvm_bindings as kvm;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

pub(crate) const VM: RawFd = 4;
pub(crate) const FIRST_VCPU: RawFd = 10;
/// `kvm_run`, a page for port I/O, and one for coalesced MMIO, as on x86.
pub(crate) const RUN_LEN: usize = 3 * 4096;
/// Where the kernel puts the data of port I/O.
pub(crate) const IO_DATA: usize = 4096;

/// What one KVM_RUN does: writes to `kvm_run`, and a result.
type Run = Box<dyn FnOnce(&mut [u8]) -> io::Result<u32> + Send>;

#[derive(Default)]
struct State {
    capabilities: BTreeMap<u32, u32>,
    msrs: BTreeMap<u32, u64>,
    kept: BTreeMap<(RawFd, &'static str), Vec<u8>>,
    refused: BTreeMap<&'static str, i32>,
    asked: Vec<(RawFd, &'static str)>,
    runs: VecDeque<Run>,
    /// Mappings by descriptor.
    pages: BTreeMap<RawFd, (usize, usize)>,
    vcpus: i32,
    closed: Vec<RawFd>,
    dirty: Vec<u64>,
    /// A run for which nothing is queued is interrupted; else it is a fault of the test's.
    idle: bool,
    /// KVM_VCPU_TSC_OFFSET of the vCPU that was asked last.
    tsc_offset: u64,
}

/// See the module page.
pub(crate) struct Double(Mutex<State>);

/// A capability's number and what CHECK_EXTENSION answers.
const LINUX_5_10: &[(u32, u32)] = &[
    (kvm::KVM_CAP_USER_MEMORY, 1),
    (kvm::KVM_CAP_MP_STATE, 1),
    (kvm::KVM_CAP_IRQFD, 1),
    (kvm::KVM_CAP_IOEVENTFD, 1),
    (kvm::KVM_CAP_VCPU_EVENTS, 1),
    (kvm::KVM_CAP_DEBUGREGS, 1),
    (kvm::KVM_CAP_XSAVE, 1),
    (kvm::KVM_CAP_XCRS, 1),
    (kvm::KVM_CAP_GET_TSC_KHZ, 1),
    (kvm::KVM_CAP_SIGNAL_MSI, 1),
    (kvm::KVM_CAP_SPLIT_IRQCHIP, 1),
    (kvm::KVM_CAP_IMMEDIATE_EXIT, 1),
    (kvm::KVM_CAP_X86_USER_SPACE_MSR, 1),
    (kvm::KVM_CAP_X86_MSR_FILTER, 1),
    (kvm::KVM_CAP_IOEVENTFD_ANY_LENGTH, 1),
    (kvm::KVM_CAP_X2APIC_API, 3),
    (kvm::KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1),
    (kvm::KVM_CAP_TSC_DEADLINE_TIMER, 1),
    (kvm::KVM_CAP_MAX_VCPUS, 288),
    (kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
];
/// What came since.
const LINUX_6_12: &[(u32, u32)] = &[
    (kvm::KVM_CAP_DIRTY_LOG_RING, 65536 * 16),
    (kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 65536 * 16),
    (kvm::KVM_CAP_BINARY_STATS_FD, 1),
    (kvm::KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
];

impl Double {
    /// A host of the oldest kernel that yado runs on.
    pub(crate) fn linux_5_10() -> Self {
        let state = State { capabilities: LINUX_5_10.iter().copied().collect(), ..State::default() };
        Self(Mutex::new(state))
    }

    /// A host of a new kernel.
    pub(crate) fn linux_6_12() -> Self {
        let double = Self::linux_5_10();
        double.state().capabilities.extend(LINUX_6_12.iter().copied());
        double
    }

    pub(crate) fn without(self, capability: u32) -> Self {
        self.state().capabilities.remove(&capability);
        self
    }

    /// Runs for which nothing is queued are interrupted.
    pub(crate) fn idle(self) -> Self {
        self.state().idle = true;
        self
    }

    /// What was asked and queued before does not count any more.
    pub(crate) fn forget_asked(&self) {
        let mut state = self.state();
        state.asked.clear();
        state.runs.clear();
    }

    /// This request fails with this error from now on.
    pub(crate) fn refuse(&self, name: &'static str, error: i32) {
        self.state().refused.insert(name, error);
    }

    /// It does not any more.
    pub(crate) fn accept(&self, name: &'static str) {
        self.state().refused.remove(name);
    }

    /// The next KVM_RUN that has nothing else to do.
    pub(crate) fn then(&self, run: impl FnOnce(&mut [u8]) -> io::Result<u32> + Send + 'static) {
        self.state().runs.push_back(Box::new(run));
    }

    /// The next KVM_RUN exits for this reason, with this in the union.
    pub(crate) fn exits<T: crate::host::Plain + Send + 'static>(&self, reason: u32, mut detail: T) {
        self.then(move |page| {
            let at = std::mem::offset_of!(kvm::kvm_run, exit_reason);
            page[at..at + 4].copy_from_slice(&reason.to_le_bytes());
            let at = std::mem::offset_of!(kvm::kvm_run, __bindgen_anon_1);
            let bytes = crate::host::bytes_of(&mut detail);
            page[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(0)
        });
    }

    /// The next KVM_RUN fails.
    pub(crate) fn fails(&self, error: i32) {
        self.then(move |_| Err(io::Error::from_raw_os_error(error)));
    }

    /// How often a request was made.
    pub(crate) fn count(&self, name: &str) -> usize {
        self.state().asked.iter().filter(|(_, asked)| *asked == name).count()
    }

    /// In which order the first of each of these was made, after the last of `after`.
    pub(crate) fn order_since(&self, after: usize) -> Vec<&'static str> {
        self.state().asked.iter().skip(after).map(|(_, name)| *name).collect()
    }

    pub(crate) fn asked(&self) -> usize {
        self.state().asked.len()
    }

    /// What was last set.
    pub(crate) fn kept<T: crate::host::Plain>(&self, fd: RawFd, name: &str) -> Option<T> {
        let state = self.state();
        let bytes = state.kept.iter().find(|((of, kept), _)| *of == fd && *kept == name)?.1;
        let mut value = T::zeroed();
        crate::host::bytes_of(&mut value).copy_from_slice(&bytes[..size_of::<T>()]);
        Some(value)
    }

    /// What a later request of `GET_` answers.
    pub(crate) fn set<T: crate::host::Plain>(&self, fd: RawFd, name: &'static str, mut value: T) {
        self.state().kept.insert((fd, name), crate::host::bytes_of(&mut value).to_vec());
    }

    pub(crate) fn tsc_offset(&self) -> u64 {
        self.state().tsc_offset
    }

    pub(crate) fn set_tsc_offset(&self, offset: u64) {
        self.state().tsc_offset = offset;
    }

    pub(crate) fn forget_msr(&self, index: u32) {
        self.state().msrs.remove(&index);
    }

    pub(crate) fn set_msr(&self, index: u32, value: u64) {
        self.state().msrs.insert(index, value);
    }

    pub(crate) fn msr(&self, index: u32) -> Option<u64> {
        self.state().msrs.get(&index).copied()
    }

    /// Every GET_DIRTY_LOG answers these words from now on, until they are cleared.
    pub(crate) fn set_dirty(&self, words: &[u64]) {
        self.state().dirty = words.to_vec();
    }

    /// Changes a vCPU's mappings.
    pub(crate) fn page(&self, vcpu: RawFd, change: impl FnOnce(&mut [u8])) {
        let (at, len) = self.state().pages[&vcpu];
        // SAFETY: a mapping that this double gave out; tests use it from one thread.
        change(unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) });
    }

    pub(crate) fn closed(&self) -> Vec<RawFd> {
        self.state().closed.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn check(&self, fd: RawFd, request: Request) -> io::Result<()> {
        let mut state = self.state();
        state.asked.push((fd, request.name));
        match state.refused.get(request.name) {
            Some(error) => Err(io::Error::from_raw_os_error(*error)),
            None => Ok(()),
        }
    }
}

/// Entries of a list after its header.
fn entries<const N: usize>(buffer: &mut [u8]) -> impl Iterator<Item = &mut [u8; N]> {
    let count = u32::from_le_bytes(buffer[..4].try_into().unwrap()) as usize;
    buffer[8..].chunks_exact_mut(N).take(count).map(|entry| entry.try_into().unwrap())
}

impl Host for Double {
    fn open(&self) -> io::Result<RawFd> {
        let state = self.state();
        match state.refused.get("open") {
            Some(error) => Err(io::Error::from_raw_os_error(*error)),
            None => Ok(3),
        }
    }

    fn number(&self, fd: RawFd, request: Request, value: u64) -> io::Result<u32> {
        assert_eq!(request.size(), 0, "{}", request.name);
        self.check(fd, request)?;
        let mut state = self.state();
        Ok(match request.name {
            "GET_API_VERSION" => 12,
            "CREATE_VM" => VM as u32,
            "CHECK_EXTENSION" => state.capabilities.get(&(value as u32)).copied().unwrap_or(0),
            "GET_VCPU_MMAP_SIZE" => RUN_LEN as u32,
            "CREATE_VCPU" => {
                state.vcpus += 1;
                (FIRST_VCPU + state.vcpus - 1) as u32
            }
            "GET_TSC_KHZ" => 2_500_000,
            "RUN" => {
                let run = state.runs.pop_front();
                let ((at, _), idle) = (state.pages[&fd], state.idle);
                drop(state);
                // SAFETY: as in `page`.
                let page = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, RUN_LEN) };
                let hurried = page[std::mem::offset_of!(kvm::kvm_run, immediate_exit)] != 0;
                if hurried {
                    if let Some(run) = run {
                        self.state().runs.push_front(run);
                    }
                    return Err(io::Error::from_raw_os_error(libc::EINTR));
                }
                return match run {
                    None if idle => Err(io::Error::from_raw_os_error(libc::EINTR)),
                    run => run.expect("KVM_RUN has something to do")(page),
                };
            }
            "GET_STATS_FD" => return Err(io::Error::from_raw_os_error(libc::ENOTTY)),
            _ => 0,
        })
    }

    unsafe fn structure(&self, fd: RawFd, request: Request, buffer: &mut [u8]) -> io::Result<u32> {
        assert!(buffer.len() >= request.size(), "{}", request.name);
        self.check(fd, request)?;
        let mut state = self.state();
        match request.name {
            "GET_SUPPORTED_CPUID" => {
                let entry =
                    |function: u32, words: [u32; 4]| [[function, 0, 0].as_slice(), &words, &[0; 3]].concat();
                let rows = [entry(1, [0, 0, u32::MAX, u32::MAX]), entry(0x8000_0008, [48, 0, 0, 0])].concat();
                buffer[..4].copy_from_slice(&2u32.to_le_bytes());
                for (to, word) in buffer[8..].chunks_exact_mut(4).zip(rows) {
                    to.copy_from_slice(&word.to_le_bytes());
                }
            }
            "GET_MSR_INDEX_LIST" => {
                let known: Vec<_> = state.msrs.keys().copied().chain([cpu::msr::TSC]).collect();
                buffer[..4].copy_from_slice(&(known.len() as u32).to_le_bytes());
                for (to, index) in buffer[4..].chunks_exact_mut(4).zip(known) {
                    to.copy_from_slice(&index.to_le_bytes());
                }
            }
            // Linux: MAX_IO_MSRS.
            "GET_MSRS" | "SET_MSRS" if entries::<16>(buffer).count() >= 256 => {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            "GET_MSRS" => {
                let mut done = 0;
                for entry in entries::<16>(buffer) {
                    let index = u32::from_le_bytes(entry[..4].try_into().unwrap());
                    let Some(value) = state.msrs.get(&index) else { break };
                    entry[8..].copy_from_slice(&value.to_le_bytes());
                    done += 1;
                }
                return Ok(done);
            }
            "SET_MSRS" => {
                let mut done = 0;
                for entry in entries::<16>(buffer) {
                    let index = u32::from_le_bytes(entry[..4].try_into().unwrap());
                    let Some(value) = state.msrs.get_mut(&index) else { break };
                    *value = u64::from_le_bytes(entry[8..].try_into().unwrap());
                    done += 1;
                }
                return Ok(done);
            }
            "GET_DIRTY_LOG" => {
                let at = u64::from_le_bytes(buffer[8..16].try_into().unwrap()) as *mut u64;
                for (index, word) in state.dirty.iter().enumerate() {
                    // SAFETY: the caller has room for a bit for each page, as for the kernel.
                    unsafe { at.add(index).write(*word) };
                }
            }
            "CLEAR_DIRTY_LOG" => state.dirty.fill(0),
            "GET_DEVICE_ATTR" | "SET_DEVICE_ATTR" => {
                let at = u64::from_le_bytes(buffer[16..24].try_into().unwrap()) as *mut u64;
                // SAFETY: the caller's word, as for the kernel.
                unsafe {
                    if request.name == "GET_DEVICE_ATTR" {
                        at.write(state.tsc_offset);
                    } else {
                        state.tsc_offset = at.read();
                    }
                }
            }
            name => match name.strip_prefix("GET_").map(str::to_owned) {
                Some(name) => {
                    let set = format!("SET_{name}");
                    let kept = state.kept.iter().find(|((of, kept), _)| *of == fd && **kept == *set);
                    match kept {
                        Some((_, bytes)) => buffer[..bytes.len()].copy_from_slice(bytes),
                        // A processor with XSAVE has one extended control register.
                        None if name == "XCRS" => {
                            buffer[0] = 1;
                            buffer[16] = 1;
                        }
                        None => {}
                    }
                }
                None => {
                    state.kept.insert((fd, name), buffer.to_vec());
                }
            },
        }
        Ok(0)
    }

    fn map(&self, fd: RawFd, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
        let page: &'static mut [u64] = Vec::leak(vec![0; len.div_ceil(8)]);
        let at = page.as_mut_ptr() as usize;
        // A ring of dirty pages is found at the descriptor's negative.
        let key = if offset == 0 { fd } else { -fd };
        self.state().pages.insert(key, (at, len));
        Ok(NonNull::new(at as *mut u8).unwrap())
    }

    fn read_at(&self, _fd: RawFd, _offset: u64, _into: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EBADF))
    }

    // Leaked: whoever looks at a mapping after its end finds it.
    unsafe fn unmap(&self, _at: NonNull<u8>, _len: usize) {}

    fn close(&self, fd: RawFd) {
        self.state().closed.push(fd);
    }
}
