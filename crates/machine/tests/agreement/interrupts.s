# Interrupts: the local APIC in both of its forms, priorities, timers, the 8259A pair, the I/O APIC, NMIs.

.macro APIC_WRITE register, value
    mov eax, APIC
    mov dword ptr [rax + \register], \value
.endm

.macro APIC_ON
    APIC_WRITE 0xf0, 0x1ff
    mov dword ptr [EOI_BY], 1
.endm

# Waits until the count of a vector is not zero, for a while that no engine needs.
.macro AWAIT vector
    mov ecx, 4000000
772:
    cmp qword ptr [COUNTS + \vector * 8], 0
    jne 773f
    pause
    dec ecx
    jnz 772b
773:
.endm

case_self_interrupts:
    APIC_ON
    # Three to itself while IF is clear: the highest comes first, each once.
    APIC_WRITE 0x310, 0
    APIC_WRITE 0x300, 0x40041
    APIC_WRITE 0x300, 0x40061
    APIC_WRITE 0x300, 0x40051
    APIC_WRITE 0x300, 0x40051
    # IRR shows them.
    mov eax, APIC
    mov ebx, [rax + 0x220]
    mov edx, [rax + 0x230]
    SHOW rbx
    SHOW rdx
    # An interrupt waits for the instruction after STI.
    sti
    nop
    nop
    AWAIT 0x41
    cli
    mov rax, [LAST]
    SHOW rax
    mov rax, [COUNTS + 0x61 * 8]
    SHOW rax
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    mov rax, [COUNTS + 0x41 * 8]
    SHOW rax
    # All are served: ISR and IRR are empty.
    mov eax, APIC
    mov ebx, [rax + 0x120]
    or ebx, [rax + 0x130]
    or ebx, [rax + 0x220]
    or ebx, [rax + 0x230]
    SHOW rbx
    jmp end_of_case

case_task_priority:
    APIC_ON
    mov eax, 6
    mov cr8, rax
    mov eax, APIC
    mov eax, [rax + 0x80]
    SHOW rax
    APIC_WRITE 0x300, 0x40051
    sti
    nop
    nop
    nop
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    APIC_WRITE 0x300, 0x40071
    AWAIT 0x71
    mov rax, [COUNTS + 0x71 * 8]
    SHOW rax
    APIC_WRITE 0x80, 0x30
    AWAIT 0x51
    mov rax, cr8
    SHOW rax
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    cli
    jmp end_of_case

case_task_priority_at_once:
    # Taken before the second instruction after the write to CR8.
    APIC_ON
    mov eax, 15
    mov cr8, rax
    APIC_WRITE 0x300, 0x40051
    sti
    nop
    xor eax, eax
    mov cr8, rax
    nop
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    cli
    jmp end_of_case

case_halt_and_timer:
    APIC_ON
    # Divide by 1, once.
    APIC_WRITE 0x3e0, 0xb
    APIC_WRITE 0x320, 0x40
    APIC_WRITE 0x380, 100000
    sti
    hlt
    cli
    mov rax, [COUNTS + 0x40 * 8]
    SHOW rax
    mov eax, APIC
    mov eax, [rax + 0x390]
    SHOW rax
    # Five periods.
    mov qword ptr [COUNTS + 0x40 * 8], 0
    APIC_WRITE 0x320, 0x20040
    APIC_WRITE 0x380, 1000000
1:  sti
    hlt
    cli
    cmp qword ptr [COUNTS + 0x40 * 8], 5
    jb 1b
    APIC_WRITE 0x380, 0
    SAY "five "
    # A masked timer counts and says nothing.
    mov qword ptr [COUNTS + 0x40 * 8], 0
    APIC_WRITE 0x320, 0x10040
    APIC_WRITE 0x380, 1000
    sti
2:  mov eax, APIC
    mov eax, [rax + 0x390]
    test eax, eax
    jnz 2b
    nop
    cli
    mov rax, [COUNTS + 0x40 * 8]
    SHOW rax
    # At a value of the TSC.
    APIC_WRITE 0x320, 0x40040
    mfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, 200000
    mov rbx, rax
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0x6e0
    wrmsr
    sti
    hlt
    cli
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, rbx
    setae al
    movzx eax, al
    SHOW rax
    mov rax, [COUNTS + 0x40 * 8]
    SHOW rax
    mov ecx, 0x6e0
    rdmsr
    or eax, edx
    SHOW rax
    # A deadline that is past comes at once; zero disarms.
    mov eax, 1
    xor edx, edx
    wrmsr
    sti
    hlt
    cli
    mov rax, [COUNTS + 0x40 * 8]
    SHOW rax
    jmp end_of_case

case_apic_registers:
    mov eax, APIC
    mov ebx, [rax + 0x20]
    SHOW rbx
    mov ebx, [rax + 0x30]
    and ebx, 0xff
    SHOW rbx
    APIC_ON
    APIC_WRITE 0xe0, 0xffffffff
    APIC_WRITE 0xd0, 0x01000000
    mov ebx, [rax + 0xd0]
    SHOW rbx
    # Logical destination.
    APIC_WRITE 0x310, 0x01000000
    APIC_WRITE 0x300, 0x4851
    sti
    AWAIT 0x51
    cli
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    # To nobody.
    APIC_WRITE 0x310, 0x02000000
    APIC_WRITE 0x300, 0x4852
    sti
    nop
    nop
    cli
    mov rax, [COUNTS + 0x52 * 8]
    SHOW rax
    # LVT entries are masked while the APIC is off by software.
    APIC_WRITE 0x350, 0x8700
    APIC_WRITE 0xf0, 0xff
    mov ebx, [rax + 0x350]
    and ebx, 0x10000
    SHOW rbx
    jmp end_of_case

case_x2apic:
    mov ecx, 0x1b
    rdmsr
    and eax, 0xd00
    SHOW rax
    rdmsr
    or eax, 0x400
    wrmsr
    mov ecx, 0x802
    rdmsr
    SHOW rax
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    mov dword ptr [EOI_BY], 2
    # Self IPI.
    mov ecx, 0x83f
    mov eax, 0x51
    wrmsr
    sti
    AWAIT 0x51
    cli
    mov rax, [COUNTS + 0x51 * 8]
    SHOW rax
    # One write of ICR, to id 0.
    mov ecx, 0x830
    mov eax, 0x4052
    xor edx, edx
    wrmsr
    sti
    AWAIT 0x52
    cli
    mov rax, [COUNTS + 0x52 * 8]
    SHOW rax
    # The logical id follows from the other.
    mov ecx, 0x80d
    rdmsr
    SHOW rax
    TRY 1f
    mov ecx, 0x80d
    wrmsr
1:  TRY 2f
    # No such register.
    mov ecx, 0x80e
    rdmsr
2:  TRY 4f
    # Not back to xAPIC, but by way of off.
    mov ecx, 0x1b
    rdmsr
    and eax, ~0x400
    wrmsr
4:  mov ecx, 0x1b
    rdmsr
    and eax, ~0xc00
    wrmsr
    rdmsr
    or eax, 0x800
    wrmsr
    rdmsr
    and eax, 0xd00
    SHOW rax
    jmp end_of_case

# IRQ 0 of the PIT through the 8259A pair, as the local APIC lets it through after power-up.
case_8259a:
    mov dword ptr [EOI_BY], 3
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x50
    out 0x21, al
    mov al, 0x58
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xfe
    out 0x21, al
    # Counter 0, once, after 2000 ticks.
    mov al, 0x30
    out 0x43, al
    mov al, 0xd0
    out 0x40, al
    mov al, 0x07
    out 0x40, al
    sti
    hlt
    cli
    mov rax, [LAST]
    SHOW rax
    mov rax, [COUNTS + 0x50 * 8]
    SHOW rax
    mov qword ptr [COUNTS + 0x50 * 8], 0
    # Again with IF clear: it waits.
    mov al, 0x30
    out 0x43, al
    mov al, 0xd0
    out 0x40, al
    xor eax, eax
    out 0x40, al
1:  mov al, 0x0a
    out 0x20, al
    in al, 0x20
    test al, 1
    jz 1b
    mov rax, [COUNTS + 0x50 * 8]
    SHOW rax
    sti
    nop
    nop
    nop
    AWAIT 0x50
    cli
    mov rax, [COUNTS + 0x50 * 8]
    SHOW rax
    jmp end_of_case

# Pin 2 of the I/O APIC is the PIT's, edge-triggered; the test device raises others.
case_ioapic:
    APIC_ON
    mov ebx, 0xfec00000
    mov dword ptr [rbx], 1
    mov eax, [rbx + 0x10]
    SHOW rax
    mov dword ptr [rbx], 0x14
    mov dword ptr [rbx + 0x10], 0x60
    mov al, 0x30
    out 0x43, al
    mov al, 0xd0
    out 0x40, al
    mov al, 0x07
    out 0x40, al
    sti
    hlt
    cli
    mov rax, [LAST]
    SHOW rax
    # Pin 20, level-triggered, held by the test device: it comes again after each end, until its handler has the wire let go.
    lea rax, [rip + held]
    mov [IDT + 0x62 * 16], ax
    shr rax, 16
    mov [IDT + 0x62 * 16 + 6], ax
    mov dword ptr [rbx], 0x10 + 40
    mov dword ptr [rbx + 0x10], 0x8062
    mov dx, 0x2000 + 20
    mov al, 1
    out dx, al
    sti
    mov ecx, 4000000
1:  cmp qword ptr [COUNTS + 0x62 * 8], 3
    jae 2f
    pause
    dec ecx
    jnz 1b
2:  cli
    mov rax, [COUNTS + 0x62 * 8]
    SHOW rax
    # Nothing is left in service, once the end has come to the I/O APIC.
    mov ecx, 100000
5:  mov eax, [rbx + 0x10]
    test eax, 0x4000
    jz 6f
    dec ecx
    jnz 5b
6:  SHOW rax
    # A second time, after it was low.
    mov qword ptr [COUNTS + 0x62 * 8], 0
    mov al, 1
    out dx, al
    sti
    mov ecx, 4000000
3:  cmp qword ptr [COUNTS + 0x62 * 8], 3
    jae 4f
    pause
    dec ecx
    jnz 3b
4:  cli
    mov rax, [COUNTS + 0x62 * 8]
    SHOW rax
    jmp end_of_case
held:
    push rax
    inc qword ptr [COUNTS + 0x62 * 8]
    cmp qword ptr [COUNTS + 0x62 * 8], 3
    jb 1f
    xor eax, eax
    out dx, al
1:  mov eax, APIC
    mov dword ptr [rax + 0xb0], 0
    pop rax
    iretq

case_nmi:
    # An NMI to itself, by the local APIC; another waits for IRET.
    APIC_ON
    lea rax, [rip + 1f]
    mov [IDT + 32], ax
    shr rax, 16
    mov [IDT + 38], ax
    xor ebx, ebx
    xor ebp, ebp
    APIC_WRITE 0x310, 0
    APIC_WRITE 0x300, 0x4400
    mov ecx, 1000
2:  pause
    dec ecx
    jnz 2b
    SHOW rbx
    SHOW rbp
    jmp end_of_case
1:  # The handler: the first sends another, which must not come inside it.
    push rax
    push rcx
    inc ebx
    cmp ebx, 1
    jne 3f
    mov eax, APIC
    mov dword ptr [rax + 0x300], 0x4400
    mov ecx, 100
4:  pause
    dec ecx
    jnz 4b
    mov ebp, ebx
3:  pop rcx
    pop rax
    iretq
