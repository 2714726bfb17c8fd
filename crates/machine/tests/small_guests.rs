//! Whole machines with guests of a few instructions: how they end, what they print, what they cost.

mod engines;

use engines::elf::elf64;
use engines::{BREAKPOINT, HYPERCALL, TASK_PRIORITY, engines, engines_without};
use machine::{EngineKind, Error, Machine, MachineConfig, Notice, Outcome};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const LOAD: u32 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(30);

/// A multiboot image of 32-bit code.
struct Guest {
    directory: tempfile::TempDir,
}

impl Guest {
    fn new(code: &[u8]) -> Self {
        let flags = 0x1_0000u32;
        let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
        let mut image = Vec::new();
        for word in [0x1bad_b002, flags, checksum, LOAD, LOAD, 0, 0, LOAD + 32] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(code);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("kernel"), image).unwrap();
        Self { directory }
    }

    fn kernel(&self) -> PathBuf {
        self.directory.path().join("kernel")
    }

    fn config(&self, engine: EngineKind) -> MachineConfig {
        MachineConfig { engine, memory: 16 << 20, ..MachineConfig::new(self.kernel()) }
    }

    fn machine(&self, engine: EngineKind) -> Machine {
        Machine::new(MachineConfig { test_devices: true, ..self.config(engine) }).unwrap()
    }

    fn run(&self, engine: EngineKind) -> (Machine, Outcome) {
        let machine = self.machine(engine);
        machine.start().unwrap();
        let outcome = machine.wait_timeout(PATIENCE).expect("the guest should have ended");
        (machine, outcome)
    }
}

/// `mov dx, port`.
fn port(port: u16) -> Vec<u8> {
    [&[0x66, 0xba][..], &port.to_le_bytes()].concat()
}

/// Prints through the serial port: `mov al, c; out dx, al` for each character.
fn print(text: &str) -> Vec<u8> {
    let mut code = port(0x3f8);
    text.bytes().for_each(|byte| code.extend([0xb0, byte, 0xee]));
    code
}

/// SLP_EN and the sleep type of S5 into PM1a control: `mov ax, 0x3400; out dx, ax`, then a loop.
fn power_off() -> Vec<u8> {
    [port(0x604), vec![0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe]].concat()
}

const HALT_FOR_EVER: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

#[test]
fn the_debug_exit_says_twice_the_value_and_one() {
    for engine in engines() {
        let (_, outcome) = Guest::new(&[0xb0, 7, 0xe6, 0xf4, 0xeb, 0xfe]).run(engine);
        assert_eq!(outcome, Outcome::DebugExit(15));
    }
}

#[test]
fn what_was_printed_before_the_power_went_is_read_to_the_end() {
    for engine in engines() {
        let (machine, outcome) = Guest::new(&[print("last words"), power_off()].concat()).run(engine);
        assert_eq!(outcome, Outcome::PoweredOff);
        assert_eq!(printed(&machine), "last words");
    }
}

#[test]
fn a_paused_guest_hears_the_power_button() {
    // Until PWRBTN_STS is set: in ax, dx; test ah, 1; jz.
    let wait = [port(0x600), vec![0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9]].concat();
    for engine in engines() {
        let machine = Guest::new(&[wait.clone(), power_off()].concat()).machine(engine);
        machine.start().unwrap();
        assert!(machine.pause());
        machine.power_button();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff));
    }
}

#[test]
fn a_triple_fault_is_the_guests_own_and_shows_where() {
    for engine in engines() {
        let (_, outcome) = Guest::new(&[0x90, 0x0f, 0x0b]).run(engine);
        let Outcome::Crashed(crash) = outcome else { panic!("{outcome:?}") };
        assert!(crash.guest && crash.why.contains("triple fault"), "{crash}");
        assert_eq!(crash.registers.rip, u64::from(LOAD) + 33);
        assert!(crash.to_string().contains("rip 0000000000100021"), "{crash}");
    }
}

/// Ways to reset a PC: the keyboard controller's pulse, the reset control register (which is also the FADT's reset
/// register), system control port A, and a triple fault with an empty interrupt table, by INT3 and by UD2.
fn resets() -> Vec<Vec<u8>> {
    let empty_table = |fault: &[u8]| {
        [&[0xbc, 0x00, 0x00, 0x20, 0x00, 0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24][..], fault].concat()
    };
    vec![
        vec![0xb0, 0xfe, 0xe6, 0x64],
        [port(0xcf9), vec![0xb0, 0x06, 0xee]].concat(),
        vec![0xb0, 0x01, 0xe6, 0x92],
        empty_table(&[0x0f, 0x0b]),
        empty_table(&INT3),
    ]
}

const INT3: [u8; 1] = [0xcc];

/// Every way to reset, with every engine that can do it.
fn resets_on_engines() -> Vec<(Vec<u8>, EngineKind)> {
    let on = |way: Vec<u8>| {
        let engines = if way.ends_with(&INT3) { engines_without(&[BREAKPOINT]) } else { engines() };
        engines.into_iter().map(move |engine| (way.clone(), engine))
    };
    resets().into_iter().flat_map(on).collect()
}

/// Prints "again" and powers off if the word at 2 MiB says so, else sets it and goes on: RAM outlives a reset.
fn unless_started_before(first: &[u8]) -> Vec<u8> {
    let again = [print("again"), power_off()].concat();
    // cmp dword [0x200000], 0x7961646f; jne past `again`
    let mut code = vec![0x81, 0x3d, 0x00, 0x00, 0x20, 0x00, 0x6f, 0x64, 0x61, 0x79, 0x0f, 0x85];
    code.extend(u32::try_from(again.len()).unwrap().to_le_bytes());
    code.extend(again);
    // mov dword [0x200000], 0x7961646f
    code.extend([0xc7, 0x05, 0x00, 0x00, 0x20, 0x00, 0x6f, 0x64, 0x61, 0x79]);
    code.extend(first);
    code
}

fn printed(machine: &Machine) -> String {
    let (serial, mut bytes) = (machine.serial(), Vec::new());
    while serial.receive(&mut bytes, PATIENCE) {}
    String::from_utf8(bytes).unwrap()
}

#[test]
fn every_way_to_reset_starts_the_guest_again() {
    for (way, engine) in resets_on_engines() {
        let code = unless_started_before(&[print("once "), way.clone(), vec![0xeb, 0xfe]].concat());
        let guest = Guest::new(&code);
        for cpus in [1, 3] {
            let config = MachineConfig { cpus, ..guest.config(engine) };
            let machine = Machine::new(config).unwrap();
            let (told, heard) = std::sync::mpsc::channel();
            machine.on_notice(move |notice| told.send(notice).unwrap());
            machine.start().unwrap();
            assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff), "{way:x?}");
            assert_eq!(printed(&machine), "once again", "{way:x?}");
            assert_eq!(
                (machine.starts(), heard.try_iter().collect()),
                (2, vec![Notice::Restarted { starts: 2 }]),
                "{way:x?}"
            );
        }
    }
}

#[test]
fn a_machine_that_must_not_restart_ends_with_the_reset() {
    for (way, engine) in resets_on_engines() {
        let guest = Guest::new(&[way.clone(), vec![0xeb, 0xfe]].concat());
        let config = MachineConfig { restart: false, ..guest.config(engine) };
        let machine = Machine::new(config).unwrap();
        machine.start().unwrap();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::Reset), "{way:x?}");
        assert_eq!(machine.starts(), 1);
    }
}

#[test]
fn a_guest_that_resets_without_end_can_be_paused_and_stopped() {
    for engine in engines() {
        let machine = Guest::new(&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]).machine(engine);
        machine.start().unwrap();
        let until = Instant::now() + PATIENCE;
        while machine.starts() < 20 {
            assert!(Instant::now() < until, "{} starts", machine.starts());
            assert!(machine.pause());
            machine.resume();
        }
        // The power button is as good: the guest is down when it resets next.
        machine.power_button();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::Stopped));
    }
}

#[test]
fn a_kernel_that_is_gone_at_the_reset_is_still_there_and_a_broken_one_is_named() {
    let code = unless_started_before(&[&resets()[0][..], &[0xeb, 0xfe]].concat());
    let guest = Guest::new(&code);
    let machine = guest.machine(EngineKind::Soft);
    std::fs::remove_file(guest.kernel()).unwrap();
    machine.start().unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff));

    let guest = Guest::new(&code);
    let machine = guest.machine(EngineKind::Soft);
    std::fs::write(guest.kernel(), b"").unwrap();
    machine.start().unwrap();
    let outcome = machine.wait_timeout(PATIENCE);
    assert!(matches!(&outcome, Some(Outcome::NotRestarted(why)) if why.contains("kernel")), "{outcome:?}");
}

#[test]
fn a_kick_that_comes_before_the_halt_ends_it() {
    // mov eax, 5 (KVM_HC_KICK_CPU); xor ebx, ebx; xor ecx, ecx (the boot processor); vmcall; nop...; cli; hlt
    let kick = [0xb8, 5, 0, 0, 0, 0x31, 0xdb, 0x31, 0xc9, 0x0f, 0x01, 0xc1];
    let halt = [&[0x90; 64][..], &[0xfa, 0xf4]].concat();
    for engine in engines_without(&[HYPERCALL]) {
        let (_, outcome) = Guest::new(&[&kick[..], &halt, &power_off()].concat()).run(engine);
        assert_eq!(outcome, Outcome::PoweredOff);
        // One kick, one halt.
        let guest = Guest::new(&[&kick[..], &halt, &print("once"), &halt, &power_off()].concat());
        let machine = guest.machine(engine);
        machine.start().unwrap();
        assert_eq!(machine.wait_timeout(Duration::from_millis(500)), None);
    }
}

#[test]
fn a_panic_that_restarts_is_a_panic_and_one_that_hangs_ends() {
    let panic = "[    1.0] Kernel panic - not syncing: test\n";
    let reset = vec![0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    let (_, outcome) = Guest::new(&[print(panic), reset].concat()).run(EngineKind::Soft);
    assert_eq!(outcome, Outcome::GuestPanic);
    let end = "[    1.0] ---[ end Kernel panic - not syncing: test ]---\r\n";
    let (_, outcome) =
        Guest::new(&[print(panic), print(end), HALT_FOR_EVER.to_vec()].concat()).run(EngineKind::Soft);
    assert_eq!(outcome, Outcome::GuestPanic);
    // pvpanic needs no console.
    let (_, outcome) =
        Guest::new(&[port(0x505), vec![0xb0, 1, 0xee, 0xeb, 0xfe]].concat()).run(EngineKind::Soft);
    assert_eq!(outcome, Outcome::GuestPanic);
}

#[test]
fn cr8_and_the_apics_task_priority_are_one_register() {
    let put = |character: u8| vec![0x66, 0xba, 0xf8, 0x03, 0xb0, character, 0xee];
    let off = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xeb, 0xfe].to_vec();
    // cmp eax, imm32; je over what prints X and powers off
    let expect = |value: u32| {
        let fail = [put(b'X'), off.clone()].concat();
        [&[0x3d][..], &value.to_le_bytes(), &[0x74, fail.len() as u8], &fail].concat()
    };
    let code = [
        vec![0x0f, 0x01, 0x1c, 0x25, 0x00, 0x04, 0x20, 0x00], // lidt [0x200400]
        vec![0x48, 0xc7, 0xc4, 0x00, 0x80, 0x20, 0x00],       // mov rsp, 0x208000
        vec![0xbb, 0x00, 0x00, 0xe0, 0xfe],                   // mov ebx, 0xfee00000
        vec![0xb8, 15, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0],      // mov eax, 15; mov cr8, rax
        vec![0x8b, 0x83, 0x80, 0, 0, 0],                      // mov eax, [rbx + 0x80]: TPR
        expect(0xf0),
        vec![0xc7, 0x83, 0xf0, 0, 0, 0, 0xff, 0x01, 0, 0], // SVR: enable
        vec![0xc7, 0x83, 0, 3, 0, 0, 0x40, 0x40, 4, 0],    // ICR: vector 0x40 to self
        vec![0xfb, 0x90, 0x90],                            // sti; nop; nop
        put(b'm'),
        vec![0x31, 0xc0, 0x44, 0x0f, 0x22, 0xc0, 0x90], // xor eax, eax; mov cr8, rax; nop
        put(b'f'),
        vec![0xc7, 0x83, 0x80, 0, 0, 0, 0x30, 0, 0, 0], // TPR = 0x30
        vec![0x44, 0x0f, 0x20, 0xc0],                   // mov rax, cr8
        expect(3),
        put(b'o'),
        off,
    ]
    .concat();
    // The handler: print, EOI, iretq.
    let handler =
        [vec![0x50], put(b't'), vec![0xc7, 0x83, 0xb0, 0, 0, 0, 0, 0, 0, 0, 0x58, 0x48, 0xcf]].concat();
    let gate = [0x00, 0x03, 0x10, 0x00, 0x00, 0x8e, 0x20, 0x00, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    let idtr = [0x0f, 0x04, 0x00, 0x10, 0x20, 0, 0, 0, 0, 0].to_vec();
    let guest = Guest::new(&[]);
    let parts = [(0, code), (0x300, handler), (0x400, idtr), (0x1400, gate)];
    std::fs::write(guest.kernel(), elf64(&parts)).unwrap();
    let engines = engines_without(&[TASK_PRIORITY]).into_iter().map(|engine| (engine, true));
    for (engine, translate) in engines.chain([(EngineKind::Soft, false)]) {
        let machine = Machine::new(MachineConfig { translate, ..guest.config(engine) }).unwrap();
        machine.start().unwrap();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff));
        assert_eq!(printed(&machine), "mtfo");
    }
}

#[test]
fn a_halted_guest_stands_still_and_stops_at_once() {
    for engine in engines() {
        let guest = Guest::new(&HALT_FOR_EVER);
        let machine = guest.machine(engine);
        machine.start().unwrap();
        assert_eq!(machine.wait_timeout(Duration::from_millis(100)), None);
        assert!(machine.pause());
        let at = machine.inspect()["vm_time_ns"].clone();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.inspect()["vm_time_ns"], at, "VM time passes while the machine is paused");
        machine.resume();
        std::thread::sleep(Duration::from_millis(20));
        assert_ne!(machine.inspect()["vm_time_ns"], at);
        let asked = Instant::now();
        machine.stop();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::Stopped));
        drop(machine);
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_guest_that_never_leaves_its_loop_is_stopped_and_paused() {
    for engine in engines() {
        let machine = Guest::new(&[0xeb, 0xfe]).machine(engine);
        machine.start().unwrap();
        for _ in 0..20 {
            assert!(machine.pause());
            machine.resume();
        }
        machine.stop();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::Stopped));
    }
}

#[test]
fn what_cannot_be_made_is_refused_with_the_cure() {
    let guest = Guest::new(&[]);
    let refused = |change: &dyn Fn(&mut MachineConfig)| {
        let mut config = MachineConfig { memory: 16 << 20, ..MachineConfig::new(guest.kernel()) };
        change(&mut config);
        Machine::new(config).err().expect("must be refused")
    };
    assert!(matches!(refused(&|config| config.cpus = 0), Error::Cpus(0)));
    assert!(refused(&|config| config.memory = 1 << 60).to_string().contains("smaller --memory"));
    assert!(refused(&|config| config.kernel = "nowhere".into()).to_string().contains("nowhere"));
    assert!(matches!(refused(&|config| config.cpu_model = Some("z80".into())), Error::Model(_)));
    let disk = machine::DiskConfig::raw(guest.directory.path().join("missing.img"));
    assert!(refused(&|config| config.disks = vec![disk.clone()]).to_string().contains("missing.img"));
}
