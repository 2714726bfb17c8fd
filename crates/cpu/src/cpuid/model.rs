//! Versioned CPU models: the same name means the same CPUID on every host that can offer it.
//!
//! A model is a set of instruction-set features (the x86-64 psABI levels, plus what kernels want of a hypervisor)
//! with a version, `x86-64-v3.1`. A later yado may add `x86-64-v3.2`, but never changes `.1`. Vendor, family and
//! caches follow the host: guest instructions run on it, and errata and undefined corners are the host's.

use super::{CpuidTable, Leaf, host};

/// A model's name and its features by CPUID register.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Name with version.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    leaf1_ecx: u32,
    leaf1_edx: u32,
    leaf7_ebx: u32,
    leaf7_ecx: u32,
    leaf7_edx: u32,
    ext1_ecx: u32,
    ext1_edx: u32,
    /// XSAVE components that the guest may enable.
    xcr0: u32,
}

/// Which vCPU this is, and how many are near it.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// APIC id of this vCPU.
    pub apic_id: u32,
    /// vCPUs of its package, which share their caches; one thread per core. Packages of a machine are equally large.
    pub cpus: u32,
}

/// A model this host cannot offer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such name.
    #[error("there is no CPU model called {0:?}; `yado doctor` lists the models")]
    Unknown(String),
    /// The host CPU lacks instructions of the model.
    #[error("CPU model {model} needs {missing} which this host does not have; choose another with --cpu")]
    Missing {
        /// The model.
        model: &'static str,
        /// Feature names, comma-separated.
        missing: String,
    },
}

/// A feature by place and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureMissing(pub &'static str);

mod bit {
    //! Feature bits: leaf 1, 7, 0x8000_0001 (Intel SDM 2A CPUID; AMD APM 3 appendix E).
    pub const SSE3: u32 = 1 << 0;
    pub const PCLMULQDQ: u32 = 1 << 1;
    pub const SSSE3: u32 = 1 << 9;
    pub const FMA: u32 = 1 << 12;
    pub const CX16: u32 = 1 << 13;
    pub const PCID: u32 = 1 << 17;
    pub const SSE41: u32 = 1 << 19;
    pub const SSE42: u32 = 1 << 20;
    pub const X2APIC: u32 = 1 << 21;
    pub const MOVBE: u32 = 1 << 22;
    pub const POPCNT: u32 = 1 << 23;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const AES: u32 = 1 << 25;
    pub const XSAVE: u32 = 1 << 26;
    pub const AVX: u32 = 1 << 28;
    pub const F16C: u32 = 1 << 29;
    pub const RDRAND: u32 = 1 << 30;
    pub const HYPERVISOR: u32 = 1 << 31;

    /// FPU, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, MTRR, PGE, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2.
    pub const BASE_EDX: u32 = 1
        | 1 << 2
        | 1 << 3
        | 1 << 4
        | 1 << 5
        | 1 << 6
        | 1 << 8
        | 1 << 9
        | 1 << 11
        | 1 << 12
        | 1 << 13
        | 1 << 15
        | 1 << 16
        | 1 << 17
        | 1 << 19
        | 1 << 23
        | 1 << 24
        | 1 << 25
        | 1 << 26;
    pub const HTT: u32 = 1 << 28;

    pub const FSGSBASE: u32 = 1 << 0;
    pub const TSC_ADJUST: u32 = 1 << 1;
    pub const BMI1: u32 = 1 << 3;
    pub const AVX2: u32 = 1 << 5;
    pub const SMEP: u32 = 1 << 7;
    pub const BMI2: u32 = 1 << 8;
    pub const ERMS: u32 = 1 << 9;
    pub const INVPCID: u32 = 1 << 10;
    pub const RDSEED: u32 = 1 << 18;
    pub const ADX: u32 = 1 << 19;
    pub const CLFLUSHOPT: u32 = 1 << 23;
    pub const SHA: u32 = 1 << 29;

    pub const UMIP: u32 = 1 << 2;
    pub const GFNI: u32 = 1 << 8;
    pub const VAES: u32 = 1 << 9;
    pub const VPCLMULQDQ: u32 = 1 << 10;
    pub const RDPID: u32 = 1 << 22;

    pub const FSRM: u32 = 1 << 4;
    pub const SERIALIZE: u32 = 1 << 14;
    pub const ARCH_CAPABILITIES: u32 = 1 << 29;

    pub const LAHF: u32 = 1 << 0;
    pub const ABM: u32 = 1 << 5;
    pub const SSE4A: u32 = 1 << 6;
    pub const MISALIGNSSE: u32 = 1 << 7;
    pub const PREFETCHW: u32 = 1 << 8;

    pub const SYSCALL: u32 = 1 << 11;
    pub const NX: u32 = 1 << 20;
    pub const MMXEXT: u32 = 1 << 22;
    pub const PDPE1GB: u32 = 1 << 26;
    pub const RDTSCP: u32 = 1 << 27;
    pub const LM: u32 = 1 << 29;
}

/// What a hypervisor offers whatever the host has: emulated by yado's engines.
const EMULATED_1_ECX: u32 = bit::PCID | bit::X2APIC | bit::TSC_DEADLINE | bit::HYPERVISOR;
const EMULATED_7_EBX: u32 = bit::FSGSBASE | bit::TSC_ADJUST | bit::SMEP | bit::INVPCID | bit::ERMS;
const EMULATED_7_ECX: u32 = bit::UMIP | bit::RDPID;
const EMULATED_7_EDX: u32 = bit::FSRM | bit::SERIALIZE;
const EMULATED_EXT_EDX: u32 = bit::SYSCALL | bit::NX | bit::PDPE1GB | bit::RDTSCP | bit::LM;

const V2: Model = Model {
    name: "x86-64-v2.1",
    about: "SSE4.2, POPCNT, CX16; no XSAVE, no AVX: any host since 2009",
    leaf1_ecx: EMULATED_1_ECX | bit::SSE3 | bit::SSSE3 | bit::CX16 | bit::SSE41 | bit::SSE42 | bit::POPCNT,
    leaf1_edx: bit::BASE_EDX,
    leaf7_ebx: EMULATED_7_EBX,
    leaf7_ecx: EMULATED_7_ECX,
    leaf7_edx: EMULATED_7_EDX,
    ext1_ecx: bit::LAHF,
    ext1_edx: EMULATED_EXT_EDX,
    xcr0: 0,
};

const V3: Model = Model {
    name: "x86-64-v3.1",
    about: "AVX2, BMI2, FMA, MOVBE and AES: hosts since 2013 (Haswell, Zen)",
    leaf1_ecx: V2.leaf1_ecx
        | bit::PCLMULQDQ
        | bit::FMA
        | bit::MOVBE
        | bit::AES
        | bit::XSAVE
        | bit::AVX
        | bit::F16C
        | bit::RDRAND,
    leaf7_ebx: EMULATED_7_EBX | bit::BMI1 | bit::AVX2 | bit::BMI2,
    ext1_ecx: bit::LAHF | bit::ABM | bit::PREFETCHW,
    xcr0: 7,
    ..V2
};

/// Everything the host has that yado can give: not portable, and not for saved guests that move.
const HOST: Model = Model {
    name: "host",
    about: "all that this host and yado offer; a saved guest resumes only on a like host",
    leaf1_ecx: V3.leaf1_ecx,
    leaf7_ebx: V3.leaf7_ebx | bit::RDSEED | bit::ADX | bit::CLFLUSHOPT | bit::SHA,
    leaf7_ecx: EMULATED_7_ECX | bit::GFNI | bit::VAES | bit::VPCLMULQDQ,
    ext1_ecx: V3.ext1_ecx | bit::SSE4A | bit::MISALIGNSSE,
    ext1_edx: EMULATED_EXT_EDX | bit::MMXEXT,
    ..V3
};

/// All models, weakest first; `host` last.
pub const MODELS: &[Model] = &[V2, V3, HOST];

/// The best versioned model that this host can offer.
pub fn default_model() -> Model {
    MODELS.iter().rev().skip(1).find(|model| model.missing().is_empty()).copied().unwrap_or(V2)
}

const NAMES_1_ECX: &[(u32, &str)] = &[
    (bit::SSE3, "sse3"),
    (bit::PCLMULQDQ, "pclmulqdq"),
    (bit::SSSE3, "ssse3"),
    (bit::FMA, "fma"),
    (bit::CX16, "cx16"),
    (bit::SSE41, "sse4.1"),
    (bit::SSE42, "sse4.2"),
    (bit::MOVBE, "movbe"),
    (bit::POPCNT, "popcnt"),
    (bit::AES, "aes"),
    (bit::XSAVE, "xsave"),
    (bit::AVX, "avx"),
    (bit::F16C, "f16c"),
    (bit::RDRAND, "rdrand"),
];
const NAMES_7_EBX: &[(u32, &str)] = &[(bit::BMI1, "bmi1"), (bit::AVX2, "avx2"), (bit::BMI2, "bmi2")];
const NAMES_EXT_ECX: &[(u32, &str)] = &[(bit::LAHF, "lahf"), (bit::ABM, "lzcnt")];

impl Model {
    /// The model called `name`.
    pub fn named(name: &str) -> Result<Self, ModelError> {
        MODELS
            .iter()
            .find(|model| {
                model.name == name || model.name.rsplit_once('.').is_some_and(|(family, _)| family == name)
            })
            .copied()
            .ok_or_else(|| ModelError::Unknown(name.to_owned()))
    }

    /// The instruction-set features of the model that this host lacks; empty if it can be offered.
    pub fn missing(&self) -> Vec<FeatureMissing> {
        if self.name == HOST.name {
            return Vec::new();
        }
        self.missing_among(host)
    }

    /// The same, of what an engine offers of the model's own table.
    pub fn missing_in(&self, table: &CpuidTable) -> Result<(), ModelError> {
        if self.name == HOST.name {
            return Ok(());
        }
        self.refuse(&self.missing_among(|function, index| table.query(function, index)))
    }

    fn refuse(&self, missing: &[FeatureMissing]) -> Result<(), ModelError> {
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.iter().map(|feature| feature.0).collect::<Vec<_>>().join(", ");
        Err(ModelError::Missing { model: self.name, missing })
    }

    fn missing_among(&self, leaf: impl Fn(u32, u32) -> Leaf) -> Vec<FeatureMissing> {
        let has = [
            (self.leaf1_ecx, leaf(1, 0).ecx, NAMES_1_ECX),
            (self.leaf7_ebx, leaf(7, 0).ebx, NAMES_7_EBX),
            (self.ext1_ecx, leaf(0x8000_0001, 0).ecx, NAMES_EXT_ECX),
        ];
        has.iter()
            .flat_map(|(wanted, has, names)| {
                names
                    .iter()
                    .filter(move |(bit, _)| wanted & bit != 0 && has & bit == 0)
                    .map(|(_, name)| FeatureMissing(name))
            })
            .collect()
    }

    /// The CPUID table of one vCPU. `tsc_hz` is the guest's TSC frequency.
    pub fn table(&self, topology: Topology, tsc_hz: u64) -> Result<CpuidTable, ModelError> {
        self.refuse(&self.missing())?;
        let mut table = CpuidTable::default();
        let amd = is_amd();
        self.basic(&mut table, topology, amd);
        self.extended(&mut table, topology, amd);
        timing(&mut table, tsc_hz);
        paravirtual(&mut table, tsc_hz);
        Ok(table)
    }

    fn basic(&self, table: &mut CpuidTable, topology: Topology, amd: bool) {
        let Leaf { ebx, ecx, edx, .. } = host(0, 0);
        table.set(0, None, Leaf { eax: 0x16, ebx, ecx, edx });
        let leaf = host(1, 0);
        let many = if topology.cpus > 1 { bit::HTT } else { 0 };
        table.set(
            1,
            None,
            Leaf {
                eax: leaf.eax,
                ebx: topology.apic_id << 24 | topology.cpus.min(255) << 16 | 8 << 8,
                ecx: self.leaf1_ecx & (leaf.ecx | EMULATED_1_ECX),
                edx: self.leaf1_edx | many,
            },
        );
        if !amd {
            table.set(2, None, host(2, 0));
            for index in 0..8 {
                let mut leaf = host(4, index);
                if leaf.eax & 0x1f == 0 {
                    break;
                }
                // Cores per package, and one thread per cache.
                leaf.eax = leaf.eax & 0x3fff | (topology.cpus.next_power_of_two() - 1).min(63) << 26;
                table.set(4, Some(index), leaf);
            }
        }
        // ARAT: the APIC timer never stops.
        table.set(6, None, Leaf { eax: 1 << 2, ..Leaf::default() });
        let leaf = host(7, 0);
        let arch_capabilities = if amd { 0 } else { bit::ARCH_CAPABILITIES };
        table.set(
            7,
            Some(0),
            Leaf {
                eax: 0,
                ebx: self.leaf7_ebx & (leaf.ebx | EMULATED_7_EBX),
                ecx: self.leaf7_ecx & (leaf.ecx | EMULATED_7_ECX),
                edx: self.leaf7_edx & (leaf.edx | EMULATED_7_EDX) | arch_capabilities,
            },
        );
        let core_shift = 32 - (topology.cpus.max(1) - 1).leading_zeros();
        let apic = topology.apic_id;
        table.set(0xb, Some(0), Leaf { eax: 0, ebx: 1, ecx: 1 << 8, edx: apic });
        table.set(0xb, Some(1), Leaf { eax: core_shift, ebx: topology.cpus, ecx: 2 << 8 | 1, edx: apic });
        table.set(0xb, Some(2), Leaf { eax: 0, ebx: 0, ecx: 2, edx: apic });
        if self.xcr0 != 0 {
            // Sizes: legacy area and header 576 bytes, AVX 256 more. EBX follows XCR0 at execution time.
            table.set(0xd, Some(0), Leaf { eax: self.xcr0, ebx: 576, ecx: 832, edx: 0 });
            // XSAVEOPT, XSAVEC, XGETBV with ECX=1, as the host has them.
            table.set(0xd, Some(1), Leaf { eax: host(0xd, 1).eax & 7, ..Leaf::default() });
            table.set(0xd, Some(2), Leaf { eax: 256, ebx: 576, ..Leaf::default() });
        }
    }

    fn extended(&self, table: &mut CpuidTable, topology: Topology, amd: bool) {
        let Leaf { ebx, ecx, edx, .. } = host(0x8000_0000, 0);
        let last = if amd { 0x8000_0021 } else { 0x8000_0008 };
        table.set(0x8000_0000, None, Leaf { eax: last, ebx, ecx, edx });
        let leaf = host(0x8000_0001, 0);
        // AMD repeats the common bits of leaf 1 here.
        let mirrored = if amd { self.leaf1_edx & 0x0183_f3ff } else { 0 };
        table.set(
            0x8000_0001,
            None,
            Leaf {
                eax: leaf.eax,
                ebx: leaf.ebx,
                ecx: self.ext1_ecx & leaf.ecx,
                edx: self.ext1_edx & (leaf.edx | EMULATED_EXT_EDX) | mirrored,
            },
        );
        for (leaf, words) in brand(self.name).into_iter().enumerate() {
            table.set(0x8000_0002 + leaf as u32, None, words);
        }
        if amd {
            table.set(0x8000_0005, None, host(0x8000_0005, 0));
            table.set(0x8000_0006, None, host(0x8000_0006, 0));
            // Which speculation problems need no mitigation code in the guest: LFENCE serialises (2), a null selector
            // clears the base (6), automatic IBRS (8), no SRSO (29); no TSA from the store queue or the L1 cache (ECX 1, 2).
            let eax = 1 << 2 | 1 << 6 | 1 << 8 | 1 << 29;
            table.set(0x8000_0021, None, Leaf { eax, ecx: 0b110, ..Leaf::default() });
        } else {
            table.set(0x8000_0006, None, host(0x8000_0006, 0));
        }
        // Invariant TSC.
        table.set(0x8000_0007, None, Leaf { edx: 1 << 8, ..Leaf::default() });
        let physical = (host(0x8000_0008, 0).eax & 0xff).clamp(36, PHYSICAL_BITS);
        let bits = 32 - (topology.cpus.max(1) - 1).leading_zeros();
        let cores = if amd { bits << 12 | (topology.cpus.min(256) - 1) } else { 0 };
        table.set(0x8000_0008, None, Leaf { eax: 48 << 8 | physical, ebx: 0, ecx: cores, edx: 0 });
    }
}

/// The widest guest-physical address that is offered, in bits.
const PHYSICAL_BITS: u32 = 46;

fn is_amd() -> bool {
    let leaf = host(0, 0);
    [leaf.ebx, leaf.edx, leaf.ecx] == [0x6874_7541, 0x6974_6e65, 0x444d_4163]
}

/// TSC and nominal frequency (leaves 0x15, 0x16): the TSC runs at the "crystal" frequency.
fn timing(table: &mut CpuidTable, tsc_hz: u64) {
    let Ok(hz) = u32::try_from(tsc_hz) else { return };
    table.set(0x15, None, Leaf { eax: 1, ebx: 1, ecx: hz, edx: 0 });
    let mhz = hz / 1_000_000;
    table.set(0x16, None, Leaf { eax: mhz, ebx: mhz, ecx: 100, edx: 0 });
}

/// KVM's paravirtual interface (Linux `Documentation/virt/kvm/x86/cpuid.rst`).
fn paravirtual(table: &mut CpuidTable, tsc_hz: u64) {
    const CLOCKSOURCE: u32 = 1 << 0;
    const NOP_IO_DELAY: u32 = 1 << 1;
    const CLOCKSOURCE2: u32 = 1 << 3;
    const STEAL_TIME: u32 = 1 << 5;
    const PV_EOI: u32 = 1 << 6;
    const PV_UNHALT: u32 = 1 << 7;
    const PV_TLB_FLUSH: u32 = 1 << 9;
    const PV_SEND_IPI: u32 = 1 << 11;
    const POLL_CONTROL: u32 = 1 << 12;
    const PV_SCHED_YIELD: u32 = 1 << 13;
    const CLOCKSOURCE_STABLE: u32 = 1 << 24;
    let name = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
    let (ebx, ecx, edx) = (name(*b"KVMK"), name(*b"VMKV"), name(*b"M\0\0\0"));
    table.set(0x4000_0000, None, Leaf { eax: 0x4000_0010, ebx, ecx, edx });
    let features = CLOCKSOURCE
        | NOP_IO_DELAY
        | CLOCKSOURCE2
        | STEAL_TIME
        | PV_EOI
        | PV_UNHALT
        | PV_TLB_FLUSH
        | PV_SEND_IPI
        | POLL_CONTROL
        | PV_SCHED_YIELD
        | CLOCKSOURCE_STABLE;
    table.set(0x4000_0001, None, Leaf { eax: features, ..Leaf::default() });
    let khz = u32::try_from(tsc_hz / 1000).unwrap_or(0);
    table.set(0x4000_0010, None, Leaf { eax: khz, ebx: 1_000_000, ..Leaf::default() });
}

/// The brand string: three leaves of sixteen bytes.
fn brand(model: &str) -> [Leaf; 3] {
    let mut text = format!("yado virtual CPU {model}").into_bytes();
    text.resize(48, 0);
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&text[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    [0, 16, 32].map(|at| Leaf { eax: word(at), ebx: word(at + 4), ecx: word(at + 8), edx: word(at + 12) })
}

#[cfg(test)]
mod test {
    use super::*;

    fn table(model: Model) -> CpuidTable {
        model.table(Topology { apic_id: 1, cpus: 3 }, 2_500_000_000).unwrap()
    }

    #[test]
    fn the_default_model_is_offered_and_has_what_linux_requires() {
        let table = table(default_model());
        let leaf = table.query(1, 0);
        // PSE, MSR, PAE, CX8, PGE, CMOV, FXSR, SSE, SSE2: arch/x86 required-features.h.
        for bit in [3, 5, 6, 8, 13, 15, 24, 25, 26] {
            assert_ne!(leaf.edx & 1 << bit, 0, "leaf 1 EDX bit {bit}");
        }
        assert_ne!(table.query(0x8000_0001, 0).edx & bit::LM, 0);
        assert_eq!(leaf.ebx >> 24, 1);
        assert_eq!(table.query(0x4000_0000, 7).ebx, u32::from_le_bytes(*b"KVMK"));
    }

    #[test]
    fn leaves_beyond_the_end_are_zero() {
        assert_eq!(table(default_model()).query(0x17, 0), Leaf::default());
        assert_eq!(table(default_model()).query(0x4000_0011, 0), Leaf::default());
    }

    #[test]
    fn names_are_found_with_and_without_version() {
        assert_eq!(Model::named("x86-64-v3").unwrap().name, "x86-64-v3.1");
        assert_eq!(Model::named("x86-64-v2.1").unwrap().name, "x86-64-v2.1");
        assert_eq!(Model::named("host").unwrap().name, "host");
        assert!(matches!(Model::named("z80"), Err(ModelError::Unknown(_))));
    }

    #[test]
    fn no_model_offers_what_no_engine_emulates() {
        for model in MODELS.iter().filter(|model| model.missing().is_empty()) {
            let table = table(*model);
            // MONITOR, VMX, OSXSAVE (dynamic); AVX-512F, SMAP, MPX; LA57, PKU; SVM.
            assert_eq!(table.query(1, 0).ecx & (1 << 3 | 1 << 5 | 1 << 27), 0);
            assert_eq!(table.query(7, 0).ebx & (1 << 16 | 1 << 20 | 1 << 14), 0);
            assert_eq!(table.query(7, 0).ecx & (1 << 16 | 1 << 3), 0);
            assert_eq!(table.query(0x8000_0001, 0).ecx & 1 << 2, 0);
        }
    }

    /// A version is a promise: what a model of a version offers never changes. A change that fails here wants a new
    /// version beside the old one.
    #[test]
    fn versions_stay_what_they_were() {
        let offered = |model: &Model| {
            [
                model.leaf1_ecx,
                model.leaf1_edx,
                model.leaf7_ebx,
                model.leaf7_ecx,
                model.leaf7_edx,
                model.ext1_ecx,
                model.ext1_edx,
                model.xcr0,
            ]
        };
        let named = |name| offered(&Model::named(name).unwrap());
        assert_eq!(
            named("x86-64-v2.1").map(|word| format!("{word:08x}")).join(" "),
            "81ba2201 078bbb7d 00000683 00400004 00004010 00000001 2c100800 00000000"
        );
        assert_eq!(
            named("x86-64-v3.1").map(|word| format!("{word:08x}")).join(" "),
            "f7fa3203 078bbb7d 000007ab 00400004 00004010 00000121 2c100800 00000007"
        );
        let mut table = CpuidTable::default();
        paravirtual(&mut table, 2_000_000_000);
        assert_eq!(table.query(0x4000_0001, 0).eax, 0x0100_3aeb, "KVM's features");
    }

    #[test]
    fn topology_tells_the_cores_apart() {
        let table = table(default_model());
        assert_eq!(table.query(0xb, 1).eax, 2);
        assert_eq!(table.query(0xb, 1).edx, 1);
    }
}
