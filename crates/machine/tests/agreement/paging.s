# Page tables: sizes, permissions, accessed and modified bits, what a fault says.

case_pages:
    mov rbx, TEST
    TRY 1f
    mov rax, [rbx]
1:  mov qword ptr [PT_TEST], DATA + 1
    TRY 2f
    mov rax, [rbx]
    SAY "read "
    mov rax, cr0
    or eax, 0x10000
    mov cr0, rax
    mov [rbx], rax
2:  mov rax, cr0
    and eax, ~0x10000
    mov cr0, rax
    TRY 3f
    mov dword ptr [rbx], 0x1234
    mov eax, [DATA]
    SHOW rax
3:  mov rax, [PT_TEST]
    and eax, 0xfff
    SHOW rax
    # A large page over the same range, after its table: 2 MiB at 2 MiB.
    mov qword ptr [PD_TEST], 0x200083
    invlpg [rbx]
    mov eax, [rbx + DATA - 0x200000]
    SHOW rax
    mov rax, [PD_TEST]
    and eax, 0xfff
    SHOW rax
    mov qword ptr [PD_TEST], PT_TEST + 7
    # Reserved bits.
    mov rax, 1 << 51
    or rax, DATA + 3
    mov [PT_TEST], rax
    mov rax, cr3
    mov cr3, rax
    TRY 5f
    mov rax, [rbx]
5:  mov qword ptr [PT_TEST], 0
    invlpg [rbx]
    TRY 4f
    mov byte ptr [rbx + 5], 0
4:  jmp end_of_case

case_execute_disable:
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x800
    wrmsr
    mov byte ptr [DATA], 0xc3
    mov rax, DATA + 3
    bts rax, 63
    mov [PT_TEST], rax
    mov rbx, TEST
    TRY 1f
    call rbx
    SAY "ran"
1:  mov esp, STACK - 8
    btr qword ptr [PT_TEST], 63
    invlpg [rbx]
    TRY 2f
    call rbx
    SAY "ran "
2:  # Without NXE bit 63 is reserved.
    mov ecx, 0xc0000080
    rdmsr
    and eax, ~0x800
    wrmsr
    bts qword ptr [PT_TEST], 63
    invlpg [rbx]
    TRY 3f
    mov rax, [rbx]
3:  jmp end_of_case

case_global_pages:
    # A global translation outlives a load of CR3 until CR4.PGE is cleared; INVLPG takes it too. Whether a processor
    # still has one is its own affair: only that none is used after it was taken is told.
    mov rax, cr4
    or eax, 0x80
    mov cr4, rax
    mov rbx, TEST
    mov dword ptr [DATA], 1
    mov dword ptr [DATA + 0x1000], 2
    mov qword ptr [PT_TEST], DATA + 0x103
    mov eax, [rbx]
    SHOW rax
    mov qword ptr [PT_TEST], DATA + 0x1103
    invlpg [rbx]
    mov eax, [rbx]
    SHOW rax
    mov qword ptr [PT_TEST], DATA + 0x103
    mov rax, cr4
    and eax, ~0x80
    mov cr4, rax
    mov eax, [rbx]
    SHOW rax
    jmp end_of_case

case_crossing_pages:
    # A store over the border of two pages, the second of which cannot be written: nothing is stored.
    mov qword ptr [PT_TEST], DATA + 3
    mov qword ptr [PT_TEST + 8], 0
    mov rbx, TEST + 0xffc
    mov dword ptr [DATA + 0xffc], 0x11111111
    TRY 1f
    mov rax, 0x2222222222222222
    mov [rbx], rax
1:  mov eax, [DATA + 0xffc]
    SHOW rax
    mov qword ptr [PT_TEST + 8], DATA + 0x5003
    invlpg [rbx + 8]
    mov rax, 0x3333333344444444
    mov [rbx], rax
    mov eax, [DATA + 0xffc]
    SHOW rax
    mov eax, [DATA + 0x5000]
    SHOW rax
    jmp end_of_case

case_own_code:
    # An instruction that the one before it writes, in the same and through another linear address.
    mov byte ptr [rip + 1f + 1], 0x55
1:  mov al, 0x11
    movzx eax, al
    SHOW rax
    lea rax, [rip + 2f + 1]
    mov rcx, rax
    and ecx, 0xfff
    and rax, ~0xfff
    or rax, 3
    mov [PT_TEST], rax
    mov rdx, TEST
    mov byte ptr [rdx + rcx], 0x66
    jmp 2f
2:  mov al, 0x22
    movzx eax, al
    SHOW rax
    # In a loop, each time another.
    xor ebx, ebx
    mov ecx, 40
3:  mov [rip + 4f + 2], cl
4:  add ebx, 0x7f
    loop 3b
    SHOW rbx
    jmp end_of_case
