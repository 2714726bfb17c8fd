//! The architectural registers of one x86-64 CPU, in the form in which they are set up, inspected and saved.

use serde::{Deserialize, Serialize};

/// RFLAGS bits.
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF and OF: what arithmetic writes.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// EFER bits.
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const FFXSR: u64 = 1 << 14;
}

/// Segment attributes, in the layout of descriptor bytes 5 and 6 (bits 8-11 of the limit left out), i.e. the VMX
/// "access rights" layout: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
#[allow(missing_docs)]
pub mod attr {
    pub const ACCESSED: u16 = 1 << 0;
    pub const WRITABLE: u16 = 1 << 1;
    pub const CODE: u16 = 1 << 3;
    pub const S: u16 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 12;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;
    /// 64-bit code, DPL 0, present, accessed.
    pub const CODE64: u16 = 0xa09b;
    /// 32-bit flat code, DPL 0.
    pub const CODE32: u16 = 0xc09b;
    /// Flat data, DPL 0.
    pub const DATA: u16 = 0xc093;
    /// Busy 64-bit (or 32-bit) TSS.
    pub const TSS_BUSY: u16 = 0x008b;
    /// LDT.
    pub const LDT: u16 = 0x0082;
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Highest valid offset, in bytes (granularity already applied).
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Attributes, see [`attr`]; without [`attr::P`] (zero, say) the segment is unusable.
    pub attr: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Its size in bytes, less one.
    pub limit: u16,
}

/// All registers of a vCPU but its MSRs (other than EFER and the APIC base), FPU and local APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: in encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table root and PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority (bits 0-3).
    pub cr8: u64,
    /// Extended feature enables.
    pub efer: u64,
    /// Extended control register 0: the enabled XSAVE components.
    pub xcr0: u64,
    /// Debug address registers.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
}

impl Registers {
    /// Names of the general registers, in the order of [`Self::gpr`].
    pub const GENERAL: [&'static str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    /// Names of the segment registers, in the order of [`Self::segments`].
    pub const SEGMENTS: [&'static str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

    /// All that are numbers, by the names that debuggers use.
    pub fn numbers(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let general = Self::GENERAL.into_iter().zip(self.gpr);
        let debug = ["dr0", "dr1", "dr2", "dr3"].into_iter().zip(self.dr);
        let others = [
            ("rip", self.rip),
            ("rflags", self.rflags),
            ("cr0", self.cr0),
            ("cr2", self.cr2),
            ("cr3", self.cr3),
            ("cr4", self.cr4),
            ("cr8", self.cr8),
            ("efer", self.efer),
            ("xcr0", self.xcr0),
            ("dr6", self.dr6),
            ("dr7", self.dr7),
        ];
        general.chain(others).chain(debug)
    }

    /// All segments with hidden parts, by name.
    pub fn named_segments(&self) -> impl Iterator<Item = (&'static str, Segment)> {
        let system = [("ldtr", self.ldtr), ("tr", self.tr)];
        Self::SEGMENTS.into_iter().zip(self.segments).chain(system)
    }
}

impl Default for Registers {
    /// The state after power-up (Intel SDM 3, table 10-1).
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attr: attr::P | attr::S | 3 };
        let code =
            Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attr: attr::P | attr::S | 0xb };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments: [data, code, data, data, data, data],
            ldtr: Segment { limit: 0xffff, attr: attr::LDT, ..Segment::default() },
            tr: Segment { limit: 0xffff, attr: attr::TSS_BUSY, ..Segment::default() },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
        }
    }
}
