//! Power cuts: at any moment, whatever of the unstable a disk has kept, the image opens, a check finds nothing wrong, and
//! every sector holds what was written last before a flush, or something written after it.

use super::test::{Kind, Step, base_bytes, read_all};
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::Disk;
use crate::format::{Raw, Repair};
use crate::storage::Storage;
use crate::storage::power::Power;
use std::sync::Arc;

/// Bytes of the disks here.
pub const SIZE: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Cuts of one history.
const CUTS: usize = 40;

/// What each sector may hold: a value in all its bytes, or what was below it.
type May = Vec<Vec<Option<u8>>>;

struct Mark {
    moment: usize,
    may: May,
}

/// A disk below.
fn base() -> Arc<dyn Disk> {
    Arc::new(Raw::new(Arc::new(Power::new(base_bytes(SIZE as usize)))))
}

struct Run {
    power: Arc<Power>,
    image: Arc<dyn super::Container>,
    may: May,
    marks: Vec<Mark>,
}

impl Run {
    fn mark(&mut self) {
        self.marks.push(Mark { moment: self.power.moment(), may: self.may.clone() });
    }

    fn sectors(at: u64, len: u64) -> std::ops::Range<usize> {
        (at / SECTOR) as usize..((at + len) / SECTOR) as usize
    }

    fn may_be(&mut self, at: u64, len: u64, value: u8) {
        for sector in &mut self.may[Self::sectors(at, len)] {
            sector.push(Some(value));
        }
        self.mark();
    }

    fn step(&mut self, step: &Step) {
        let clip = |at: u64, len: u64| (at.min(SIZE), len.min(SIZE - at.min(SIZE)));
        // What may be there is wider from the beginning of a step on, and narrower after its end.
        match *step {
            Step::Write(at, len, value) => {
                let (at, len) = clip(at, len);
                self.may_be(at, len, value);
                self.image.write(at, &WriteFrom(&vec![value; len as usize])).unwrap();
            }
            Step::Zero(at, len, unmap) => {
                let (at, len) = clip(at, len);
                self.may_be(at, len, 0);
                self.image.write_zeroes(at, len, unmap).unwrap();
            }
            Step::Discard(at, len) => {
                let (at, len) = clip(at, len);
                self.may_be(at, len, 0);
                self.image.discard(at, len).unwrap();
                // What was left alone is what it was.
                for sector in Self::sectors(at, len) {
                    let mut now = [0; SECTOR as usize];
                    self.image.read(sector as u64 * SECTOR, &ReadInto::new(&mut now)).unwrap();
                    if now != [0; SECTOR as usize] {
                        self.may[sector].pop();
                    }
                }
            }
            Step::Flush | Step::Reopen | Step::Resize(_) => {
                self.image.flush().unwrap();
                for sector in &mut self.may {
                    let last = sector.pop();
                    sector.clear();
                    sector.extend(last);
                }
            }
        }
        self.mark();
    }
}

/// Plays steps, and cuts the power in their history.
pub fn play(kind: &dyn Kind, steps: &[Step], seed: u64) {
    let below = || kind.below().then(base);
    let first = Arc::new(Power::default());
    drop(kind.create(first.clone(), below()));
    let start = first.cut(&[], first.moment(), || 0);
    let power = Arc::new(Power::new(start.clone()));
    let image = kind.open(power.clone(), below());
    let may = vec![vec![if kind.below() { None } else { Some(0) }]; (SIZE / SECTOR) as usize];
    let mut run = Run { power, image, may, marks: Vec::new() };
    run.mark();
    steps.iter().for_each(|step| run.step(step));
    let end = run.power.moment();
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    };
    for _ in 0..CUTS {
        let moment = (random() % (end as u64 + 1)) as usize;
        let bytes = run.power.cut(&start, moment, &mut random);
        // What holds between two marks: all that the first allows, and the second.
        let before = run.marks.iter().rposition(|mark| mark.moment <= moment).unwrap_or(0);
        let allowed = run.marks.get(before..(before + 2).min(run.marks.len())).unwrap_or_default();
        judge(kind, bytes, below(), allowed, moment);
    }
}

fn judge(kind: &dyn Kind, bytes: Vec<u8>, below: Option<Arc<dyn Disk>>, allowed: &[Mark], moment: usize) {
    let under = if kind.below() { base_bytes(SIZE as usize) } else { vec![0; SIZE as usize] };
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes));
    let image = kind.open(storage, below);
    let found = image.check(Repair::Nothing).unwrap();
    assert!(found.corruptions == 0 && found.errors == 0, "cut at {moment} of {kind:?}: {found:#?}");
    let content = read_all(image.as_ref());
    for (number, sector) in content.chunks(SECTOR as usize).enumerate() {
        let at = number * SECTOR as usize;
        let good = |value: &Option<u8>| match value {
            Some(value) => *sector == [*value; SECTOR as usize],
            None => *sector == under[at..at + SECTOR as usize],
        };
        let may = || allowed.iter().flat_map(|mark| &mark.may[number]);
        assert!(
            may().any(good),
            "cut at {moment} of {kind:?}: sector {number} begins with {}, may: {:?}",
            sector[0],
            may().collect::<Vec<_>>()
        );
    }
    let repaired = image.check(Repair::All).unwrap();
    assert!(repaired.corruptions == 0 && repaired.errors == 0, "{repaired:?}");
    assert!(read_all(image.as_ref()) == content, "a repair has changed the disk");
    // It can be used on.
    image.write(SIZE / 2 - 700, &WriteFrom(&[0x77; 2000])).unwrap();
    let mut bytes = [0; 2000];
    image.read(SIZE / 2 - 700, &ReadInto::new(&mut bytes)).unwrap();
    assert!(bytes == [0x77; 2000]);
}
