//! The engine on the kernel that this host has, if it has KVM: what the double cannot judge.

use cpu::cpuid::{Model, Topology};
use cpu::{Activity, Engine, Exit, Registers, Segment, Space, Vcpu, VcpuConfig, attr, cr0};
use engine_kvm::{KvmEngine, Options};
use memory::{Backing, GuestMemory, PageFlags};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CODE: u64 = 0x8000;
const RAM: u64 = 1 << 20;

/// Flat 32-bit code at [`CODE`]; `None` where there is no KVM.
fn guest(code: &[u8], options: Options) -> Option<(GuestMemory, KvmEngine, Box<dyn Vcpu>)> {
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("no KVM here: nothing to judge");
        return None;
    }
    let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
    memory.write(CODE, code).unwrap();
    let engine = KvmEngine::new(memory.clone(), options).unwrap();
    let mut vcpu = create(&engine);
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let data = flat(16, attr::DATA);
    let mut registers = vcpu.registers();
    registers.segments = [data, flat(8, attr::CODE32), data, data, data, data];
    (registers.cr0, registers.rip) = (cr0::PE | cr0::ET, CODE);
    vcpu.set_registers(&registers);
    Some((memory, engine, vcpu))
}

fn create(engine: &KvmEngine) -> Box<dyn Vcpu> {
    let table =
        Model::named("host").unwrap().table(Topology { apic_id: 0, cpus: 1 }, engine.tsc_hz()).unwrap();
    let cpuid = Arc::new(engine.offer(table));
    engine.create_vcpu(VcpuConfig { index: 0, cpuid }).unwrap()
}

fn out(value: u64) -> Exit {
    Exit::Write { space: Space::Port, address: 0x80, size: 1, value }
}

/// Writes a byte to each 16th page from 64 KiB on, then `out 0x80, al`, for ever.
const WRITER: [u8; 21] = [
    0xbf, 0x00, 0x00, 0x01, 0x00, // mov edi, 0x10000
    0x88, 0x07, // mov [edi], al
    0x81, 0xc7, 0x00, 0x00, 0x01, 0x00, // add edi, 0x10000
    0x81, 0xff, 0x00, 0x00, 0x10, 0x00, // cmp edi, 0x100000
    0x72, 0xf0, // jb
];

#[test]
fn written_pages_are_known_by_bitmap_and_by_ring() {
    for dirty_ring in [None, Some(4096)] {
        let code = [&WRITER[..], &[0xe6, 0x80, 0xeb, 0xe5]].concat();
        let options = Options { dirty_ring, ..Options::default() };
        let Some((memory, engine, mut vcpu)) = guest(&code, options) else { return };
        engine.log_writes(true).unwrap();
        assert_eq!(vcpu.run().unwrap(), out(0));
        let pages = engine.collect_writes().unwrap();
        assert!((15..20).contains(&pages), "{pages} pages, {dirty_ring:?}");
        for page in 1..16u64 {
            assert!(memory.host_page(page << 16).unwrap().flags.contains(PageFlags::MODIFIED), "{page}");
        }
        assert!(!memory.host_page(0x18000).unwrap().flags.contains(PageFlags::MODIFIED));
        assert_eq!(engine.collect_writes().unwrap(), 0, "they are told once");
        // The same pages again are news again.
        assert_eq!(vcpu.run().unwrap(), out(0));
        assert!(engine.collect_writes().unwrap() >= 15);
    }
}

#[test]
fn what_was_saved_in_one_vm_goes_on_in_another() {
    // inc eax; out 0x80, al; jmp
    let code = [0x40, 0xe6, 0x80, 0xeb, 0xfb];
    let Some((memory, _first, mut vcpu)) = guest(&code, Options::default()) else { return };
    for value in 1..4 {
        assert_eq!(vcpu.run().unwrap(), out(value));
    }
    assert!(!out(3).pausable());
    // The instruction is completed by a run that a kick ends before the guest goes on.
    vcpu.kick_handle().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    assert!(vcpu.set_msr(cpu::msr::STAR, 0x0012_3456_0000_0000));
    let saved = vcpu.save().unwrap();
    assert_eq!(saved.activity, Activity::Running);
    let text = serde_json::to_string(&saved).unwrap();
    drop((vcpu, _first));

    let second = KvmEngine::new(memory, Options::default()).unwrap();
    let mut vcpu = create(&second);
    vcpu.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(vcpu.msr(cpu::msr::STAR), Some(0x0012_3456_0000_0000));
    let mut again = vcpu.save().unwrap();
    // Time goes on.
    again.msrs.insert(cpu::msr::TSC, saved.msrs[&cpu::msr::TSC]);
    assert!(again.clock_ns > saved.clock_ns);
    again.clock_ns = saved.clock_ns;
    assert_eq!(again, saved);
    for value in 4..8 {
        assert_eq!(vcpu.run().unwrap(), out(value));
    }
    vcpu.reset(false);
    let mut expected = Registers::default();
    expected.gpr[2] = vcpu.registers().gpr[2];
    assert_eq!(vcpu.registers(), expected);
}

#[test]
fn a_kick_ends_an_endless_loop_and_a_halt_and_none_is_lost() {
    for code in [&[0xeb, 0xfe][..], &[0xfa, 0xf4]] {
        let Some((_memory, _engine, mut vcpu)) = guest(code, Options::default()) else { return };
        let kick = vcpu.kick_handle();
        let kicker = std::thread::spawn(move || {
            for _ in 0..200 {
                std::thread::sleep(Duration::from_micros(100));
                kick.kick();
            }
        });
        let began = Instant::now();
        let mut heard = 0;
        while !kicker.is_finished() {
            // The last may have been heard already.
            if heard == 0 || began.elapsed() < Duration::from_millis(10) {
                assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
                heard += 1;
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        kicker.join().unwrap();
        assert!(heard >= 1);
        // One that came before the run ends it at once.
        vcpu.kick_handle().kick();
        assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    }
}

#[test]
fn counters_count() {
    let Some((_memory, _engine, mut vcpu)) = guest(&[0xe6, 0x80, 0xeb, 0xfc], Options::default()) else {
        return;
    };
    let sum = |vcpu: &dyn Vcpu| vcpu.counters().iter().map(|(_, value)| value).sum::<u64>();
    let before = sum(&*vcpu);
    if vcpu.counters().is_empty() {
        println!("this kernel has no binary statistics");
        return;
    }
    for _ in 0..100 {
        assert_eq!(vcpu.run().unwrap(), out(0));
    }
    assert!(sum(&*vcpu) >= before + 100, "{:?}", vcpu.counters());
    assert!(vcpu.counters().iter().any(|(name, _)| *name == "exits"));
    assert!(vcpu.counters().len() > 10);
}

#[test]
fn the_clock_that_a_guest_was_saved_with_goes_on_in_another_vm() {
    const PAGE: u64 = 0x9000;
    // out 0x80, al; jmp
    let Some((memory, first, mut vcpu)) = guest(&[0xe6, 0x80, 0xeb, 0xfc], Options::default()) else {
        return;
    };
    assert!(vcpu.set_msr(cpu::msr::KVM_SYSTEM_TIME, PAGE | 1));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vcpu.run().unwrap(), out(0));
    vcpu.kick_handle().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    vcpu.stand();
    first.stand();
    let saved = vcpu.save().unwrap();
    let clock = saved.clock_ns.unwrap();
    assert!(clock > 250_000_000, "{clock}");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vcpu.save().unwrap().clock_ns, Some(clock), "it stands");
    drop((vcpu, first));

    let second = KvmEngine::new(memory.clone(), Options::default()).unwrap();
    let mut vcpu = create(&second);
    vcpu.stand();
    second.stand();
    vcpu.restore(&saved).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(vcpu.save().unwrap().clock_ns, Some(clock), "it stands here too");
    memory.write(PAGE, &[0; 32]).unwrap();
    let began = Instant::now();
    second.go_on();
    vcpu.go_on();
    assert_eq!(vcpu.run().unwrap(), out(0));
    let now = vcpu.save().unwrap().clock_ns.unwrap();
    let passed = began.elapsed().as_nanos() as u64;
    assert!(now >= clock && now <= clock + passed, "{clock} {now} {passed}");
    // `pvclock_vcpu_time_info`: its version is even, and its time not that of a new VM.
    let (version, time) = (memory.load_u32(PAGE).unwrap(), memory.load_u64(PAGE + 16).unwrap());
    assert!(
        version != 0 && version % 2 == 0 && (clock..=now).contains(&time),
        "{version} {clock} {time} {now}"
    );
}

#[test]
fn a_doorbell_is_heard_without_an_exit_until_it_is_taken_down() {
    const PLACE: u64 = 0xfe00_3004;
    // mov edx, 0xfe003004; four times mov [edx], ax; mov [edx], eax; then out 0x80, al; and again.
    let code = [
        0xba, 0x04, 0x30, 0x00, 0xfe, 0x66, 0x89, 0x02, 0x66, 0x89, 0x02, 0x66, 0x89, 0x02, 0x66, 0x89, 0x02,
        0x89, 0x02, 0xe6, 0x80, 0xeb, 0xee,
    ];
    let Some((_memory, engine, mut vcpu)) = guest(&code, Options::default()) else { return };
    let bells = engine.doorbells().unwrap();
    let events: [_; 2] =
        std::array::from_fn(|_| rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    let heard = |event: &std::os::fd::OwnedFd| {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    let write = |size| Exit::Write { space: Space::Mmio, address: PLACE, size, value: 0 };
    assert!(bells.hang(PLACE, events[0].as_fd()));
    assert!(bells.hang(PLACE + 4, events[1].as_fd()), "of another queue");
    for _ in 0..3 {
        // Another width is an exit, or is heard too.
        let mut exits = 0;
        let other = loop {
            match vcpu.run().unwrap() {
                exit if exit == write(4) => exits += 1,
                exit => break exit,
            }
        };
        assert_eq!(other, out(0));
        assert!(exits < 2);
        assert_eq!((exits + heard(&events[0]), heard(&events[1])), (5, 0));
    }
    bells.take_down(PLACE, events[0].as_fd());
    for size in [2, 2, 2, 2, 4] {
        assert_eq!(vcpu.run().unwrap(), write(size));
    }
    assert_eq!(heard(&events[0]), 0);
}
