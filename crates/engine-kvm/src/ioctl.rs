//! The requests of /dev/kvm that yado makes: numbers as `linux/kvm.h` and `asm-generic/ioctl.h` define them, pure data.
//! A test compares every one, and every structure that goes with it, with the installed kernel headers.

use kvm_bindings as kvm;

/// One ioctl: its number says how many bytes the kernel reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// As in the header, without `KVM_`.
    pub(crate) name: &'static str,
    pub(crate) number: u32,
    /// The structure holds addresses that the kernel follows.
    pub(crate) pointers: bool,
}

impl Request {
    /// Bytes of the structure that the number names.
    pub(crate) const fn size(self) -> usize {
        (self.number >> 16 & 0x3fff) as usize
    }
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
/// `KVMIO`.
const KIND: u32 = 0xae;

const fn number(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | KIND << 8 | nr
}

macro_rules! requests {
    ($($(#[$about:meta])* $name:ident = $direction:ident $nr:literal $(, $structure:ty $(, $pointers:ident)?)?;)*) => {
        $(
            $(#[$about])*
            pub(crate) const $name: Request = Request {
                name: stringify!($name),
                number: number($direction, $nr, 0 $(+ size_of::<$structure>())?),
                pointers: false $($(|| !stringify!($pointers).is_empty())?)?,
            };
        )*
        /// All of them, for whoever checks them.
        #[cfg(test)]
        pub(crate) const ALL: &[Request] = &[$($name),*];
    };
}

const READ_WRITE: u32 = READ | WRITE;

requests! {
    GET_API_VERSION = NONE 0x00;
    CREATE_VM = NONE 0x01;
    GET_MSR_INDEX_LIST = READ_WRITE 0x02, kvm::kvm_msr_list;
    CHECK_EXTENSION = NONE 0x03;
    GET_VCPU_MMAP_SIZE = NONE 0x04;
    GET_SUPPORTED_CPUID = READ_WRITE 0x05, kvm::kvm_cpuid2;
    CREATE_VCPU = NONE 0x41;
    GET_DIRTY_LOG = WRITE 0x42, kvm::kvm_dirty_log, follows;
    SET_USER_MEMORY_REGION = WRITE 0x46, kvm::kvm_userspace_memory_region, follows;
    SET_TSS_ADDR = NONE 0x47;
    SET_IDENTITY_MAP_ADDR = WRITE 0x48, u64;
    SET_GSI_ROUTING = WRITE 0x6a, kvm::kvm_irq_routing;
    /// The structure holds a descriptor, no address.
    IOEVENTFD = WRITE 0x79, kvm::kvm_ioeventfd;
    SET_CLOCK = WRITE 0x7b, kvm::kvm_clock_data;
    GET_CLOCK = READ 0x7c, kvm::kvm_clock_data;
    RUN = NONE 0x80;
    GET_REGS = READ 0x81, kvm::kvm_regs;
    SET_REGS = WRITE 0x82, kvm::kvm_regs;
    GET_SREGS = READ 0x83, kvm::kvm_sregs;
    SET_SREGS = WRITE 0x84, kvm::kvm_sregs;
    TRANSLATE = READ_WRITE 0x85, kvm::kvm_translation;
    GET_MSRS = READ_WRITE 0x88, kvm::kvm_msrs;
    SET_MSRS = WRITE 0x89, kvm::kvm_msrs;
    GET_LAPIC = READ 0x8e, kvm::kvm_lapic_state;
    SET_LAPIC = WRITE 0x8f, kvm::kvm_lapic_state;
    SET_CPUID2 = WRITE 0x90, kvm::kvm_cpuid2;
    GET_MP_STATE = READ 0x98, kvm::kvm_mp_state;
    SET_MP_STATE = WRITE 0x99, kvm::kvm_mp_state;
    NMI = NONE 0x9a;
    GET_VCPU_EVENTS = READ 0x9f, kvm::kvm_vcpu_events;
    SET_VCPU_EVENTS = WRITE 0xa0, kvm::kvm_vcpu_events;
    GET_DEBUGREGS = READ 0xa1, kvm::kvm_debugregs;
    SET_DEBUGREGS = WRITE 0xa2, kvm::kvm_debugregs;
    GET_TSC_KHZ = NONE 0xa3;
    ENABLE_CAP = WRITE 0xa3, kvm::kvm_enable_cap;
    /// The number names 4096 bytes; the kernel never touches more.
    GET_XSAVE = READ 0xa4, kvm::kvm_xsave;
    SET_XSAVE = WRITE 0xa5, kvm::kvm_xsave;
    SIGNAL_MSI = WRITE 0xa5, kvm::kvm_msi;
    GET_XCRS = READ 0xa6, kvm::kvm_xcrs;
    SET_XCRS = WRITE 0xa7, kvm::kvm_xcrs;
    KVMCLOCK_CTRL = NONE 0xad;
    /// Of a TSC offset the structure holds an address.
    SET_DEVICE_ATTR = WRITE 0xe1, kvm::kvm_device_attr, follows;
    GET_DEVICE_ATTR = WRITE 0xe2, kvm::kvm_device_attr, follows;
    CLEAR_DIRTY_LOG = READ_WRITE 0xc0, kvm::kvm_clear_dirty_log, follows;
    X86_SET_MSR_FILTER = WRITE 0xc6, crate::host::MsrFilter, follows;
    RESET_DIRTY_RINGS = NONE 0xc7;
    GET_STATS_FD = NONE 0xce;
}

/// The names of exit reasons, for people.
pub(crate) fn exit_name(reason: u32) -> &'static str {
    const NAMES: &[(u32, &str)] = &[
        (kvm::KVM_EXIT_UNKNOWN, "UNKNOWN"),
        (kvm::KVM_EXIT_EXCEPTION, "EXCEPTION"),
        (kvm::KVM_EXIT_IO, "IO"),
        (kvm::KVM_EXIT_HYPERCALL, "HYPERCALL"),
        (kvm::KVM_EXIT_DEBUG, "DEBUG"),
        (kvm::KVM_EXIT_HLT, "HLT"),
        (kvm::KVM_EXIT_MMIO, "MMIO"),
        (kvm::KVM_EXIT_IRQ_WINDOW_OPEN, "IRQ_WINDOW_OPEN"),
        (kvm::KVM_EXIT_SHUTDOWN, "SHUTDOWN"),
        (kvm::KVM_EXIT_FAIL_ENTRY, "FAIL_ENTRY"),
        (kvm::KVM_EXIT_INTR, "INTR"),
        (kvm::KVM_EXIT_SET_TPR, "SET_TPR"),
        (kvm::KVM_EXIT_TPR_ACCESS, "TPR_ACCESS"),
        (kvm::KVM_EXIT_NMI, "NMI"),
        (kvm::KVM_EXIT_INTERNAL_ERROR, "INTERNAL_ERROR"),
        (kvm::KVM_EXIT_SYSTEM_EVENT, "SYSTEM_EVENT"),
        (kvm::KVM_EXIT_IOAPIC_EOI, "IOAPIC_EOI"),
        (kvm::KVM_EXIT_HYPERV, "HYPERV"),
        (kvm::KVM_EXIT_X86_RDMSR, "X86_RDMSR"),
        (kvm::KVM_EXIT_X86_WRMSR, "X86_WRMSR"),
        (kvm::KVM_EXIT_DIRTY_RING_FULL, "DIRTY_RING_FULL"),
        (kvm::KVM_EXIT_X86_BUS_LOCK, "X86_BUS_LOCK"),
        (kvm::KVM_EXIT_NOTIFY, "NOTIFY"),
        (kvm::KVM_EXIT_MEMORY_FAULT, "MEMORY_FAULT"),
    ];
    NAMES
        .iter()
        .find(|(number, _)| *number == reason)
        .map_or("of a kind yado does not know", |(_, name)| name)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::fmt::Write;
    use std::mem::offset_of;
    use std::process::Command;

    /// What a C compiler says of the expressions, with the host's own `linux/kvm.h`.
    fn in_c(expressions: &[String]) -> Vec<u64> {
        let directory = tempfile::tempdir().unwrap();
        let (source, program) = (directory.path().join("ask.c"), directory.path().join("ask"));
        let mut text =
            "#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {\n".to_owned();
        for expression in expressions {
            writeln!(text, "printf(\"%lu\\n\", (unsigned long)({expression}));").unwrap();
        }
        text += "return 0; }\n";
        std::fs::write(&source, text).unwrap();
        let built = Command::new("cc").arg(&source).arg("-o").arg(&program).status();
        assert!(built.expect("cc and the kernel's headers (linux-libc-dev) are needed").success());
        let told = Command::new(&program).output().unwrap();
        String::from_utf8(told.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
    }

    #[test]
    fn every_request_has_the_number_that_the_headers_give_it() {
        let names: Vec<_> = ALL.iter().map(|request| format!("KVM_{}", request.name)).collect();
        for (request, number) in ALL.iter().zip(in_c(&names)) {
            assert_eq!(u64::from(request.number), number, "{}", request.name);
        }
    }

    macro_rules! same {
        ($rows:ident, $structure:ident: $($field:ident),*) => {
            $rows.push((format!("sizeof(struct {})", stringify!($structure)), size_of::<kvm::$structure>()));
            $($rows.push((
                format!("offsetof(struct {}, {})", stringify!($structure), stringify!($field)),
                offset_of!(kvm::$structure, $field),
            ));)*
        };
    }

    #[test]
    fn every_structure_lies_as_the_headers_say() {
        let mut rows: Vec<(String, usize)> = Vec::new();
        same!(rows, kvm_run: request_interrupt_window, immediate_exit, exit_reason, ready_for_interrupt_injection,
            if_flag, flags, cr8, apic_base, kvm_valid_regs, kvm_dirty_regs, s);
        same!(rows, kvm_regs: rax, rsp, r15, rip, rflags);
        same!(rows, kvm_sregs: cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base,
            interrupt_bitmap);
        same!(rows, kvm_segment: base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable);
        same!(rows, kvm_dtable: base, limit);
        same!(rows, kvm_debugregs: db, dr6, dr7, flags);
        same!(rows, kvm_xcrs: nr_xcrs, flags, xcrs);
        same!(rows, kvm_vcpu_events: exception, interrupt, nmi, sipi_vector, flags, smi, triple_fault,
            exception_has_payload, exception_payload);
        same!(rows, kvm_msr_entry: index, data);
        same!(rows, kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx);
        same!(rows, kvm_lapic_state: regs);
        same!(rows, kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr);
        same!(rows, kvm_irq_routing_entry: gsi, type_, flags, u);
        same!(rows, kvm_irq_routing_msi: address_lo, address_hi, data);
        same!(rows, kvm_msi: address_lo, address_hi, data, flags, devid);
        same!(rows, kvm_ioeventfd: datamatch, addr, len, fd, flags);
        same!(rows, kvm_clock_data: clock, flags, realtime, host_tsc);
        same!(rows, kvm_device_attr: flags, group, attr, addr);
        same!(rows, kvm_enable_cap: cap, flags, args);
        {
            use crate::host::{MsrFilter, MsrFilterRange};
            let mut add = |what: &str, is: usize| rows.push((what.to_owned(), is));
            add("sizeof(struct kvm_msr_filter)", size_of::<MsrFilter>());
            add("offsetof(struct kvm_msr_filter, ranges)", offset_of!(MsrFilter, ranges));
            add("sizeof(struct kvm_msr_filter_range)", size_of::<MsrFilterRange>());
            add("offsetof(struct kvm_msr_filter_range, nmsrs)", offset_of!(MsrFilterRange, nmsrs));
            add("offsetof(struct kvm_msr_filter_range, base)", offset_of!(MsrFilterRange, base));
            add("offsetof(struct kvm_msr_filter_range, bitmap)", offset_of!(MsrFilterRange, bitmap));
        }
        same!(rows, kvm_dirty_log: slot);
        same!(rows, kvm_clear_dirty_log: slot, num_pages, first_page);
        same!(rows, kvm_dirty_gfn: flags, slot, offset);
        same!(rows, kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset);
        same!(rows, kvm_stats_desc: flags, exponent, size, offset, bucket_size, name);
        same!(rows, kvm_translation: linear_address, physical_address, valid);
        let asked: Vec<_> = rows.iter().map(|(what, _)| what.replace("type_", "type")).collect();
        for ((what, ours), theirs) in rows.iter().zip(in_c(&asked)) {
            // This one has grown in kernels after the headers that are installed here, at its end.
            let grows = what.starts_with("sizeof(struct kvm_run)");
            assert!(*ours as u64 == theirs || grows && *ours as u64 > theirs, "{what}: {ours}, not {theirs}");
        }
    }

    #[test]
    fn the_exits_are_where_the_headers_put_them() {
        let detail = offset_of!(kvm::kvm_run, __bindgen_anon_1);
        let rows = [
            ("io.port", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_4, port)),
            ("io.count", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_4, count)),
            ("io.data_offset", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_4, data_offset)),
            ("mmio.phys_addr", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_6, phys_addr)),
            ("mmio.data", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_6, data)),
            ("mmio.is_write", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_6, is_write)),
            ("hypercall.args", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_8, args)),
            ("hypercall.ret", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_8, ret)),
            ("internal.data", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_13, data)),
            (
                "emulation_failure.flags",
                detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_14, flags),
            ),
            ("system_event.type", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_19, type_)),
            ("eoi.vector", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_21, vector)),
            ("msr.error", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, error)),
            ("msr.index", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, index)),
            ("msr.data", detail + offset_of!(kvm::kvm_run__bindgen_ty_1__bindgen_ty_23, data)),
        ];
        let asked: Vec<_> =
            rows.iter().map(|(what, _)| format!("offsetof(struct kvm_run, {what})")).collect();
        for ((what, ours), theirs) in rows.iter().zip(in_c(&asked)) {
            assert_eq!(*ours as u64, theirs, "{what}");
        }
    }
}
