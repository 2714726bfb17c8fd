//! Submission and completion queues in guest RAM (section 4.1).

use crate::spec::{Command, Status};
use memory::{AccessError, GuestMemory};
use std::collections::VecDeque;

/// Bytes of a submission entry.
const COMMAND_SIZE: u64 = 64;
/// Bytes of a completion entry.
const COMPLETION_SIZE: u64 = 16;

/// A ring that the guest fills.
#[derive(Debug)]
pub struct SubmissionQueue {
    base: u64,
    entries: u16,
    head: u16,
    tail: u16,
    pub completion_queue: u16,
    /// It is being deleted, by this command of the administrator's: no more of its own are taken.
    pub closing: Option<u16>,
}

impl SubmissionQueue {
    pub fn new(base: u64, entries: u16, completion_queue: u16) -> Self {
        Self { base, entries, head: 0, tail: 0, completion_queue, closing: None }
    }

    /// The doorbell; `false` if the value is no index.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        match u16::try_from(tail) {
            Ok(tail) if tail < self.entries => {
                self.tail = tail;
                true
            }
            _ => false,
        }
    }

    /// Takes the next command, if there is one.
    pub fn pop(&mut self, memory: &GuestMemory) -> Option<Result<Command, AccessError>> {
        if self.head == self.tail {
            return None;
        }
        let at = self.base.wrapping_add(u64::from(self.head).wrapping_mul(COMMAND_SIZE));
        self.head = next(self.head, self.entries);
        Some(memory.read_array(at).map(Command))
    }

    pub fn head(&self) -> u16 {
        self.head
    }
}

/// What goes into a completion queue.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    pub result: u32,
    pub submission_queue: u16,
    pub submission_head: u16,
    pub command: u16,
    pub status: Status,
}

/// A ring that the controller fills.
#[derive(Debug)]
pub struct CompletionQueue {
    base: u64,
    entries: u16,
    head: u16,
    tail: u16,
    phase: bool,
    /// MSI-X vector, if the queue interrupts.
    pub vector: Option<u16>,
    /// Submission queues that use this one.
    pub users: u16,
    /// Completions that found the ring full, or the controller no bus master; bounded by the commands in flight.
    waiting: VecDeque<Completion>,
}

impl CompletionQueue {
    pub fn new(base: u64, entries: u16, vector: Option<u16>) -> Self {
        Self { base, entries, head: 0, tail: 0, phase: true, vector, users: 0, waiting: VecDeque::new() }
    }

    /// The doorbell; `false` if the value is no index.
    pub fn set_head(&mut self, head: u32) -> bool {
        match u16::try_from(head) {
            Ok(head) if head < self.entries => {
                self.head = head;
                true
            }
            _ => false,
        }
    }

    /// Adds a completion for the next [`Self::post`].
    pub fn push(&mut self, completion: Completion) {
        self.waiting.push_back(completion);
    }

    /// Posts what waits as far as there is room; answers whether anything was posted.
    pub fn post(&mut self, memory: &GuestMemory) -> Result<bool, AccessError> {
        let mut posted = false;
        while next(self.tail, self.entries) != self.head {
            let Some(completion) = self.waiting.pop_front() else { break };
            self.write(memory, completion)?;
            posted = true;
        }
        Ok(posted)
    }

    fn write(&mut self, memory: &GuestMemory, completion: Completion) -> Result<(), AccessError> {
        let Completion { result, submission_queue, submission_head, command, status } = completion;
        let at = self.base.wrapping_add(u64::from(self.tail).wrapping_mul(COMPLETION_SIZE));
        let mut first = [0; 12];
        for (to, from) in first.iter_mut().zip(
            result
                .to_le_bytes()
                .into_iter()
                .chain([0; 4])
                .chain(submission_head.to_le_bytes())
                .chain(submission_queue.to_le_bytes()),
        ) {
            *to = from;
        }
        memory.write(at, &first)?;
        // The phase bit makes the entry valid, so it goes last and in one piece.
        let last = u32::from(command) | u32::from(status.0) << 17 | u32::from(self.phase) << 16;
        memory.atomic_u32(at.wrapping_add(12), |cell| {
            cell.store(last.to_le(), std::sync::atomic::Ordering::Release);
        })?;
        self.tail = next(self.tail, self.entries);
        if self.tail == 0 {
            self.phase = !self.phase;
        }
        Ok(())
    }

    /// Completions wait for room.
    pub fn is_stuck(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Entries the guest has not taken yet.
    pub fn has_entries(&self) -> bool {
        self.head != self.tail
    }
}

fn next(index: u16, entries: u16) -> u16 {
    let next = index.wrapping_add(1);
    if next >= entries { 0 } else { next }
}
