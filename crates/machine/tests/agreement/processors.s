# Several processors: start-up, messages among them, one memory.

.set STARTED, DATA + 0x100
.set TURN, DATA + 0x108
.set ROUNDS, DATA + 0x110
.set SUM, DATA + 0x118
.set GO, DATA + 0x120

# Three more processors start at 0x9000; each adds its number, then all count together.
case_processors:
    mov eax, APIC
    mov dword ptr [rax + 0xf0], 0x1ff
    mov dword ptr [EOI_BY], 1
    mov qword ptr [STARTED], 0
    mov qword ptr [SUM], 0
    mov qword ptr [GO], 0
    lea rsi, [rip + trampoline]
    mov edi, 0x9000
    .byte 0xb9                  # mov ecx, the length
    .long trampoline_end - trampoline
    rep movsb
    lea rax, [rip + other_processor]
    mov [0x9f00], rax
    mov word ptr [0x9f10], GDT_LIMIT
    mov dword ptr [0x9f12], GDT
    # INIT to all but itself, then start-up twice, as kernels do.
    mov eax, APIC
    mov dword ptr [rax + 0x300], 0xc4500
    mov ecx, 10000
1:  pause
    loop 1b
    mov dword ptr [rax + 0x300], 0xc4609
    mov ecx, 10000
2:  pause
    loop 2b
    mov dword ptr [rax + 0x300], 0xc4609
3:  pause
    cmp qword ptr [STARTED], 3
    jne 3b
    mov rax, [SUM]
    SHOW rax
    # A second start-up message does nothing to one that runs.
    mov eax, APIC
    mov dword ptr [rax + 0x310], 0x01000000
    mov dword ptr [rax + 0x300], 0x4609
    mov qword ptr [TURN], 0
    mov qword ptr [GO], 1
    # 3000 locked additions, 1000 each.
4:  pause
    cmp qword ptr [TURN], 3000
    jne 4b
    SAY "counted "
    # A message to each in turn, answered by a message.
    mov ebx, 1
5:  mov qword ptr [COUNTS + 0x91 * 8], 0
    mov eax, APIC
    mov ecx, ebx
    shl ecx, 24
    mov [rax + 0x310], ecx
    mov dword ptr [rax + 0x300], 0x4090
    sti
6:  hlt
    cmp qword ptr [COUNTS + 0x91 * 8], 0
    je 6b
    cli
    inc ebx
    cmp ebx, 4
    jb 5b
    mov rax, [COUNTS + 0x90 * 8]
    SHOW rax
    # To all others at once.
    mov qword ptr [COUNTS + 0x92 * 8], 0
    mov eax, APIC
    mov dword ptr [rax + 0x300], 0xc4092
7:  pause
    cmp qword ptr [COUNTS + 0x92 * 8], 3
    jb 7b
    SAY "all"
    jmp end_of_case

other_processor:
    # One at a time, the stack is by number.
    mov eax, APIC
    mov ebx, [rax + 0x20]
    shr ebx, 24
    mov esp, ebx
    shl esp, 12
    add esp, 0x500000
    lidt [IDTR]
    mov dword ptr [rax + 0xf0], 0x1ff
    lock add [SUM], rbx
    lock inc qword ptr [STARTED]
1:  pause
    cmp qword ptr [GO], 1
    jne 1b
    mov ecx, 1000
2:  lock inc qword ptr [TURN]
    loop 2b
    # Each answers when vector 0x90 comes.
3:  cli
    mov rbp, [COUNTS + 0x90 * 8]
    sti
    hlt
    cli
    cmp qword ptr [LAST], 0x90
    jne 3b
    mov eax, APIC
    mov dword ptr [rax + 0x310], 0
    mov dword ptr [rax + 0x300], 0x4091
    jmp 3b

# The last of three hundred: it starts, is interrupted by a message of another processor and by the I/O APIC, and answers; all
# of it with an APIC id of more than eight bits.

.set FAR, 299

case_far_processor:
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    mov dword ptr [EOI_BY], 2
    lea rsi, [rip + trampoline]
    mov edi, 0x9000
    .byte 0xb9                  # mov ecx, the length
    .long trampoline_end - trampoline
    rep movsb
    lea rax, [rip + far_processor]
    mov [0x9f00], rax
    mov word ptr [0x9f10], GDT_LIMIT
    mov dword ptr [0x9f12], GDT
    mov ecx, 0x830
    mov edx, FAR
    mov eax, 0x4500
    wrmsr
    mov eax, 0x4609
    wrmsr
1:  pause
    cmp qword ptr [STARTED], 1
    jne 1b
    mov rax, [SUM]
    SHOW rax
    # A message there, and one back.
    mov eax, 0x4090
    wrmsr
    sti
2:  hlt
    cmp qword ptr [COUNTS + 0x91 * 8], 1
    jne 2b
    cli
    mov rax, [COUNTS + 0x90 * 8]
    SHOW rax
    # Pin 20 of the I/O APIC: destination bits 7-0 and 14-8.
    mov ebx, 0xfec00000
    mov dword ptr [rbx], 0x11 + 40
    mov dword ptr [rbx + 0x10], (FAR & 0xff) << 24 | (FAR >> 8) << 17
    mov dword ptr [rbx], 0x10 + 40
    mov dword ptr [rbx + 0x10], 0x92
    mov dx, 0x2000 + 20
    mov al, 1
    out dx, al
3:  pause
    cmp qword ptr [COUNTS + 0x92 * 8], 1
    jne 3b
    # What the guest is told of such messages: KVM_FEATURE_MSI_EXT_DEST_ID.
    mov eax, 0x40000001
    cpuid
    shr eax, 15
    and eax, 1
    SHOW rax
    SAY "heard"
    jmp end_of_case

far_processor:
    mov esp, 0x600000
    lidt [IDTR]
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    mov ecx, 0x802
    rdmsr
    mov [SUM], rax
    mov qword ptr [STARTED], 1
    sti
1:  hlt
    cmp qword ptr [COUNTS + 0x90 * 8], 1
    jne 1b
    mov ecx, 0x830
    xor edx, edx
    mov eax, 0x4091
    wrmsr
2:  hlt
    jmp 2b

.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [0x9f10]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long 0x9000 + trampoline32 - trampoline
    .word KERNEL32
.code32
trampoline32:
    mov ax, KERNEL_DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, 0x620
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80000013
    mov cr0, eax
    .byte 0xea
    .long 0x9000 + trampoline64 - trampoline
    .word KERNEL64
.code64
trampoline64:
    mov rax, [0x9f00]
    jmp rax
trampoline_end:
