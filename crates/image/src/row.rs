//! Disks one behind another, as one that is read.

use crate::buffers::{Buffers, Part};
use crate::disk::{Disk, Status, check_range, no_snapshots, read_only_error};
use std::io;
use std::sync::Arc;

/// See the module.
pub struct Row {
    /// Where each begins.
    disks: Vec<(u64, Arc<dyn Disk>)>,
    capacity: u64,
}

impl Row {
    /// These disks, in this order.
    pub fn new(disks: Vec<Arc<dyn Disk>>) -> Self {
        let mut end = 0u64;
        let placed = disks.into_iter().map(|disk| {
            let start = end;
            end = end.saturating_add(disk.capacity());
            (start, disk)
        });
        Self { disks: placed.collect(), capacity: end }
    }

    /// The disk at an offset, the offset in it, and how much of `len` is on it.
    fn at(&self, offset: u64, len: u64) -> io::Result<(&dyn Disk, u64, u64)> {
        let number = self.disks.partition_point(|(start, _)| *start <= offset).saturating_sub(1);
        // Of disks that begin at one place all but the last are empty.
        let (start, disk) = self.disks.get(number).ok_or(io::ErrorKind::InvalidInput)?;
        let inside = offset.saturating_sub(*start);
        Ok((disk.as_ref(), inside, len.min(disk.capacity().saturating_sub(inside))))
    }
}

impl Disk for Row {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let len = buffers.len();
        check_range(offset, len, self.capacity)?;
        let mut done = 0u64;
        while done < len {
            let (disk, inside, part) = self.at(offset.saturating_add(done), len.saturating_sub(done))?;
            disk.read(inside, &Part::new(buffers, done, part))?;
            done = done.saturating_add(part.max(1));
        }
        Ok(())
    }

    fn write(&self, _offset: u64, _buffers: &dyn Buffers) -> io::Result<()> {
        Err(read_only_error())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(read_only_error())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Err(read_only_error())
    }

    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(offset, len, self.capacity)?;
        let (disk, inside, part) = self.at(offset, len)?;
        disk.block_status(inside, part)
    }

    fn resize(&self, _capacity: u64) -> io::Result<()> {
        Err(read_only_error())
    }

    fn snapshot(&self, _name: &str) -> io::Result<()> {
        Err(no_snapshots())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::format::Raw;
    use crate::storage::power::Power;
    use crate::{Content, ReadInto};

    #[test]
    fn disks_follow_each_other() {
        let disk = |value: u8, len: usize| {
            Arc::new(Raw::new(Arc::new(Power::new(vec![value; len])))) as Arc<dyn Disk>
        };
        let row = Row::new(vec![disk(1, 1024), disk(9, 0), disk(2, 512), disk(3, 2048)]);
        assert_eq!(row.capacity(), 3584);
        let mut bytes = vec![0; 3000];
        row.read(300, &ReadInto::new(&mut bytes)).unwrap();
        let expected: Vec<u8> = [vec![1; 1024], vec![2; 512], vec![3; 2048]].concat();
        assert!(bytes == expected[300..3300]);
        let status = row.block_status(1100, 2000).unwrap();
        assert_eq!((status.content, status.len), (Content::Data, 436));
        assert!(row.read(3000, &ReadInto::new(&mut bytes)).is_err());
    }
}
