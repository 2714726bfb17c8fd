//! Between yado's registers and KVM's structures.

use cpu::{DescriptorTable, Registers, Segment, attr};
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// A segment as KVM has it.
fn to_segment(segment: Segment) -> kvm_segment {
    let Segment { base, limit, selector, attr } = segment;
    let bit = |mask: u16| u8::from(attr & mask != 0);
    let present = bit(attr::P);
    kvm_segment {
        base,
        limit,
        selector,
        type_: (attr & 0xf) as u8,
        present,
        dpl: (attr >> attr::DPL_SHIFT & 3) as u8,
        db: bit(attr::DB),
        s: bit(attr::S),
        l: bit(attr::L),
        g: bit(attr::G),
        avl: bit(attr::AVL),
        unusable: 1 ^ present,
        padding: 0,
    }
}

fn from_segment(segment: kvm_segment) -> Segment {
    let kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, padding: _ } =
        segment;
    let bit = |value: u8, mask: u16| if value != 0 { mask } else { 0 };
    let attr = if unusable != 0 {
        0
    } else {
        u16::from(type_ & 0xf)
            | u16::from(dpl & 3) << attr::DPL_SHIFT
            | bit(s, attr::S)
            | bit(present, attr::P)
            | bit(avl, attr::AVL)
            | bit(l, attr::L)
            | bit(db, attr::DB)
            | bit(g, attr::G)
    };
    Segment { base, limit, selector, attr }
}

fn to_table(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..kvm_dtable::default() }
}

fn from_table(table: kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit }
}

/// All groups together.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) debug: kvm_debugregs,
    pub(crate) xcr0: u64,
}

impl Groups {
    /// yado's form.
    pub(crate) fn registers(&self) -> Registers {
        let Self { regs: r, sregs: s, debug, xcr0 } = self;
        Registers {
            gpr: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            segments: [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(from_segment),
            ldtr: from_segment(s.ldt),
            tr: from_segment(s.tr),
            gdtr: from_table(s.gdt),
            idtr: from_table(s.idt),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            xcr0: *xcr0,
            dr: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
        }
    }

    /// KVM's form. What yado's has no place for (the APIC base) stays as it is here; an interrupt that waits to be
    /// injected is forgotten, as the software engine does.
    pub(crate) fn set(&mut self, registers: &Registers) {
        let Registers {
            gpr,
            rip,
            rflags,
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            xcr0,
            dr,
            dr6,
            dr7,
        } = registers;
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = *gpr;
        self.regs = kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: *rip,
            rflags: *rflags,
        };
        let [es, cs, ss, ds, fs, gs] = segments.map(to_segment);
        self.sregs = kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: to_segment(*tr),
            ldt: to_segment(*ldtr),
            gdt: to_table(*gdtr),
            idt: to_table(*idtr),
            cr0: *cr0,
            cr2: *cr2,
            cr3: *cr3,
            cr4: *cr4,
            cr8: *cr8,
            efer: *efer,
            apic_base: self.sregs.apic_base,
            interrupt_bitmap: [0; 4],
        };
        self.debug = kvm_debugregs { db: *dr, dr6: *dr6, dr7: *dr7, ..self.debug };
        self.xcr0 = *xcr0;
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::host::Plain;
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = Segment> {
        (any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()).prop_map(|(base, limit, selector, bits)| {
            // Not present is unusable, whatever else the descriptor said.
            let attr = if bits & attr::P == 0 { 0 } else { bits & 0xf0ff };
            Segment { base, limit, selector, attr }
        })
    }

    proptest! {
        #[test]
        fn registers_survive_the_way_to_kvm_and_back(
            gpr: [u64; 16], words: [u64; 14], segments in prop::collection::vec(segment(), 8), limits: [u16; 2]
        ) {
            let registers = Registers {
                gpr,
                rip: words[0],
                rflags: words[1],
                segments: segments[..6].try_into().unwrap(),
                ldtr: segments[6],
                tr: segments[7],
                gdtr: DescriptorTable { base: words[2], limit: limits[0] },
                idtr: DescriptorTable { base: words[3], limit: limits[1] },
                cr0: words[4],
                cr2: words[5],
                cr3: words[6],
                cr4: words[7],
                cr8: words[8],
                efer: words[9],
                xcr0: words[10],
                dr: [words[11]; 4],
                dr6: words[12],
                dr7: words[13],
            };
            let mut sregs = kvm_sregs::zeroed();
            sregs.apic_base = 0xfee0_0900;
            sregs.interrupt_bitmap = [1; 4];
            let mut groups = Groups { regs: kvm_regs::zeroed(), sregs, debug: kvm_debugregs::zeroed(), xcr0: 0 };
            groups.set(&registers);
            prop_assert_eq!(groups.registers(), registers);
            prop_assert_eq!((groups.sregs.apic_base, groups.sregs.interrupt_bitmap), (0xfee0_0900, [0; 4]));
        }
    }
}
