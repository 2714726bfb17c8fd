# Accesses to devices: ports and memory, every width and every form of instruction. The test device keeps what it is given.

.set PORT, 0xe0
.set MEMORY, 0xff000000

case_ports:
    mov eax, 0x11223344
    mov dx, PORT
    out dx, eax
    xor eax, eax
    in eax, dx
    SHOW rax
    mov rax, -1
    in al, PORT
    SHOW rax
    mov rax, -1
    in ax, PORT
    SHOW rax
    mov rax, -1
    in eax, PORT
    SHOW rax
    mov al, 0x99
    out PORT, al
    xor eax, eax
    in eax, dx
    SHOW rax
    # Nobody there.
    mov dx, 0x1230
    in al, dx
    SHOW rax
    in eax, dx
    SHOW rax
    # Strings, both directions.
    mov dx, PORT
    mov edi, DATA
    mov ecx, 5
    rep insd
    mov rax, rdi
    SHOW rax
    mov eax, [DATA + 16]
    SHOW rax
    mov dword ptr [DATA], 0x04030201
    mov dword ptr [DATA + 4], 0x08070605
    mov esi, DATA
    mov ecx, 7
    rep outsb
    SHOW rsi
    in al, dx
    SHOW rax
    std
    mov esi, DATA + 6
    mov ecx, 3
    rep outsw
    cld
    SHOW rsi
    in ax, dx
    SHOW rax
    # One without REP, one with a count of zero.
    mov edi, DATA + 64
    insb
    xor ecx, ecx
    rep insb
    SHOW rdi
    # Ports above the first 256 only by DX; a string of 3000 bytes, more than a page of answers.
    mov edi, DATA
    mov ecx, 3000
    mov dx, PORT
    rep insb
    SHOW rcx
    movzx eax, byte ptr [DATA + 2999]
    SHOW rax
    jmp end_of_case

case_port_string_fault:
    mov dword ptr [DATA + 0x40], 0
    mov dx, PORT
    # A string over the border of a page that is not there: what came before it stays.
    mov qword ptr [PT_TEST], DATA + 3
    mov qword ptr [PT_TEST + 8], 0
    mov rdi, TEST + 0xff8
    mov ecx, 4
    TRY 1f
    rep insd
1:  SHOW rcx
    mov rax, TEST
    sub rdi, rax
    SHOW rdi
    jmp end_of_case

case_memory_moves:
    mov ebx, MEMORY
    mov rax, 0x8877665544332211
    mov [rbx], rax
    mov rcx, [rbx]
    SHOW rcx
    mov ecx, [rbx + 4]
    SHOW rcx
    xor ecx, ecx
    mov cx, [rbx + 2]
    SHOW rcx
    xor ecx, ecx
    mov ch, [rbx + 7]
    SHOW rcx
    movzx ecx, byte ptr [rbx + 7]
    SHOW rcx
    movsx rcx, byte ptr [rbx + 7]
    SHOW rcx
    movzx ecx, word ptr [rbx + 6]
    SHOW rcx
    movsx ecx, word ptr [rbx + 6]
    SHOW rcx
    movsxd rcx, dword ptr [rbx + 4]
    SHOW rcx
    # Not aligned.
    mov ecx, [rbx + 1]
    SHOW rcx
    mov rcx, [rbx + 3]
    SHOW rcx
    # Immediates.
    mov byte ptr [rbx], 0x5a
    mov word ptr [rbx + 2], 0x1234
    mov dword ptr [rbx + 4], 0xcafebabe
    mov rcx, [rbx]
    SHOW rcx
    mov qword ptr [rbx], -2
    mov rcx, [rbx]
    SHOW rcx
    # The accumulator's form with an address in the instruction.
    movabs eax, [0xff000000]
    SHOW rax
    mov rax, 0x0102030405060708
    movabs [0xff000008], rax
    mov rcx, [rbx + 8]
    SHOW rcx
    jmp end_of_case

case_memory_arithmetic:
    mov ebx, MEMORY
    mov dword ptr [rbx], 0x7fffffff
    add dword ptr [rbx], 1
    pushfq
    pop rcx
    and ecx, 0x8d5
    SHOW rcx
    mov ecx, [rbx]
    SHOW rcx
    sub byte ptr [rbx + 3], 0x80
    or word ptr [rbx], 0x0ff0
    and dword ptr [rbx], 0xff0
    xor dword ptr [rbx], -1
    mov ecx, [rbx]
    SHOW rcx
    inc dword ptr [rbx]
    neg dword ptr [rbx]
    not dword ptr [rbx]
    mov ecx, [rbx]
    SHOW rcx
    stc
    adc byte ptr [rbx], 0
    mov ecx, [rbx]
    SHOW rcx
    cmp byte ptr [rbx], 0x10
    setb cl
    movzx ecx, cl
    SHOW rcx
    test dword ptr [rbx], 0x10
    setnz cl
    movzx ecx, cl
    SHOW rcx
    mov eax, 7
    imul eax, [rbx], 3
    SHOW rax
    shl dword ptr [rbx], 3
    mov ecx, [rbx]
    SHOW rcx
    # With a register as destination.
    mov eax, 5
    add eax, [rbx]
    SHOW rax
    cmp eax, [rbx]
    seta cl
    movzx ecx, cl
    SHOW rcx
    jmp end_of_case

case_memory_atomics:
    mov ebx, MEMORY
    mov dword ptr [rbx], 0x1234
    mov eax, 0x5678
    xchg eax, [rbx]
    SHOW rax
    mov eax, 0x5678
    mov ecx, 0x9abc
    lock cmpxchg [rbx], ecx
    setz al
    movzx eax, al
    SHOW rax
    mov eax, 1
    lock cmpxchg [rbx], ecx
    SHOW rax
    mov eax, 0x10
    lock xadd [rbx], eax
    SHOW rax
    lock inc byte ptr [rbx]
    lock bts dword ptr [rbx], 31
    setc al
    movzx eax, al
    SHOW rax
    mov eax, [rbx]
    SHOW rax
    bt dword ptr [rbx], 31
    setc al
    movzx eax, al
    SHOW rax
    jmp end_of_case

case_memory_strings:
    mov ebx, MEMORY
    mov edi, MEMORY
    mov eax, 0x31323334
    mov ecx, 4
    rep stosd
    SHOW rdi
    mov rcx, [rbx + 8]
    SHOW rcx
    # From device to RAM and from RAM to device.
    mov esi, MEMORY
    mov edi, DATA
    mov ecx, 2
    rep movsq
    mov rax, [DATA + 8]
    SHOW rax
    mov dword ptr [DATA], 0x0d0c0b0a
    mov esi, DATA
    mov edi, MEMORY + 1
    mov ecx, 3
    rep movsb
    mov rax, [rbx]
    SHOW rax
    # From device to device.
    mov esi, MEMORY
    mov edi, MEMORY + 16
    movsd
    mov eax, [rbx + 16]
    SHOW rax
    mov esi, MEMORY
    lodsw
    SHOW rax
    # Compared.
    mov esi, MEMORY
    mov edi, MEMORY + 16
    cmpsd
    setz al
    movzx eax, al
    SHOW rax
    mov edi, MEMORY
    mov al, 0x0b
    mov ecx, 8
    repne scasb
    SHOW rcx
    jmp end_of_case

case_memory_stack:
    mov ebx, MEMORY
    mov qword ptr [rbx], 0x1111
    push qword ptr [rbx]
    pop rax
    SHOW rax
    push 0x2222
    pop qword ptr [rbx + 8]
    mov rax, [rbx + 8]
    SHOW rax
    # The stack itself.
    mov rbp, rsp
    mov esp, MEMORY + 64
    push 0x3333
    pop rax
    mov rsp, rbp
    SHOW rax
    mov rax, [rbx + 56]
    SHOW rax
    jmp end_of_case

case_memory_vectors:
    mov ebx, MEMORY
    mov rax, 0x0123456789abcdef
    mov [rbx], rax
    mov [rbx + 8], rax
    movdqu xmm0, [rbx]
    movdqu [DATA], xmm0
    mov rax, [DATA + 8]
    SHOW rax
    movdqu [rbx + 16], xmm0
    mov rax, [rbx + 24]
    SHOW rax
    movups xmm2, [rbx]
    movaps [rbx + 32], xmm2
    mov rax, [rbx + 40]
    SHOW rax
    mov eax, 0x77
    movnti [rbx], eax
    mov rax, [rbx]
    SHOW rax
    jmp end_of_case

case_memory_paged:
    # A device's page through another linear address, and an access that begins in RAM and ends in it.
    mov dword ptr [MEMORY_LOW], 0
    mov qword ptr [PT_TEST], DATA + 3
    mov rax, 0xff000003
    mov [PT_TEST + 8], rax
    mov rbx, TEST + 0xffc
    mov rax, 0x8899aabbccddeeff
    mov [rbx], rax
    mov eax, [DATA + 0xffc]
    SHOW rax
    mov ecx, MEMORY
    mov eax, [rcx]
    SHOW rax
    mov rax, [rbx]
    SHOW rax
    mov rax, [rbx + 1]
    mov eax, eax
    SHOW rax
    # Reads of nothing are all ones.
    mov ebx, 0xfd000000
    mov rax, [rbx]
    SHOW rax
    mov [rbx], rax
    movzx eax, byte ptr [rbx]
    SHOW rax
    jmp end_of_case
.set MEMORY_LOW, DATA + 0x2000

# A virtio disk: three sectors, one after the other, each awaited by its message. Its worker hears the notification, by an exit or
# without one, and interrupts.

.set ECAM, 0xe0000000
.set DISK, 0x10421af4           # vendor and device (virtio 1.3, 4.1.2)
.set DISK_BAR, 0xd0000000
.set DISK_VECTOR, 0x60
.set RING, DATA + 0x1000        # descriptors, available ring, used ring: a page each
.set HEADER, DATA + 0x4000
.set SECTOR, DATA + 0x5000
.set DONE, DATA + 0x6000

case_disk:
    mov ebx, ECAM
    mov ecx, 32
1:  cmp dword ptr [rbx], DISK
    je 2f
    add ebx, 0x8000
    dec ecx
    jnz 1b
    SAY "none"
    ret
    # Where the identity map reaches.
2:  mov word ptr [rbx + 4], 0
    mov edi, DISK_BAR
    mov [rbx + 0x10], edi
    mov dword ptr [rbx + 0x14], 0
    mov word ptr [rbx + 4], 6
    # MSI-X on, its first vector to APIC 0.
    movzx esi, byte ptr [rbx + 0x34]
3:  cmp byte ptr [rbx + rsi], 0x11
    je 4f
    movzx esi, byte ptr [rbx + rsi + 1]
    jmp 3b
4:  mov word ptr [rbx + rsi + 2], 0x8000
    mov dword ptr [rdi + 0x4000], 0xfee00000
    mov dword ptr [rdi + 0x4004], 0
    mov dword ptr [rdi + 0x4008], DISK_VECTOR
    mov dword ptr [rdi + 0x400c], 0
    mov dword ptr [EOI_BY], 1
    mov ecx, APIC
    mov dword ptr [rcx + 0xf0], 0x1ff
    # ACKNOWLEDGE, DRIVER; VERSION_1; FEATURES_OK.
    mov byte ptr [rdi + 20], 0
    mov byte ptr [rdi + 20], 3
    mov dword ptr [rdi + 8], 0
    mov dword ptr [rdi + 12], 0
    mov dword ptr [rdi + 8], 1
    mov dword ptr [rdi + 12], 1
    mov byte ptr [rdi + 20], 11
    # Queue 0 of eight entries; DRIVER_OK.
    mov word ptr [rdi + 22], 0
    mov word ptr [rdi + 24], 8
    mov word ptr [rdi + 26], 0
    mov dword ptr [rdi + 32], RING
    mov dword ptr [rdi + 36], 0
    mov dword ptr [rdi + 40], RING + 0x1000
    mov dword ptr [rdi + 44], 0
    mov dword ptr [rdi + 48], RING + 0x2000
    mov dword ptr [rdi + 52], 0
    mov word ptr [rdi + 28], 1
    mov byte ptr [rdi + 20], 15
    # A read: header, 512 bytes, status.
    mov esi, RING
    mov qword ptr [rsi], HEADER
    mov dword ptr [rsi + 8], 16
    mov dword ptr [rsi + 12], 0x10001
    mov qword ptr [rsi + 16], SECTOR
    mov dword ptr [rsi + 24], 512
    mov dword ptr [rsi + 28], 0x20003
    mov qword ptr [rsi + 32], DONE
    mov dword ptr [rsi + 40], 1
    mov dword ptr [rsi + 44], 2
    xor r12d, r12d
5:  mov [HEADER + 8], r12
    mov byte ptr [DONE], 0xff
    inc r12
    mov [RING + 0x1002], r12w
    mov word ptr [rdi + 0x3000], 0
6:  cli
    cmp [COUNTS + DISK_VECTOR * 8], r12
    jae 7f
    sti
    hlt
    jmp 6b
7:  mov eax, [SECTOR]
    SHOW rax
    movzx eax, byte ptr [DONE]
    SHOW rax
    cmp r12d, 3
    jb 5b
    movzx eax, word ptr [RING + 0x2002]
    SHOW rax
    mov rax, [COUNTS + DISK_VECTOR * 8]
    SHOW rax
    mov byte ptr [rdi + 20], 0
    ret
