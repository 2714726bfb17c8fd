# The modes of the processor, there and back.

case_compatibility:
    # 32-bit code in long mode.
    lea rax, [rip + 1f]
    push KERNEL32
    push rax
    retfq
.code32
1:  mov eax, 0x80000000
    inc eax
    # In 64-bit mode this would be a prefix and no increment.
    inc eax
    mov ebx, eax
    push ebx
    pop ecx
    # A far jump to the kernel's 64-bit segment.
    push KERNEL64
    call 2f
2:  pop eax
    .byte 0x05                  # add eax, the distance
    .long 3f - 2b
    push eax
    retf
.code64
3:  SHOW rbx
    SHOW rcx
    mov eax, cs
    SHOW rax
    jmp end_of_case

case_protected_and_real:
    # Out of long mode, into protected mode without paging, into real mode, and back. The part below 1 MiB is copied.
    lea rsi, [rip + low]
    mov edi, 0x8000
    .byte 0xb9                  # mov ecx, the length
    .long low_end - low
    rep movsb
    lea rax, [rip + returned]
    mov [0x7f00], rax
    mov word ptr [GDTR_LOW], GDT_LIMIT
    mov dword ptr [GDTR_LOW + 2], GDT
    mov eax, 0x8000
    push KERNEL32
    push rax
    retfq
returned:
    movzx eax, word ptr [0x7e00]
    SHOW rax
    movzx eax, word ptr [0x7e02]
    SHOW rax
    mov eax, [0x7e04]
    SHOW rax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0x500
    SHOW rax
    jmp end_of_case

.code32
low:
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    mov [0x7e04], eax
    and eax, ~0x100
    wrmsr
    mov esp, 0x7000
    .byte 0xea
    .long 0x8000 + low16 - low
    .word CODE16
.code16
low16:
    mov ax, DATA16
    mov ds, ax
    mov es, ax
    mov ss, ax
    # The real-mode interrupt table is at 0 again.
    mov dword ptr [0x7d00], 0x3ff
    mov word ptr [0x7d04], 0
    lidt [0x7d00]
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    .byte 0xea
    .word 0x8000 + low_real - low, 0
low_real:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7000
    # A segment is sixteen times its number.
    mov ax, 0x0700
    mov fs, ax
    mov word ptr fs:[0xe00], 0x1616
    # A software interrupt through the table.
    .byte 0xc7, 0x06            # mov word ptr [0x60 * 4], the handler
    .word 0x60 * 4, 0x8000 + low_handler - low
    mov word ptr [0x60 * 4 + 2], 0
    int 0x60
    # Back.
    lgdt [GDTR_LOW]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long 0x8000 + low32 - low
    .word KERNEL32
low_handler:
    mov word ptr [0x7e02], 0x6060
    iret
.set GDTR_LOW, 0x7d10
.code32
low32:
    mov ax, KERNEL_DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long 0x8000 + low64 - low
    .word KERNEL64
.code64
low64:
    mov esp, STACK - 8
    lidt [IDTR]
    mov rax, [0x7f00]
    jmp rax
low_end:
