//! User code in a process: what comes back, what stops it, and what it cannot reach.

use super::*;
use crate::peers::kick;
use cpu::{Segment, attr};
use memory::{Backing, GuestMemory};
use std::time::{Duration, Instant};

const CODE: u64 = 0x40_0000;
const OTHER_CODE: u64 = 0x41_0000;
const DATA: u64 = 0x50_0000;
const STACK: u64 = 0x60_0000;
/// Present, writable, the user's.
const OPEN: u64 = 7;

struct Guest {
    core: Core,
    direct: Direct,
}

impl Guest {
    /// A user program at [`CODE`]: 8 MiB are mapped where they are, by pages of 4 KiB that nobody has accessed.
    fn new(code: &[u8]) -> Self {
        let ram = GuestMemory::new(&[(0, 8 << 20)], Backing::Shared).unwrap();
        let mut core = Core::flat64(ram.clone()).unwrap();
        let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes()).unwrap();
        put(0x1000, 0x2000 | OPEN);
        put(0x2000, 0x3000 | OPEN);
        for table in 0..4 {
            put(0x3000 + table * 8, (0x4000 + table * 0x1000) | OPEN);
            for page in 0..512 {
                put(0x4000 + table * 0x1000 + page * 8, (table << 21 | page << 12) | OPEN);
            }
        }
        ram.write(CODE, code).unwrap();
        let state = &mut core.state;
        for segment in &mut state.segments {
            *segment = Segment::default();
        }
        let user = 3 << attr::DPL_SHIFT;
        state.segments[seg::CS] =
            Segment { base: 0, limit: u32::MAX, selector: 0x33, attr: attr::CODE64 | user };
        state.segments[seg::SS] =
            Segment { base: 0, limit: u32::MAX, selector: 0x2b, attr: attr::DATA | user };
        state.rip = CODE;
        state.gpr[4] = STACK;
        state.rflags = rflags::FIXED | rflags::IF;
        core.mmu.flush_all(&mut core.state);
        Self { core, direct: Direct::new(1_000_000_000) }
    }

    fn run(&mut self) -> Next {
        self.core.enter();
        let next = self.direct.run(&mut self.core);
        self.core.leave();
        assert_eq!(self.direct.off(), None);
        next.unwrap()
    }

    /// Runs until something is to be done, which must be at an offset of the code.
    fn runs_to(&mut self, offset: u64) {
        assert_eq!(self.run(), Next::Step);
        assert_eq!(self.core.state.rip, CODE + offset);
    }

    fn read(&self, at: u64) -> u64 {
        self.core.mmu.memory.load_u64(at).unwrap()
    }

    fn write(&self, at: u64, value: u64) {
        self.core.mmu.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    fn entry(linear: u64) -> u64 {
        0x4000 + (linear >> 12) * 8
    }

    /// One whose process is there, and where that has its own pages.
    fn with_process() -> (Self, u64) {
        let mut guest = Self::new(&SYSCALL);
        guest.runs_to(0);
        let ours = guest.direct.mirrors.iter().flatten().next().unwrap().process.ours();
        (guest, ours[0])
    }

    /// Another program is about to run.
    fn program(&mut self, code: &[u8]) {
        self.core.mmu.memory.write(OTHER_CODE, code).unwrap();
        self.core.state.rip = OTHER_CODE;
    }

    fn pid(&self) -> libc::pid_t {
        self.direct.mirrors.iter().flatten().next().unwrap().process.pid()
    }
}

/// MOV of a 64-bit number to RDI.
fn rdi(value: u64) -> Vec<u8> {
    [&[0x48, 0xbf][..], &value.to_le_bytes()].concat()
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];

fn program(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn registers_flags_and_memory_come_back() {
    // mov [rdi], rax; add rax, rbx; vpaddq ymm1, ymm0, ymm0; fld1; stc; cld; syscall
    let code = program(&[
        &rdi(DATA),
        &[0x48, 0x89, 0x07, 0x48, 0x01, 0xd8, 0xc5, 0xfd, 0xd4, 0xc8, 0xd9, 0xe8, 0xf9, 0xfc],
        &SYSCALL,
    ]);
    let mut guest = Guest::new(&code);
    guest.core.state.gpr[0] = 60;
    guest.core.state.gpr[3] = 5;
    guest.core.state.gpr[15] = 0x1234_5678_9abc;
    guest.core.state.ymm.0[0] = [1, 2, 3, 4];
    guest.core.state.mxcsr = 0x9fc0;
    guest.core.state.segments[seg::FS].base = 0x7000;
    guest.runs_to(code.len() as u64 - 2);
    let state = &guest.core.state;
    assert_eq!((state.gpr[0], state.gpr[3], state.gpr[4], state.gpr[7]), (65, 5, STACK, DATA));
    assert_eq!(state.gpr[15], 0x1234_5678_9abc);
    assert_eq!(state.ymm.0[1], [2, 4, 6, 8]);
    assert_eq!((state.mxcsr, state.segments[seg::FS].base), (0x9fc0, 0x7000));
    assert_eq!(state.rflags & (rflags::CF | rflags::ZF | rflags::IF), rflags::CF | rflags::IF);
    // The register on top of the x87 stack is 1.0.
    assert_eq!(state.x87.0[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    assert_eq!(guest.read(DATA), 60);
    // What was written is dirty, what was only fetched is not, what nobody touched is neither that nor accessed.
    assert_eq!(guest.read(Guest::entry(DATA)) & 0x60, 0x60);
    assert_eq!(guest.read(Guest::entry(CODE)) & 0x60, 0x20);
    assert_eq!(guest.read(Guest::entry(DATA + 0x1000)) & 0x60, 0);
}

#[test]
fn no_system_call_is_made_for_the_guest() {
    // exit_group, kill(getppid), int 0x80: each would be the end of something.
    for (number, call) in [(231, [0x0f, 0x05]), (62, [0x0f, 0x05]), (1, [0xcd, 0x80])] {
        let mut guest = Guest::new(&call);
        guest.core.state.gpr[0] = number;
        guest.core.state.gpr[7] = u64::from(std::process::id());
        guest.core.state.gpr[6] = 9;
        for _ in 0..3 {
            guest.runs_to(0);
            assert_eq!(guest.core.state.gpr[0], number);
        }
    }
}

#[test]
fn exceptions_are_for_the_other_tiers() {
    let cases: [(&[u8], u64); 8] = [
        // ud2; int3; int 3; icebp; hlt; div by zero; a privileged MOV; a load from nowhere
        (&[0x0f, 0x0b], 0),
        (&[0x90, 0xcc], 1),
        (&[0x90, 0xcd, 0x03], 1),
        (&[0x90, 0xf1], 1),
        (&[0xf4], 0),
        (&[0x31, 0xc9, 0xf7, 0xf1], 2),
        (&[0x0f, 0x20, 0xd8], 0),
        (&[0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0x10], 0),
    ];
    for (code, at) in cases {
        let mut guest = Guest::new(code);
        guest.runs_to(at);
        // Nothing that the host's kernel did to get there is left in the flags.
        assert_eq!(guest.core.state.rflags & rflags::RF, 0);
    }
}

#[test]
fn a_kick_stops_an_endless_loop() {
    // inc rax; jmp
    let mut guest = Guest::new(&[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
    let doorbell = &raw const guest.core.state.doorbell as usize;
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        #[allow(unsafe_code)]
        // SAFETY: the guest lives until this thread has been joined.
        unsafe {
            (*(doorbell as *const crate::state::Doorbell)).ring(kick::LEAVE);
        }
    });
    let began = Instant::now();
    assert_eq!(guest.run(), Next::Kicked);
    assert!(began.elapsed() < Duration::from_secs(5));
    kicker.join().unwrap();
    assert!(guest.core.state.gpr[0] > 1000);
    assert_eq!(guest.run(), Next::Kicked, "a kick that nobody has taken still stops it");
}

/// Runs `mov rax, [rdi]; syscall` from the start.
fn load(guest: &mut Guest) -> u64 {
    guest.core.state.rip = CODE;
    guest.runs_to(13);
    guest.core.state.gpr[0]
}

#[test]
fn pages_are_forgotten_when_the_guest_says_so() {
    let code = program(&[&rdi(DATA), &[0x48, 0x8b, 0x07], &SYSCALL]);
    let mut guest = Guest::new(&code);
    guest.write(DATA, 1);
    guest.write(DATA + 0x8000, 2);
    guest.write(DATA + 0x9000, 3);
    assert_eq!(load(&mut guest), 1);
    guest.write(Guest::entry(DATA), (DATA + 0x8000) | OPEN);
    assert_eq!(load(&mut guest), 1, "as a TLB, a process goes on with what it knows");
    guest.core.mmu.invalidate_page(&mut guest.core.state, DATA + 8);
    assert_eq!(load(&mut guest), 2);
    guest.write(Guest::entry(DATA), (DATA + 0x9000) | OPEN);
    guest.core.mmu.flush_all(&mut guest.core.state);
    assert_eq!(load(&mut guest), 3);
    // Not present any more: the guest has to hear of it.
    guest.write(Guest::entry(DATA), 0);
    guest.core.mmu.invalidate_page(&mut guest.core.state, DATA);
    guest.core.state.rip = CODE;
    guest.runs_to(10);
}

#[test]
fn a_large_page_is_forgotten_whole() {
    const LARGE: u64 = 0x80_0000;
    const ENTRY: u64 = 0x3020;
    const SIZE: u64 = 1 << 7;
    let code = program(&[&rdi(LARGE + 0x3000), &[0x48, 0x8b, 0x07], &SYSCALL]);
    let mut guest = Guest::new(&code);
    guest.write(0x60_3000, 1);
    guest.write(0x20_3000, 2);
    guest.write(ENTRY, 0x60_0000 | OPEN | SIZE);
    assert_eq!(load(&mut guest), 1);
    guest.write(ENTRY, 0x20_0000 | OPEN | SIZE);
    guest.core.mmu.invalidate_page(&mut guest.core.state, LARGE);
    assert_eq!(load(&mut guest), 2);
    // A table of small pages instead, and one large page again with the same frames, of which only a flush of all tells.
    guest.write(ENTRY, 0x5000 | OPEN);
    guest.core.mmu.invalidate_page(&mut guest.core.state, LARGE);
    assert_eq!(load(&mut guest), 2);
    guest.write(ENTRY, 0x20_0000 | OPEN | SIZE | 0x60);
    guest.core.mmu.flush_all(&mut guest.core.state);
    assert_eq!(load(&mut guest), 2);
    guest.write(ENTRY, OPEN | SIZE | 0x60);
    guest.write(0x3000, 3);
    guest.core.mmu.invalidate_page(&mut guest.core.state, LARGE);
    assert_eq!(load(&mut guest), 3);
}

#[test]
fn a_step_that_the_program_asks_for_itself_is_over_when_it_is_told() {
    // pushfq; or dword [rsp], 0x100; popfq; mov al, 0xcc; syscall
    let code = program(&[&[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0xb0, 0xcc], &SYSCALL]);
    let mut guest = Guest::new(&code);
    assert_eq!(guest.run(), Next::SingleStepped);
    assert_eq!(guest.core.state.rip, CODE + 11);
    assert_eq!(guest.core.state.gpr[0] & 0xff, 0xcc);
    assert_ne!(guest.core.state.rflags & rflags::TF, 0);
}

#[test]
fn the_hosts_vsyscall_page_is_not_the_guests() {
    const TIME: u64 = 0xffff_ffff_ff60_0400;
    // mov rax, TIME; call rax
    let code = program(&[&[0x48, 0xb8], &TIME.to_le_bytes(), &[0xff, 0xd0]]);
    let mut guest = Guest::new(&code);
    assert_eq!(guest.run(), Next::Step);
    assert_eq!((guest.core.state.rip, guest.core.state.gpr[4]), (TIME, STACK - 8));
    assert_eq!(guest.read(STACK - 8), CODE + 12);
}

#[test]
fn interrupts_that_are_off_are_not_left_to_the_host() {
    let mut guest = Guest::new(&[0x90]);
    let tables = tables(&guest.core.state);
    (0..1000).for_each(|turn| guest.direct.policy.sample(tables, true, f64::from(turn) * 0.004));
    assert!(guest.direct.wants(&guest.core.state));
    guest.core.state.rflags |= rflags::IOPL;
    assert!(!guest.direct.wants(&guest.core.state));
    guest.core.state.rflags = rflags::FIXED;
    assert!(!guest.direct.wants(&guest.core.state));
}

#[test]
fn rights_are_those_of_the_page_tables() {
    // mov [rdi], rax; syscall
    let code = program(&[&rdi(DATA), &[0x48, 0x89, 0x07], &SYSCALL]);
    let mut guest = Guest::new(&code);
    guest.write(Guest::entry(DATA), DATA | 5);
    guest.runs_to(10);
    // The guest's kernel allows it, and needs to tell nobody.
    guest.write(Guest::entry(DATA), DATA | OPEN);
    guest.runs_to(13);
    // A page of the supervisor's.
    let mut guest = Guest::new(&code);
    guest.write(Guest::entry(DATA), DATA | 3);
    guest.runs_to(10);
    // Code in a page without code: jmp rdi
    let mut guest = Guest::new(&program(&[&rdi(DATA), &[0xff, 0xe7]]));
    guest.write(Guest::entry(DATA), DATA | OPEN | 1 << 63);
    assert_eq!(guest.run(), Next::Step);
    assert_eq!(guest.core.state.rip, DATA);
}

#[test]
fn writes_to_translated_code_are_seen() {
    let code = program(&[&rdi(DATA), &[0x48, 0x89, 0x07], &SYSCALL]);
    let mut guest = Guest::new(&code);
    guest.runs_to(13);
    guest.core.protect_code(DATA);
    guest.core.state.rip = CODE;
    guest.runs_to(10);
}

#[test]
fn cpuid_is_not_the_hosts() {
    let mut guest = Guest::new(&[0x90, 0x0f, 0xa2, 0x90, 0x0f, 0x31, 0x0f, 0x0b]);
    for offset in [1, 4, 6] {
        guest.runs_to(offset);
        // The single-step tier would do it here.
        guest.core.state.rip = CODE + [3, 6, 0][[1, 4, 6].iter().position(|&at| at == offset).unwrap()];
    }
    guest.runs_to(1);
    // Other pages need breakpoints too, and there are four.
    for page in 1..4u64 {
        let at = CODE + page * 0x1000;
        guest.core.mmu.memory.write(at, &[0x90, 0x0f, 0xa2, 0x0f, 0x31]).unwrap();
        guest.core.state.rip = at;
        guest.runs_to(page * 0x1000 + 1);
    }
    guest.core.state.rip = CODE;
    guest.runs_to(1);
    // The first that is run in its page.
    Guest::new(&[0x0f, 0xa2]).runs_to(0);
    // More in a page than breakpoints: the translator's.
    let mut guest = Guest::new(&[0x0f, 0xa2].repeat(5));
    assert_eq!(guest.run(), Next::Translate);
    assert_eq!(guest.core.state.rip, CODE);
    // Code that is written later.
    let mut guest = Guest::new(&[0x90, 0x0f, 0x0b]);
    guest.runs_to(1);
    guest.core.state.rip = CODE;
    guest.core.write_uint(CODE + 1, 0xa20f_9090, 4, Privilege::User).unwrap();
    guest.runs_to(3);
}

/// A page and the one behind it, with these bytes across; the program can begin in either.
fn across(bytes: &[u8], in_first: usize) -> (Guest, u64) {
    let mut code = [0x90; 0x1000 + 16];
    code[0x1000 - in_first..][..bytes.len()].copy_from_slice(bytes);
    // A system call behind it.
    let end = 0x1000 - in_first + bytes.len();
    code[end..end + 2].copy_from_slice(&SYSCALL);
    (Guest::new(&code), end as u64)
}

#[test]
fn instructions_over_a_page_end_are_looked_at_when_both_pages_are_there() {
    for bytes in [&[0x0f, 0xa2][..], &[0x49, 0x0f, 0x01, 0xd0], &[0x66, 0x0f, 0xc7, 0x64, 0x24, 0x40]] {
        for in_first in 1..bytes.len() {
            for second_page_first in [false, true] {
                let (mut guest, end) = across(bytes, in_first);
                if second_page_first {
                    guest.core.state.rip = CODE + end;
                    guest.runs_to(end);
                }
                guest.core.state.rip = CODE + 0xfe0;
                guest.runs_to(0x1000 - in_first as u64);
            }
        }
    }
}

#[test]
fn what_only_may_be_one_over_a_page_end_does_not_stop() {
    // jz, a move with a prefix, and a jump to and fro.
    for bytes in [&[0x0f, 0x84, 0, 0, 0, 0][..], &[0x49, 0x8b, 0xc4], &[0x48, 0x89, 0xc7]] {
        for second_page_first in [false, true] {
            let (mut guest, end) = across(bytes, 1);
            guest.core.state.gpr[12] = CODE;
            if second_page_first {
                guest.core.state.rip = CODE + end;
                guest.runs_to(end);
            }
            guest.core.state.rip = CODE + 0xfe0;
            guest.runs_to(end);
            let stops = guest.direct.statistics.stops;
            guest.core.state.rip = CODE + 0xfe0;
            guest.runs_to(end);
            assert_eq!(guest.direct.statistics.stops - stops, 1, "the system call");
        }
    }
}

#[test]
fn the_process_has_nothing_but_guest_memory() {
    let mut guest = Guest::new(&[0x0f, 0x0b]);
    guest.runs_to(0);
    let pid = guest.pid();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    for line in maps.lines() {
        let ours = ["yado-ram", "yado-direct", "yado-commands"].iter().any(|name| line.contains(name));
        assert!(ours || line.ends_with("[vsyscall]"), "{maps}");
        // What can be written is guest memory, and nothing can be both written and executed.
        let rights = line.split_whitespace().nth(1).unwrap();
        assert!(!rights.contains('w') || line.contains("yado-ram"), "{line}");
        assert!(!(rights.contains('w') && rights.contains('x')), "{line}");
    }
    let mut files: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|file| std::fs::read_link(file.unwrap().path()).unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files.len(), 3, "{files:?}");
    assert!(files.iter().all(|file| file.starts_with("/memfd:yado-")), "{files:?}");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
}

/// What the host's kernel does not take back from a tracer ends this tier's turn, and nothing else.
#[test]
fn segments_and_bases_of_the_guests_own_are_no_error() {
    let base = 0xffff_8000_0000_0000u64.to_le_bytes();
    let wide = [&[0x48, 0xb8][..], &base].concat();
    let write = |register: u8| [&wide[..], &[0xf3, 0x48, 0x0f, 0xae, 0xc0 | register << 3]].concat();
    let load = |selector: u8, segment: u8| vec![0xb8, selector, 0, 0, 0, 0x8e, 0xc0 | segment << 3];
    let (fs, gs) = (write(2), write(3));
    let mut cases = vec![load(1, 3), load(0x28, 0), load(0x2b, 3), load(3, 5)];
    if cpu::cpuid::host(7, 0).ebx & 1 != 0 {
        cases.extend([fs, gs]);
    }
    for before in cases {
        let code = program(&[&rdi(DATA), &before, &[0x48, 0x89, 0x07], &SYSCALL]);
        let mut guest = Guest::new(&code);
        // The store, or the load if the host has no such segment.
        guest.run();
        let at = guest.core.state.rip.wrapping_sub(CODE) as usize;
        assert!(at == 10 + before.len() || at == 15, "{before:x?}: stopped at {at}");
    }
    // A jump into 32-bit code: push 0x23; push rdi; lretq
    let code = program(&[&rdi(CODE + 0x40), &[0x6a, 0x23, 0x57, 0x48, 0xcb]]);
    let mut guest = Guest::new(&code);
    guest.write(CODE + 0x40, 0x0b0f);
    let table = DATA + 0x10_0000;
    guest.write(table + 0x20, 0x00cf_fb00_0000_ffff);
    guest.core.state.gdtr = cpu::DescriptorTable { base: table, limit: 0x3f };
    guest.core.state.gpr[4] = DATA + 0x1000;
    while guest.core.state.rip.wrapping_sub(CODE) < 0x40 {
        guest.run();
        assert!(guest.core.state.rip.wrapping_sub(CODE) <= 0x40);
    }
    assert_eq!(guest.core.state.segments[seg::CS].selector, 0x23);
    assert!(!guest.core.state.code64());
}

/// A program that has pages where the process has its own, or at the very end as without address randomisation, sees what it
/// has there.
#[test]
fn programs_can_have_any_page() {
    let (guest, ours) = Guest::with_process();
    drop(guest);
    for linear in [None, Some(0x7fff_ffff_c000), Some(0x7fff_ffff_d000), Some(0x7fff_ffff_e000)] {
        let (mut guest, place) = Guest::with_process();
        assert_ne!(place, ours, "processes have their pages at random places");
        let linear = linear.unwrap_or(place);
        // Page tables of all four levels: that of the guest's page at DATA.
        let index = |level: u64| (linear >> (12 + 9 * level) & 511) * 8;
        let (third, second, first) = (0x9000, 0xa000, 0xb000);
        guest.write(0x1000 + index(3), third | OPEN);
        guest.write(third + index(2), second | OPEN);
        guest.write(second + index(1), first | OPEN);
        guest.write(first + index(0), DATA | OPEN);
        guest.write(DATA, 77);
        // mov rax, [rdi]; mov [rdi + 8], rax
        let code = program(&[&rdi(linear), &[0x48, 0x8b, 0x07, 0x48, 0x89, 0x47, 0x08], &SYSCALL]);
        guest.program(&code);
        assert_eq!(guest.run(), Next::Step);
        assert_eq!(guest.core.state.rip, OTHER_CODE + code.len() as u64 - 2, "{linear:#x}");
        assert_eq!((guest.core.state.gpr[0], guest.read(DATA + 8)), (77, 77));
    }
}

#[test]
fn few_pages_in_many_places_do_not_fill_the_books() {
    let (mut guest, _) = Guest::with_process();
    let mirror = guest.direct.mirrors.iter_mut().flatten().next().unwrap();
    for place in 0..3000u64 {
        mirror.make_room(512);
        let page = |i: u64| mirror::Wanted {
            linear: (place << 21) + 0x1000_0000 + i * PAGE,
            physical: i * PAGE,
            offset: i * PAGE,
            rights: READ,
            shift: 21,
        };
        mirror.map(&(0..512).map(page).collect::<Vec<_>>());
        assert!(mirror.len() <= 1 << 18);
    }
}

#[test]
fn the_id_flag_is_each_programs_own() {
    // pushfq; xor dword [rsp], 1 << 21; popfq
    let toggle = [0x9c, 0x81, 0x34, 0x24, 0, 0, 0x20, 0, 0x9d];
    let mut guest = Guest::new(&program(&[&toggle, &SYSCALL, &toggle, &SYSCALL]));
    guest.runs_to(9);
    assert_ne!(guest.core.state.rflags & rflags::ID, 0);
    // Another program's turn, which has not set it: not in this process.
    guest.core.state.rip = CODE;
    guest.core.state.rflags &= !rflags::ID;
    guest.core.state.ymm.0[3] = [7, 8, 9, 10];
    assert_eq!(guest.run(), Next::Translate);
    assert_eq!((guest.core.state.rip, guest.core.state.rflags & rflags::ID), (CODE, 0));
    assert_eq!(guest.core.state.ymm.0[3], [7, 8, 9, 10]);
    // The first one goes on.
    guest.core.state.rip = CODE + 11;
    guest.core.state.rflags |= rflags::ID;
    guest.runs_to(20);
    assert_eq!(guest.core.state.rflags & rflags::ID, 0);
}

#[test]
fn a_program_that_has_every_page_stops_no_other() {
    let (mut guest, _) = Guest::with_process();
    // All linear addresses lead to the tables of the first 512 GiB, and there to one table of pages.
    let index = |level: u64| (CODE >> (12 + 9 * level) & 511) * 8;
    let (greedy, third, second) = (0x9000, 0xa000, 0xb000);
    for entry in 0..512 {
        guest.write(greedy + entry * 8, third | OPEN);
        guest.write(third + entry * 8, second | OPEN);
        guest.write(second + entry * 8, (0x4000 + index(1) / 8 * 0x1000) | OPEN);
    }
    let own = guest.core.state.cr3;
    let load = |guest: &mut Guest, tables: u64| {
        guest.core.state.cr3 = tables;
        guest.core.mmu.flush_all(&mut guest.core.state);
    };
    load(&mut guest, greedy);
    let runs: Vec<_> = (0..RETIRED_MAX + 3).map(|_| guest.run()).collect();
    assert_eq!(runs.last(), Some(&Next::Translate), "no more processes are made for it");
    assert!(guest.direct.retired.len() <= RETIRED_MAX);
    load(&mut guest, own);
    guest.core.state.rip = CODE;
    guest.runs_to(0);
}

/// What a guest may try: each attempt must end as a stop, with nothing of ours changed.
#[test]
fn attacks_on_our_pages_end_as_faults() {
    let store: &[u8] = &[0x48, 0x89, 0x07];
    let jump: &[u8] = &[0xff, 0xe7];
    let load: &[u8] = &[0x48, 0x8b, 0x07];
    for (target, instruction) in [
        // Our code and commands, read-only; the page after them; the last ones; the vsyscall page's time(); the end of all.
        (Ok(0), store),
        (Ok(0x1000), store),
        (Ok(0x2000), store),
        (Ok(0x2000), load),
        (Err(0x7fff_ffff_e000), store),
        (Err(0x7fff_ffff_f000), store),
        (Err(0xffff_ffff_ff60_0400), jump),
        (Err(0xffff_8000_0000_0000), store),
    ] {
        let (mut guest, ours) = Guest::with_process();
        let target = target.map_or_else(|address| address, |offset| ours + offset);
        guest.program(&program(&[&rdi(target), instruction, &SYSCALL]));
        assert_eq!(guest.run(), Next::Step, "{target:#x}");
        let state = &guest.core.state;
        assert!(state.rip == OTHER_CODE + 10 || state.rip == target, "{:#x}", state.rip);
        assert_ne!(state.gpr[0], 1);
    }
    // Into our own code, which makes system calls: they are not made either.
    let (mut guest, ours) = Guest::with_process();
    guest.program(&program(&[&rdi(ours + 0x127), jump]));
    guest.core.state.gpr[0] = 231;
    assert_eq!(guest.run(), Next::Step);
    assert_eq!((guest.core.state.rip, guest.core.state.gpr[0]), (ours + 0x127, 231));
    // And 32-bit code, by a far return: push 0x23; push CODE + 0x20; lretq; there, int 0x80.
    let mut code = vec![0x6a, 0x23, 0x68, 0x20, 0, 0x40, 0, 0x48, 0xcb];
    code.resize(0x20, 0x90);
    code.extend([0xcd, 0x80]);
    let mut guest = Guest::new(&code);
    guest.core.state.gpr[0] = 1;
    let next = guest.run();
    assert!(next == Next::Step, "{next:?}");
    // The process is as good as before.
    guest.core.state.rip = CODE;
    guest.core.state.gpr[4] = STACK;
    assert_eq!(guest.run(), Next::Step);
}

#[test]
fn a_process_that_is_killed_is_an_error() {
    let mut guest = Guest::new(&[0x0f, 0x0b]);
    guest.runs_to(0);
    let pid = guest.pid();
    #[allow(unsafe_code)]
    // SAFETY: a process of ours.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
    }
    guest.core.enter();
    let end = guest.direct.run(&mut guest.core);
    guest.core.leave();
    assert!(matches!(end, Err(Error::Host { .. })), "{end:?}");
}

#[test]
fn memory_that_cannot_be_shared_turns_it_off() {
    let ram = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).unwrap();
    let mut core = Core::flat64(ram).unwrap();
    let mut direct = Direct::new(1_000_000_000);
    assert_eq!(direct.run(&mut core).unwrap(), Next::Translate);
    assert!(direct.off().unwrap().contains("shared"));
}

/// Calls code at [`DATA`] that is patched before each of a hundred calls, and ends.
fn patching() -> Vec<u8> {
    // mov ecx, 100; again: mov [rdi + 1], ecx; call rdi; dec ecx; jnz again; syscall
    let patch = [0xb9, 100, 0, 0, 0, 0x89, 0x4f, 0x01, 0xff, 0xd7, 0xff, 0xc9, 0x75, 0xf7];
    program(&[&rdi(DATA), &patch, &SYSCALL])
}

/// A guest that has run [`patching`] on `add eax, number; ret`, with the single-step tier doing its part.
fn patched() -> Guest {
    let code = patching();
    let mut guest = Guest::new(&code);
    guest.core.mmu.memory.write(DATA, &[0x05, 0, 0, 0, 0, 0xc3]).unwrap();
    guest.core.state.gpr[0] = 0;
    let end = CODE + code.len() as u64 - 2;
    while guest.run() == Next::Step && guest.core.state.rip != end {
        guest.core.enter();
        assert!(matches!(crate::step::step(&mut guest.core), crate::exception::Stop::Continue));
        guest.core.leave();
        // What the translator does, without blocks in the page.
        for (at, _) in std::mem::take(&mut guest.core.code_writes) {
            guest.core.mmu.memory.unmark_code(at);
        }
    }
    guest
}

#[test]
fn code_that_is_written_all_the_time_stops_at_first_only() {
    let guest = patched();
    assert_eq!(guest.core.state.gpr[0], 5050);
    let stops = guest.direct.statistics.stops;
    assert!(stops < 50, "{stops}");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap();
    let open: Vec<_> = maps.lines().filter(|line| line.contains("rwx")).collect();
    assert!(open.len() == 1 && open[0].starts_with("00500000-00501000"), "{maps}");
}

#[test]
fn in_code_that_is_written_all_the_time_the_clock_is_still_the_guests() {
    let mut guest = patched();
    // Nobody looks: rdtsc; ud2
    guest.core.mmu.memory.write(DATA, &[0x0f, 0x31, 0x0f, 0x0b]).unwrap();
    guest.core.state.rip = DATA;
    assert_eq!(guest.run(), Next::Step);
    assert_eq!(guest.core.state.rip, DATA);
}

#[test]
fn code_that_is_written_all_the_time_is_looked_through_now_and_then() {
    let mut guest = patched();
    guest.core.mmu.memory.write(DATA, &[0x90, 0x0f, 0xa2, 0x0f, 0x0b]).unwrap();
    std::thread::sleep(Duration::from_millis(6));
    let end = patching().len() as u64 - 2;
    guest.core.state.rip = CODE + end;
    guest.runs_to(end);
    guest.core.state.rip = DATA;
    assert_eq!(guest.run(), Next::Step);
    assert_eq!(guest.core.state.rip, DATA + 1);
}
