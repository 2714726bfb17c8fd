//! Instructions that the host CPU executes on guest state.

use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use iced_x86::Instruction;

pub(crate) struct Stubs {}

impl Stubs {
    pub(crate) fn new() -> Result<Self, cpu::Error> {
        Ok(Self {})
    }
}

pub(crate) fn execute(_core: &mut Core, _instruction: &Instruction) -> Result<(), Trap> {
    Err(Exception::UD.into())
}
