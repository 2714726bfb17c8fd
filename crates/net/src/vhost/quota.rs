//! How much of this process's addresses, and of the places for mappings, the memory of another process may take.
//!
//! Files without blocks can be as long as one likes, and who takes all addresses takes away those that others, and allocations, need. So
//! everybody has some that nobody can take from him, and of what is there in common beyond that nobody gets more than a quarter of what
//! is left.
//!
//! Lock order: the ledger alone.

use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of addresses that everybody may have: half of a process's in all, with as many connections as a switch has ports.
const BYTES_EACH: usize = 32 << 30;
const BYTES_COMMON: usize = 32 << 40;
/// Mappings: the same.
const MAPPINGS_EACH: usize = 4;
const MAPPINGS_COMMON: usize = 4096;

/// What is left of what is there in common.
#[derive(Debug)]
struct Ledger {
    bytes: usize,
    mappings: usize,
}

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { bytes: BYTES_COMMON, mappings: MAPPINGS_COMMON });

/// What somebody has: one for each connection.
#[derive(Debug, Default)]
pub struct Quota(Mutex<Has>);

#[derive(Debug, Default, Clone, Copy)]
struct Has {
    bytes: usize,
    mappings: usize,
}

/// What was taken for one mapping; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Taken {
    quota: Arc<Quota>,
    bytes: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of what is common, what is left once somebody has `after` instead of `before` of something of which everybody may have `each`.
fn left(common: usize, each: usize, before: usize, after: usize) -> Option<usize> {
    let (before, after) = (before.saturating_sub(each), after.saturating_sub(each));
    let all = common.checked_add(before)?;
    let fair = after <= before || after <= all / 4;
    all.checked_sub(after).filter(|_| fair)
}

impl Quota {
    /// Takes what a mapping of so many bytes needs.
    pub(super) fn take(quota: &Arc<Self>, bytes: usize) -> Option<Taken> {
        let mut ledger = lock(&LEDGER);
        let mut has = lock(&quota.0);
        let after = Has { bytes: has.bytes.checked_add(bytes)?, mappings: has.mappings.checked_add(1)? };
        let bytes_left = left(ledger.bytes, BYTES_EACH, has.bytes, after.bytes)?;
        let mappings_left = left(ledger.mappings, MAPPINGS_EACH, has.mappings, after.mappings)?;
        *ledger = Ledger { bytes: bytes_left, mappings: mappings_left };
        *has = after;
        drop(has);
        Some(Taken { quota: quota.clone(), bytes })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut ledger = lock(&LEDGER);
        let mut has = lock(&self.quota.0);
        let after =
            Has { bytes: has.bytes.saturating_sub(self.bytes), mappings: has.mappings.saturating_sub(1) };
        ledger.bytes = left(ledger.bytes, BYTES_EACH, has.bytes, after.bytes).unwrap_or(ledger.bytes);
        ledger.mappings =
            left(ledger.mappings, MAPPINGS_EACH, has.mappings, after.mappings).unwrap_or(ledger.mappings);
        *has = after;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everybody_has_his_own_whatever_others_take() {
        let mut common = 1000;
        let mut greedy = vec![];
        for _ in 0..50 {
            // Each takes as much as it gets, in steps of one.
            let mut has = 0;
            while let Some(rest) = left(common, 10, has, has + 1) {
                (common, has) = (rest, has + 1);
            }
            greedy.push(has);
        }
        assert_eq!(greedy[..3], [10 + 250, 10 + 187, 10 + 140]);
        assert!(greedy.iter().all(|has| *has >= 10), "{greedy:?}");
    }

    proptest! {
        #[test]
        fn what_is_given_back_is_there_again(
            steps in prop::collection::vec((0usize..4, 0usize..60, any::<bool>()), 0..100),
        ) {
            let mut common = 200;
            let mut has = [0usize; 4];
            for (who, amount, give) in steps {
                let after = if give { has[who].saturating_sub(amount) } else { has[who] + amount };
                if let Some(rest) = left(common, 20, has[who], after) {
                    (common, has[who]) = (rest, after);
                } else {
                    prop_assert!(!give, "one can always give back");
                }
                let beyond: usize = has.iter().map(|has| has.saturating_sub(20)).sum();
                prop_assert_eq!(common + beyond, 200);
            }
        }
    }
}
