//! Random reads of a guest's second disk: 4 KiB each, past the page cache, every block's content checked. Only where an
//! initial RAM disk brings the disk's driver (`cargo xtask bench image`).

use super::{Numbers, Workload};
use io_uring::{IoUring, opcode, types};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

pub const GROUP: &str = "disk";
pub const ALL: &[Workload] = &[
    Workload { group: GROUP, name: "random_reads_1", run: |units| one(units).unwrap_or(u64::MAX) },
    Workload { group: GROUP, name: "random_reads_32", run: |units| many(units).unwrap_or(u64::MAX) },
];

const DEVICE: &str = "/dev/vda";
const MODULE: &str = "/virtio_blk.ko";
const BLOCK: usize = 4096;
const DEPTH: usize = 32;
/// Most time that the driver takes to find the disk.
const FINDING: Duration = Duration::from_secs(10);
/// finit_module(2): the file is compressed.
const COMPRESSED: libc::c_int = 4;

/// Whether there is a disk to read.
pub fn offered() -> bool {
    Path::new(MODULE).exists() && Path::new(DEVICE).exists()
}

/// Loads the driver, if one was brought, and waits for the disk.
pub fn prepare() {
    let Ok(mut module) = File::open(MODULE) else { return };
    let mut magic = [0; 6];
    let is_xz = module.read_exact(&mut magic).is_ok() && &magic == b"\xfd7zXZ\0";
    let flags = if is_xz { COMPRESSED } else { 0 };
    // SAFETY: an open file, a C string and a number; failure shows as a missing disk.
    unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), flags) };
    for _ in 0..FINDING.as_millis() / 50 {
        if Path::new(DEVICE).exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Memory that O_DIRECT takes.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    /// Zero if it is the block of this number: each begins with its own.
    fn wrong(&self, number: u64) -> u64 {
        u64::from(!self.0.starts_with(&number.to_le_bytes()))
    }
}

fn open() -> std::io::Result<(File, u64)> {
    let mut disk = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(DEVICE)?;
    let blocks = disk.seek(SeekFrom::End(0))? / BLOCK as u64;
    Ok((disk, blocks.max(1)))
}

/// One read at a time; answers how many were wrong.
fn one(units: u64) -> std::io::Result<u64> {
    let (disk, blocks) = open()?;
    let (mut numbers, mut block, mut wrong) = (Numbers(units | 1), Block([0; BLOCK]), 0);
    for _ in 0..units {
        let number = numbers.draw() % blocks;
        disk.read_exact_at(&mut block.0, number * BLOCK as u64)?;
        wrong += block.wrong(number);
    }
    Ok(wrong)
}

/// Many at a time; answers how many were wrong.
fn many(units: u64) -> std::io::Result<u64> {
    let (disk, blocks) = open()?;
    let mut memory: Vec<Block> = (0..DEPTH).map(|_| Block([0; BLOCK])).collect();
    let mut asked = [0; DEPTH];
    let mut ring = IoUring::new(DEPTH as u32)?;
    let mut numbers = Numbers(units | 1);
    let (mut begun, mut done, mut wrong) = (0, 0, 0);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    while done < units {
        while begun < units && !free.is_empty() {
            let Some(slot) = free.pop() else { break };
            asked[slot] = numbers.draw() % blocks;
            let into = memory[slot].0.as_mut_ptr();
            let read = opcode::Read::new(types::Fd(disk.as_raw_fd()), into, BLOCK as u32)
                .offset(asked[slot] * BLOCK as u64)
                .build()
                .user_data(slot as u64);
            // SAFETY: the memory lives as long as the ring (all reads are waited for), and no other read has this slot.
            unsafe { ring.submission().push(&read) }.map_err(std::io::Error::other)?;
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            let slot = completion.user_data() as usize;
            let whole = completion.result() == BLOCK as i32;
            wrong += if whole { memory[slot].wrong(asked[slot]) } else { 1 };
            free.push(slot);
            done += 1;
        }
    }
    Ok(wrong)
}
