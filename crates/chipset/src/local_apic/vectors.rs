//! A 256-bit register: IRR, ISR or TMR.

/// A set of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Vectors(pub(super) [u64; 4]);

fn place(vector: u8) -> (usize, u64) {
    (usize::from(vector >> 6), 1 << (vector & 63))
}

impl Vectors {
    /// Adds a vector; whether it was not there.
    pub(super) fn insert(&mut self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        let Some(word) = self.0.get_mut(word) else { return false };
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    pub(super) fn remove(&mut self, vector: u8) {
        let (word, bit) = place(vector);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(super) fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        u8::try_from((index << 6) | word.checked_ilog2()? as usize).ok()
    }

    /// Register `index` (0-7) of the eight 32-bit ones that software sees.
    pub(super) fn register(&self, index: u32) -> u32 {
        let word = self.0.get((index >> 1) as usize).copied().unwrap_or(0);
        (word >> ((index & 1) << 5)) as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u8> {
        (0..=255).filter(|&vector| self.contains(vector))
    }
}

#[cfg(test)]
#[test]
fn holds_vectors() {
    let mut set = Vectors::default();
    assert_eq!(set.highest(), None);
    for vector in [0, 31, 32, 63, 64, 200, 255] {
        assert!(set.insert(vector));
        assert!(!set.insert(vector));
        assert_eq!(set.highest(), Some(vector));
    }
    assert_eq!(set.register(0), 0x8000_0001);
    assert_eq!(set.register(1), 0x8000_0001);
    assert_eq!(set.register(6), 1 << 8);
    set.remove(255);
    assert_eq!(set.highest(), Some(200));
    assert_eq!(set.iter().count(), 6);
}
