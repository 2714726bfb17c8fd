# Exceptions: vectors, error codes, and where they go on.

case_arithmetic:
    TRY 1f
    xor edx, edx
    xor eax, eax
    div eax
1:  TRY 2f
    ud2
2:  TRY 3f
    mov rax, 0x8000000000000000
    mov rbx, [rax]
3:  TRY 4f
    mov rbp, 0x8000000000000000
    mov rax, [rbp]
4:  TRY 5f
    mov eax, 0xf8
    mov ds, eax
5:  TRY 6f
    mov eax, ABSENT
    mov ds, eax
6:  TRY 7f
    mov eax, KERNEL64
    mov ss, eax
7:  TRY 8f
    mov rax, cr4
    or rax, 1 << 15
    mov cr4, rax
8:  TRY 9f
    mov eax, 1
    mov cr8, rax
    mov rax, cr8
    SHOW rax
    mov eax, 0x10
    mov cr8, rax
9:  xor eax, eax
    mov cr8, rax
    # A step at a time: one trap, after the instruction.
    TRY 10f
    xor ebx, ebx
    pushfq
    or dword ptr [rsp], 0x100
    popfq
    inc ebx
    inc ebx
    inc ebx
10: mov rax, dr6
    and eax, 0x4000
    SHOW rbx
    SHOW rax
    mov eax, 0xffff0ff0
    mov dr6, rax
    jmp end_of_case

case_breakpoint:
    TRY 1f
    int3
    SAY "never"
1:  SAY "trapped"
    jmp end_of_case

case_hypercall:
    # KVM_HC_VAPIC_POLL_IRQ does nothing.
    mov eax, 1
    xor ebx, ebx
    vmcall
    SHOW rax
    mov eax, 0x7777
    vmcall
    SHOW rax
    jmp end_of_case

case_data_breakpoint:
    # A write of four bytes, watched by DR0; the trap comes after the instruction.
    mov eax, DATA
    mov dr0, rax
    mov eax, 0xd0401
    mov dr7, rax
    TRY 1f
    mov dword ptr [DATA + 8], 1
    mov dword ptr [DATA], 2
    SAY "late"
1:  mov rax, dr6
    and eax, 0xf
    SHOW rax
    mov eax, 0x400
    mov dr7, rax
    mov eax, [DATA]
    SHOW rax
    jmp end_of_case

case_floating_faults:
    mov rax, cr0
    or eax, 8
    mov cr0, rax
    TRY 1f
    movups xmm0, [DATA]
1:  TRY 2f
    fninit
2:  clts
    # An unmasked division by zero.
    mov dword ptr [DATA], 0x1d80
    ldmxcsr [DATA]
    xorps xmm1, xmm1
    pcmpeqd xmm0, xmm0
    pslld xmm0, 25
    psrld xmm0, 2
    TRY 3f
    divps xmm0, xmm1
3:  mov dword ptr [DATA], 0x1f80
    ldmxcsr [DATA]
    # Reserved bits of MXCSR.
    mov dword ptr [DATA], 0xffffffff
    TRY 4f
    ldmxcsr [DATA]
4:  TRY 5f
    movaps xmm0, [DATA + 4]
5:  jmp end_of_case

case_user_mode:
    TRY 1f
    lea rax, [rip + user_halts]
    call to_user
1:  TRY 2f
    lea rax, [rip + user_interrupts]
    call to_user
2:  TRY 3f
    lea rax, [rip + user_out]
    call to_user
3:  TRY 4f
    lea rax, [rip + user_reads_kernel]
    # The page at TEST is the kernel's alone.
    mov qword ptr [PT_TEST], DATA + 3
    call to_user
4:  jmp end_of_case

case_user_calls:
    TRY 5f
    lea rax, [rip + user_calls_kernel_gate]
    call to_user
    # A gate that is open to all comes back.
5:  mov qword ptr [COUNTS + 0x80 * 8], 0
    TRY 6f
    lea rax, [rip + user_gate]
    call to_user
6:  mov rax, [COUNTS + 0x80 * 8]
    SHOW rax
    # SYSCALL and SYSRET.
    mov ecx, 0xc0000081
    mov edx, 0x00330010
    xor eax, eax
    wrmsr
    mov ecx, 0xc0000082
    lea rax, [rip + 8f]
    mov rdx, rax
    shr rdx, 32
    wrmsr
    mov ecx, 0xc0000084
    mov eax, 0x200
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000080
    rdmsr
    or eax, 1
    wrmsr
    TRY 7f
    xor ebp, ebp
    lea rax, [rip + user_system]
    call to_user
8:  # From ring 3: CS and SS are the kernel's, IF is masked.
    mov eax, cs
    SHOW rax
    mov eax, ss
    SHOW rax
    pushfq
    pop rax
    and eax, 0x200
    SHOW rax
    sysretq
7:  SHOW rbp
    jmp end_of_case

to_user:
    push USER_DATA
    push STACK - 0x8000
    push 0x202
    push USER64
    push rax
    iretq
user_halts:
    hlt
user_interrupts:
    cli
user_out:
    out 0x80, al
user_reads_kernel:
    mov rax, TEST
    mov rax, [rax]
user_calls_kernel_gate:
    int 0x81
user_gate:
    int 0x80
    ud2
user_system:
    syscall
    mov ebp, 0x5e
    mov eax, cs
    shl eax, 8
    or ebp, eax
    mov eax, ss
    shl eax, 16
    or ebp, eax
    ud2

# x87 and SSE in ring 3, through interrupts that come in between.
case_user_floating:
    mov qword ptr [DATA + 0x40], 0
    mov eax, APIC
    mov dword ptr [rax + 0xf0], 0x1ff
    mov dword ptr [EOI_BY], 1
    mov dword ptr [rax + 0x3e0], 0xb
    mov dword ptr [rax + 0x320], 0x20040
    mov dword ptr [rax + 0x380], 300000
    TRY 1f
    lea rax, [rip + user_computes]
    call to_user
1:  mov eax, APIC
    mov dword ptr [rax + 0x380], 0
    mov rax, [DATA]
    SHOW rax
    mov rax, [DATA + 8]
    SHOW rax
    mov rax, [DATA + 16]
    SHOW rax
    mov rax, [DATA + 24]
    SHOW rax
    mov eax, [DATA + 32]
    SHOW rax
    movzx eax, word ptr [DATA + 36]
    SHOW rax
    movzx eax, word ptr [DATA + 38]
    SHOW rax
    jmp end_of_case
user_computes:
    fninit
    fld1
    fldpi
    fmul st, st(1)
    mov rax, 0x1111222233334444
    movq xmm0, rax
    mov rax, 0x5555666677778888
    movq xmm15, rax
    mov dword ptr [DATA + 32], 0x9f80
    ldmxcsr [DATA + 32]
    mov dword ptr [DATA + 32], 0
    mov rbx, [COUNTS + 0x40 * 8]
    add rbx, 3
1:  pause
    cmp [COUNTS + 0x40 * 8], rbx
    jb 1b
    paddd xmm0, xmm0
    movq [DATA], xmm0
    movq [DATA + 8], xmm15
    fistp qword ptr [DATA + 16]
    fistp qword ptr [DATA + 24]
    stmxcsr [DATA + 32]
    fnstcw [DATA + 36]
    fnstsw [DATA + 38]
    ud2
