//! Small guests, and what they must leave behind.

mod events;
mod garbage;
mod io;
mod memory;
mod modes;
mod native;

use super::step;
use crate::cpu_core::Core;
use crate::exception::Stop;
use crate::state::seg;
use ::memory::{Backing, GuestMemory};
use cpu::{DescriptorTable, Exit, Segment, attr};

pub(super) const CODE: u64 = 0x10_0000;
pub(super) const STACK: u64 = 0x20_0000;
pub(super) const DATA: u64 = 0x30_0000;
/// Handler of exception `n`: a HLT at `HANDLERS + 16 * n`.
pub(super) const HANDLERS: u64 = 0x11_0000;
pub(super) const IDT: u64 = 0x1_0000;
pub(super) const GDT: u64 = 0x1_2000;
pub(super) const TSS: u64 = 0x1_3000;
/// Stack that the TSS gives to CPL 0.
pub(super) const RSP0: u64 = 0x21_0000;
/// First stack of the IST.
pub(super) const IST1: u64 = 0x22_0000;

/// Selectors of the test GDT.
pub(super) mod selector {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2b;
    pub const USER_CODE64: u16 = 0x33;
    pub const DATA16: u16 = 0x38;
    pub const TSS: u16 = 0x40;
}

/// Defines guest code in assembly, of at most 512 bytes, ending with HLT.
macro_rules! guest {
    ($name:ident: $($line:literal)+) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            std::arch::naked_asm!($($line,)+ "hlt")
        }
    };
}
pub(super) use guest;

pub(super) struct Machine {
    pub core: Core,
}

impl Machine {
    /// A flat 64-bit machine with GDT, TSS and an IDT whose handlers halt.
    pub fn new(code: extern "C" fn()) -> Self {
        let mut machine = Self::with_bytes(&[]);
        // SAFETY: the bytes of a function, and of what the linker put behind it, are readable.
        #[allow(unsafe_code)]
        let code = unsafe { std::slice::from_raw_parts(code as *const u8, 512) };
        machine.write(CODE, code);
        machine
    }

    pub fn with_bytes(code: &[u8]) -> Self {
        let ram = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).unwrap();
        let mut machine = Self { core: Core::flat64(ram).unwrap() };
        machine.write(CODE, code);
        let gdt: [u64; 8] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_9300_0000_ffff,
        ];
        for (n, descriptor) in gdt.iter().enumerate() {
            machine.write_u64(GDT + 8 * n as u64, *descriptor);
        }
        for vector in 0..64 {
            machine.gate(vector, 0x8e, 0);
            machine.write(HANDLERS + 16 * vector, &[0xf4]);
        }
        machine.write_u64(TSS + 4, RSP0);
        machine.write_u64(TSS + 36, IST1);
        let state = &mut machine.core.state;
        state.gdtr = DescriptorTable { base: GDT, limit: 0xfff };
        state.idtr = DescriptorTable { base: IDT, limit: 0x3ff };
        state.tr = Segment { base: TSS, limit: 0x67, selector: selector::TSS, attr: attr::TSS_BUSY };
        state.gpr[4] = STACK;
        state.rip = CODE;
        machine
    }

    pub fn gate(&mut self, vector: u64, kind: u64, ist: u64) {
        let handler = HANDLERS + 16 * vector;
        let low = handler & 0xffff
            | u64::from(selector::CODE64) << 16
            | ist << 32
            | kind << 40
            | (handler >> 16 & 0xffff) << 48;
        self.write_u64(IDT + 16 * vector, low);
        self.write_u64(IDT + 16 * vector + 8, handler >> 32);
    }

    /// Goes on at CPL 3 in flat 64-bit code.
    pub fn user(&mut self) {
        let state = &mut self.core.state;
        state.segments[seg::CS] = Segment {
            base: 0,
            limit: u32::MAX,
            selector: selector::USER_CODE64,
            attr: attr::CODE64 | 3 << attr::DPL_SHIFT,
        };
        state.segments[seg::SS] = Segment {
            base: 0,
            limit: u32::MAX,
            selector: selector::USER_DATA,
            attr: attr::DATA | 3 << attr::DPL_SHIFT,
        };
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        self.core.mmu.memory.write(address, bytes).unwrap();
    }

    pub fn write_u64(&mut self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    pub fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        self.core.mmu.memory.read_array(address).unwrap()
    }

    pub fn u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address))
    }

    pub fn u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.bytes(address))
    }

    /// Maps the 4 KiB page at linear `address` (anywhere in the lowest 2 MiB from 1 GiB on) with this entry.
    pub fn map(&mut self, address: u64, entry: u64) {
        self.write_u64(0x2008, 0x5007);
        self.write_u64(0x5000, 0x6007);
        self.write_u64(0x6000 + (address >> 12 & 511) * 8, entry);
        self.core.mmu.flush_all(&mut self.core.state);
    }

    /// One step that must not leave.
    pub fn step(&mut self) {
        self.core.enter();
        let stop = step(&mut self.core);
        self.core.leave();
        assert!(matches!(stop, Stop::Continue), "{stop:?} at {:#x}", self.core.state.rip);
    }

    /// Runs to the next exit.
    pub fn run(&mut self) -> Exit {
        self.core.enter();
        let exit = self.run_inner();
        self.core.leave();
        exit
    }

    fn run_inner(&mut self) -> Exit {
        self.core.state.halted = false;
        for _ in 0..1_000_000 {
            match self.core.deliver_pending() {
                Stop::Continue => {}
                other => panic!("{other:?}"),
            }
            match step(&mut self.core) {
                Stop::Continue => {}
                Stop::Exit(exit) => return exit,
                Stop::Fail(error) => panic!("{error}"),
            }
        }
        panic!("the guest does not end: rip {:#x}", self.core.state.rip);
    }

    /// Runs to the HLT at the end of the guest's code.
    pub fn finish(&mut self) {
        assert_eq!(self.run(), Exit::Halt);
        let rip = self.core.state.rip;
        assert!(!(HANDLERS..HANDLERS + 0x400).contains(&rip), "exception {}", (rip - HANDLERS) / 16);
    }

    /// Runs to the HLT of an exception handler; answers its vector.
    pub fn fault(&mut self) -> u64 {
        assert_eq!(self.run(), Exit::Halt);
        let rip = self.core.state.rip;
        assert!((HANDLERS..HANDLERS + 0x400).contains(&rip), "no exception: rip {rip:#x}");
        (rip - HANDLERS) / 16
    }

    /// Item `n` of the frame on top of the stack.
    pub fn frame(&self, n: u64) -> u64 {
        self.u64(self.core.state.gpr[4] + 8 * n)
    }
}
