# Model-specific registers, CPUID, and the state of the floating-point unit.

.macro PUT msr, value
    mov ecx, \msr
    mov rax, \value
    mov rdx, rax
    shr rdx, 32
    wrmsr
.endm

.macro GET msr
    mov ecx, \msr
    rdmsr
    shl rdx, 32
    or rax, rdx
.endm

case_msrs:
    PUT 0xc0000102, 0x1122334455667788 & 0x7fffffffffff
    PUT 0xc0000101, 0x310000
    swapgs
    GET 0xc0000101
    SHOW rax
    GET 0xc0000102
    SHOW rax
    swapgs
    mov dword ptr [DATA + 8], 0x6b6b
    mov eax, gs:[8]
    SHOW rax
    PUT 0xc0000100, 0x310004
    mov eax, fs:[4]
    SHOW rax
    # Addresses that are not canonical.
    TRY 1f
    PUT 0xc0000100, 0x800000000000
1:  TRY 2f
    PUT 0xc0000102, 0xffff700000000000
2:  TRY 4f
    # No such register.
    mov ecx, 0x12345
    rdmsr
4:  TRY 5f
    mov ecx, 0x12345
    wrmsr
5:
    # EFER: reserved bits, and LME while paging.
    TRY 7f
    PUT 0xc0000080, 0x80000000
7:  TRY 8f
    GET 0xc0000080
    and eax, ~0x100
    wrmsr
8:  GET 0xc0000080
    and eax, 0x500
    SHOW rax
    PUT 0xc0000081, 0x1b0010000000000
    GET 0xc0000081
    SHOW rax
    # The APIC's base, MTRRs.
    GET 0xfe
    and eax, 0x100
    SHOW rax
    jmp end_of_case

case_memory_types:
    # PAT: what it is after power-up, a type that does not exist, another order.
    GET 0x277
    SHOW rax
    TRY 6f
    PUT 0x277, 2
6:  PUT 0x277, 0x0007010600070106
    GET 0x277
    SHOW rax
    PUT 0x277, 0x0007040600070406
    jmp end_of_case

case_time:
    # The TSC goes on, follows what is written, and TSC_ADJUST with it.
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rbx, rax
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, rbx
    seta al
    movzx eax, al
    SHOW rax
    PUT 0x10, 0x100000000000
    rdtsc
    shl rdx, 32
    or rax, rdx
    shr rax, 44
    SHOW rax
    mov rax, cr4
    or eax, 4
    mov cr4, rax
    TRY 1f
    lea rax, [rip + user_time]
    call to_user
1:  mov rax, cr4
    and eax, ~4
    mov cr4, rax
    jmp end_of_case
user_time:
    rdtsc
    ud2

case_cpuid:
    mov eax, 1
    cpuid
    shr ebx, 24
    SHOW rbx
    # x2APIC, hypervisor.
    mov rax, rcx
    shr eax, 21
    and eax, 1
    SHOW rax
    shr ecx, 31
    SHOW rcx
    mov eax, 0x40000000
    cpuid
    SHOW rbx
    SHOW rcx
    SHOW rdx
    mov eax, 0xb
    mov ecx, 1
    cpuid
    SHOW rdx
    mov eax, 0xb
    mov ecx, 0
    cpuid
    SHOW rcx
    # OSXSAVE follows CR4, if there is XSAVE.
    mov eax, 1
    cpuid
    bt ecx, 26
    jnc 2f
    mov rax, cr4
    bts rax, 18
    mov cr4, rax
    mov eax, 1
    cpuid
    bt ecx, 27
    jc 2f
    SAY "no OSXSAVE"
2:  SAY "done"
    jmp end_of_case

case_floating_state:
    fninit
    fld1
    fldpi
    fmul st, st(1)
    fistp qword ptr [DATA]
    mov rax, [DATA]
    SHOW rax
    fnstcw [DATA]
    movzx eax, word ptr [DATA]
    SHOW rax
    fnstsw ax
    movzx eax, ax
    SHOW rax
    # Through an interrupt that halts meanwhile, all of it is kept.
    mov rax, 0x1111222233334444
    movq xmm0, rax
    mov rax, 0x5555666677778888
    movq xmm15, rax
    mov dword ptr [DATA], 0x9f80
    ldmxcsr [DATA]
    mov eax, APIC
    mov dword ptr [rax + 0xf0], 0x1ff
    mov dword ptr [EOI_BY], 1
    mov dword ptr [rax + 0x3e0], 0xb
    mov dword ptr [rax + 0x320], 0x40
    mov dword ptr [rax + 0x380], 100000
    sti
    hlt
    cli
    movq rax, xmm0
    SHOW rax
    movq rax, xmm15
    SHOW rax
    stmxcsr [DATA]
    mov eax, [DATA]
    SHOW rax
    fxsave [DATA + 0x100]
    pxor xmm15, xmm15
    fninit
    fxrstor [DATA + 0x100]
    movq rax, xmm15
    SHOW rax
    fistp dword ptr [DATA]
    mov eax, [DATA]
    SHOW rax
    mov rax, [DATA + 0x100 + 160]
    SHOW rax
    jmp end_of_case

case_compare_sixteen:
    mov qword ptr [DATA], 1
    mov qword ptr [DATA + 8], 2
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg16b [DATA]
    setz al
    movzx eax, al
    SHOW rax
    mov rax, [DATA + 8]
    SHOW rax
    jmp end_of_case
