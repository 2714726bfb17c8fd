//! Raw copies between Rust buffers and guest RAM by host address.
//!
//! Guest RAM is shared with other vCPUs, so no Rust reference to it is ever made. Aligned accesses of 1, 2, 4 and 8
//! bytes are single host accesses, as the guest may expect of its CPU (Intel SDM 3, 9.1.1).
#![allow(unsafe_code)]

/// Copies out of guest RAM. `from` must come from a translation that covers the whole slice.
pub(crate) fn read(from: *const u8, into: &mut [u8]) {
    // SAFETY: in all arms, callers pass a pointer that the MMU made for a RAM page, and check that the access stays in
    // that page; RAM outlives the engine. Volatile keeps the access whole.
    unsafe {
        match into.len() {
            1 => into[0] = from.read_volatile(),
            2 => into.copy_from_slice(&from.cast::<Unaligned<u16>>().read_volatile().0.to_le_bytes()),
            4 => into.copy_from_slice(&from.cast::<Unaligned<u32>>().read_volatile().0.to_le_bytes()),
            8 => into.copy_from_slice(&from.cast::<Unaligned<u64>>().read_volatile().0.to_le_bytes()),
            len => std::ptr::copy(from, into.as_mut_ptr(), len),
        }
    }
}

/// Copies into guest RAM; as [`read`].
pub(crate) fn write(to: *mut u8, from: &[u8]) {
    // SAFETY: as in `read`.
    unsafe {
        match *from {
            [a] => to.write_volatile(a),
            [a, b] => to.cast::<Unaligned<u16>>().write_volatile(Unaligned(u16::from_le_bytes([a, b]))),
            [a, b, c, d] => {
                to.cast::<Unaligned<u32>>().write_volatile(Unaligned(u32::from_le_bytes([a, b, c, d])));
            }
            [a, b, c, d, e, f, g, h] => to
                .cast::<Unaligned<u64>>()
                .write_volatile(Unaligned(u64::from_le_bytes([a, b, c, d, e, f, g, h]))),
            _ => std::ptr::copy(from.as_ptr(), to, from.len()),
        }
    }
}

/// Bytes that a guest cannot guess.
pub(crate) fn random() -> u64 {
    let mut seed = 0u64;
    // SAFETY: the buffer is eight bytes of our own.
    let got = unsafe { libc::getrandom((&raw mut seed).cast(), 8, 0) };
    if got == 8 { seed } else { std::ptr::from_ref(&seed) as u64 ^ u64::from(std::process::id()) }
}

/// Selector of the data segment in use.
pub(crate) fn data_segment() -> u16 {
    let selector: u16;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mov {0:x}, ss", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector
}

/// Has the CPU forget what is in its buffers, on CPUs whose microcode does that (Linux, admin-guide/hw-vuln).
pub(crate) fn forget_buffers(selector: &u16) {
    // SAFETY: looks at a descriptor; the form with memory is the one that does more.
    unsafe { std::arch::asm!("verw word ptr [{}]", in(reg) selector, options(readonly, nostack)) };
}

/// Stops a traced process of ours.
pub(crate) fn interrupt(process: libc::pid_t) {
    // SAFETY: sends a signal to a child that is not reaped while it may be sent one.
    unsafe { libc::kill(process, libc::SIGUSR1) };
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Copies `len` bytes from RAM to RAM as MOVS does with ascending addresses: where the ranges overlap with the
/// destination above the source, bytes already copied are copied again.
pub(crate) fn copy_up(from: *const u8, to: *mut u8, len: usize, unit: usize) {
    let apart = (to as usize).wrapping_sub(from as usize);
    // SAFETY: as in `read`, for both ranges.
    unsafe {
        if apart >= len {
            std::ptr::copy(from, to, len);
            return;
        }
        let mut done = 0;
        while done < len {
            // One element at a time: a pattern fill by self-overlap.
            std::ptr::copy(from.add(done), to.add(done), unit);
            done += unit;
        }
    }
}

/// Fills `count` elements with `value`'s low `unit` bytes.
pub(crate) fn fill(to: *mut u8, value: u64, unit: usize, count: usize) {
    let bytes = value.to_le_bytes();
    // SAFETY: as in `read`.
    unsafe {
        if bytes[..unit].iter().all(|&byte| byte == bytes[0]) {
            std::ptr::write_bytes(to, bytes[0], unit * count);
            return;
        }
        for i in 0..count {
            std::ptr::copy(bytes.as_ptr(), to.add(i * unit), unit);
        }
    }
}
