//! KVM's paravirtual end of interrupt (Linux `Documentation/virt/kvm/x86/msr.rst`): a bit in guest memory says that the
//! local APIC need not be told, and the guest clears it instead.
//!
//! States: off; idle; offered, from an injection until anybody looks at the local APIC: then the bit says whether the
//! interrupt has ended, and is taken back if not.

use memory::GuestMemory;
use std::sync::atomic::Ordering;

const ENABLED: u64 = 1;
const RESERVED: u64 = 2;
const ADDRESS: u64 = !3;

/// One vCPU's.
#[derive(Debug, Default)]
pub(super) struct ParavirtualEoi {
    value: u64,
    offered: bool,
}

impl ParavirtualEoi {
    /// What the MSR holds.
    pub(super) fn value(&self) -> u64 {
        self.value
    }

    /// WRMSR, nothing being offered; `None` is #GP.
    pub(super) fn set(&mut self, value: u64) -> Option<()> {
        if value & RESERVED != 0 {
            return None;
        }
        self.value = value;
        Some(())
    }

    pub(super) fn is_on(&self) -> bool {
        self.value & ENABLED != 0
    }

    /// The interrupt just injected may end without a word to the local APIC.
    pub(super) fn offer(&mut self, memory: &GuestMemory) {
        if self.is_on() {
            let set = memory.atomic_u32(self.value & ADDRESS, |word| word.fetch_or(1, Ordering::SeqCst));
            // A word that is not RAM is the guest's own mistake: it gets no offers.
            self.offered = set.is_ok();
        }
    }

    /// Before the local APIC is looked at: whether the interrupt has ended. If not, the guest will say so itself.
    pub(super) fn settle(&mut self, memory: &GuestMemory) -> bool {
        if !std::mem::take(&mut self.offered) {
            return false;
        }
        let word = memory.atomic_u32(self.value & ADDRESS, |word| word.fetch_and(!1, Ordering::SeqCst));
        word.is_ok_and(|word| word & 1 == 0)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::Backing;

    #[test]
    fn an_end_is_believed_once_and_only_if_offered() {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        let mut eoi = ParavirtualEoi::default();
        eoi.offer(&memory);
        assert!(!eoi.settle(&memory), "it is off");
        assert_eq!(eoi.set(0x203), None);
        assert_eq!((eoi.set(0x201), eoi.value()), (Some(()), 0x201));
        assert!(!eoi.settle(&memory), "nothing was offered");
        eoi.offer(&memory);
        assert_eq!(memory.load_u32(0x200).unwrap(), 1);
        assert!(!eoi.settle(&memory), "the handler still runs");
        assert_eq!(memory.load_u32(0x200).unwrap(), 0, "the offer is taken back");
        eoi.offer(&memory);
        memory.write(0x200, &[0]).unwrap();
        assert!(eoi.settle(&memory));
        assert!(!eoi.settle(&memory));
        eoi.set(0x10_0001);
        eoi.offer(&memory);
        assert!(!eoi.settle(&memory), "there is no RAM");
    }
}
