//! The log of device accesses of the instruction under way.
//!
//! An instruction that reaches a device leaves the engine with an [`Exit`] and runs again from its start once the
//! machine has acted. What was read is in the log then, and what was written is not written again. States: *empty*
//! between instructions; *awaiting* while the machine owes an answer; *replaying* while the instruction runs again.

use crate::exception::Trap;
use cpu::{Exit, Space};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Request {
    Read { space: Space, address: u64, size: u8 },
    Write { space: Space, address: u64, size: u8 },
    ReadMsr(u32),
    WriteMsr(u32),
    Hypercall,
}

/// See the module page.
#[derive(Debug, Default)]
pub struct IoLog {
    done: Vec<(Request, Option<u64>)>,
    cursor: usize,
    awaiting: Option<Request>,
}

impl IoLog {
    /// Nothing of the next instruction has happened yet.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty() && self.awaiting.is_none()
    }

    /// The instruction (or iteration) is complete.
    pub fn commit(&mut self) {
        self.done.clear();
        self.cursor = 0;
        self.awaiting = None;
    }

    /// The instruction starts (again).
    pub fn rewind(&mut self) {
        self.cursor = 0;
    }

    /// The machine's answer to the last exit.
    pub fn complete(&mut self, answer: Option<u64>) {
        if let Some(request) = self.awaiting.take() {
            self.done.push((request, answer));
        }
    }

    /// The logged answer to `request`, if it was made before; else what came after it is forgotten.
    fn replay(&mut self, request: &Request) -> Option<Option<u64>> {
        match self.done.get(self.cursor) {
            Some((logged, answer)) if logged == request => {
                self.cursor += 1;
                Some(*answer)
            }
            _ => {
                self.done.truncate(self.cursor);
                None
            }
        }
    }

    fn ask(&mut self, request: Request, exit: Exit) -> Result<Option<u64>, Trap> {
        match self.replay(&request) {
            Some(answer) => Ok(answer),
            None => {
                self.awaiting = Some(request);
                Err(Trap::Exit(exit))
            }
        }
    }

    /// Reads a device register.
    pub fn read(&mut self, space: Space, address: u64, size: u8) -> Result<u64, Trap> {
        let answer = self.ask(Request::Read { space, address, size }, Exit::Read { space, address, size })?;
        Ok(answer.unwrap_or(u64::MAX))
    }

    /// Writes a device register.
    pub fn write(&mut self, space: Space, address: u64, size: u8, value: u64) -> Result<(), Trap> {
        let request = Request::Write { space, address, size };
        if self.replay(&request).is_some() {
            return Ok(());
        }
        self.done.push((request, None));
        Err(Trap::Exit(Exit::Write { space, address, size, value }))
    }

    /// Reads an MSR of the machine's; `None` is #GP.
    pub fn read_msr(&mut self, index: u32) -> Result<Option<u64>, Trap> {
        self.ask(Request::ReadMsr(index), Exit::ReadMsr { index })
    }

    /// Writes an MSR of the machine's; `None` is #GP.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<Option<u64>, Trap> {
        self.ask(Request::WriteMsr(index), Exit::WriteMsr { index, value })
    }

    /// A hypercall.
    pub fn hypercall(&mut self, number: u64, args: [u64; 4]) -> Result<u64, Trap> {
        let answer = self.ask(Request::Hypercall, Exit::Hypercall { number, args })?;
        Ok(answer.unwrap_or(0))
    }
}
