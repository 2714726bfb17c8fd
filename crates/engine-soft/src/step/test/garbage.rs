//! Guests that execute garbage may hurt only themselves.

use super::*;
use cpu::{Registers, cr0, efer, rflags};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// An address or number that is likely to be interesting.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => self.below(64),
            2 => u64::MAX - self.below(64),
            3 => (1u64 << 47) - self.below(32),
            4 => (0x7f_ffffu64 + 16) - self.below(32),
            _ => self.below(8 << 20),
        }
    }
}

fn mode(machine: &mut Machine, random: &mut Random) {
    match random.below(6) {
        0 => {
            let mut registers = Registers::default();
            registers.segments[seg::CS] =
                Segment { base: 0x8000, limit: 0xffff, selector: 0x800, attr: 0x9b };
            registers.rip = random.below(0x1_0000);
            machine.core.state.set_registers(&registers);
        }
        1 => {
            let state = &mut machine.core.state;
            state.cr0 &= !cr0::PG;
            state.efer &= !(efer::LMA | efer::LME);
            state.segments[seg::CS].attr = attr::CODE32;
        }
        2 | 3 => machine.user(),
        4 => {
            machine.user();
            machine.core.state.segments[seg::CS].attr = attr::CODE32 | 3 << attr::DPL_SHIFT;
        }
        _ => {}
    }
    let core = &mut machine.core;
    core.mmu.flush_all(&mut core.state);
}

#[test]
fn random_instructions_in_all_modes_neither_panic_nor_escape() {
    let mut random = Random(0x5eed);
    for _ in 0..150 {
        let mut machine = Machine::with_bytes(&[]);
        machine.core.enter();
        for _ in 0..60 {
            let code: [u8; 64] = std::array::from_fn(|_| random.next() as u8);
            let state = &mut machine.core.state;
            state.cr0 |= cr0::PE | cr0::PG;
            state.efer |= efer::LME | efer::LMA;
            state.cr4 = cpu::cr4::PAE | cpu::cr4::OSFXSR | cpu::cr4::OSXSAVE | cpu::cr4::OSXMMEXCPT;
            state.segments[seg::CS].attr = attr::CODE64;
            state.segments[seg::SS].attr = attr::DATA;
            state.halted = false;
            state.rip = 0x8000 + random.below(0x1000);
            state.rflags = random.next() & 0x0024_7fd7 & !rflags::TF | rflags::FIXED;
            let rip = state.rip;
            for n in 0..16 {
                machine.core.state.gpr[n] = random.value();
            }
            let _ = machine.core.mmu.memory.write(rip, &code);
            mode(&mut machine, &mut random);
            for _ in 0..20 {
                match step(&mut machine.core) {
                    Stop::Continue => {}
                    Stop::Exit(Exit::Shutdown | Exit::Halt) => break,
                    Stop::Exit(_) => machine.core.io.complete(Some(random.next())),
                    // What the engine says it does not do.
                    Stop::Fail(error) => {
                        assert!(error.to_string().contains("task switch"), "{error}");
                        break;
                    }
                }
            }
            machine.core.io.commit();
        }
        machine.core.leave();
    }
}
