//! Random instruction sequences on the bare CPU and on both tiers of the software engine, also with an interrupt among
//! them, compared in all that a program can see. A case is made from a seed and a number alone; a failing one is reduced and shown.

mod case;
mod codes;
mod generate;
mod guest;
mod native;
mod random;

use case::{Case, Ending, Outcome, PAGE, WRITABLE};
use generate::Generator;
use guest::{Guest, Met, Tier};
use iced_x86::Instruction;
use native::Native;
use random::Random;
use std::fmt::Write;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    /// Number of the first case.
    pub first: u64,
    pub cases: u64,
    /// Stop after so many failures.
    pub failures: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    pub cases: u64,
    pub instructions: u64,
    pub codes: usize,
    /// Cases that ended in an exception, by vector.
    pub exceptions: [u64; 32],
    /// Cases that killed the native child, which are not compared.
    pub died: u64,
    /// Interrupts among the instructions of cases.
    pub interrupts: u64,
    /// A text for each difference.
    pub failures: Vec<String>,
}

struct Bench {
    native: Native,
    tiers: [(Tier, Guest); Tier::ALL.len()],
    data: Vec<u8>,
}

/// Data that is interesting as integers and as numbers.
fn data(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        match random.below(8) {
            0 => bytes.extend(random.extended()),
            1 => bytes.extend([0; 16]),
            _ => bytes.extend(random.lane().to_le_bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

impl Bench {
    fn new(seed: u64) -> Self {
        let constant = data(&mut Random::of(seed, u64::MAX), PAGE as usize);
        let native = Native::new(&constant);
        let tiers = Tier::ALL.map(|tier| (tier, Guest::new(tier, &constant)));
        Self { native, tiers, data: vec![0; WRITABLE] }
    }

    /// Runs one case all ways; the differences, if any.
    fn compare(&mut self, case: &Case) -> Option<String> {
        self.native.start(std::slice::from_ref(case), &self.data);
        self.native.finish();
        let (native, native_data) = self.native.outcome(0);
        let mut text = String::new();
        for (tier, guest) in &mut self.tiers {
            let mut outcome = guest.run(case, &self.data);
            let mut left = guest.data().to_vec();
            if unequal(native, &outcome, native_data, &left) {
                let met = guest.met(case, &outcome);
                forgive(case, *tier, met, native, &mut outcome, native_data, &mut left);
                let lines = case::differences(native, &outcome, native_data, &left);
                for line in lines.iter().take(20) {
                    let _ = writeln!(text, "  {tier:?} tier: {line}");
                }
                if let Some(i) = met.instruction.filter(|_| !lines.is_empty()) {
                    let _ = writeln!(text, "  {tier:?} tier: met {:?} at {:#x}", i.code(), i.ip());
                }
            }
        }
        (!text.is_empty()).then_some(text)
    }

    /// Leaves out instructions as long as a difference stays.
    fn minimise(&mut self, case: &Case) -> (Case, String) {
        let mut best = case.clone();
        let mut text = self.compare(case).unwrap_or_else(|| "  (not when run alone)\n".into());
        'again: loop {
            let instructions = best.instructions();
            if instructions.len() < 2 {
                break;
            }
            for out in instructions.iter().rev() {
                let at = (out.ip() - best.start) as usize;
                let mut smaller = best.clone();
                // In place, so that addresses stay: one-byte NOPs.
                smaller.code[at..at + out.len()].fill(0x90);
                if smaller.code != best.code
                    && let Some(difference) = self.compare(&smaller)
                {
                    (best, text) = (smaller, difference);
                    continue 'again;
                }
            }
            break;
        }
        (best, text)
    }
}

/// What the manuals leave open, and what the template tier does not do to the letter.
fn forgive(
    case: &Case,
    tier: Tier,
    met: Met,
    native: &Outcome,
    other: &mut Outcome,
    native_data: &[u8],
    data: &mut [u8],
) {
    // Code that has overwritten itself, or was jumped into the middle of, may say what no case says.
    if met.lost
        || other.ending.kind == Ending::CALLED
        || met.instruction.is_some_and(|i| !i.is_invalid() && !codes::allowed(i.code()))
    {
        *other = *native;
        data.copy_from_slice(native_data);
        return;
    }
    if case.instructions().iter().any(|i| codes::unsteady(i.code())) {
        other.state.rflags = other.state.rflags & !0x800 | native.state.rflags & 0x800;
    }
    several_faults(case, met, native, other, native_data, data);
    if half_a_count(met, native, other) {
        *other = *native;
        data.copy_from_slice(native_data);
    }
    breakpoint_instruction(case, met, native, other);
    elsewhere(native, other, native_data, data);
    if tier != Tier::Step {
        dead_flags(case, met, native, other);
    }
}

/// AMD's CPUs read only the low half of a shift's count from memory, and so do not meet the fault of a page that the upper half
/// reaches into. Only with MXCSR.MM set can one be there, which few programs know of.
fn half_a_count(met: Met, native: &Outcome, other: &Outcome) -> bool {
    use iced_x86::Mnemonic as M;
    let shift = |i: Instruction| {
        matches!(
            i.mnemonic(),
            M::Psraw | M::Psrad | M::Psrlw | M::Psrld | M::Psrlq | M::Psllw | M::Pslld | M::Psllq
        )
    };
    other.ending.kind == 15 && native.state.rip != other.state.rip && met.instruction.is_some_and(shift)
}

/// Some hypervisors report INT1 as a fault; jumps into the middle of instructions find it, with prefixes too.
fn breakpoint_instruction(case: &Case, met: Met, native: &Outcome, other: &mut Outcome) {
    let place = |rip: u64| rip.checked_sub(case.start).map_or(usize::MAX, |at| at as usize);
    let passed = case.code.get(place(native.state.rip)..place(other.state.rip));
    // Code that the case has written over itself is not known here.
    let is_int1 = |bytes: &[u8]| bytes.len() < 16 && (bytes.last() == Some(&0xf1) || met.rewritten);
    let is_int1 = passed.is_some_and(is_int1);
    if native.ending == other.ending && native.ending.kind == 2 && is_int1 {
        other.state.rip = native.state.rip;
        other.state.rflags = native.state.rflags;
    }
}

/// A jump to where the child has memory of its own, and the guest has none: to say that it is there, or run what is there, is the
/// child's affair.
fn elsewhere(native: &Outcome, other: &mut Outcome, native_data: &[u8], data: &mut [u8]) {
    const FETCH: u32 = 16;
    let inside = |address: u64| {
        (case::CODE..case::CODE + 2 * PAGE).contains(&address)
            || (case::DATA..case::DATA + 3 * PAGE).contains(&address)
    };
    let (a, b) = (native.ending, other.ending);
    let jumped = b.kind == 15 && b.error & FETCH != 0 && !inside(b.cr2) && !inside(other.state.rip);
    if jumped && a != b && !inside(native.state.rip) {
        *other = *native;
        data.copy_from_slice(native_data);
    }
}

/// Where an instruction with several accesses meets several faults, CPUs differ in which they report, even between
/// CMPS and REP CMPS of one CPU.
fn several_faults(
    case: &Case,
    met: Met,
    native: &Outcome,
    other: &mut Outcome,
    native_data: &[u8],
    data: &mut [u8],
) {
    use iced_x86::Mnemonic as M;
    let (a, b) = (native.ending, other.ending);
    let memory = |kind: u32| matches!(kind, 13..=15 | 18);
    let instructions = case.instructions();
    // A repeated instruction that overwrites itself ends when it is fetched again: in the engine, that is earlier.
    let code = case::CODE..case::CODE + 2 * PAGE;
    let own = |i: &Instruction| i.is_string_instruction() && i.ip() == native.state.rip;
    if instructions.iter().any(own) && case.state.gpr.iter().any(|value| code.contains(value)) {
        *other = *native;
        data.copy_from_slice(native_data);
        return;
    }
    // MASKMOV may report faults of bytes that its mask leaves out. A gather that has some elements reports the trap
    // that waits (TF) instead of the fault of the next one.
    let masked = |i: &Instruction| {
        matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
            || matches!(a.kind, 2 | 18) && i.is_vsib()
    };
    if (memory(a.kind) || a.kind == 2 && b.kind == 15)
        && instructions.iter().any(|i| masked(i) && i.ip() == native.state.rip)
    {
        *other = *native;
        data.copy_from_slice(native_data);
        return;
    }
    if a == b || !memory(a.kind) || !memory(b.kind) || native.state.rip != other.state.rip {
        return;
    }
    let Some(i) = met.instruction else { return };
    let several = i.is_string_instruction()
        || matches!(
            i.mnemonic(),
            M::Call
                | M::Push
                | M::Pop
                | M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Enter
        );
    // Vectors: alignment before the address; and prefixes of segments without a base are ignored.
    let wide = |op| i.op_register(op).is_vector_register() || i.op_register(op).is_mm();
    let vector = (0..i.op_count()).any(wide) || i.mnemonic() == M::Cmpxchg16b;
    if matches!((a.kind, b.kind), (13, 14) | (14, 13)) && (vector || i.has_segment_prefix()) {
        other.ending = a;
    }
    // A base of the upper half and an offset that is no address alone: AMD's CPUs do not let the sum wrap around.
    let wraps =
        i.segment_prefix() != iced_x86::Register::None && matches!((a.kind, b.kind), (14, 15) | (14, 18));
    let gather = i.is_vsib();
    let several = several || wraps || gather;
    // Several accesses, of which the last may be beyond the end of a half of the address space.
    let environment = matches!(i.mnemonic(), M::Frstor | M::Fldenv | M::Fxrstor | M::Fxrstor64)
        || i.mnemonic() == M::Fstp && i.memory_size() == iced_x86::MemorySize::Float80;
    if several || environment && matches!((a.kind, b.kind), (15, 15) | (18 | 15, 14)) {
        other.ending = a;
    }
}

/// Status flags of RFLAGS.
const STATUS: u64 = 0x8d5;

/// The template tier does not keep flags that nobody will read, though the handler of a fault can see them.
fn dead_flags(case: &Case, met: Met, native: &Outcome, other: &mut Outcome) {
    if native.ending.kind != 0 && native.ending == other.ending && native.state.rip == other.state.rip {
        // Which they are is not known of code that is gone.
        let dead = if met.rewritten { STATUS } else { case.dead_flags(native.state.rip) };
        other.state.rflags = other.state.rflags & !dead | native.state.rflags & dead;
    }
}

fn unequal(native: &Outcome, other: &Outcome, native_data: &[u8], other_data: &[u8]) -> bool {
    native.ending.kind != Ending::DIED
        && !case::same(native, other, native_data, other_data)
        && !case::differences(native, other, native_data, other_data).is_empty()
}

/// A case, for people.
#[allow(dead_code, reason = "the test does not ask")]
pub fn listing(seed: u64, number: u64) -> String {
    Generator::new().case(seed, number).listing()
}

/// Runs cases until there are enough, or enough failures.
pub fn run(options: &Options, mut progress: impl FnMut(&Report)) -> Report {
    let generator = Generator::new();
    let mut bench = Bench::new(options.seed);
    let mut report = Report { codes: generator.len(), ..Report::default() };
    let mut number = options.first;
    let end = options.first.saturating_add(options.cases);
    while number < end && report.failures.len() < options.failures {
        // Batches start at fixed numbers, so that a case's data depends on its number alone.
        let batch = number / native::BATCH as u64;
        let last = end.min((batch + 1) * native::BATCH as u64);
        bench.data = data(&mut Random::of(!options.seed, batch), WRITABLE);
        let cases: Vec<Case> = (number..last).map(|n| generator.case(options.seed, n)).collect();
        bench.native.start(&cases, &bench.data);
        let count = bench.tiers.len();
        let mut outcomes = Vec::with_capacity(cases.len() * count);
        for case in &cases {
            for (_, guest) in &mut bench.tiers {
                let outcome = guest.run(case, &bench.data);
                outcomes.push((outcome, guest.data().to_vec(), guest.met(case, &outcome)));
            }
        }
        bench.native.finish();
        let mut failed = vec![];
        for (i, case) in cases.iter().enumerate() {
            let (native, native_data) = bench.native.outcome(i);
            report.cases += 1;
            report.instructions += case.instructions().len() as u64;
            match native.ending.kind {
                0 => {}
                Ending::DIED => report.died += 1,
                kind => report.exceptions[(kind as usize - 1) & 31] += 1,
            }
            for (at, (outcome, data, met)) in outcomes[i * count..(i + 1) * count].iter_mut().enumerate() {
                if !unequal(native, outcome, native_data, data) {
                    continue;
                }
                forgive(case, bench.tiers[at].0, *met, native, outcome, native_data, data);
                if unequal(native, outcome, native_data, data) {
                    let text: String = case::differences(native, outcome, native_data, data)
                        .iter()
                        .take(20)
                        .map(|line| format!("  {:?} tier: {line}\n", bench.tiers[at].0))
                        .collect();
                    failed.push((number + i as u64, case, text));
                    break;
                }
            }
        }
        for (number, case, first) in failed {
            let (reduced, text) = bench.minimise(case);
            report.failures.push(format!(
                "seed {} case {number}:\n{}{first}reduced to:\n{}{text}",
                options.seed,
                case.listing(),
                reduced.listing(),
            ));
        }
        number = last;
        report.interrupts = bench.tiers.iter().map(|(_, guest)| guest.interrupts()).sum();
        progress(&report);
    }
    report
}
