//! I/O commands (section 6): from the rings to requests, and back.

use crate::data::{segments, take};
use crate::device_side::{Nvme, Origin, WRITE_CACHE};
use crate::spec::{Command, Status, nvm};
use device::block::{Operation, Outcome, Request, Segment};
use std::collections::VecDeque;

/// Most requests the worker may hold at a time.
const IN_FLIGHT_MAX: usize = 1024;
/// Bytes that are discarded in one request, so that a worker is not lost in one for long, and how many of those of a command are handed
/// out at a time.
const DISCARD_MAX: u64 = 1 << 30;
const DISCARDS_MAX: usize = 16;
/// Bytes of a dataset management range.
const RANGE_SIZE: usize = 16;

/// A command that the worker works on, in one or more requests.
#[derive(Debug)]
pub struct Pending {
    pub origin: Origin,
    /// Requests still out.
    pub parts: u32,
    /// It reads the disk.
    pub reading: bool,
    /// The first failure.
    pub status: Status,
    /// The controller was disabled: nobody hears the end.
    pub abandoned: bool,
    /// Of a discard: the ranges (in bytes) that are not handed out yet.
    pub rest: VecDeque<(u64, u64)>,
}

impl Nvme {
    /// The next request from any ring, fairly.
    pub(crate) fn fetch(&mut self) -> Option<Request> {
        loop {
            let master = self.may_use_memory();
            // A flush or discard touches no memory.
            if self.ready.front().is_some_and(|request| master || request.segments.is_empty()) {
                return self.ready.pop_front();
            }
            if !master || !self.is_enabled() || self.pending.len() >= IN_FLIGHT_MAX {
                return None;
            }
            let (queue, command) = self.next_command()?;
            let origin = Origin { queue, command: command.id() };
            if let Err(status) = self.io_command(origin, &command) {
                self.complete_command(origin, 0, status);
            }
        }
    }

    fn next_command(&mut self) -> Option<(u16, Command)> {
        let count = u16::try_from(self.submission_queues.len()).unwrap_or(u16::MAX);
        for _ in 1..count {
            self.turn = if self.turn.wrapping_add(1) >= count { 1 } else { self.turn.wrapping_add(1) };
            let slot = usize::from(self.turn);
            match self.submission_queues.get(slot) {
                Some(Some(queue)) if queue.closing.is_none() && !self.is_stuck(queue.completion_queue) => {}
                _ => continue,
            }
            let Some(Some(queue)) = self.submission_queues.get_mut(slot) else { continue };
            match queue.pop(&self.memory) {
                None => {}
                Some(Ok(command)) => return Some((self.turn, command)),
                Some(Err(_)) => {
                    self.fail();
                    return None;
                }
            }
        }
        None
    }

    fn io_command(&mut self, origin: Origin, command: &Command) -> Result<(), Status> {
        if command.unsupported_flags() {
            return Err(Status::INVALID_FIELD);
        }
        let everywhere = command.opcode() == nvm::FLUSH && command.namespace() == u32::MAX;
        if command.namespace() != 1 && !everywhere {
            return Err(Status::INVALID_NAMESPACE);
        }
        let force = command.dword::<12>() & 1 << 30 != 0 || self.writes_through();
        let one = match command.opcode() {
            nvm::FLUSH => (Operation::Flush, 0, 0, Vec::new()),
            nvm::READ => {
                let (offset, len) = self.range(command)?;
                (Operation::Read, offset, len, segments(&self.memory, command, len)?)
            }
            nvm::WRITE => {
                let (offset, len) = self.writable_range(command)?;
                (Operation::Write { fua: force }, offset, len, segments(&self.memory, command, len)?)
            }
            nvm::WRITE_ZEROES => {
                let (offset, len) = self.writable_range(command)?;
                let unmap = command.dword::<12>() & 1 << 25 != 0;
                (Operation::WriteZeroes { unmap, fua: force }, offset, len, Vec::new())
            }
            nvm::DATASET_MANAGEMENT => return self.dataset_management(origin, command),
            _ => return Err(Status::INVALID_OPCODE),
        };
        self.hand_out(origin, vec![one]);
        Ok(())
    }

    /// Whether the driver has switched the volatile write cache off.
    fn writes_through(&self) -> bool {
        self.features.get(WRITE_CACHE).is_some_and(|feature| feature & 1 == 0)
    }

    fn range(&self, command: &Command) -> Result<(u64, u64), Status> {
        let block = u64::from(command.dword::<10>()) | u64::from(command.dword::<11>()) << 32;
        let blocks = u64::from(command.dword::<12>() as u16).wrapping_add(1);
        self.bytes_of(block, blocks)
    }

    fn writable_range(&self, command: &Command) -> Result<(u64, u64), Status> {
        if self.geometry.read_only { Err(Status::WRITE_PROTECTED) } else { self.range(command) }
    }

    fn bytes_of(&self, block: u64, blocks: u64) -> Result<(u64, u64), Status> {
        match block.checked_add(blocks) {
            Some(end) if end <= self.namespace.blocks => {
                Ok((block << self.namespace.block_shift, blocks << self.namespace.block_shift))
            }
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    fn dataset_management(&mut self, origin: Origin, command: &Command) -> Result<(), Status> {
        const DEALLOCATE: u32 = 1 << 2;
        let count = usize::from(command.dword::<10>() as u8).wrapping_add(1);
        if command.dword::<11>() & DEALLOCATE == 0 || !self.geometry.discard {
            // Hints about access that need no action.
            self.complete_command(origin, 0, Status::SUCCESS);
            return Ok(());
        }
        if self.geometry.read_only {
            return Err(Status::WRITE_PROTECTED);
        }
        let mut bytes = vec![0; count.wrapping_mul(RANGE_SIZE)];
        take(&self.memory, command, &mut bytes)?;
        let mut rest = VecDeque::new();
        for range in bytes.chunks_exact(RANGE_SIZE) {
            let field = |at: usize, len: usize| {
                let bytes = range.iter().skip(at).take(len);
                bytes.rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
            };
            let (offset, len) = self.bytes_of(field(8, 8), field(4, 4))?;
            if len > 0 {
                rest.push_back((offset, len));
            }
        }
        if rest.is_empty() {
            self.complete_command(origin, 0, Status::SUCCESS);
            return Ok(());
        }
        self.hand_out(origin, Vec::new());
        let token = self.next_token;
        if let Some(pending) = self.pending.get_mut(&token) {
            pending.rest = rest;
        }
        for _ in 0..DISCARDS_MAX {
            self.discard_more(token);
        }
        Ok(())
    }

    /// Queues the next request of a discard, if there is more to it.
    fn discard_more(&mut self, token: u64) {
        let Some(pending) = self.pending.get_mut(&token) else { return };
        let Some((offset, left)) = pending.rest.front_mut() else { return };
        let (at, len) = (*offset, (*left).min(DISCARD_MAX));
        (*offset, *left) = (at.saturating_add(len), left.saturating_sub(len));
        if *left == 0 {
            pending.rest.pop_front();
        }
        pending.parts = pending.parts.saturating_add(1);
        let operation = Operation::Discard;
        self.ready.push_back(Request { token, operation, offset: at, len, segments: Vec::new() });
    }

    /// Queues the requests of one command for the worker.
    pub(crate) fn hand_out(&mut self, origin: Origin, parts: Vec<(Operation, u64, u64, Vec<Segment>)>) {
        self.next_token = self.next_token.wrapping_add(1);
        let token = self.next_token;
        let count = u32::try_from(parts.len()).unwrap_or(u32::MAX);
        let reading = parts.iter().any(|(operation, ..)| *operation == Operation::Read);
        let status = Status::SUCCESS;
        let pending =
            Pending { origin, parts: count, reading, status, abandoned: false, rest: VecDeque::new() };
        self.pending.insert(token, pending);
        for (operation, offset, len, segments) in parts {
            self.ready.push_back(Request { token, operation, offset, len, segments });
        }
    }

    /// The worker is done with one request.
    pub(crate) fn request_done(&mut self, token: u64, outcome: Outcome) {
        let Some(pending) = self.pending.get_mut(&token) else { return };
        if let Some(status) = failure(outcome, pending.reading)
            && pending.status == Status::SUCCESS
        {
            pending.status = status;
        }
        pending.parts = pending.parts.saturating_sub(1);
        self.discard_more(token);
        if self.pending.get(&token).is_none_or(|pending| pending.parts > 0) {
            return;
        }
        let Some(Pending { origin, status, abandoned, .. }) = self.pending.remove(&token) else { return };
        if !abandoned {
            self.complete_command(origin, 0, status);
        }
        self.finish_deletions();
        self.drained();
    }
}

/// The status of a failed request.
fn failure(outcome: Outcome, reading: bool) -> Option<Status> {
    match outcome {
        Outcome::Ok => None,
        Outcome::IoError if reading => Some(Status::READ_ERROR),
        Outcome::IoError => Some(Status::WRITE_FAULT),
        Outcome::NoSpace => Some(Status::CAPACITY_EXCEEDED),
        Outcome::Unsupported => Some(Status::WRITE_PROTECTED),
        Outcome::BadAddress => Some(Status::DATA_TRANSFER),
    }
}
