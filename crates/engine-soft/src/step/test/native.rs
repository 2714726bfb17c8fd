//! Instructions that the host executes.

use super::*;
use cpu::{cr0, cr4, rflags};

guest!(divide: "div ecx");

#[test]
fn a_division_by_zero_is_the_guest_s_exception() {
    let mut machine = Machine::new(divide);
    assert_eq!(machine.fault(), 0);
    assert_eq!(machine.frame(0), CODE);
    let mut machine = Machine::new(divide);
    machine.core.state.gpr[0] = 100;
    machine.core.state.gpr[1] = 7;
    machine.finish();
    assert_eq!((machine.core.state.gpr[0], machine.core.state.gpr[2]), (14, 2));
}

guest!(halves: "mov ah, 0x12" "add bh, ah" "xchg ch, [rbx]" "movzx esp, ch" "add spl, 3" "setc r12b" "bswap rsp");

#[test]
fn high_bytes_and_the_stack_pointer_are_operands_like_others() {
    let mut machine = Machine::new(halves);
    machine.write(DATA + 0x1300, &[0x55]);
    machine.core.state.gpr[3] = DATA + 0x100;
    machine.core.state.gpr[1] = 0xaa00;
    machine.finish();
    let state = &machine.core.state;
    assert_eq!(state.gpr[1], 0x5500);
    assert_eq!(state.gpr[4], 0x58u64.swap_bytes());
    assert_eq!(machine.bytes::<1>(DATA + 0x1300), [0xaa]);
}

guest!(flags: "stc" "adc rax, 0" "mov rbx, 0x7fffffffffffffff" "add rbx, 1" "lahf" "seto cl");

#[test]
fn status_flags_go_in_and_out_and_no_others() {
    let mut machine = Machine::new(flags);
    machine.core.state.rflags |= rflags::IF | rflags::DF | rflags::AC | rflags::ID;
    machine.core.state.gpr[0] = 4;
    machine.finish();
    let state = &machine.core.state;
    assert_eq!(state.gpr[0] & 0xff, 5);
    assert_eq!(state.gpr[1] & 0xff, 1);
    let others = rflags::IF | rflags::DF | rflags::AC | rflags::ID | rflags::FIXED;
    assert_eq!(state.rflags, others | rflags::OF | rflags::SF | rflags::PF | rflags::AF);
}

guest!(bits: "bts [rbx], rax" "setc cl" "btr word ptr [rbx], dx");

#[test]
fn bit_strings_reach_beyond_their_operand() {
    let mut machine = Machine::new(bits);
    machine.core.state.gpr[3] = DATA + 0x100;
    machine.core.state.gpr[0] = 1000;
    machine.core.state.gpr[2] = (-17i64) as u64;
    machine.write(DATA + 0x100 - 4, &[0xff; 4]);
    machine.finish();
    assert_eq!(machine.bytes::<1>(DATA + 0x100 + 125), [1]);
    assert_eq!(machine.bytes::<4>(DATA + 0xfc), [0xff, 0x7f, 0xff, 0xff]);
}

guest!(exchange16: "lock cmpxchg16b [rbx]" "setz cl");

#[test]
fn cmpxchg16b_exchanges_and_checks_its_alignment() {
    let mut machine = Machine::new(exchange16);
    machine.write_u64(DATA, 1);
    machine.write_u64(DATA + 8, 2);
    let set = |machine: &mut Machine, address| {
        let gpr = &mut machine.core.state.gpr;
        (gpr[0], gpr[2], gpr[3]) = (1, 2, address);
        gpr[1] = 0x700;
    };
    set(&mut machine, DATA);
    machine.finish();
    assert_eq!(machine.u64(DATA), DATA);
    assert_eq!(machine.u64(DATA + 8), 0x700);
    assert_eq!(machine.core.state.gpr[1], 0x701);
    for address in [DATA + 8, DATA + 0xff8] {
        let mut machine = Machine::new(exchange16);
        set(&mut machine, address);
        assert_eq!(machine.fault(), 13);
    }
}

guest!(sse: "movaps xmm0, [rbx]" "paddd xmm0, [rbx]" "movaps [rbx + 16], xmm0" "cvtdq2ps xmm1, xmm0"
    "vaddps ymm2, ymm1, ymm1" "vextractf128 xmm3, ymm2, 1" "vmovups [rbx + 32], ymm2");

#[test]
fn vectors_keep_their_values() {
    let mut machine = Machine::new(sse);
    for n in 0..4u32 {
        machine.write(DATA + 4 * u64::from(n), &(n + 1).to_le_bytes());
    }
    machine.core.state.gpr[3] = DATA;
    machine.finish();
    assert_eq!(machine.u32(DATA + 16 + 12), 8);
    assert_eq!(f32::from_bits(machine.u32(DATA + 32 + 12)), 16.0);
    assert_eq!(machine.u64(DATA + 48), 0);
    assert_eq!(machine.core.state.ymm.0[0][0], 0x0000_0004_0000_0002);
}

#[test]
fn misaligned_and_crossing_vectors() {
    let mut machine = Machine::new(sse);
    machine.core.state.gpr[3] = DATA + 4;
    assert_eq!(machine.fault(), 13);
    // movups [rbx], xmm0 across two pages that are not neighbours.
    let mut machine = Machine::with_bytes(&[0x0f, 0x11, 0x03, 0x0f, 0x10, 0x0b, 0xf4]);
    machine.map(0x4000_0000, 0x30_0003);
    machine.write_u64(0x6008, 0x50_0003);
    machine.core.state.ymm.0[0] = [0x1111_1111_1111_1111, 0x2222_2222_2222_2222, 0, 0];
    machine.core.state.gpr[3] = 0x4000_0ffc;
    machine.finish();
    assert_eq!(machine.u32(0x30_0ffc), 0x1111_1111);
    assert_eq!(machine.u64(0x50_0000), 0x2222_2222_1111_1111);
    assert_eq!(machine.core.state.ymm.0[1][..2], machine.core.state.ymm.0[0][..2]);
}

#[test]
fn units_that_are_off_are_not_available() {
    for (cr0, cr4_off, vector) in [(cr0::TS, 0, 7), (cr0::EM, 0, 6), (0, cr4::OSFXSR, 6)] {
        let mut machine = Machine::new(sse);
        machine.core.state.gpr[3] = DATA;
        machine.core.state.cr0 |= cr0;
        machine.core.state.cr4 &= !cr4_off;
        assert_eq!(machine.fault(), vector);
    }
    // vaddps ymm0, ymm0, ymm0 without OSXSAVE.
    let mut machine = Machine::with_bytes(&[0xc5, 0xfc, 0x58, 0xc0]);
    machine.core.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(machine.fault(), 6);
    // fld1 with TS.
    let mut machine = Machine::with_bytes(&[0xd9, 0xe8]);
    machine.core.state.cr0 |= cr0::TS;
    assert_eq!(machine.fault(), 7);
    // vaddps zmm0, zmm0, zmm0: the CPU model has no AVX-512.
    let mut machine = Machine::with_bytes(&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0]);
    assert_eq!(machine.fault(), 6);
}

guest!(unmasked: "ldmxcsr [rbx]" "divps xmm0, xmm1");

#[test]
fn unmasked_simd_exceptions_are_delivered_with_their_flags() {
    let mut machine = Machine::new(unmasked);
    machine.write(DATA, &0x1d80u32.to_le_bytes());
    machine.core.state.gpr[3] = DATA;
    machine.core.state.ymm.0[0] = [0x3f80_0000_3f80_0000; 4];
    assert_eq!(machine.fault(), 19);
    assert_eq!(machine.core.state.mxcsr, 0x1d84, "the divide-by-zero flag");
    assert_eq!(machine.core.state.ymm.0[0][0], 0x3f80_0000_3f80_0000);
    let mut machine = Machine::new(unmasked);
    machine.write(DATA, &0xffff_ffffu32.to_le_bytes());
    machine.core.state.gpr[3] = DATA;
    assert_eq!(machine.fault(), 13, "reserved bits of MXCSR");
}

guest!(x87: "fld1" "fldpi" "faddp" "fstp qword ptr [rbx]" "fldz" "fld1" "fnstsw ax" "mov ecx, eax" "fxsave [rbx + 0x100]"
    "fninit" "fnstsw ax" "mov edx, eax" "fxrstor [rbx + 0x100]" "fnstsw ax" "fstp qword ptr [rbx + 8]");

#[test]
fn x87_state_lives_from_one_instruction_to_the_next() {
    let mut machine = Machine::new(x87);
    machine.core.state.gpr[3] = DATA;
    machine.finish();
    assert_eq!(f64::from_bits(machine.u64(DATA)), 1.0 + std::f64::consts::PI);
    assert_eq!(f64::from_bits(machine.u64(DATA + 8)), 1.0);
    let top = |register: usize| machine.core.state.gpr[register] >> 11 & 7;
    assert_eq!((top(1), top(2), top(0)), (6, 0, 6));
    assert_eq!(machine.u64(DATA + 0x108), 0, "no host addresses in the image");
}

guest!(pending: "fldcw [rbx]" "fld1" "fldz" "fdivp" "nop" "fwait");

#[test]
fn a_pending_x87_exception_is_delivered_at_the_next_instruction() {
    let mut machine = Machine::new(pending);
    machine.write(DATA, &0x37bu16.to_le_bytes());
    machine.core.state.gpr[3] = DATA;
    assert_eq!(machine.fault(), 16);
}

guest!(xsave: "mov eax, 7" "xor edx, edx" "xsave [rbx]" "vpxor ymm1, ymm1, ymm1" "xrstor [rbx]" "mov ecx, 0" "xgetbv");

#[test]
fn xsave_and_xrstor_round_trip() {
    let mut machine = Machine::new(xsave);
    machine.core.state.gpr[3] = DATA;
    machine.core.state.ymm.0[1] = [1, 2, 3, 4];
    machine.finish();
    assert_eq!(machine.core.state.ymm.0[1], [1, 2, 3, 4]);
    assert_eq!(machine.u64(DATA + 160 + 16), 1);
    assert_eq!(machine.u64(DATA + 576 + 16), 3);
    assert_eq!(machine.u64(DATA + 512) & !7, 0);
    assert_eq!(machine.core.state.gpr[0], 7);
    // A header with unknown components, and a misaligned area.
    for (offset, bad) in [(0, true), (16, false)] {
        // mov eax, -1; mov edx, -1; xrstor [rbx]
        let mut machine =
            Machine::with_bytes(&[0xb8, 255, 255, 255, 255, 0xba, 255, 255, 255, 255, 0x0f, 0xae, 0x2b]);
        machine.core.state.gpr[3] = DATA + offset;
        if bad {
            machine.write_u64(DATA + 512, 1 << 9);
        }
        assert_eq!(machine.fault(), 13);
    }
}

guest!(masked: "vpmaskmovd ymm0, ymm1, [rbx]" "vpmaskmovd [rbx + 0x800], ymm1, ymm0" "vgatherdps ymm3, [rbx + ymm4*4], ymm5");

#[test]
fn elements_masked_off_do_not_fault() {
    let mut machine = Machine::new(masked);
    machine.map(0x4000_0000, 0x30_0003);
    let start = 0x4000_0000 + 0x1000 - 16;
    machine.write(DATA + 0xff0, &[7; 16]);
    machine.core.state.gpr[3] = start;
    let top = 0x8000_0000u64;
    // The upper four elements would be in a page that is not there.
    machine.core.state.ymm.0[1] = [top | top << 32, top, 0, 0];
    machine.step();
    assert_eq!(machine.core.state.ymm.0[0], [0x0707_0707_0707_0707, 0x0707_0707, 0, 0]);
    machine.core.state.gpr[3] = start - 0x800;
    machine.write(DATA + 0xff0, &[0; 16]);
    machine.step();
    assert_eq!(machine.bytes::<16>(DATA + 0xff0), [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0]);
    // Gather: indices -1 and 0 are there, the third faults; the first two stay done.
    machine.core.state.gpr[3] = 0x4000_0ffc;
    machine.core.state.ymm.0[4] = [0xffff_ffff, 1, 0, 0];
    machine.core.state.ymm.0[5] = [top | top << 32, top, 0, 0];
    machine.write(DATA + 0xff8, &[1, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(machine.fault(), 14);
    assert_eq!(machine.core.state.cr2, 0x4000_1000);
    assert_eq!(machine.core.state.ymm.0[3][0], 1 | 2 << 32);
    assert_eq!(machine.core.state.ymm.0[5], [0, top, 0, 0]);
}

#[test]
fn a_gather_with_32_bit_addresses_wraps_around() {
    // addr32 vgatherdps ymm3, [ymm4*4 + DATA], ymm5
    let code = [0x67, 0xc4, 0xe2, 0x55, 0x92, 0x1c, 0xa5, 0x00, 0x00, 0x30, 0x00, 0xf4];
    let mut machine = Machine::with_bytes(&code);
    machine.write(DATA, &[1, 0, 0, 0]);
    machine.core.state.ymm.0[4] = [0x4000_0000, 0, 0, 0];
    machine.core.state.ymm.0[5] = [0x8000_0000, 0, 0, 0];
    machine.finish();
    assert_eq!(machine.core.state.ymm.0[3][0] as u32, 1);
}

#[test]
fn aligned_moves_stay_so_with_misaligned_sse() {
    // movaps xmm0, [rbx], misaligned in a page that is not there: alignment comes first.
    let mut machine = Machine::with_bytes(&[0x0f, 0x28, 0x03, 0xf4]);
    machine.map(0x4000_0000, 0);
    machine.core.state.mxcsr |= 1 << 17;
    machine.core.state.gpr[3] = 0x4000_0004;
    assert_eq!(machine.fault(), 13);
}
