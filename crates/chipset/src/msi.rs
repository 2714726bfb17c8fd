//! What a message-signalled interrupt means to the local APICs (Intel SDM 3, 12.11), with the extended destination
//! id of KVM's `KVM_FEATURE_MSI_EXT_DEST_ID`: address bits 11-5 are bits 14-8 of the destination.

use crate::local_apic::{Apics, Delivery, Destination, Ipi, Trigger};
use device::{Msi, MsiSink};

/// First address of the range that the interrupt controllers catch.
pub const BASE: u64 = 0xfee0_0000;
/// Bytes of it.
pub const LEN: u64 = 0x10_0000;

const LOGICAL: u64 = 1 << 2;
const REDIRECTION_HINT: u64 = 1 << 3;
const LEVEL: u32 = 1 << 15;
const ASSERT: u32 = 1 << 14;

/// The message as the local APICs see it; `None` if the address is not theirs or the delivery mode is reserved.
pub fn decode(msi: Msi) -> Option<Ipi> {
    if msi.address & !(LEN.wrapping_sub(1)) != BASE {
        return None;
    }
    let logical = msi.address & LOGICAL != 0;
    let low = (msi.address >> 12) as u8;
    let high = (msi.address >> 5) & 0x7f;
    let destination = match high {
        0 => Destination::narrow(logical, low),
        _ => Destination::wide(logical, (high << 8) as u32 | u32::from(low)),
    };
    let delivery = match Delivery::from_field(msi.data >> 8)? {
        Delivery::Fixed if logical && msi.address & REDIRECTION_HINT != 0 => Delivery::LowestPriority,
        delivery => delivery,
    };
    let trigger = if msi.data & LEVEL != 0 { Trigger::Level } else { Trigger::Edge };
    Some(Ipi { delivery, vector: msi.data as u8, trigger, destination })
}

/// The message that an I/O APIC sends for a redirection entry. `destination` has 15 bits.
pub fn encode(destination: u32, logical: bool, delivery: u32, vector: u8, trigger: Trigger) -> Msi {
    let low = u64::from(destination & 0xff) << 12;
    let high = u64::from((destination >> 8) & 0x7f) << 5;
    let level = if trigger == Trigger::Level { LEVEL } else { 0 };
    Msi {
        address: BASE | low | high | if logical { LOGICAL } else { 0 },
        data: u32::from(vector) | (delivery & 7) << 8 | ASSERT | level,
    }
}

/// A sink that routes messages to the local APICs; what is not for them is dropped.
pub fn sink(apics: &Apics) -> MsiSink {
    let apics = apics.clone();
    MsiSink::new(move |msi| {
        if let Some(ipi) = decode(msi) {
            apics.route(&ipi);
        }
    })
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn formats() {
        let ipi = decode(Msi { address: 0xfee0_3000, data: 0x41 }).unwrap();
        assert_eq!(ipi.destination, Destination::Physical(3));
        assert_eq!((ipi.delivery, ipi.vector, ipi.trigger), (Delivery::Fixed, 0x41, Trigger::Edge));
        let broadcast = decode(Msi { address: 0xfeef_f00c, data: 0x8441 }).unwrap();
        assert_eq!(broadcast.destination, Destination::Logical(Destination::BROADCAST));
        assert_eq!((broadcast.delivery, broadcast.trigger), (Delivery::Nmi, Trigger::Level));
        let hinted = decode(Msi { address: 0xfee0_300c, data: 0x41 }).unwrap();
        assert_eq!(hinted.delivery, Delivery::LowestPriority);
        let extended = decode(Msi { address: 0xfeef_f020, data: 0x41 }).unwrap();
        assert_eq!(extended.destination, Destination::Physical(0x1ff));
        assert_eq!(decode(Msi { address: 0xfed0_0000, data: 0 }), None);
        assert_eq!(decode(Msi { address: 0x1_fee0_0000, data: 0 }), None);
        assert_eq!(decode(Msi { address: 0xfee0_0000, data: 0x300 }), None, "reserved delivery mode");
    }

    proptest! {
        #[test]
        fn decodes_what_it_encodes(destination in 0u32..0x7fff, logical: bool, vector: u8, level: bool) {
            prop_assume!(destination != 0xff);
            let trigger = if level { Trigger::Level } else { Trigger::Edge };
            let ipi = decode(encode(destination, logical, 0, vector, trigger)).unwrap();
            let destination = Destination::wide(logical, destination);
            prop_assert_eq!(ipi, Ipi { delivery: Delivery::Fixed, vector, trigger, destination });
        }
    }
}
