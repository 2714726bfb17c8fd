//! What a vCPU that cannot go on has to say, for people: the exit, in words, with the instruction's bytes.

use crate::ioctl::exit_name;
use crate::run_page::RunPage;
use kvm_bindings as kvm;
use kvm_bindings::{
    kvm_run__bindgen_ty_1__bindgen_ty_1 as Hardware, kvm_run__bindgen_ty_1__bindgen_ty_2 as FailEntry,
    kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal, kvm_run__bindgen_ty_1__bindgen_ty_14 as Emulation,
    kvm_run__bindgen_ty_1__bindgen_ty_27 as MemoryFault,
};
use std::fmt::Write;

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        let separator = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{separator}{byte:02x}");
    }
    text
}

/// The bytes of the instruction that KVM could not emulate, if it told.
fn told_bytes(page: &RunPage) -> Option<Vec<u8>> {
    let emulation: Emulation = page.detail();
    let told = u64::from(kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    // The flags word, then length and bytes in two more: three words of data at least.
    if emulation.ndata < 3 || emulation.flags & told == 0 {
        return None;
    }
    // The same bytes seen as words: flags, then one byte of length and fifteen of the instruction.
    let Internal { data, .. } = page.detail();
    let bytes: Vec<u8> = data.iter().skip(1).take(2).flat_map(|word| word.to_le_bytes()).collect();
    let (&length, bytes) = bytes.split_first()?;
    bytes.get(..usize::from(length)).map(<[u8]>::to_vec)
}

/// An exit that no guest should cause, in words; `bytes` are those at the instruction pointer, if they can be read.
pub(crate) fn describe(page: &RunPage, bytes: Option<&[u8]>) -> String {
    let instruction = |bytes: Option<&[u8]>| match bytes {
        Some(bytes) if !bytes.is_empty() => format!("; the instruction begins with {}", hex(bytes)),
        _ => "; the instruction cannot be read".to_owned(),
    };
    match page.exit_reason() {
        kvm::KVM_EXIT_INTERNAL_ERROR => {
            let Internal { suberror, ndata, data } = page.detail();
            let what = match suberror {
                kvm::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
                kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions at once",
                kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was being delivered",
                kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM does not know",
                _ => "an error that yado does not know",
            };
            if suberror == kvm::KVM_INTERNAL_ERROR_EMULATION {
                let told = told_bytes(page);
                return format!("{what}{}", instruction(told.as_deref().or(bytes)));
            }
            let data: Vec<_> = data.iter().take(ndata as usize).map(|word| format!("{word:#x}")).collect();
            let data = if data.is_empty() { String::new() } else { format!(" ({})", data.join(", ")) };
            format!("KVM internal error {suberror}: {what}{data}{}", instruction(bytes))
        }
        kvm::KVM_EXIT_FAIL_ENTRY => {
            let FailEntry { hardware_entry_failure_reason: reason, cpu } = page.detail();
            // Intel SDM 3C, 24.9.1: bit 31 is a failed entry, 33 is invalid guest state.
            let what = match reason {
                0x8000_0021 => ": the guest's state is not valid for VT-x",
                0x8000_0022 => ": an MSR could not be loaded",
                u64::MAX => ": the guest's state is not valid for SVM",
                _ => "",
            };
            format!("the processor refused to enter the guest (reason {reason:#x} on CPU {cpu}{what})")
        }
        kvm::KVM_EXIT_UNKNOWN => {
            let Hardware { hardware_exit_reason } = page.detail();
            format!(
                "the processor left the guest for reason {hardware_exit_reason:#x}, which KVM does not know"
            )
        }
        kvm::KVM_EXIT_MEMORY_FAULT => {
            let MemoryFault { gpa, size, flags } = page.detail();
            format!(
                "the host could not give memory at guest-physical {gpa:#x} ({size} bytes, flags {flags:#x})"
            )
        }
        reason => format!("exit {reason} ({}) is not one that yado asked for", exit_name(reason)),
    }
}
