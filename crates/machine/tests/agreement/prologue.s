# What every case stands on: paging, descriptor tables, handlers, and words on the serial port. Copied to 2 MiB; nothing in
# it has an absolute address of its own. Entered in 64-bit mode, with the case's address in R15.

.set STACK,      0x2f0000
.set IDT,        0x300000
.set IDTR,       0x301000       # ten bytes each
.set GDTR,       0x301010
.set GDT,        0x301100
.set TSS,        0x302000
.set RECOVER,    0x303000       # where a fault goes on
.set EOI_BY,     0x303008       # 0 nobody, 1 local APIC's page, 2 its MSR, 3 the 8259A pair
.set LAST,       0x303010       # vector that came last
.set COUNTS,     0x304000       # by vector
.set DATA,       0x310000       # of cases
.set PML4,       0x400000
.set PDPT,       0x401000
.set PD,         0x402000       # four
.set PDPT_TEST,  0x406000
.set PD_TEST,    0x407000
.set PT_TEST,    0x408000
.set TEST,       0x8000000000   # linear address of PT_TEST's first page
.set APIC,       0xfee00000
.set KERNEL32, 0x08
.set KERNEL64, 0x10
.set KERNEL_DATA, 0x18
.set TASK, 0x20
.set USER32, 0x33
.set USER_DATA, 0x3b
.set USER64, 0x43
.set CODE16, 0x48
.set DATA16, 0x50
.set ABSENT, 0x58
.set GDT_LIMIT, 0x5f

.macro SAY text
    call 771f
    .asciz "\text"
771:
    pop rsi
    call puts
.endm

.macro SHOW value
    push rax
    mov rax, \value
    call puthex
    mov al, ' '
    call putc
    pop rax
.endm

# A fault from here on goes on at the label.
.macro TRY label
    push rax
    lea rax, [rip + \label]
    mov [RECOVER], rax
    pop rax
.endm

yado_entry:
    mov esp, STACK
    cld
    # Identity map of 4 GiB in 2 MiB pages, for all rings.
    mov edi, PML4
    xor eax, eax
    mov ecx, 0xa000 / 8
    rep stosq
    mov dword ptr [PML4], PDPT + 7
    mov dword ptr [PML4 + 8], PDPT_TEST + 7
    mov dword ptr [PDPT_TEST], PD_TEST + 7
    mov dword ptr [PD_TEST], PT_TEST + 7
    mov edi, PDPT
    mov eax, PD + 7
1:  mov [rdi], rax
    add rdi, 8
    add eax, 0x1000
    cmp edi, PDPT + 32
    jb 1b
    mov edi, PD
    mov eax, 0x87
2:  mov [rdi], rax
    add rdi, 8
    add rax, 0x200000
    cmp edi, PD + 0x4000
    jb 2b
    mov eax, PML4
    mov cr3, rax
    # Descriptors.
    lea rsi, [rip + descriptors]
    mov edi, GDT
    mov ecx, GDT_LIMIT + 1
    rep movsb
    mov edi, TSS
    xor eax, eax
    mov ecx, 0x1000 / 8
    rep stosq
    mov dword ptr [TSS + 4], STACK - 0x4000
    mov dword ptr [TSS + 0x66], 0x68
    mov word ptr [GDTR], GDT_LIMIT
    mov qword ptr [GDTR + 2], GDT
    lgdt [GDTR]
    push KERNEL64
    lea rax, [rip + 3f]
    push rax
    retfq
3:  mov eax, KERNEL_DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, TASK
    ltr ax
    # Gates: interrupt gates; 0x80 and 3 may be called by everybody.
    lea rsi, [rip + stubs]
    mov edi, IDT
    xor ecx, ecx
4:  mov rax, rsi
    mov [rdi], ax
    mov word ptr [rdi + 2], KERNEL64
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    mov qword ptr [rdi + 8], 0
    add rdi, 16
    add rsi, 16
    inc ecx
    cmp ecx, 256
    jb 4b
    or byte ptr [IDT + 0x80 * 16 + 5], 0x60
    or byte ptr [IDT + 3 * 16 + 5], 0x60
    mov word ptr [IDTR], 0xfff
    mov qword ptr [IDTR + 2], IDT
    lidt [IDTR]
    mov edi, RECOVER
    xor eax, eax
    mov ecx, 0x2000 / 8
    rep stosq
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    # All of the 8259A pair is masked.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    call r15
end_of_case:
    mov al, 10
    call putc
power_off:
    mov dx, 0x604
    mov ax, 0x3400
    out dx, ax
1:  hlt
    jmp 1b

putc:
    push rdx
    mov dx, 0x3f8
    out dx, al
    pop rdx
    ret

puts:
    push rax
1:  lodsb
    test al, al
    jz 2f
    call putc
    jmp 1b
2:  pop rax
    ret

# RAX in hexadecimal, without zeroes in front.
puthex:
    push rax
    push rcx
    push rdx
    mov rdx, rax
    mov ecx, 60
1:  mov rax, rdx
    shr rax, cl
    jnz 2f
    test ecx, ecx
    jz 2f
    sub ecx, 4
    jmp 1b
2:  mov rax, rdx
    shr rax, cl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 3f
    add al, 'a' - '0' - 10
3:  call putc
    sub ecx, 4
    jns 2b
    pop rdx
    pop rcx
    pop rax
    ret

.balign 16
stubs:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21)
    .else
    push 0
    .endif
    push vector
    jmp come
    .set vector, vector + 1
.endr
.balign 16

come:
    push rax
    push rcx
    push rdx
    push rsi
    cld
    mov rax, [rsp + 32]
    cmp eax, 32
    jae 5f
    mov al, '#'
    call putc
    mov rax, [rsp + 32]
    call puthex
    mov al, '/'
    call putc
    mov rax, [rsp + 40]
    call puthex
    cmp dword ptr [rsp + 32], 14
    jne 1f
    mov al, '@'
    call putc
    mov rax, cr2
    call puthex
1:  mov al, ' '
    call putc
    mov rax, [RECOVER]
    test rax, rax
    jnz 2f
    mov al, '!'
    call putc
    mov rax, [rsp + 48]
    call puthex
    jmp end_of_case
2:  mov [rsp + 48], rax
    and dword ptr [rsp + 64], ~0x100
    test byte ptr [rsp + 56], 3
    jz 4f
    # From another ring: back in the kernel's.
    mov qword ptr [rsp + 56], KERNEL64
    mov qword ptr [rsp + 80], KERNEL_DATA
    mov qword ptr [rsp + 72], STACK - 0x100
    jmp 4f
5:  mov [LAST], rax
    lock inc qword ptr [COUNTS + rax * 8]
    mov ecx, [EOI_BY]
    cmp ecx, 1
    jne 6f
    mov ecx, APIC
    mov dword ptr [rcx + 0xb0], 0
    jmp 4f
6:  cmp ecx, 2
    jne 7f
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    jmp 4f
7:  cmp ecx, 3
    jne 4f
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
4:  pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

.balign 8
descriptors:
    .quad 0
    .quad 0x00cf9b000000ffff    # 08: 32-bit code
    .quad 0x00af9b000000ffff    # 10: 64-bit code
    .quad 0x00cf93000000ffff    # 18: data
    .quad 0x0000893020000067    # 20: TSS at 0x302000
    .quad 0
    .quad 0x00cffb000000ffff    # 30: 32-bit code of ring 3
    .quad 0x00cff3000000ffff    # 38: data of ring 3
    .quad 0x00affb000000ffff    # 40: 64-bit code of ring 3
    .quad 0x00009b000000ffff    # 48: 16-bit code, base 0
    .quad 0x000093000000ffff    # 50: 16-bit data, base 0
    .quad 0x00cf13000000ffff    # 58: data that is not present
descriptors_end:
