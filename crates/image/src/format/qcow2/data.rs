//! Lookups and reads.

use super::table::{Entry, Mapping};
use super::{Qcow2, absent};
use crate::buffers::{Buffers, Part, put_zeroes};
use crate::disk::{Content, Status};
use crate::endian::size;
use std::io;

/// A run of the disk that is stored in one way.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub mapping: Mapping,
    /// Place of the first byte, for data; the entry's word, for compressed clusters.
    pub host: u64,
    pub len: u64,
    /// The image alone uses the cluster: it can be written in place.
    pub owned: bool,
}

impl Qcow2 {
    /// How the disk is stored from `offset` on, for at most `len` bytes.
    pub fn lookup(&self, offset: u64, len: u64) -> io::Result<Run> {
        let shape = &self.shape;
        let span = shape.table_span();
        let most = len.min(span.saturating_sub(offset & span.wrapping_sub(1)));
        self.map.with(self.storage.as_ref(), shape.l1_index(offset), |table| {
            let Some(table) = table else {
                return Run { mapping: Mapping::Unallocated, host: 0, len: most, owned: false };
            };
            let unit = shape.unit();
            let describe = |entry: &Entry, at: u64| {
                let mapping = entry.mapping(shape, shape.sub(at));
                let host = match mapping {
                    Mapping::Data => entry.host().saturating_add(shape.within(at)),
                    Mapping::Compressed => entry.word,
                    _ => 0,
                };
                (mapping, host, entry.owned(shape))
            };
            let mut index = shape.l2_index(offset);
            let mut entry = table.entry(index);
            let (mapping, host, owned) = describe(&entry, offset);
            let mut run = unit.saturating_sub(offset & unit.wrapping_sub(1));
            if mapping == Mapping::Compressed {
                run = shape.cluster().saturating_sub(shape.within(offset));
            }
            while run < most && mapping != Mapping::Compressed {
                let at = offset.saturating_add(run);
                let next = shape.l2_index(at);
                if next != index {
                    index = next;
                    entry = table.entry(index);
                }
                let (kind, place, ours) = describe(&entry, at);
                let follows =
                    mapping != Mapping::Data || (place == host.saturating_add(run) && ours == owned);
                if kind != mapping || !follows {
                    break;
                }
                run = run.saturating_add(unit);
            }
            Run { mapping, host, len: run.min(most), owned }
        })
    }

    /// Reads `len` bytes at `offset` into `buffers` at `at`. Inside the gate.
    pub fn read_inside(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let mut done = 0u64;
        while done < len {
            let (from, to) = (offset.saturating_add(done), at.saturating_add(done));
            let run = self.lookup(from, len.saturating_sub(done))?;
            match run.mapping {
                Mapping::Data => self.data().read(run.host, buffers, to, run.len)?,
                Mapping::Zero => put_zeroes(buffers, to, run.len)?,
                Mapping::Unallocated => self.read_backing(from, buffers, to, run.len)?,
                Mapping::Compressed => {
                    let cluster = self.inflate(run.host)?;
                    let start = size(self.shape.within(from));
                    let piece = cluster.get(start..start.saturating_add(size(run.len)));
                    buffers.put(to, piece.ok_or(io::ErrorKind::InvalidData)?)?;
                }
                Mapping::Broken => {
                    return Err(self.damage(&format!("the L2 entry for offset {from:#x} breaks the rules")));
                }
            }
            done = done.saturating_add(run.len);
        }
        Ok(())
    }

    /// Reads from the disk below; beyond its end there are zeroes.
    pub fn read_backing(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let Some(backing) = &self.backing else { return put_zeroes(buffers, at, len) };
        let below = backing.capacity().saturating_sub(offset).min(len);
        if below > 0 {
            backing.read(offset, &Part::new(buffers, at, below))?;
        }
        put_zeroes(buffers, at.saturating_add(below), len.saturating_sub(below))
    }

    /// Whether nothing below the image has anything at or after `offset`.
    pub fn nothing_below(&self, offset: u64) -> bool {
        self.backing.as_ref().is_none_or(|backing| backing.capacity() <= offset)
    }

    /// See [`crate::Disk::block_status`]. Inside the gate.
    pub fn status_inside(&self, offset: u64, len: u64) -> io::Result<Status> {
        let run = self.lookup(offset, len)?;
        let here = |content, offset, compressed| Status {
            len: run.len,
            content,
            depth: 0,
            present: true,
            offset,
            compressed,
        };
        Ok(match run.mapping {
            Mapping::Data => here(Content::Data, Some(run.host), false),
            Mapping::Compressed => here(Content::Data, None, true),
            Mapping::Zero => here(Content::Zero, None, false),
            Mapping::Broken => {
                return Err(self.damage(&format!("the L2 entry for offset {offset:#x} breaks the rules")));
            }
            Mapping::Unallocated => match &self.backing {
                Some(backing) if backing.capacity() > offset => {
                    let below = backing
                        .block_status(offset, run.len.min(backing.capacity().saturating_sub(offset)))?;
                    Status { depth: below.depth.saturating_add(1), ..below }
                }
                Some(_) => Status { depth: 0, ..absent(self.run_of_nothing(offset, run.len, len)?) },
                None => absent(self.run_of_nothing(offset, run.len, len)?),
            },
        })
    }

    /// How far nothing goes on: runs end with each L2 table, and a sparse disk of many TiB has many.
    fn run_of_nothing(&self, offset: u64, first: u64, len: u64) -> io::Result<u64> {
        let mut run = first;
        while run < len {
            let next = self.lookup(offset.saturating_add(run), len.saturating_sub(run))?;
            if next.mapping != Mapping::Unallocated {
                break;
            }
            run = run.saturating_add(next.len);
        }
        Ok(run)
    }
}
