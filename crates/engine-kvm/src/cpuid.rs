//! CPUID: what of a model this KVM can give.
//!
//! A model is the same on both engines, but for what an engine cannot do. Three kinds of answers are KVM's own on every
//! model: which speculation flaws the processor has and which cures it offers (guests run on it, unlike on the software
//! engine), and the paravirtual features that its in-kernel local APIC can keep.

use cpu::cpuid::{CpuidTable, Leaf, Row};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Bits by (leaf, index) and register that follow KVM whatever the model says (Intel SDM 2A CPUID; AMD APM 3, E.4).
/// Leaf 7: MD_CLEAR 10, IBRS 26, STIBP 27, L1D_FLUSH 28, ARCH_CAPABILITIES 29, SSBD 31.
const CURES_7_EDX: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// Leaf 7.2: PSFD 0, IPRED_CTRL 1, RRSBA_CTRL 2, DDPD_U 3, BHI_CTRL 4, MCDT_NO 5.
const CURES_7_2_EDX: u32 = 0x3f;
/// Leaf 8000_0008: IBPB 12, IBRS 14, STIBP 15, always-on 16 and 17, preferred 18, same mode 19, SSBD 24, virtual SSBD 25,
/// SSB_NO 26, PSFD 28, BTC_NO 29, IBPB_RET 30.
const CURES_8_EBX: u32 = 0x770f_d000;
/// Leaf 8000_0021: LFENCE serialises 2, VERW_CLEAR 5, null selector clears base 6, automatic IBRS 8, SBPB 27,
/// IBPB_BRTYPE 28, SRSO_NO 29, SRSO_USER_KERNEL_NO 30.
const CURES_21_EAX: u32 = 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 0xf << 27;
/// TSA_SQ_NO 1, TSA_L1_NO 2.
const CURES_21_ECX: u32 = 0b110;

/// Given by the local APIC and KVM whatever KVM_GET_SUPPORTED_CPUID says of them: x2APIC 21, hypervisor 31.
const ALWAYS_1_ECX: u32 = 1 << 21 | 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
/// Hyper-threading: the topology's business.
const HTT: u32 = 1 << 28;

/// What KVM supports.
#[derive(Debug, Clone, Default)]
pub(crate) struct Supported(Vec<kvm_cpuid_entry2>);

impl Supported {
    pub(crate) fn new(entries: Vec<kvm_cpuid_entry2>) -> Self {
        Self(entries)
    }

    fn leaf(&self, function: u32, index: u32) -> Leaf {
        let found = self.0.iter().find(|entry| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == function && (!indexed || entry.index == index)
        });
        found.map_or(Leaf::default(), |entry| Leaf {
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
    }

    /// What of `table` KVM gives. `all`: the host's own model, which has every paravirtual feature.
    pub(crate) fn offer(&self, mut table: CpuidTable, all: bool, tsc_deadline: bool) -> CpuidTable {
        for row in &mut table.rows {
            let has = self.leaf(row.function, row.index.unwrap_or(0));
            row.leaf = narrowed(row, has, all, tsc_deadline);
        }
        let cures = self.leaf(7, 2).edx & CURES_7_2_EDX;
        if cures != 0 && table.get(7, 0).is_some() {
            let mut leaf = table.query(7, 0);
            leaf.eax = 2;
            table.set(7, Some(0), leaf);
            table.set(7, Some(1), Leaf::default());
            table.set(7, Some(2), Leaf { edx: cures, ..Leaf::default() });
        }
        table
    }
}

/// One row as KVM can give it.
fn narrowed(row: &Row, has: Leaf, all: bool, tsc_deadline: bool) -> Leaf {
    let Leaf { eax, ebx, ecx, edx } = row.leaf;
    match (row.function, row.index.unwrap_or(0)) {
        (1, _) => {
            let timer = if tsc_deadline { TSC_DEADLINE } else { 0 };
            let ecx = ecx & (has.ecx & !TSC_DEADLINE | ALWAYS_1_ECX | timer);
            Leaf { eax, ebx, ecx, edx: edx & (has.edx | HTT) }
        }
        (7, 0) => Leaf {
            eax,
            ebx: ebx & has.ebx,
            ecx: ecx & has.ecx,
            edx: edx & has.edx & !CURES_7_EDX | has.edx & CURES_7_EDX,
        },
        (0xd, 0) => Leaf { eax: eax & has.eax, ebx, ecx, edx: edx & has.edx },
        (0xd, 1) => Leaf { eax: eax & has.eax, ebx, ecx, edx },
        (0x4000_0001, _) => Leaf { eax: if all { has.eax } else { eax & has.eax }, ebx, ecx, edx },
        (0x8000_0001, _) => Leaf { eax, ebx, ecx: ecx & has.ecx, edx: edx & has.edx },
        (0x8000_0007, _) => Leaf { eax, ebx, ecx, edx: edx & has.edx },
        (0x8000_0008, _) => {
            let bits = match has.eax & 0xff {
                0 => eax & 0xff,
                bits => bits.min(eax & 0xff),
            };
            let ebx = ebx & !CURES_8_EBX | has.ebx & CURES_8_EBX;
            Leaf { eax: eax & !0xff | bits, ebx, ecx, edx }
        }
        (0x8000_0021, _) => Leaf {
            eax: eax & has.eax & !CURES_21_EAX | has.eax & CURES_21_EAX,
            ebx,
            ecx: ecx & has.ecx & !CURES_21_ECX | has.ecx & CURES_21_ECX,
            edx,
        },
        _ => row.leaf,
    }
}

/// The table in KVM's form.
pub(crate) fn entries(table: &CpuidTable) -> Vec<kvm_cpuid_entry2> {
    table
        .rows
        .iter()
        .map(|&Row { function, index, leaf: Leaf { eax, ebx, ecx, edx } }| kvm_cpuid_entry2 {
            function,
            index: index.unwrap_or(0),
            flags: if index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        })
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    fn entry(function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        let row = Row { function, index, leaf: Leaf { eax, ebx, ecx, edx } };
        entries(&CpuidTable { rows: vec![row] })[0]
    }

    fn table(rows: &[(u32, Option<u32>, [u32; 4])]) -> CpuidTable {
        let mut table = CpuidTable::default();
        for &(function, index, [eax, ebx, ecx, edx]) in rows {
            table.set(function, index, Leaf { eax, ebx, ecx, edx });
        }
        table
    }

    #[test]
    fn features_that_kvm_lacks_are_not_promised() {
        let kvm = Supported::new(vec![
            entry(1, None, [0, 0, 1 << 13, 0x1f]),
            entry(7, Some(0), [0, 1, 0, 0]),
            entry(0x8000_0008, None, [40, 0, 0, 0]),
        ]);
        let model = table(&[
            (1, None, [0x10, 0x20, 1 << 13 | 1 << 24 | 1 << 26 | 1 << 31, 1 << 28 | 0xff]),
            (7, Some(0), [0, 0b11, 1, 0]),
            (0x8000_0008, None, [48 << 8 | 46, 0, 7, 0]),
        ]);
        let offered = kvm.offer(model.clone(), false, true);
        let one = offered.query(1, 0);
        assert_eq!((one.eax, one.ebx), (0x10, 0x20));
        assert_eq!((one.ecx, one.edx), (1 << 13 | 1 << 24 | 1 << 31, 1 << 28 | 0x1f));
        assert_eq!(kvm.offer(model, false, false).query(1, 0).ecx, 1 << 13 | 1 << 31);
        assert_eq!((offered.query(7, 0).ebx, offered.query(7, 0).ecx), (1, 0));
        assert_eq!((offered.query(0x8000_0008, 0).eax, offered.query(0x8000_0008, 0).ecx), (48 << 8 | 40, 7));
    }

    #[test]
    fn what_cures_the_processor_needs_is_the_processors_word() {
        let kvm = Supported::new(vec![
            entry(7, Some(0), [2, 0, 0, 1 << 26 | 1 << 4]),
            entry(7, Some(2), [0, 0, 0, 1 << 4 | 1 << 30]),
            entry(0x8000_0008, None, [48, 1 << 12 | 1, 0, 0]),
            entry(0x8000_0021, None, [1 << 2, 0, 0, 0]),
        ]);
        // A model that claims to be immune, as the software engine's guests are.
        let model = table(&[
            (7, Some(0), [0, 0, 0, 1 << 29]),
            (0x8000_0008, None, [46, 0, 0, 0]),
            (0x8000_0021, None, [1 << 29 | 1 << 2, 0, 0b110, 0]),
        ]);
        let offered = kvm.offer(model, false, true);
        assert_eq!((offered.query(7, 0).eax, offered.query(7, 0).edx), (2, 1 << 26));
        assert_eq!((offered.query(7, 1), offered.query(7, 2).edx), (Leaf::default(), 1 << 4));
        assert_eq!(offered.query(0x8000_0008, 0).ebx, 1 << 12);
        assert_eq!((offered.query(0x8000_0021, 0).eax, offered.query(0x8000_0021, 0).ecx), (1 << 2, 0));
    }

    #[test]
    fn only_the_hosts_own_model_has_all_paravirtual_features() {
        let kvm = Supported::new(vec![entry(0x4000_0001, None, [0b1110, 0, 0, 0])]);
        let model = table(&[(0x4000_0001, None, [0b0011, 0, 0, 0])]);
        assert_eq!(kvm.offer(model.clone(), false, true).query(0x4000_0001, 0).eax, 0b0010);
        assert_eq!(kvm.offer(model, true, true).query(0x4000_0001, 0).eax, 0b1110);
    }
}
