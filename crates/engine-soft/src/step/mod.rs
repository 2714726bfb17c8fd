//! The single-step tier.

use crate::cpu_core::Core;
use crate::exception::{Stop, Trap};
use iced_x86::Instruction;

pub(crate) mod native;

/// Executes one instruction.
pub(crate) type Execute = fn(&mut Core, &Instruction) -> Result<(), Trap>;

/// Executes exactly one instruction at the state's RIP (or a bounded run of iterations of a repeated one), delivering
/// the exception it meets, if any.
pub fn step(core: &mut Core) -> Stop {
    match core.fetch_instruction().and_then(|decoded| (decoded.execute)(core, &decoded.instruction)) {
        Ok(()) => Stop::Continue,
        Err(Trap::Exception(exception)) => core.raise(exception),
        Err(Trap::Exit(exit)) => Stop::Exit(exit),
        Err(Trap::Fail(error)) => Stop::Fail(error),
    }
}

pub(crate) fn classify(_instruction: &Instruction) -> Execute {
    native::execute
}
