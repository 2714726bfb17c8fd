//! Memory for stubs: one memfd mapped twice, writable and executable but never both (W^X), and the assembly through
//! which stubs are entered.
#![allow(unsafe_code)]

use crate::signal::{Registration, register};
use crate::state::CpuState;
use cpu::Error;
use std::arch::naked_asm;
use std::mem::offset_of;

/// Bytes of stubs of one vCPU. When full, all are dropped.
const SIZE: usize = 2 << 20;

/// See the module page.
pub(crate) struct Arena {
    writable: *mut u8,
    executable: *mut u8,
    used: usize,
    _registrations: [Registration; 2],
}

// SAFETY: the mappings are owned, and any thread may use them.
unsafe impl Send for Arena {}

fn refused(what: &'static str) -> Error {
    Error::Host { what, source: std::io::Error::last_os_error() }
}

impl Arena {
    pub(crate) fn new() -> Result<Self, Error> {
        // SAFETY: fresh mappings of a fresh file; every result is checked.
        unsafe {
            let fd = libc::memfd_create(c"yado-stubs".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(refused("memory for generated code (memfd_create)"));
            }
            let sized = libc::ftruncate(fd, SIZE as libc::off_t) == 0;
            let map =
                |protection| libc::mmap(std::ptr::null_mut(), SIZE, protection, libc::MAP_SHARED, fd, 0);
            let writable = map(libc::PROT_READ | libc::PROT_WRITE);
            let executable = map(libc::PROT_READ | libc::PROT_EXEC);
            let error = refused("mapping generated code as executable");
            libc::close(fd);
            if !sized || writable == libc::MAP_FAILED || executable == libc::MAP_FAILED {
                return Err(error);
            }
            let start = executable as u64;
            let fixed = xrstor_stub as *const () as u64;
            let registrations = [
                register(start..start + SIZE as u64, recover)?,
                register(fixed..fixed + FIXED_LEN, recover)?,
            ];
            Ok(Self {
                writable: writable.cast(),
                executable: executable.cast(),
                used: 0,
                _registrations: registrations,
            })
        }
    }

    /// Stores a stub; answers its executable address, or `None` when there is no room.
    pub(crate) fn store(&mut self, code: &[u8]) -> Option<usize> {
        let end = self.used.checked_add(code.len())?;
        if end > SIZE {
            return None;
        }
        // SAFETY: the range was just checked to lie inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len()) };
        let entry = self.executable as usize + self.used;
        self.used = (end + 15) & !15;
        Some(entry)
    }

    /// Drops all stubs.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mappings; no stub runs, since running needs `&mut` of the owner.
        unsafe {
            libc::munmap(self.writable.cast(), SIZE);
            libc::munmap(self.executable.cast(), SIZE);
        }
    }
}

/// A fault inside a stub. RSP is as the stub's entry left it, so returning from the stub right here, with the trap
/// number in RAX, is all: a faulting instruction has no effect, and registers are stored only after it.
fn recover(trap: u64, context: &mut libc::ucontext_t) -> bool {
    // A page fault is no guest instruction's doing: all addresses were checked. Let it be seen.
    if trap == 14 {
        return false;
    }
    let registers = &mut context.uc_mcontext.gregs;
    let rsp = registers[libc::REG_RSP as usize] as u64;
    // SAFETY: RSP points at the return address that the thunk's CALL pushed.
    let back = unsafe { (rsp as *const u64).read() };
    registers[libc::REG_RIP as usize] = back as i64;
    registers[libc::REG_RSP as usize] = rsp.wrapping_add(8) as i64;
    registers[libc::REG_RAX as usize] = (trap + 1) as i64;
    true
}

/// Runs a stub. Answers 0, or the host's trap number + 1.
///
/// # Safety
/// `stub` must be the address of a stub of this module's making, and its memory operand valid.
pub(crate) unsafe fn run(state: &mut CpuState, stub: usize, vector: bool, avx: bool) -> u64 {
    // SAFETY: by this function's own contract; the thunks keep the calling convention.
    unsafe {
        match (vector, avx) {
            (false, _) => plain(state, stub),
            (true, true) => vector_avx(state, stub),
            (true, false) => vector_sse(state, stub),
        }
    }
}

#[unsafe(naked)]
unsafe extern "sysv64" fn plain(state: *mut CpuState, stub: usize) -> u64 {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "push rdi", "call rsi",
        "pop rdi", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    )
}

macro_rules! vector_thunk {
    ($name:ident, $move:literal, $register:literal, $end:literal) => {
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name(state: *mut CpuState, stub: usize) -> u64 {
            naked_asm!(
                "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "push rdi",
                "stmxcsr [rdi + {host}]",
                "ldmxcsr [rdi + {guest}]",
                concat!($move, " ", $register, "0, [rdi + {v} + 0x000]"),
                concat!($move, " ", $register, "1, [rdi + {v} + 0x020]"),
                concat!($move, " ", $register, "2, [rdi + {v} + 0x040]"),
                concat!($move, " ", $register, "3, [rdi + {v} + 0x060]"),
                concat!($move, " ", $register, "4, [rdi + {v} + 0x080]"),
                concat!($move, " ", $register, "5, [rdi + {v} + 0x0a0]"),
                concat!($move, " ", $register, "6, [rdi + {v} + 0x0c0]"),
                concat!($move, " ", $register, "7, [rdi + {v} + 0x0e0]"),
                concat!($move, " ", $register, "8, [rdi + {v} + 0x100]"),
                concat!($move, " ", $register, "9, [rdi + {v} + 0x120]"),
                concat!($move, " ", $register, "10, [rdi + {v} + 0x140]"),
                concat!($move, " ", $register, "11, [rdi + {v} + 0x160]"),
                concat!($move, " ", $register, "12, [rdi + {v} + 0x180]"),
                concat!($move, " ", $register, "13, [rdi + {v} + 0x1a0]"),
                concat!($move, " ", $register, "14, [rdi + {v} + 0x1c0]"),
                concat!($move, " ", $register, "15, [rdi + {v} + 0x1e0]"),
                "call rsi",
                "mov rdi, [rsp]",
                "stmxcsr [rdi + {guest}]",
                "ldmxcsr [rdi + {host}]",
                concat!($move, " [rdi + {v} + 0x000], ", $register, "0"),
                concat!($move, " [rdi + {v} + 0x020], ", $register, "1"),
                concat!($move, " [rdi + {v} + 0x040], ", $register, "2"),
                concat!($move, " [rdi + {v} + 0x060], ", $register, "3"),
                concat!($move, " [rdi + {v} + 0x080], ", $register, "4"),
                concat!($move, " [rdi + {v} + 0x0a0], ", $register, "5"),
                concat!($move, " [rdi + {v} + 0x0c0], ", $register, "6"),
                concat!($move, " [rdi + {v} + 0x0e0], ", $register, "7"),
                concat!($move, " [rdi + {v} + 0x100], ", $register, "8"),
                concat!($move, " [rdi + {v} + 0x120], ", $register, "9"),
                concat!($move, " [rdi + {v} + 0x140], ", $register, "10"),
                concat!($move, " [rdi + {v} + 0x160], ", $register, "11"),
                concat!($move, " [rdi + {v} + 0x180], ", $register, "12"),
                concat!($move, " [rdi + {v} + 0x1a0], ", $register, "13"),
                concat!($move, " [rdi + {v} + 0x1c0], ", $register, "14"),
                concat!($move, " [rdi + {v} + 0x1e0], ", $register, "15"),
                $end,
                "pop rdi", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
                "ret",
                v = const offset_of!(CpuState, ymm),
                guest = const offset_of!(CpuState, mxcsr),
                host = const offset_of!(CpuState, host_mxcsr),
            )
        }
    };
}

vector_thunk!(vector_avx, "vmovups", "ymm", "vzeroupper");
vector_thunk!(vector_sse, "movups", "xmm", "");

/// Code of a fixed stub that may fault: registered for recovery as the arena is.
const FIXED_LEN: u64 = 32;

macro_rules! area_stub {
    ($name:ident, $instruction:literal) => {
        /// Component mask in `scratch[1]`, area in `scratch[0]`.
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name(state: *mut CpuState) -> u64 {
            naked_asm!(
                "mov rcx, [rdi + {scratch}]",
                "mov eax, [rdi + {scratch} + 8]",
                "xor edx, edx",
                concat!($instruction, " [rcx]"),
                "xor eax, eax",
                "ret",
                scratch = const offset_of!(CpuState, scratch),
            )
        }
    };
}

area_stub!(xsave_stub, "xsave64");
area_stub!(xsavec_stub, "xsavec64");
area_stub!(xrstor_stub, "xrstor64");

/// XSAVE or XSAVEC of the live x87 state and the state's vectors.
pub(crate) fn save_area(state: &mut CpuState, area: *mut u8, components: u64, compact: bool, avx: bool) {
    state.scratch[0] = area as u64;
    state.scratch[1] = components;
    let stub = if compact { xsavec_stub as *const () } else { xsave_stub as *const () } as usize;
    // SAFETY: the area has room for x87, SSE and AVX, and `components` names no others.
    unsafe { run(state, stub, true, avx) };
}

/// XRSTOR; `false` if the host refuses the area.
pub(crate) fn load_area(state: &mut CpuState, area: *const u8, components: u64, avx: bool) -> bool {
    state.scratch[0] = area as u64;
    state.scratch[1] = components;
    // SAFETY: as above; a #GP of the area's contents is recovered.
    unsafe { run(state, xrstor_stub as *const () as usize, true, avx) == 0 }
}

/// Loads the guest's x87 state into the host's registers.
pub(crate) fn load_x87(state: &mut CpuState) {
    // MXCSR is in the same image and must stay the host's.
    let mxcsr: u32;
    // SAFETY: the image is 512 aligned bytes; MXCSR is put back at once. Rust code does not use x87.
    unsafe {
        let mut host = 0u32;
        std::arch::asm!("stmxcsr [{}]", in(reg) &mut host, options(nostack));
        mxcsr = host;
    }
    state.x87.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    let image = state.x87.0.as_ptr();
    // SAFETY: as above; XMM registers are declared clobbered.
    unsafe {
        std::arch::asm!("fxrstor64 [{}]", in(reg) image, options(nostack),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
    }
}

/// What every MMX instruction does besides its work: all tags become valid, and the top of the stack zero.
pub(crate) fn touch_mmx() {
    // SAFETY: changes only x87 state, which is the guest's here.
    unsafe { std::arch::asm!("movd {:e}, mm0", out(reg) _, options(nomem, nostack, preserves_flags)) };
}

/// An x87 exception is pending that the next waiting instruction must raise.
pub(crate) fn x87_pending() -> bool {
    let status: u16;
    // SAFETY: reads x87 state only.
    unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status & 0x80 != 0
}

/// Copies the host's x87 registers, leaving them as they are.
pub(crate) fn peek_x87(state: &mut CpuState) {
    let image = state.x87.0.as_mut_ptr();
    // SAFETY: the image is 512 aligned bytes and owned.
    unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) image, options(nostack)) };
}

/// Stores the host's x87 registers as the guest's, and leaves them clean for the host.
pub(crate) fn store_x87(state: &mut CpuState) {
    let image = state.x87.0.as_mut_ptr();
    // SAFETY: the image is 512 aligned bytes and owned; FNINIT leaves the state the host's ABI expects.
    unsafe { std::arch::asm!("fxsave64 [{}]", "fninit", in(reg) image, options(nostack)) };
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn full_is_said_and_cleared() {
        let mut arena = Arena::new().unwrap();
        let first = arena.store(&[0xc3; 64]).unwrap();
        while arena.store(&[0xc3; 4096]).is_some() {}
        arena.clear();
        assert_eq!(arena.store(&[0xc3]), Some(first));
    }
}
