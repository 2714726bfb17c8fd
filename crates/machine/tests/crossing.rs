//! A vCPU that is saved on one engine goes on, on another, where it was: registers, vectors, model-specific registers, what comes
//! next, HLT. Through the saved form as text, as it lies on disks.

mod engines;

use cpu::cpuid::{Model, Topology};
use cpu::{
    Activity, Engine, Exit, Registers, Segment, Space, Vcpu, VcpuConfig, VcpuState, attr, cr0, cr4, efer,
};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use machine::EngineKind;
use memory::{Backing, GuestMemory};
use std::sync::Arc;

const RAM: u64 = 2 << 20;
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x8800;
const STACK: u64 = 0x7ff0;
const IDT: u64 = 0x6000;
const GDT: u64 = 0x9000;
const VECTOR: u8 = 0x40;

fn memory() -> GuestMemory {
    let memory = GuestMemory::new(&[(0, RAM)], Backing::Shared).unwrap();
    let put = |at: u64, words: &[u64]| {
        memory.write(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    };
    // One 2 MiB page, to itself.
    put(0x1000, &[0x2003]);
    put(0x2000, &[0x3003]);
    put(0x3000, &[0x83]);
    put(GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    put(IDT + u64::from(VECTOR) * 16, &[HANDLER & 0xffff | 8 << 16 | 0x8e00 << 32, 0]);
    // The handler: out 0x81, al; iretq.
    memory.write(HANDLER, &[0xe6, 0x81, 0x48, 0xcf]).unwrap();
    memory
}

fn start() -> Registers {
    let segment = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let data = segment(16, attr::DATA);
    let mut registers = Registers {
        rip: CODE,
        rflags: cpu::rflags::FIXED,
        segments: [data, segment(8, attr::CODE64), data, data, data, data],
        tr: Segment { base: 0, limit: 0x67, selector: 0, attr: attr::TSS_BUSY },
        ldtr: Segment::default(),
        cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG,
        cr3: 0x1000,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT,
        efer: efer::LME | efer::LMA | efer::SCE,
        ..Registers::default()
    };
    (registers.gdtr.base, registers.gdtr.limit) = (GDT, 23);
    (registers.idtr.base, registers.idtr.limit) = (IDT, 0x41 * 16 - 1);
    registers.gpr[4] = STACK;
    registers
}

/// A fresh vCPU of that engine, with what both can offer.
fn vcpu(kind: EngineKind, memory: &GuestMemory) -> (Box<dyn Engine>, Box<dyn Vcpu>) {
    let topology = Topology { apic_id: 0, cpus: 1 };
    let engine: Box<dyn Engine> = match kind {
        EngineKind::Soft => {
            Box::new(SoftEngine::new(memory.clone(), engine_soft::Options::default()).unwrap())
        }
        EngineKind::Kvm => Box::new(KvmEngine::new(memory.clone(), engine_kvm::Options::default()).unwrap()),
    };
    let table = Model::named("host").unwrap().table(topology, engine.tsc_hz()).unwrap();
    let cpuid = Arc::new(engine.offer(table));
    let vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid }).unwrap();
    (engine, vcpu)
}

/// Completes the last exit and comes to stand between two instructions.
fn settle(vcpu: &mut dyn Vcpu) {
    vcpu.kick_handle().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
}

fn run_to_write(vcpu: &mut dyn Vcpu) -> (u64, u64) {
    loop {
        match vcpu.run().unwrap() {
            Exit::Write { space: Space::Port, address, value, .. } => return (address, value),
            Exit::Interrupted | Exit::InterruptWindow => {}
            other => panic!("{other:?}"),
        }
    }
}

/// On disk and back.
fn stored(state: &VcpuState) -> VcpuState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// What of a state no engine may change: all but its clocks, and registers of which another engine knows nothing.
fn essence(state: &VcpuState) -> (Registers, Vec<u8>, Vec<(u32, u64)>) {
    use cpu::msr;
    let kept = [msr::STAR, msr::LSTAR, msr::SFMASK, msr::KERNEL_GS_BASE, msr::PAT];
    let values = kept.iter().filter_map(|&number| Some((number, *state.msrs.get(&number)?))).collect();
    let mut extended = state.extended.clone();
    // Which parts are in use, and that the area may end earlier, are a matter of taste. Which bits MXCSR has is the host's word.
    extended.resize(832, 0);
    extended[28..32].fill(0);
    extended[512..520].fill(0);
    (state.registers.clone(), extended, values)
}

/// Pairs of different engines, both ways; none where there is but one.
fn crossings() -> Vec<(EngineKind, EngineKind)> {
    let engines = engines::engines();
    let mut pairs = vec![(EngineKind::Soft, EngineKind::Soft)];
    if engines.contains(&EngineKind::Kvm) {
        pairs.extend([(EngineKind::Soft, EngineKind::Kvm), (EngineKind::Kvm, EngineKind::Soft)]);
    }
    pairs
}

#[test]
fn a_loop_goes_on_and_nothing_is_lost() {
    for (first, second) in crossings() {
        let memory = memory();
        // inc rbx; mov [0x5000], rbx; mov al, bl; out 0x80, al; jmp
        let code = [
            0x48, 0xff, 0xc3, 0x48, 0x89, 0x1c, 0x25, 0x00, 0x50, 0x00, 0x00, 0x88, 0xd8, 0xe6, 0x80, 0xeb,
            0xef,
        ];
        memory.write(CODE, &code).unwrap();
        let (mut engine, mut running) = vcpu(first, &memory);
        let mut registers = start();
        for (number, value) in
            registers.gpr.iter_mut().enumerate().filter(|(number, _)| ![0, 3, 4].contains(number))
        {
            *value = 0x1111_0000_2222_0000 + number as u64;
        }
        (registers.dr[0], registers.cr2) = (0x1234, 0x5678_9000);
        running.set_registers(&registers);
        for (number, value) in [
            (cpu::msr::STAR, 0x0012_3456_0000_0000),
            (cpu::msr::LSTAR, 0x7000),
            (cpu::msr::KERNEL_GS_BASE, 0x0000_7fff_0000_1000),
            (cpu::msr::SFMASK, 0x4700),
        ] {
            assert!(running.set_msr(number, value), "{number:#x} on {first:?}");
        }
        // Vectors and x87 that nothing of the code touches.
        let mut state = running.save().unwrap();
        state.extended.resize(576, 0);
        state.extended[512] |= 3;
        state.extended[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
        state.extended[0..2].copy_from_slice(&0x027fu16.to_le_bytes());
        for (number, byte) in state.extended[160..416].iter_mut().enumerate() {
            *byte = number as u8;
        }
        running.restore(&state).unwrap();
        let mut kind = first;
        for turn in 0..6u64 {
            for step in 1..=3 {
                let value = (turn * 3 + step) & 0xff;
                assert_eq!(
                    run_to_write(&mut *running),
                    (0x80, value),
                    "{first:?} to {second:?}, on {kind:?}"
                );
            }
            settle(&mut *running);
            let saved = running.save().unwrap();
            let tsc = saved.msrs[&cpu::msr::TSC];
            kind = if kind == first { second } else { first };
            drop((running, engine));
            (engine, running) = vcpu(kind, &memory);
            running.restore(&stored(&saved)).unwrap();
            let again = running.save().unwrap();
            assert_eq!(
                essence(&again),
                essence(&saved),
                "turn {turn}: {first:?} to {second:?}, now {kind:?}"
            );
            let late = again.msrs[&cpu::msr::TSC].wrapping_sub(tsc);
            // PVM keeps no TSC of a guest's own.
            assert!(late < engine.tsc_hz() || engines::faults().contains(&engines::TIME), "{late} ticks");
        }
        assert_eq!(memory.read_array::<8>(0x5000).unwrap(), 18u64.to_le_bytes());
    }
}

#[test]
fn an_interrupt_that_is_under_way_arrives_where_the_guest_goes_on() {
    for (first, second) in crossings() {
        for halt in [false, true] {
            let memory = memory();
            // sti; nop; then hlt or a loop that says 0x80; after the interrupt 0x82.
            let code: &[u8] = if halt {
                &[0xfb, 0x90, 0xf4, 0xe6, 0x82, 0xeb, 0xfe]
            } else {
                &[0xfb, 0x90, 0xe6, 0x80, 0x90, 0xe6, 0x82, 0xeb, 0xfe]
            };
            memory.write(CODE, code).unwrap();
            let (engine, mut running) = vcpu(first, &memory);
            running.set_registers(&start());
            if halt && first == EngineKind::Soft {
                assert_eq!(running.run().unwrap(), Exit::Halt);
            } else if halt {
                let kick = running.kick_handle();
                let later = std::thread::spawn(move || {
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    kick.kick();
                });
                assert_eq!(running.run().unwrap(), Exit::Interrupted);
                later.join().unwrap();
            } else {
                assert_eq!(run_to_write(&mut *running), (0x80, 0));
                settle(&mut *running);
            }
            let mut saved = running.save().unwrap();
            assert_eq!(saved.activity == Activity::Halted, halt, "{first:?}");
            saved.events.interrupt = Some(VECTOR);
            drop((running, engine));
            let (_engine, mut running) = vcpu(second, &memory);
            running.restore(&stored(&saved)).unwrap();
            assert_eq!(running.save().unwrap().events.interrupt, Some(VECTOR));
            assert_eq!(run_to_write(&mut *running).0, 0x81, "{first:?} to {second:?}, halted {halt}");
            assert_eq!(run_to_write(&mut *running).0, 0x82);
        }
    }
}

#[test]
fn what_an_engine_cannot_take_is_refused_by_name() {
    let memory = memory();
    let (_engine, mut vcpu) = vcpu(EngineKind::Soft, &memory);
    let good = vcpu.save().unwrap();
    let refused = |vcpu: &mut dyn Vcpu, change: &dyn Fn(&mut VcpuState)| {
        let mut bad = good.clone();
        change(&mut bad);
        vcpu.restore(&bad).unwrap_err().to_string()
    };
    assert!(refused(&mut *vcpu, &|bad| bad.extended.truncate(500)).contains("cut off"));
    assert!(refused(&mut *vcpu, &|bad| bad.extended[513] = 2).contains("processor state"));
    assert!(refused(&mut *vcpu, &|bad| bad.extended[26] = 1).contains("MXCSR 0x11f80"));
    assert!(refused(&mut *vcpu, &|bad| bad.registers.xcr0 = 0xe7).contains("XCR0 0xe7"));
    assert!(refused(&mut *vcpu, &|bad| bad.events.triple_fault = true).contains("triple fault"));
    let pat = |bad: &mut VcpuState| _ = bad.msrs.insert(cpu::msr::PAT, 2);
    assert!(refused(&mut *vcpu, &pat).contains("0x277"));
    vcpu.restore(&good).unwrap();
    assert_eq!(essence(&vcpu.save().unwrap()), essence(&good));
}
