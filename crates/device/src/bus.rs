//! Address ranges, and what answers there.

use std::collections::BTreeMap;

/// A range that overlaps one already on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {base:#x} overlap another device's range")]
pub struct RangeTaken {
    /// First address.
    pub base: u64,
    /// Length.
    pub len: u64,
}

/// Maps disjoint address ranges to targets (a shared device, usually). Lookup is a tree search; the caller clones
/// the target and drops any lock around the bus before it calls the device.
#[derive(Debug, Clone)]
pub struct Bus<T> {
    ranges: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for Bus<T> {
    fn default() -> Self {
        Self { ranges: BTreeMap::new() }
    }
}

impl<T> Bus<T> {
    /// Puts `target` at `len` bytes from `base`.
    pub fn insert(&mut self, base: u64, len: u64, target: T) -> Result<(), RangeTaken> {
        let taken = RangeTaken { base, len };
        let last = len.checked_sub(1).and_then(|last| base.checked_add(last)).ok_or(taken)?;
        if let Some((&other, &(other_len, _))) = self.ranges.range(..=last).next_back()
            && other.saturating_add(other_len) > base
        {
            return Err(taken);
        }
        self.ranges.insert(base, (len, target));
        Ok(())
    }

    /// The target at `address` and the offset into its range, if all `size` bytes are inside it.
    pub fn find(&self, address: u64, size: u64) -> Option<(&T, u64)> {
        let (&base, (len, target)) = self.ranges.range(..=address).next_back()?;
        let offset = address.checked_sub(base)?;
        (offset.checked_add(size)? <= *len).then_some((target, offset))
    }

    /// All ranges: base, length, target.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &T)> {
        self.ranges.iter().map(|(&base, (len, target))| (base, *len, target))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_are_found() {
        let mut bus = Bus::default();
        bus.insert(0x60, 1, 'k').unwrap();
        bus.insert(0x64, 1, 's').unwrap();
        assert!(bus.insert(0x5f, 2, 'x').is_err());
        assert!(bus.insert(0x61, 4, 'x').is_err());
        assert!(bus.insert(0x61, 0, 'x').is_err());
        bus.insert(0x61, 3, 'p').unwrap();
        assert_eq!(bus.find(0x63, 1), Some((&'p', 2)));
        assert_eq!(bus.find(0x63, 2), None);
        assert_eq!(bus.find(0x65, 1), None);
        assert_eq!(bus.iter().count(), 3);
    }
}
