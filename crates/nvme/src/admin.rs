//! Admin commands (section 5), executed as they are found.

use crate::data::give;
use crate::device_side::{Nvme, QUEUES};
use crate::identify::{self, Page};
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::spec::{Command, QUEUE_ENTRIES_MAX, Status, admin};

/// How many asynchronous event requests may wait.
const EVENTS_MAX: usize = 4;

/// How an admin command goes on.
pub enum Answer {
    /// It is complete with this result.
    Done(Result<u32, Status>),
    /// It completes when there is something to tell.
    Later,
}

impl Nvme {
    pub(crate) fn admin_command(&mut self, command: &Command) -> Answer {
        if command.unsupported_flags() {
            return Answer::Done(Err(Status::INVALID_FIELD));
        }
        Answer::Done(match command.opcode() {
            admin::IDENTIFY => self.identify(command),
            admin::CREATE_CQ => self.create_cq(command),
            admin::CREATE_SQ => self.create_sq(command),
            admin::DELETE_CQ => self.delete_cq(command),
            admin::DELETE_SQ => match self.delete_sq(command) {
                Ok(()) => return Answer::Later,
                Err(status) => Err(status),
            },
            admin::SET_FEATURES => self.set_features(command),
            admin::GET_FEATURES => self.get_features(command),
            admin::GET_LOG_PAGE => self.log_page(command),
            // Commands are not aborted: result bit 0 says so.
            admin::ABORT => Ok(1),
            admin::ASYNC_EVENT if self.events.len() < EVENTS_MAX => {
                self.events.push(command.id());
                return Answer::Later;
            }
            admin::ASYNC_EVENT => Err(Status::ASYNC_EVENT_LIMIT),
            _ => Err(Status::INVALID_OPCODE),
        })
    }

    fn identify(&self, command: &Command) -> Result<u32, Status> {
        const NAMESPACE: u32 = 0;
        const CONTROLLER: u32 = 1;
        const ACTIVE_NAMESPACES: u32 = 2;
        const DESCRIPTORS: u32 = 3;
        let (discard, read_only) = (self.geometry.discard, self.geometry.read_only);
        let page = match (command.dword::<10>() & 0xff, command.namespace()) {
            (CONTROLLER, _) => identify::controller(&self.serial, &self.namespace.uuid, discard),
            (NAMESPACE, 1 | u32::MAX) => identify::namespace(&self.namespace, discard, read_only),
            // A namespace that is not there has an empty structure.
            (NAMESPACE, _) => return Err(Status::INVALID_NAMESPACE),
            (ACTIVE_NAMESPACES, after) => {
                let mut page = Page::new();
                if after == 0 {
                    page.put(0, &1u32.to_le_bytes());
                }
                page
            }
            (DESCRIPTORS, 1) => identify::descriptors(&self.namespace),
            (DESCRIPTORS, _) => return Err(Status::INVALID_NAMESPACE),
            _ => return Err(Status::INVALID_FIELD),
        };
        give(&self.memory, command, page.bytes(), 4096).map(|()| 0)
    }

    fn create_cq(&mut self, command: &Command) -> Result<u32, Status> {
        const CONTIGUOUS: u32 = 1;
        const INTERRUPTS: u32 = 2;
        let (id, entries) = queue_parameters(command)?;
        let flags = command.dword::<11>();
        let vector = (flags >> 16) as u16;
        if flags & CONTIGUOUS == 0 || !command.prp1().is_multiple_of(4096) {
            return Err(Status::INVALID_FIELD);
        }
        if flags & INTERRUPTS != 0 && vector >= self.msix.len() {
            return Err(Status::INVALID_VECTOR);
        }
        let vector = (flags & INTERRUPTS != 0).then_some(vector);
        match self.completion_queues.get_mut(usize::from(id)) {
            Some(slot @ None) => *slot = Some(CompletionQueue::new(command.prp1(), entries, vector)),
            _ => return Err(Status::INVALID_QUEUE),
        }
        Ok(0)
    }

    fn create_sq(&mut self, command: &Command) -> Result<u32, Status> {
        let (id, entries) = queue_parameters(command)?;
        let flags = command.dword::<11>();
        let completion = (flags >> 16) as u16;
        if flags & 1 == 0 || !command.prp1().is_multiple_of(4096) {
            return Err(Status::INVALID_FIELD);
        }
        if !matches!(self.submission_queues.get(usize::from(id)), Some(None)) {
            return Err(Status::INVALID_QUEUE);
        }
        match self.completion_queues.get_mut(usize::from(completion)) {
            Some(Some(queue)) if completion != 0 => queue.users = queue.users.saturating_add(1),
            _ => return Err(Status::INVALID_CQ),
        }
        if let Some(slot) = self.submission_queues.get_mut(usize::from(id)) {
            *slot = Some(SubmissionQueue::new(command.prp1(), entries, completion));
        }
        Ok(0)
    }

    fn delete_cq(&mut self, command: &Command) -> Result<u32, Status> {
        let id = command.dword::<10>() as u16;
        match self.completion_queues.get_mut(usize::from(id)) {
            Some(Some(queue)) if id != 0 && queue.users > 0 => Err(Status::INVALID_QUEUE_DELETION),
            Some(slot @ Some(_)) if id != 0 => {
                *slot = None;
                Ok(0)
            }
            _ => Err(Status::INVALID_QUEUE),
        }
    }

    /// Begins to delete a submission queue. That is complete when all of its commands are: those that nobody works on yet are aborted,
    /// the others come to their end first (section 5.6), for they read and write the host's memory.
    fn delete_sq(&mut self, command: &Command) -> Result<(), Status> {
        let id = command.dword::<10>() as u16;
        match self.submission_queues.get_mut(usize::from(id)) {
            Some(Some(queue)) if id != 0 && queue.closing.is_none() => queue.closing = Some(command.id()),
            _ => return Err(Status::INVALID_QUEUE),
        }
        self.abort_queue(id);
        self.finish_deletions();
        Ok(())
    }

    fn set_features(&mut self, command: &Command) -> Result<u32, Status> {
        const QUEUE_COUNT: u8 = 0x07;
        let value = command.dword::<11>();
        match command.dword::<10>() as u8 {
            // Queues beyond the administrator's, less one, twice.
            QUEUE_COUNT => Ok(queue_count()),
            id @ (0x01 | 0x02 | 0x04..=0x06 | 0x08..=0x0b) => {
                if let Some(slot) = self.features.get_mut(usize::from(id)) {
                    *slot = value;
                }
                Ok(0)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn get_features(&self, command: &Command) -> Result<u32, Status> {
        match command.dword::<10>() as u8 {
            0x07 => Ok(queue_count()),
            id @ (0x01 | 0x02 | 0x04..=0x06 | 0x08..=0x0b) => {
                Ok(self.features.get(usize::from(id)).copied().unwrap_or(0))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn log_page(&self, command: &Command) -> Result<u32, Status> {
        let (ten, eleven) = (command.dword::<10>(), command.dword::<11>());
        let dwords = u64::from(ten >> 16 | (eleven & 0xffff) << 16).saturating_add(1);
        let offset = u64::from(command.dword::<12>()) | u64::from(command.dword::<13>()) << 32;
        let page = match ten as u8 {
            // No errors yet.
            0x01 => Page::<512>::new(),
            0x02 => identify::smart(),
            0x03 => identify::firmware(),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        let from = usize::try_from(offset).ok().and_then(|offset| page.bytes().get(offset..));
        let from = from.ok_or(Status::INVALID_FIELD)?;
        give(&self.memory, command, from, dwords.saturating_mul(4)).map(|()| 0)
    }
}

/// Queue id and number of entries of a create command.
fn queue_parameters(command: &Command) -> Result<(u16, u16), Status> {
    let ten = command.dword::<10>();
    let (id, last) = (ten as u16, (ten >> 16) as u16);
    if id == 0 || id >= QUEUES {
        return Err(Status::INVALID_QUEUE);
    }
    if last == 0 || last >= QUEUE_ENTRIES_MAX {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    Ok((id, last.wrapping_add(1)))
}

fn queue_count() -> u32 {
    let last = u32::from(QUEUES.saturating_sub(2));
    last << 16 | last
}
