//! Random bytes as guest code on the software engine, in every mode: they may hurt only their guest.
//!
//! 64-bit code runs in lock-step: the single-step tier first, then the translator, which must agree. Everything else is
//! the single-step tier's alone.
#![no_main]

use cpu::cpuid::{Topology, default_model};
use cpu::{Engine, Error, Exit, Kick, Registers, Segment, Vcpu, VcpuConfig, attr, cr0, cr4, efer, rflags};
use engine_soft::{Options, SoftEngine};
use memory::{Backing, GuestMemory};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use yado_fuzz::Input;

const RAM: u64 = 0x8_0000;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x3_0000;
const DATA: u64 = 0x4_0000;
/// How many times a case may come out.
const EXITS_MAX: usize = 16;

struct Machine {
    memory: GuestMemory,
    vcpu: Box<dyn Vcpu>,
    /// What RAM holds before each case.
    fresh: Vec<u8>,
}

/// Counts cases; endless loops are kicked, and what does not come out then is a hang.
static CASE: AtomicU64 = AtomicU64::new(0);

fn watch(kick: &dyn Kick) {
    let (mut last, mut stuck) = (0, 0);
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let now = CASE.load(Ordering::SeqCst);
        if now != last || now & 1 == 0 {
            (last, stuck) = (now, 0);
            continue;
        }
        stuck += 1;
        kick.kick();
        if stuck == 3000 {
            eprintln!("the engine did not come out in 30 seconds");
            std::process::abort();
        }
    }
}

fn machine() -> Result<Machine, Error> {
    let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).expect("memory of the host");
    // Identity paging by one large page, of which only the first part is RAM; the rest is devices.
    let put = |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).expect("in RAM");
    put(PML4, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x87);
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_9300_0000_ffffu64,
    ];
    for (n, descriptor) in (0..).zip(gdt) {
        put(GDT + 8 * n, descriptor);
    }
    for vector in 0..64 {
        let handler = HANDLERS + vector * 4;
        let rights = if vector == 3 { 0xee00u64 } else { 0x8e00 };
        put(IDT + 16 * vector, handler & 0xffff | 8 << 16 | rights << 32);
        memory.write(handler, &[0xf4]).expect("in RAM");
    }
    put(TSS + 4, STACK);
    for n in 0..0x400 {
        put(DATA + n * 8, n.wrapping_mul(0x0123_4567_89ab_cdef).rotate_left(n as u32));
    }
    let mut fresh = vec![0; RAM as usize];
    memory.read(0, &mut fresh).expect("in RAM");
    let options = Options { verify: true, single_cpu: true, code_cache_bytes: 8 << 20, ..Options::default() };
    let engine = SoftEngine::new(memory.clone(), options)?;
    let table =
        default_model().table(Topology { apic_id: 0, cpus: 1 }, engine.tsc_hz()).expect("a CPU model");
    let vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::new(table) })?;
    let kick = vcpu.kick_handle();
    std::thread::spawn(move || watch(&*kick));
    Ok(Machine { memory, vcpu, fresh })
}

fn flat(selector: u16, attributes: u16) -> Segment {
    let level = (selector & 3) << attr::DPL_SHIFT;
    Segment { base: 0, limit: u32::MAX, selector, attr: attributes | level }
}

/// Registers that are likely to be interesting.
fn registers(input: &mut Input<'_>) -> Registers {
    let mode = input.u8();
    let mut registers = Registers::default();
    let spread = input.u8();
    for (n, register) in registers.gpr.iter_mut().enumerate() {
        *register = match spread.wrapping_mul(31).wrapping_add(n as u8 * 7) & 7 {
            0 => n as u64,
            1 => DATA + 0xff8 + n as u64,
            2 => input.number(),
            3 => CODE + n as u64 * 8,
            4 => RAM - n as u64,
            _ => DATA + n as u64 * 64,
        };
    }
    registers.gpr[4] = STACK - 0x100;
    registers.rip = CODE;
    registers.rflags = u64::from(input.u16()) & 0x0ed5 & !rflags::TF | rflags::FIXED;
    if mode & 0x80 != 0 {
        registers.rflags |= rflags::TF;
    }
    registers.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::MP | cr0::WP;
    registers.cr3 = PML4;
    registers.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE | cr4::FSGSBASE;
    registers.xcr0 = 7;
    registers.gdtr.base = GDT;
    registers.gdtr.limit = 0x3f;
    registers.idtr.base = IDT;
    registers.idtr.limit = 0x3ff;
    registers.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attr: attr::TSS_BUSY };
    registers.segments = [flat(0x10, attr::DATA); 6];
    registers.efer = efer::SCE | efer::NXE;
    let code = match mode & 7 {
        0 => {
            registers = Registers { gpr: registers.gpr, rip: CODE & 0xffff, ..Registers::default() };
            registers.segments[1].base = CODE & !0xffff;
            return registers;
        }
        1 => flat(0x18, attr::CODE32),
        2 | 3 => {
            registers.cr0 |= cr0::PG;
            registers.efer |= efer::LME | efer::LMA;
            registers.segments[2] = flat(0x2b, attr::DATA);
            flat(0x23, attr::CODE32)
        }
        4 | 5 => {
            registers.cr0 |= cr0::PG;
            registers.efer |= efer::LME | efer::LMA;
            registers.segments[2] = flat(0x2b, attr::DATA);
            flat(0x33, attr::CODE64)
        }
        _ => {
            registers.cr0 |= cr0::PG;
            registers.efer |= efer::LME | efer::LMA;
            flat(8, attr::CODE64)
        }
    };
    registers.segments[1] = code;
    registers
}

fn run(machine: &mut Machine, input: &mut Input<'_>) {
    machine.vcpu.reset(false);
    let registers = registers(input);
    machine.memory.write(0, &machine.fresh).expect("in RAM");
    let code = input.take(2048);
    if !code.is_empty() {
        // Behind the code, and wherever it jumps to: HLT.
        machine.memory.fill(CODE, 0x1000, 0xf4).expect("in RAM");
        machine.memory.write(CODE, code).expect("in RAM");
    }
    machine.vcpu.set_registers(&registers);
    for exits in 0..EXITS_MAX {
        let exit = match machine.vcpu.run() {
            Ok(exit) => exit,
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains("differ"), "{text}");
                assert!(matches!(error, Error::Guest { .. }), "{text}");
                return;
            }
        };
        match exit {
            Exit::Read { .. } => {
                machine.vcpu.complete(Some(0x1234_5678_9abc_def0u64.rotate_left(exits as u32)))
            }
            Exit::Write { .. } | Exit::InterruptWindow | Exit::Debug => {}
            Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => {
                machine.vcpu.complete((exits & 1 == 0).then_some(0));
            }
            Exit::Hypercall { .. } => machine.vcpu.complete(Some(0)),
            Exit::Halt if exits & 3 == 0 && machine.vcpu.interruptible() => {
                machine.vcpu.inject_interrupt(0x20)
            }
            Exit::Halt | Exit::Shutdown | Exit::Interrupted => return,
        }
    }
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    MACHINE.with_borrow_mut(|machine| {
        let machine = machine.get_or_insert_with(|| self::machine().expect("an engine"));
        CASE.fetch_add(1, Ordering::SeqCst);
        run(machine, &mut Input(data));
        CASE.fetch_add(1, Ordering::SeqCst);
    });
});
