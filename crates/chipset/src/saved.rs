//! How chips say what their saved state is.

/// A saved state type `$state` with the same fields as `$live` has, and the conversions between them. Both take the value
/// apart field by field, so that a new field does not compile until it is named here.
macro_rules! same_fields {
    ($(#[$about:meta])* $visible:vis $state:ident of $live:ident { $($field:ident: $kind:ty),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        $visible struct $state {
            $($field: $kind),+
        }

        impl From<&$live> for $state {
            fn from(live: &$live) -> Self {
                let $live { $($field),+ } = live.clone();
                Self { $($field: $field.into()),+ }
            }
        }

        impl From<$state> for $live {
            fn from(state: $state) -> Self {
                let $state { $($field),+ } = state;
                Self { $($field: $field.into()),+ }
            }
        }
    };
}

#[cfg(test)]
pub(crate) mod test {
    use device::{Access, Device, Saved, VmTime};
    use proptest::prelude::*;

    /// An access of a guest: window, offset, value, nanoseconds since the one before; a read if there is no value.
    pub(crate) type Step = (u16, u64, Option<u8>, u32);

    pub(crate) fn steps(windows: u16, offsets: u64) -> impl Strategy<Value = Vec<Step>> {
        prop::collection::vec((0..windows, 0..offsets, any::<Option<u8>>(), 0u32..2_000_000), 0..60)
    }

    fn run(device: &mut dyn Device, steps: &[Step], now: &mut u64) -> Vec<u64> {
        let mut answers = Vec::new();
        for &(window, offset, value, wait) in steps {
            *now += u64::from(wait);
            while let Some(due) = device.deadline().filter(|due| due.0 <= *now) {
                device.tick(due);
                if device.deadline() == Some(due) {
                    break;
                }
            }
            let access = Access { window, offset, size: 1 };
            match value {
                Some(value) => device.write(access, value.into(), VmTime(*now)),
                None => answers.push(device.read(access, VmTime(*now))),
            }
        }
        answers
    }

    /// A device that is saved after `before`, through JSON into a fresh one, answers `after` as it would have itself.
    pub(crate) fn goes_on<D>(mut device: D, mut fresh: D, before: &[Step], after: &[Step])
    where
        D: Device + Saved,
        D::State: Clone + PartialEq + std::fmt::Debug,
    {
        let mut now = 0;
        run(&mut device, before, &mut now);
        let state = device.save();
        let json = serde_json::to_string(&state).unwrap();
        fresh.restore(serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(fresh.save(), state);
        assert_eq!(fresh.deadline(), device.deadline());
        let mut again = now;
        assert_eq!(run(&mut fresh, after, &mut again), run(&mut device, after, &mut now));
        assert_eq!(fresh.save(), device.save());
    }
}
