//! One case: code with the state it starts in; and what came of it.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, RflagsBits};

/// Where the code's two pages are, in the guest and in the native child alike.
pub const CODE: u64 = 0x2a61_0000;
/// Two pages of data to read and write, then one to read, then nothing.
pub const DATA: u64 = 0x2a62_0000;
pub const PAGE: u64 = 0x1000;
/// Bytes that a case may change.
pub const WRITABLE: usize = 0x2000;
/// Room for eight instructions.
pub const CODE_MAX: usize = 128;

/// What both sides load before and store after. General registers first: the native side knows the layout.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs: u64,
    pub gs: u64,
    pub pad: [u64; 4],
    /// FXSAVE image: the x87 part and MXCSR.
    pub fx: [u8; 512],
    pub ymm: [[u64; 4]; 16],
}

impl State {
    pub const EMPTY: Self =
        Self { gpr: [0; 16], rip: 0, rflags: 0, fs: 0, gs: 0, pad: [0; 4], fx: [0; 512], ymm: [[0; 4]; 16] };

    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx[24], self.fx[25], self.fx[26], self.fx[27]])
    }

    pub fn set_mxcsr(&mut self, value: u32) {
        self.fx[24..28].copy_from_slice(&value.to_le_bytes());
    }
}

/// How a case ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ending {
    /// 0: at the end of the code; vector + 1 of an exception; or one of those below.
    pub kind: u32,
    pub error: u32,
    /// Of page faults.
    pub cr2: u64,
}

impl Ending {
    /// The engine did not come back, or refused.
    pub const REFUSED: u32 = 1000;
    /// Code that was overwritten has called the kernel.
    pub const CALLED: u32 = 1002;
    /// The native child died.
    pub const DIED: u32 = 1001;

    /// An exception.
    pub fn exception(vector: u32, error: u32, cr2: u64) -> Self {
        if vector != 14 {
            return Self { kind: vector + 1, error, cr2: 0 };
        }
        // Linux says "present" of all addresses but its processes'.
        Self { kind: 15, error: error | u32::from(cr2 >= 0x7fff_ffff_f000), cr2 }
    }
}

/// Code and state.
#[derive(Clone)]
pub struct Case {
    pub code: Vec<u8>,
    /// Address of the first instruction.
    pub start: u64,
    pub state: State,
    /// Quadwords of data that differ from the batch's.
    pub pokes: Vec<(u64, u64)>,
    /// Start without the translations that earlier cases left.
    pub flush: bool,
}

impl Case {
    /// The code, and a jump to where cases end.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.code.clone();
        // JMP [RIP + distance]; the pointer is aligned, since the code may have set RFLAGS.AC.
        let tail = self.start + bytes.len() as u64;
        let distance = (tail + 6).next_multiple_of(8) - tail - 6;
        bytes.extend([0xff, 0x25, distance as u8, 0, 0, 0]);
        bytes.resize(bytes.len() + distance as usize, 0xcc);
        bytes.extend(super::native::end().to_le_bytes());
        bytes
    }

    pub fn instructions(&self) -> Vec<Instruction> {
        Decoder::with_ip(64, &self.code, self.start, DecoderOptions::NONE).into_iter().collect()
    }

    /// Status flags that nobody reads any more from the instruction at `rip` on, as far as straight-line code shows:
    /// the template tier does not keep them for the handler of a fault there.
    pub fn dead_flags(&self, rip: u64) -> u64 {
        const BITS: [(u32, u64); 6] = [
            (RflagsBits::CF, 0x1),
            (RflagsBits::PF, 0x4),
            (RflagsBits::AF, 0x10),
            (RflagsBits::ZF, 0x40),
            (RflagsBits::SF, 0x80),
            (RflagsBits::OF, 0x800),
        ];
        let instructions = self.instructions();
        let code = CODE..CODE + 2 * PAGE;
        if !instructions.iter().any(|i| i.ip() == rip) && code.contains(&rip)
            || self.state.gpr.iter().any(|value| code.contains(value))
        {
            // The code has overwritten itself, or may have.
            return 0x8d5;
        }
        let dead = !live(&instructions, rip, 8);
        BITS.iter().filter(|(bit, _)| dead & bit != 0).map(|(_, flag)| flag).sum()
    }

    /// For people.
    pub fn listing(&self) -> String {
        let mut text = String::new();
        for i in self.instructions() {
            let at = (i.ip() - self.start) as usize;
            let bytes: String = self.code[at..at + i.len()].iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("  {:#x}: {bytes:<30} {i}    [{:?}]\n", i.ip(), i.code());
        }
        text += &format!(
            "  flags {:#x} mxcsr {:#x} fs {:#x} gs {:#x} fcw {:02x}{:02x} fsw {:02x}{:02x} ftw {:02x}\n",
            self.state.rflags,
            self.state.mxcsr(),
            self.state.fs,
            self.state.gs,
            self.state.fx[1],
            self.state.fx[0],
            self.state.fx[3],
            self.state.fx[2],
            self.state.fx[4],
        );
        for (row, values) in self.state.gpr.chunks(4).enumerate() {
            let names = NAMES[row * 4..].iter().zip(values);
            let line: Vec<_> = names.map(|(name, value)| format!("{name:>3} {value:#018x}")).collect();
            text += &format!("  {}\n", line.join("  "));
        }
        for (at, value) in &self.pokes {
            text += &format!("  [{at:#x}] = {value:#x}\n");
        }
        text
    }
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Flags that may be read from `rip` on, in iced's numbering.
fn live(instructions: &[Instruction], rip: u64, depth: u32) -> u32 {
    let (mut read, mut open) = (0, u32::MAX);
    for i in instructions.iter().skip_while(|i| i.ip() != rip) {
        read |= i.rflags_read() & open;
        open &= !i.rflags_modified();
        match i.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch if depth > 0 => {
                let mut after = live(instructions, i.near_branch_target(), depth - 1);
                if i.flow_control() == FlowControl::ConditionalBranch {
                    after |= live(instructions, i.next_ip(), depth - 1);
                }
                return read | open & after;
            }
            _ => return read | open,
        }
    }
    read | open
}

/// What came of a case.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    pub state: State,
    pub ending: Ending,
}

/// Where two outcomes differ; empty if nowhere. x87's last instruction and operand pointers and opcode are not
/// compared: in the engine they are those of its own copies.
pub fn differences(native: &Outcome, other: &Outcome, native_data: &[u8], other_data: &[u8]) -> Vec<String> {
    let mut found = vec![];
    let mut at = |name: &str, native: u64, other: u64| {
        if native != other {
            found.push(format!("{name}: native {native:#x}, engine {other:#x}"));
        }
    };
    let (a, b) = (&native.state, &other.state);
    at("ending (vector + 1)", native.ending.kind.into(), other.ending.kind.into());
    let page_fault = native.ending.kind == 15;
    at("error code", native.ending.error.into(), other.ending.error.into());
    if page_fault {
        at("cr2", native.ending.cr2, other.ending.cr2);
    }
    at("rip", a.rip, b.rip);
    at("rflags", a.rflags, b.rflags);
    for (name, (x, y)) in NAMES.iter().zip(a.gpr.iter().zip(&b.gpr)) {
        at(name, *x, *y);
    }
    at("fs base", a.fs, b.fs);
    at("gs base", a.gs, b.gs);
    at("mxcsr", a.mxcsr().into(), b.mxcsr().into());
    let word = |s: &State, i: usize| u64::from(s.fx[i]) | u64::from(s.fx[i + 1]) << 8;
    at("fcw", word(a, 0), word(b, 0));
    at("fsw", word(a, 2), word(b, 2));
    at("ftw", word(a, 4), word(b, 4));
    for i in 0..8 {
        let high = |s: &State| word(s, 32 + 16 * i + 8);
        let low = |s: &State| (0..4).map(|w| word(s, 32 + 16 * i + 2 * w) << (16 * w)).sum();
        at(&format!("st{i} significand"), low(a), low(b));
        at(&format!("st{i} exponent"), high(a), high(b));
    }
    for i in 0..16 {
        for lane in 0..4 {
            at(&format!("ymm{i}[{lane}]"), a.ymm[i][lane], b.ymm[i][lane]);
        }
    }
    if native_data != other_data {
        for (i, (x, y)) in native_data.chunks(8).zip(other_data.chunks(8)).enumerate() {
            let value = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            at(&format!("[{:#x}]", DATA + 8 * i as u64), value(x), value(y));
        }
    }
    found
}

/// Whether [`differences`] would find one, without the text.
pub fn same(native: &Outcome, other: &Outcome, native_data: &[u8], other_data: &[u8]) -> bool {
    let (a, b) = (&native.state, &other.state);
    native.ending == other.ending
        && a.gpr == b.gpr
        && (a.rip, a.rflags, a.fs, a.gs) == (b.rip, b.rflags, b.fs, b.gs)
        && a.fx[..6] == b.fx[..6]
        && a.fx[24..28] == b.fx[24..28]
        && (0..8).all(|i| a.fx[32 + 16 * i..42 + 16 * i] == b.fx[32 + 16 * i..42 + 16 * i])
        && a.ymm == b.ymm
        && native_data == other_data
}
