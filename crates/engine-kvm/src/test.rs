//! What cannot be reached on every host: answers of VT-x and SVM, errors, old kernels, by a [`Double`].

use crate::double::{Double, FIRST_VCPU, IO_DATA, VM};
use crate::engine::{KvmEngine, Options};
use crate::host::Plain;
use cpu::cpuid::{CpuidTable, Leaf};
use cpu::{Activity, Engine, Error, Exit, Registers, Space, Vcpu, VcpuConfig, VcpuState};
use kvm_bindings as kvm;
use kvm_bindings::{
    kvm_run__bindgen_ty_1__bindgen_ty_1 as Hardware, kvm_run__bindgen_ty_1__bindgen_ty_2 as FailEntry,
    kvm_run__bindgen_ty_1__bindgen_ty_4 as Io, kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio,
    kvm_run__bindgen_ty_1__bindgen_ty_8 as Hypercall, kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal,
    kvm_run__bindgen_ty_1__bindgen_ty_19 as SystemEvent, kvm_run__bindgen_ty_1__bindgen_ty_21 as Eoi,
    kvm_run__bindgen_ty_1__bindgen_ty_23 as Msr, kvm_run__bindgen_ty_1__bindgen_ty_27 as MemoryFault,
};
use memory::{Backing, GuestMemory, PageFlags};
use std::sync::Arc;

fn memory() -> GuestMemory {
    GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap()
}

fn engine(double: &Arc<Double>, options: Options) -> Result<KvmEngine, Error> {
    KvmEngine::on(double.clone(), memory(), options)
}

/// A double with a few MSRs, and its first vCPU.
fn vcpu_on(double: Double) -> (Arc<Double>, KvmEngine, Box<dyn Vcpu>) {
    for index in [cpu::msr::TSC, cpu::msr::STAR, cpu::msr::TSC_DEADLINE] {
        double.set_msr(index, 0);
    }
    let double = Arc::new(double);
    let engine = engine(&double, Options::default()).unwrap();
    let vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::default() }).unwrap();
    (double, engine, vcpu)
}

fn vcpu() -> (Arc<Double>, KvmEngine, Box<dyn Vcpu>) {
    vcpu_on(Double::linux_6_12())
}

fn zeroed() -> Hardware {
    Hardware::zeroed()
}

#[test]
fn an_old_kernel_is_enough_and_an_older_one_is_told_what_it_lacks() {
    let (double, engine, _vcpu) = vcpu_on(Double::linux_5_10());
    assert_eq!((engine.name(), engine.tsc_hz()), ("kvm", 2_500_000_000));
    assert_eq!(double.count("GET_STATS_FD"), 0);
    let double = Arc::new(Double::linux_5_10().without(kvm::KVM_CAP_X86_MSR_FILTER));
    let error = engine_error(&double);
    assert!(
        error.contains("KVM_CAP_X86_MSR_FILTER (Linux 5.10)") && error.contains("--engine soft"),
        "{error}"
    );
    assert_eq!(double.closed(), [VM, 3], "nothing is left open");
}

fn engine_error(double: &Arc<Double>) -> String {
    engine(double, Options::default()).err().expect("refused").to_string()
}

#[test]
fn what_the_kernel_refuses_has_a_name() {
    for request in
        ["CREATE_VM", "SET_USER_MEMORY_REGION", "SET_TSS_ADDR", "GET_SUPPORTED_CPUID", "CREATE_VCPU"]
    {
        let double = Arc::new(Double::linux_6_12());
        double.refuse(request, libc::ENOMEM);
        let error = engine_error(&double);
        assert!(error.starts_with(&format!("KVM_{request}: ")), "{error}");
    }
    let double = Arc::new(Double::linux_6_12());
    double.refuse("ENABLE_CAP", libc::EINVAL);
    assert!(engine_error(&double).starts_with("KVM_CAP_SPLIT_IRQCHIP: "));
}

#[test]
fn strings_of_port_io_are_single_accesses_and_answers_find_their_place() {
    let (double, _engine, mut vcpu) = vcpu();
    let io = Io { direction: 1, size: 2, port: 0x1f0, count: 3, data_offset: IO_DATA as u64 };
    double.then(|page| {
        page[IO_DATA..IO_DATA + 6].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        Ok(0)
    });
    // The first run only filled the page; its exit reason is unknown, which is an error.
    assert!(vcpu.run().is_err());
    double.exits(kvm::KVM_EXIT_IO, io);
    for value in [0x0201, 0x0403, 0x0605] {
        let expected = Exit::Write { space: Space::Port, address: 0x1f0, size: 2, value };
        assert_eq!(vcpu.run().unwrap(), expected);
        assert!(!vcpu.interruptible());
    }
    double.exits(kvm::KVM_EXIT_IO, Io { direction: 0, size: 4, count: 2, ..io });
    for answer in [0x1111_2222, 0x3333_4444u64] {
        assert_eq!(vcpu.run().unwrap(), Exit::Read { space: Space::Port, address: 0x1f0, size: 4 });
        vcpu.complete(Some(answer));
    }
    double.page(FIRST_VCPU, |page| {
        assert_eq!(page[IO_DATA..IO_DATA + 8], [0x22, 0x22, 0x11, 0x11, 0x44, 0x44, 0x33, 0x33]);
    });
    double.exits(kvm::KVM_EXIT_HLT, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
}

#[test]
fn a_kernel_that_names_impossible_places_reaches_nothing() {
    let (double, _engine, mut vcpu) = vcpu();
    // An answer "into" the registers of kvm_run, and one far outside.
    for data_offset in [8, 1 << 40, u64::MAX] {
        double.exits(kvm::KVM_EXIT_IO, Io { direction: 0, size: 4, port: 1, count: 1, data_offset });
        assert!(matches!(vcpu.run().unwrap(), Exit::Read { .. }));
        let before = double_page(&double);
        vcpu.complete(Some(0x5555_5555));
        assert_eq!(double_page(&double), before);
    }
    // A count that no page holds.
    let io = Io { direction: 1, size: 1, port: 1, count: u32::MAX, data_offset: IO_DATA as u64 };
    double.exits(kvm::KVM_EXIT_IO, io);
    for _ in 0..4096 {
        assert!(matches!(vcpu.run().unwrap(), Exit::Write { .. }));
    }
    double.exits(kvm::KVM_EXIT_HLT, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
}

fn double_page(double: &Double) -> Vec<u8> {
    let mut copy = Vec::new();
    double.page(FIRST_VCPU, |page| copy = page.to_vec());
    copy
}

#[test]
fn parts_of_instructions_in_odd_lengths_become_natural_accesses() {
    let (double, _engine, mut vcpu) = vcpu();
    let data = [1, 2, 3, 4, 5, 6, 7, 8];
    double.exits(kvm::KVM_EXIT_MMIO, Mmio { phys_addr: 0xfd00_0ffd, data, len: 3, is_write: 1 });
    let write = |address, size, value| Exit::Write { space: Space::Mmio, address, size, value };
    assert_eq!(vcpu.run().unwrap(), write(0xfd00_0ffd, 1, 1));
    assert_eq!(vcpu.run().unwrap(), write(0xfd00_0ffe, 2, 0x0302));
    // A natural width is one access wherever it lies.
    double.exits(kvm::KVM_EXIT_MMIO, Mmio { phys_addr: 0xfd00_0003, data, len: 8, is_write: 1 });
    assert_eq!(vcpu.run().unwrap(), write(0xfd00_0003, 8, 0x0807_0605_0403_0201));
    double.exits(kvm::KVM_EXIT_MMIO, Mmio { phys_addr: 0xfd00_1000, data: [0; 8], len: 5, is_write: 0 });
    assert_eq!(vcpu.run().unwrap(), Exit::Read { space: Space::Mmio, address: 0xfd00_1000, size: 4 });
    vcpu.complete(Some(0xddcc_bbaa));
    assert_eq!(vcpu.run().unwrap(), Exit::Read { space: Space::Mmio, address: 0xfd00_1004, size: 1 });
    vcpu.complete(None);
    let at = std::mem::offset_of!(kvm::kvm_run, __bindgen_anon_1) + std::mem::offset_of!(Mmio, data);
    double.page(FIRST_VCPU, |page| assert_eq!(page[at..at + 5], [0xaa, 0xbb, 0xcc, 0xdd, 0xff]));
}

#[test]
fn model_specific_registers_and_hypercalls_are_answered() {
    let (double, _engine, mut vcpu) = vcpu();
    double.exits(kvm::KVM_EXIT_X86_RDMSR, Msr { index: 0xc001_0015, ..Msr::zeroed() });
    assert_eq!(vcpu.run().unwrap(), Exit::ReadMsr { index: 0xc001_0015 });
    vcpu.complete(Some(7));
    let told = |double: &Double| {
        let mut msr = Msr::zeroed();
        let at = std::mem::offset_of!(kvm::kvm_run, __bindgen_anon_1);
        double.page(FIRST_VCPU, |page| {
            let bytes = crate::host::bytes_of(&mut msr);
            bytes.copy_from_slice(&page[at..at + bytes.len()]);
        });
        (msr.error, msr.data)
    };
    assert_eq!(told(&double), (0, 7));
    double.exits(kvm::KVM_EXIT_X86_WRMSR, Msr { index: 0x1234, data: 9, ..Msr::zeroed() });
    assert_eq!(vcpu.run().unwrap(), Exit::WriteMsr { index: 0x1234, value: 9 });
    vcpu.complete(None);
    assert_eq!(told(&double).0, 1, "#GP");
    let mut call = Hypercall::zeroed();
    (call.nr, call.args) = (12, [1, 2, 3, 4, 5, 6]);
    double.exits(kvm::KVM_EXIT_HYPERCALL, call);
    assert_eq!(vcpu.run().unwrap(), Exit::Hypercall { number: 12, args: [1, 2, 3, 4] });
    vcpu.complete(Some(0));
}

#[test]
fn kicks_are_heard_once_and_the_rest_of_the_exits_have_their_meaning() {
    let (double, _engine, mut vcpu) = vcpu();
    let kick = vcpu.kick_handle();
    kick.kick();
    kick.kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    double.fails(libc::EAGAIN);
    double.exits(kvm::KVM_EXIT_IOAPIC_EOI, Eoi { vector: 0x62 });
    assert_eq!(vcpu.run().unwrap(), Exit::EndOfInterrupt { vector: 0x62 });
    double.fails(libc::EINTR);
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    vcpu.request_interrupt_window(true);
    double.exits(kvm::KVM_EXIT_IRQ_WINDOW_OPEN, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::InterruptWindow);
    let asked = std::mem::offset_of!(kvm::kvm_run, request_interrupt_window);
    double.page(FIRST_VCPU, |page| assert_eq!(page[asked], 0, "it is asked for once"));
    double.exits(kvm::KVM_EXIT_SHUTDOWN, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
    let mut event = SystemEvent::zeroed();
    event.type_ = kvm::KVM_SYSTEM_EVENT_RESET;
    double.exits(kvm::KVM_EXIT_SYSTEM_EVENT, event);
    assert_eq!(vcpu.run().unwrap(), Exit::Shutdown);
    double.exits(kvm::KVM_EXIT_DEBUG, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::Debug);
}

#[test]
fn interrupts_go_in_only_when_the_kernel_is_ready_and_whoever_saves_sees_them() {
    let (double, _engine, mut vcpu) = vcpu();
    assert!(!vcpu.interruptible(), "before the first run nobody knows");
    let ready = std::mem::offset_of!(kvm::kvm_run, ready_for_interrupt_injection);
    double.page(FIRST_VCPU, |page| page[ready] = 1);
    assert!(!vcpu.interruptible(), "the page may be of another life");
    let interrupted = |vcpu: &mut dyn Vcpu| {
        double.fails(libc::EINTR);
        assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    };
    interrupted(&mut *vcpu);
    assert!(vcpu.interruptible());
    vcpu.inject_interrupt(0x50);
    assert!(!vcpu.interruptible(), "one at a time");
    assert_eq!(vcpu.save().unwrap().events.interrupt, Some(0x50));
    let since = double.asked();
    interrupted(&mut *vcpu);
    let under_way = || double.kept::<kvm::kvm_vcpu_events>(FIRST_VCPU, "SET_VCPU_EVENTS").unwrap();
    assert_eq!((under_way().interrupt.injected, under_way().interrupt.nr, under_way().flags), (1, 0x50, 0));
    assert_eq!(double.order_since(since), ["GET_VCPU_EVENTS", "SET_VCPU_EVENTS", "GET_MP_STATE", "RUN"]);
    // That run ended before the guest was entered: it is saved all the same.
    assert_eq!(vcpu.save().unwrap().events.interrupt, Some(0x50));
    // One for a vCPU in HLT wakes it.
    double.set(FIRST_VCPU, "SET_MP_STATE", kvm::kvm_mp_state { mp_state: kvm::KVM_MP_STATE_HALTED });
    vcpu.inject_interrupt(0x51);
    interrupted(&mut *vcpu);
    assert_eq!((under_way().interrupt.nr, vcpu.activity()), (0x51, Activity::Running));
    // In the middle of an instruction, and after a change of registers, the page says nothing.
    double.exits(kvm::KVM_EXIT_MMIO, Mmio { phys_addr: 0xfd00_0000, data: [0; 8], len: 4, is_write: 1 });
    assert!(matches!(vcpu.run().unwrap(), Exit::Write { .. }));
    assert!(!vcpu.interruptible());
    interrupted(&mut *vcpu);
    assert!(vcpu.interruptible());
    let registers = vcpu.registers();
    vcpu.set_registers(&registers);
    assert!(!vcpu.interruptible());
    interrupted(&mut *vcpu);
    // A refusal is an error.
    double.refuse("SET_VCPU_EVENTS", libc::EINVAL);
    vcpu.inject_interrupt(0x52);
    interrupted(&mut *vcpu);
    let error = vcpu.run().unwrap_err().to_string();
    assert!(error.starts_with("giving KVM an interrupt of the 8259A: "), "{error}");
}

fn stopped(vcpu: &mut dyn Vcpu) -> String {
    match vcpu.run() {
        Err(error @ Error::Guest { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_stops_a_guest_is_told_in_words() {
    let (double, _engine, mut vcpu) = vcpu();
    let mut internal = Internal::zeroed();
    (internal.suberror, internal.ndata) = (kvm::KVM_INTERNAL_ERROR_EMULATION, 4);
    internal.data[0] = kvm::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.into();
    internal.data[1] = u64::from_le_bytes([3, 0x0f, 0x01, 0xc5, 0, 0, 0, 0]);
    double.exits(kvm::KVM_EXIT_INTERNAL_ERROR, internal);
    let told = stopped(&mut *vcpu);
    assert!(told.contains("cannot emulate") && told.ends_with("begins with 0f 01 c5"), "{told}");
    // A length that lies outside what is there.
    internal.data[1] = u64::MAX;
    double.exits(kvm::KVM_EXIT_INTERNAL_ERROR, internal);
    assert!(stopped(&mut *vcpu).contains("cannot emulate"));
    // VT-x: a delivery that met an EPT misconfiguration (exit 49).
    let mut internal = Internal::zeroed();
    (internal.suberror, internal.ndata) = (kvm::KVM_INTERNAL_ERROR_DELIVERY_EV, 3);
    internal.data[..3].copy_from_slice(&[0x8000_030e, 0x31, 0]);
    double.exits(kvm::KVM_EXIT_INTERNAL_ERROR, internal);
    let told = stopped(&mut *vcpu);
    assert!(told.contains("event was being delivered (0x8000030e, 0x31, 0x0)"), "{told}");
    // More data than there is room for.
    internal.ndata = u32::MAX;
    double.exits(kvm::KVM_EXIT_INTERNAL_ERROR, internal);
    assert!(stopped(&mut *vcpu).contains("0x31"));
    let mut entry = FailEntry::zeroed();
    (entry.hardware_entry_failure_reason, entry.cpu) = (0x8000_0021, 5);
    double.exits(kvm::KVM_EXIT_FAIL_ENTRY, entry);
    let told = stopped(&mut *vcpu);
    assert!(told.contains("reason 0x80000021 on CPU 5: the guest's state is not valid for VT-x"), "{told}");
    double.exits(kvm::KVM_EXIT_UNKNOWN, Hardware { hardware_exit_reason: 0x4a });
    assert!(stopped(&mut *vcpu).contains("for reason 0x4a"));
    double.then(|page| {
        let at = std::mem::offset_of!(kvm::kvm_run, exit_reason);
        page[at..at + 4].copy_from_slice(&kvm::KVM_EXIT_MEMORY_FAULT.to_le_bytes());
        let mut fault = MemoryFault::zeroed();
        (fault.gpa, fault.size) = (0x5000, 0x1000);
        let at = std::mem::offset_of!(kvm::kvm_run, __bindgen_anon_1);
        let bytes = crate::host::bytes_of(&mut fault);
        page[at..at + bytes.len()].copy_from_slice(bytes);
        Err(std::io::Error::from_raw_os_error(libc::EFAULT))
    });
    assert!(stopped(&mut *vcpu).contains("memory at guest-physical 0x5000"));
    double.exits(kvm::KVM_EXIT_NOTIFY, zeroed());
    assert!(stopped(&mut *vcpu).contains("(NOTIFY) is not one that yado asked for"));
    double.fails(libc::EIO);
    assert!(matches!(vcpu.run(), Err(Error::Host { what: "KVM_RUN", .. })));
}

#[test]
fn state_that_the_kernel_does_not_take_fails_the_next_run() {
    let (double, _engine, mut vcpu) = vcpu();
    double.refuse("SET_SREGS", libc::EINVAL);
    vcpu.set_registers(&Registers::default());
    let error = vcpu.run().unwrap_err().to_string();
    assert!(error.starts_with("KVM_SET_SREGS: "), "{error}");
}

#[test]
fn a_refusal_is_forgotten_with_the_state_that_was_refused() {
    let (double, _engine, mut vcpu) = vcpu();
    let saved = vcpu.save().unwrap();
    for restored in [false, true] {
        double.refuse("SET_SREGS", libc::EINVAL);
        vcpu.set_registers(&Registers::default());
        double.accept("SET_SREGS");
        if restored {
            vcpu.restore(&saved).unwrap()
        } else {
            vcpu.reset(false)
        }
        double.exits(kvm::KVM_EXIT_HLT, zeroed());
        assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    }
    // One that cannot be restored is not sound again.
    double.refuse("SET_XSAVE", libc::EINVAL);
    assert!(vcpu.restore(&saved).is_err());
    vcpu.reset(false);
    assert!(vcpu.run().unwrap_err().to_string().starts_with("KVM_SET_XSAVE: "));
}

#[test]
fn the_guests_clock_is_saved_and_goes_on() {
    let clock =
        |double: &Double| double.kept::<kvm::kvm_clock_data>(VM, "SET_CLOCK").map(|clock| clock.clock);
    let passes = |double: &Double, clock| {
        double.set(VM, "SET_CLOCK", kvm::kvm_clock_data { clock, ..kvm::kvm_clock_data::zeroed() });
    };
    let (double, engine, mut first) = vcpu();
    let mut second = engine.create_vcpu(VcpuConfig { index: 1, cpuid: Arc::default() }).unwrap();
    passes(&double, 5000);
    for vcpu in [&mut first, &mut second] {
        vcpu.stand();
    }
    engine.stand();
    passes(&double, 9000);
    let mut saved = first.save().unwrap();
    assert_eq!((saved.clock_ns, second.save().unwrap().clock_ns), (Some(5000), Some(5000)));
    // What is restored meanwhile is what goes on.
    saved.clock_ns = Some(70_000);
    first.restore(&saved).unwrap();
    second.restore(&saved).unwrap();
    assert_eq!((clock(&double), first.save().unwrap().clock_ns), (Some(9000), Some(70_000)));
    engine.go_on();
    assert_eq!(clock(&double), Some(70_000));
    first.go_on();
    second.go_on();
    // Of a machine that runs, the first vCPU's word counts; a reset changes no clock, and a state without one neither.
    saved.clock_ns = Some(80_000);
    second.restore(&saved).unwrap();
    assert_eq!(clock(&double), Some(70_000));
    first.restore(&saved).unwrap();
    assert_eq!(clock(&double), Some(80_000));
    passes(&double, 81_000);
    first.reset(false);
    saved.clock_ns = None;
    first.restore(&saved).unwrap();
    assert_eq!(clock(&double), Some(81_000));
    // States of before it was saved have none.
    let mut text = serde_json::to_value(&saved).unwrap();
    text.as_object_mut().unwrap().remove("clock_ns");
    assert_eq!(serde_json::from_value::<VcpuState>(text).unwrap(), saved);
}

#[test]
fn a_vcpu_is_saved_and_restored_group_by_group_in_order() {
    let (double, _engine, mut vcpu) = vcpu();
    double.set_msr(cpu::msr::STAR, 0x1234);
    let mut registers = vcpu.registers();
    (registers.rip, registers.cr3) = (0x1000, 0x2000);
    vcpu.set_registers(&registers);
    let saved = vcpu.save().unwrap();
    assert_eq!((saved.registers.rip, saved.msrs[&cpu::msr::STAR]), (0x1000, 0x1234));
    assert!(saved.extended.len() >= 576 && saved.local_apic.as_ref().is_some_and(|page| page.len() == 1024));
    // JSON, as everything saved is, and back.
    let text = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<VcpuState>(&text).unwrap(), saved);
    vcpu.reset(false);
    assert_eq!(vcpu.registers().rip, 0xfff0);
    assert_eq!(double.msr(cpu::msr::STAR), Some(0));
    let since = double.asked();
    vcpu.restore(&saved).unwrap();
    let set: Vec<_> = double.order_since(since).into_iter().filter(|name| name.starts_with("SET_")).collect();
    assert_eq!(
        set,
        [
            "SET_REGS",
            "SET_SREGS",
            "SET_DEBUGREGS",
            "SET_XCRS",
            "SET_XSAVE",
            "SET_LAPIC",
            "SET_MSRS",
            "SET_VCPU_EVENTS",
            "SET_CLOCK",
            "SET_MP_STATE"
        ]
    );
    assert_eq!(vcpu.save().unwrap(), saved);
    // A register that this host does not have.
    let mut other = saved.clone();
    other.msrs.insert(0x4444, 1);
    let error = vcpu.restore(&other).unwrap_err().to_string();
    assert!(error.contains("MSRs 0x4444"), "{error}");
    other = saved.clone();
    other.extended.truncate(100);
    assert!(vcpu.restore(&other).is_err());
}

#[test]
fn clocks_stand_while_the_machine_does() {
    let (double, engine, mut vcpu) = vcpu();
    double.set_msr(cpu::msr::TSC_DEADLINE, 500);
    vcpu.stand();
    assert_eq!(double.msr(cpu::msr::TSC_DEADLINE), Some(0), "no timer fires meanwhile");
    engine.stand();
    engine.go_on();
    vcpu.go_on();
    assert_eq!(double.msr(cpu::msr::TSC_DEADLINE), Some(500));
    assert_eq!(
        (double.count("SET_CLOCK"), double.count("SET_DEVICE_ATTR"), double.count("KVMCLOCK_CTRL")),
        (1, 1, 1)
    );
    // A kernel without TSC offsets takes the value instead.
    let (double, engine, mut vcpu) = vcpu_on(Double::linux_5_10());
    double.refuse("GET_DEVICE_ATTR", libc::ENXIO);
    double.set_msr(cpu::msr::TSC, 777);
    vcpu.stand();
    engine.stand();
    double.set_msr(cpu::msr::TSC, 999);
    engine.go_on();
    vcpu.go_on();
    assert_eq!(double.msr(cpu::msr::TSC), Some(777));
    assert_eq!(vcpu.activity(), Activity::Running);
}

/// Sets the double's clock attribute to what was last set, as a kernel would.
fn offset(double: &Double) -> i64 {
    double.tsc_offset() as i64
}

#[test]
fn a_vcpu_that_did_not_run_between_two_pauses_makes_up_for_both() {
    let (double, engine, mut first) = vcpu();
    let mut second = engine.create_vcpu(VcpuConfig { index: 1, cpuid: Arc::default() }).unwrap();
    let pause = std::time::Duration::from_millis(2);
    first.stand();
    second.stand();
    engine.stand();
    std::thread::sleep(pause);
    engine.go_on();
    // The first runs and stands again; the second has not come to run.
    first.go_on();
    let once = offset(&double);
    first.stand();
    engine.stand();
    std::thread::sleep(pause);
    engine.go_on();
    // To resume what runs changes nothing.
    engine.go_on();
    first.go_on();
    let twice = offset(&double);
    assert!(once < 0 && twice < once, "{once} {twice}");
    double.set_tsc_offset(0);
    second.go_on();
    assert_eq!(offset(&double), twice, "both are as far back");
}

#[test]
fn what_is_saved_or_restored_while_the_machine_stands_is_what_goes_on() {
    let (double, engine, mut vcpu) = vcpu();
    double.set_msr(cpu::msr::TSC, 1000);
    double.set_msr(cpu::msr::TSC_DEADLINE, 5000);
    vcpu.stand();
    engine.stand();
    // KVM's TSC runs on.
    double.set_msr(cpu::msr::TSC, 1700);
    let mut state = vcpu.save().unwrap();
    let clocks = |state: &VcpuState| (state.msrs[&cpu::msr::TSC], state.msrs[&cpu::msr::TSC_DEADLINE]);
    assert_eq!(clocks(&state), (1000, 5000));
    state.msrs.insert(cpu::msr::TSC, 300);
    state.msrs.insert(cpu::msr::TSC_DEADLINE, 400);
    vcpu.restore(&state).unwrap();
    assert_eq!(double.msr(cpu::msr::TSC_DEADLINE), Some(0), "no timer fires meanwhile");
    double.set_msr(cpu::msr::TSC, 900);
    assert_eq!(clocks(&vcpu.save().unwrap()), (300, 400));
    engine.go_on();
    vcpu.go_on();
    assert_eq!((double.msr(cpu::msr::TSC), double.msr(cpu::msr::TSC_DEADLINE)), (Some(300), Some(400)));
    assert_eq!(double.count("SET_DEVICE_ATTR"), 0, "its past is another one's");
}

#[test]
fn more_registers_than_one_request_may_name_are_all_saved() {
    let double = Double::linux_6_12();
    for index in 0..300 {
        double.set_msr(0x4b56_4d00 + index, u64::from(index));
    }
    let (double, _engine, mut vcpu) = vcpu_on(double);
    let mut state = vcpu.save().unwrap();
    assert_eq!(state.msrs[&(0x4b56_4d00 + 299)], 299);
    for (_, value) in state.msrs.iter_mut() {
        *value += 1;
    }
    vcpu.restore(&state).unwrap();
    assert_eq!(double.msr(0x4b56_4d00 + 299), Some(300));
    // One that was there and is not any more is not left out in silence.
    double.forget_msr(0x4b56_4d00 + 150);
    let error = vcpu.save().unwrap_err().to_string();
    assert!(error.contains("0x4b564d96"), "{error}");
}

#[test]
fn an_exception_that_another_engine_has_raised_is_not_lost() {
    let (double, _engine, mut vcpu) = vcpu();
    let mut state = vcpu.save().unwrap();
    let raised = |vector, error_code, payload| {
        Some(cpu::Exception { vector, error_code, payload: Some(payload), delivering: false })
    };
    state.events.exception = raised(14, Some(2), 0xdead_b000);
    vcpu.restore(&state).unwrap();
    let events = double.kept::<kvm::kvm_vcpu_events>(FIRST_VCPU, "SET_VCPU_EVENTS").unwrap();
    assert_eq!((events.exception.injected, events.exception.nr, events.exception.error_code), (1, 14, 2));
    assert_eq!(vcpu.registers().cr2, 0xdead_b000);
    state.events.exception = raised(1, None, 1 << 14);
    vcpu.restore(&state).unwrap();
    assert_ne!(vcpu.registers().dr6 & 1 << 14, 0);
}

#[test]
fn written_pages_come_out_of_bitmaps_once() {
    for double in [Double::linux_6_12(), Double::linux_5_10().without(kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)]
    {
        let double = Arc::new(double);
        let memory = memory();
        let engine = KvmEngine::on(double.clone(), memory.clone(), Options::default()).unwrap();
        engine.log_writes(true).unwrap();
        let slot = double.kept::<kvm::kvm_userspace_memory_region>(VM, "SET_USER_MEMORY_REGION").unwrap();
        assert_eq!(slot.flags, kvm::KVM_MEM_LOG_DIRTY_PAGES);
        double.set_dirty(&[0b101, 1 << 63]);
        assert_eq!(engine.collect_writes().unwrap(), 3);
        let modified = |page: u64| memory.host_page(page << 12).unwrap().flags.contains(PageFlags::MODIFIED);
        let pages: Vec<_> = (0..256).filter(|&page| modified(page)).collect();
        assert_eq!(pages, [0, 2, 127]);
    }
}

#[test]
fn written_pages_come_out_of_rings_once() {
    let double = Arc::new(Double::linux_6_12());
    double.set_msr(cpu::msr::TSC, 0);
    let memory = memory();
    let options = Options { dirty_ring: Some(256), ..Options::default() };
    let engine = KvmEngine::on(double.clone(), memory.clone(), options).unwrap();
    let mut vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::default() }).unwrap();
    let fill = |first: usize, pages: &[u64]| {
        double.page(-FIRST_VCPU, |ring| {
            for (index, page) in pages.iter().enumerate() {
                let at = (first + index) % 256 * 16;
                ring[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
                ring[at + 8..at + 16].copy_from_slice(&page.to_le_bytes());
            }
        });
    };
    fill(0, &[7, 9]);
    assert_eq!(engine.collect_writes().unwrap(), 2);
    assert_eq!(engine.collect_writes().unwrap(), 0);
    assert!(memory.host_page(9 << 12).unwrap().flags.contains(PageFlags::MODIFIED));
    // A full ring ends KVM_RUN; a page that is not RAM hurts nobody.
    fill(2, &[u64::MAX; 254]);
    double.exits(kvm::KVM_EXIT_DIRTY_RING_FULL, zeroed());
    double.exits(kvm::KVM_EXIT_HLT, zeroed());
    assert_eq!(vcpu.run().unwrap(), Exit::Halt);
    assert_eq!(double.count("RESET_DIRTY_RINGS"), 2);
    for wrong in [100, 1 << 20] {
        let options = Options { dirty_ring: Some(wrong), ..Options::default() };
        assert!(KvmEngine::on(double.clone(), memory.clone(), options).is_err());
    }
}

#[test]
fn messages_and_pins_reach_the_kernel() {
    let (double, engine, _vcpu) = vcpu();
    let apics = engine.local_apics().unwrap();
    apics.send(0xfeef_f020, 0x4041);
    let sent = double.kept::<kvm::kvm_msi>(VM, "SIGNAL_MSI").unwrap();
    assert_eq!((sent.address_lo, sent.address_hi, sent.data), (0xfeef_f000, 0x100, 0x4041));
    let pins = [(0xfee0_0000, 0x4000), (0xfee0_1000, 0xc062)];
    apics.set_pins(&pins);
    apics.set_pins(&pins);
    assert_eq!(double.count("SET_GSI_ROUTING"), 1, "only changes cost a system call");
}

#[test]
fn doorbells_are_told_to_the_kernel_and_what_it_refuses_stays_an_exit() {
    use std::os::fd::{AsFd, AsRawFd};
    let (event, _) = std::io::pipe().unwrap();
    let (any, two) = (Double::linux_6_12(), Double::linux_6_12().without(kvm::KVM_CAP_IOEVENTFD_ANY_LENGTH));
    for (double, width) in [(any, 0), (two, 2)] {
        let (double, engine, _vcpu) = vcpu_on(double);
        let bells = engine.doorbells().unwrap();
        let told = || {
            let bell = double.kept::<kvm::kvm_ioeventfd>(VM, "IOEVENTFD").unwrap();
            (bell.addr, bell.len, bell.fd, bell.flags, bell.datamatch)
        };
        assert!(bells.hang(0xfe00_3004, event.as_fd()));
        assert_eq!(told(), (0xfe00_3004, width, event.as_raw_fd(), 0, 0));
        bells.take_down(0xfe00_3004, event.as_fd());
        // KVM_IOEVENTFD_FLAG_DEASSIGN.
        assert_eq!(told(), (0xfe00_3004, width, event.as_raw_fd(), 4, 0));
    }
    let (double, engine, _vcpu) = vcpu();
    let bells = engine.doorbells().unwrap();
    double.refuse("IOEVENTFD", libc::ENOSPC);
    assert!(!bells.hang(0xfe00_3008, event.as_fd()));
}

#[test]
fn models_lose_what_kvm_lacks() {
    let (_double, engine, _vcpu) = vcpu();
    let mut table = CpuidTable::default();
    table.set(1, None, Leaf { ecx: 1 << 13 | 1 << 24, ..Leaf::default() });
    table.set(7, Some(0), Leaf { ebx: 1 << 5, ..Leaf::default() });
    let offered = engine.offer(table);
    assert_eq!((offered.query(1, 0).ecx, offered.query(7, 0).ebx), (1 << 13 | 1 << 24, 0));
    let error = engine.create_vcpu(VcpuConfig { index: 288, cpuid: Arc::default() }).err().unwrap();
    assert!(error.to_string().contains("288 vCPUs"), "{error}");
}
