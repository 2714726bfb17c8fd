//! Physical region pages: where a command's data is (section 4.3).

use crate::spec::{Command, Status};
use device::block::Segment;
use memory::GuestMemory;

const PAGE: u64 = 4096;
/// log2 of the most pages a command may transfer: 1 MiB.
pub const PAGES_SHIFT_MAX: u8 = 8;
/// The most bytes a command may transfer.
pub const TRANSFER_MAX: u64 = PAGE << PAGES_SHIFT_MAX;

/// The segments of `len` bytes. Lists are read here; the data's own addresses are checked when it moves.
pub fn segments(memory: &GuestMemory, command: &Command, len: u64) -> Result<Vec<Segment>, Status> {
    if len > TRANSFER_MAX {
        return Err(Status::INVALID_FIELD);
    }
    let (first, second) = (command.prp1(), command.prp2());
    if !first.is_multiple_of(4) {
        return Err(Status::INVALID_PRP);
    }
    let mut runs = Runs(Vec::new());
    let head = PAGE.wrapping_sub(first % PAGE).min(len);
    runs.add(first, head);
    let mut left = len.wrapping_sub(head);
    if left == 0 {
        return Ok(runs.0);
    }
    if left <= PAGE {
        if !second.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
        runs.add(second, left);
        return Ok(runs.0);
    }
    let mut list = second;
    if !list.is_multiple_of(8) {
        return Err(Status::INVALID_PRP);
    }
    // Each turn takes one entry: at most 256 of data, and one chain pointer for every 511 of them.
    while left > 0 {
        let entry = memory.load_u64(list).map_err(|_| Status::DATA_TRANSFER)?;
        if !entry.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
        let last_in_page = list % PAGE == PAGE.wrapping_sub(8);
        if last_in_page && left > PAGE {
            // The next list begins a page, so it has data entries: the chain cannot go on without end.
            list = entry;
            continue;
        }
        let part = left.min(PAGE);
        runs.add(entry, part);
        left = left.wrapping_sub(part);
        list = list.wrapping_add(8);
    }
    Ok(runs.0)
}

struct Runs(Vec<Segment>);

impl Runs {
    /// Adds a piece, joined to the one before where they touch.
    fn add(&mut self, address: u64, len: u64) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if let Some(last) = self.0.last_mut()
            && last.address.checked_add(u64::from(last.len)) == Some(address)
            && let Some(sum) = last.len.checked_add(len)
        {
            last.len = sum;
        } else if len > 0 {
            self.0.push(Segment { address, len });
        }
    }
}

/// Writes `bytes` to a command's data, cut to `len`.
pub fn give(memory: &GuestMemory, command: &Command, bytes: &[u8], len: u64) -> Result<(), Status> {
    let len = len.min(bytes.len() as u64);
    let mut from = bytes;
    for Segment { address, len } in segments(memory, command, len)? {
        let Some((part, rest)) = from.split_at_checked(len as usize) else { break };
        memory.write(address, part).map_err(|_| Status::DATA_TRANSFER)?;
        from = rest;
    }
    Ok(())
}

/// Reads `into.len()` bytes of a command's data.
pub fn take(memory: &GuestMemory, command: &Command, into: &mut [u8]) -> Result<(), Status> {
    let mut to = into;
    for Segment { address, len } in segments(memory, command, to.len() as u64)? {
        let Some((part, rest)) = to.split_at_mut_checked(len as usize) else { break };
        memory.read(address, part).map_err(|_| Status::DATA_TRANSFER)?;
        to = rest;
    }
    Ok(())
}
