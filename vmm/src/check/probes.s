# The code of the tiny guest. Each probe runs in 64-bit ring 0 from its first instruction, on a virtual machine of its own,
# and ends with OK or WRONG; an OUT to port 0x12 is an exit to the host and nothing else. Registers are zero at entry but
# for RSP (a stack) and RDI (4 KiB of zeroes, page-aligned).
#
# The host copies a probe to another address, so it reaches only its own labels, relative to RIP. Memory is mapped for the
# kernel at 0 and, a second time, for users at 0x400000; nothing is mapped at 0x200000.

.macro OK
    mov al, 1
    out 0x10, al
.endm

.macro WRONG
    mov al, 0
    out 0x10, al
.endm

.macro PROBE name
    .global kvrun_probe_\name
    kvrun_probe_\name:
.endm

.macro END name
    .global kvrun_probe_\name\()_end
    kvrun_probe_\name\()_end:
.endm

.pushsection .rodata.kvrun_probes, "a"

# What the interrupt table points to: 8 bytes per vector, reporting it.
PROBE handlers
    .set vector, 0
    .rept 32
        .balign 8
        mov al, vector
        out 0x11, al
        .set vector, vector + 1
    .endr
END handlers

# Vector 3 and the timer's: counts in R14. The probe tells in R13 where the local APIC wants its end of interrupt.
PROBE count_handler
    inc r14
    test r13, r13
    jz 4f
    mov rcx, r13
    xor eax, eax
    xor edx, edx
    wrmsr
4:  iretq
END count_handler

# Vector 14: goes on where R15 says, if the probe expects a fault.
PROBE fault_handler
    test r15, r15
    jz 4f
    inc r14
    add rsp, 8
    mov [rsp], r15
    iretq
4:  mov al, 14
    out 0x11, al
END fault_handler

PROBE nothing
    OK
END nothing

PROBE cpuid
    xor eax, eax
    cpuid
    test eax, eax
    jz 4f
    OK
4:  WRONG
END cpuid

PROBE rdtsc
    rdtsc
    mov r8, rax
    lfence
    rdtsc
    cmp rax, r8
    je 4f
    OK
4:  WRONG
END rdtsc

PROBE fences
    mfence
    lfence
    sfence
    pause
    OK
END fences

PROBE string
    mov rsi, rdi
    mov rbx, rdi
    mov rax, 0x1122334455667788
    mov ecx, 16
    rep stosq
    mov ecx, 128
    rep movsb
    cmp [rbx + 248], rax
    jne 4f
    OK
4:  WRONG
END string

PROBE lock_xadd
    mov qword ptr [rdi], 40
    mov eax, 2
    lock xadd [rdi], rax
    cmp rax, 40
    jne 4f
    cmp qword ptr [rdi], 42
    jne 4f
    lock bts qword ptr [rdi], 6
    cmp qword ptr [rdi], 106
    jne 4f
    OK
4:  WRONG
END lock_xadd

PROBE cmpxchg16b
    mov qword ptr [rdi], 1
    mov qword ptr [rdi + 8], 2
    mov eax, 1
    mov edx, 2
    mov ebx, 3
    mov ecx, 4
    lock cmpxchg16b [rdi]
    jnz 4f
    cmp qword ptr [rdi], 3
    jne 4f
    cmp qword ptr [rdi + 8], 4
    jne 4f
    OK
4:  WRONG
END cmpxchg16b

PROBE popcnt
    mov eax, 0xf0f0
    popcnt rax, rax
    cmp eax, 8
    jne 4f
    OK
4:  WRONG
END popcnt

PROBE fxsave
    fninit
    fxsave [rdi]
    cmp word ptr [rdi], 0x37f
    jne 4f
    fxrstor [rdi]
    OK
4:  WRONG
END fxsave

PROBE sse2
    mov eax, 21
    movq xmm0, rax
    movdqa xmm1, xmm0
    paddq xmm0, xmm1
    movdqu [rdi], xmm0
    cmp qword ptr [rdi], 42
    jne 4f
    OK
4:  WRONG
END sse2

PROBE xsave
    mov rax, cr4
    or eax, 1 << 18             # OSXSAVE
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3                  # x87 and SSE
    xsetbv
    out 0x12, al                # what is set must outlive an exit to the host
    xgetbv
    cmp eax, 3
    jne 4f
    mov eax, 42
    movq xmm3, rax
    mov eax, 3
    xsave [rdi]
    pxor xmm3, xmm3
    mov eax, 3
    xrstor [rdi]
    movq rax, xmm3
    cmp rax, 42
    jne 4f
    OK
4:  WRONG
END xsave

PROBE xsaves
    mov rax, cr4
    or eax, 1 << 18
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3
    xsetbv
    mov eax, 42
    movq xmm3, rax
    mov eax, 3
    xsaves [rdi]
    pxor xmm3, xmm3
    mov eax, 3
    xrstors [rdi]
    movq rax, xmm3
    cmp rax, 42
    jne 4f
    OK
4:  WRONG
END xsaves

PROBE int3
    int3
    cmp r14, 1
    jne 4f
    OK
4:  WRONG
END int3

PROBE page_fault
    lea r15, [rip + 2f]
    mov eax, 0x200000           # not mapped
    mov rbx, [rax]
    jmp 4f
2:  cmp r14, 1
    jne 4f
    mov rbx, cr2
    cmp rbx, rax
    jne 4f
    OK
4:  WRONG
END page_fault

PROBE iretq
    mov rbx, rsp
    xor eax, eax
    mov ax, ss
    push rax
    push rbx
    pushfq
    mov ax, cs
    push rax
    lea rax, [rip + 2f]
    push rax
    iretq
    jmp 4f
2:  cmp rsp, rbx
    jne 4f
    OK
4:  WRONG
END iretq

PROBE msr
    mov ecx, 0xc0000102         # KERNEL_GS_BASE
    mov eax, 0x5000
    xor edx, edx
    wrmsr
    xor eax, eax
    rdmsr
    cmp eax, 0x5000
    jne 4f
    OK
4:  WRONG
END msr

PROBE swapgs
    mov ecx, 0xc0000102         # KERNEL_GS_BASE
    mov rax, rdi
    xor edx, edx
    wrmsr
    mov qword ptr [rdi], 42
    swapgs
    mov rax, gs:[0]
    cmp rax, 42
    jne 4f
    OK
4:  WRONG
END swapgs

PROBE control_registers
    mov rax, cr0
    xor eax, 1 << 16            # WP
    mov cr0, rax
    mov rbx, cr0
    cmp rax, rbx
    jne 4f
    mov rax, cr3
    mov cr3, rax
    mov rax, cr4
    xor eax, 1 << 7             # PGE
    mov cr4, rax
    mov rbx, cr4
    cmp rax, rbx
    jne 4f
    mov eax, 3
    mov cr8, rax
    mov rbx, cr8
    cmp rax, rbx
    jne 4f
    OK
4:  WRONG
END control_registers

PROBE invlpg
    mov qword ptr [rdi], 42
    invlpg [rdi]
    cmp qword ptr [rdi], 42
    jne 4f
    OK
4:  WRONG
END invlpg

PROBE descriptor_tables
    sgdt [rdi]
    lgdt [rdi]
    sidt [rdi + 16]
    lidt [rdi + 16]
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    # LTR wants a TSS that is not busy: clear that bit of the one in use.
    mov rbx, [rdi + 2]
    and byte ptr [rbx + 0x28 + 5], 0xfd
    mov ax, 0x28
    ltr ax
    str bx
    cmp bx, 0x28
    jne 4f
    OK
4:  WRONG
END descriptor_tables

PROBE smap
    mov rax, cr4
    or eax, 1 << 21             # SMAP
    mov cr4, rax
    stac
    mov rbx, [rdi + 0x400000]   # the same page, as a user's
    clac
    lea r15, [rip + 2f]
    mov rbx, [rdi + 0x400000]
    jmp 4f
2:  cmp r14, 1
    jne 4f
    OK
4:  WRONG
END smap

PROBE syscall
    mov ecx, 0xc0000080         # EFER
    rdmsr
    or eax, 1                   # SCE
    wrmsr
    mov ecx, 0xc0000081         # STAR: SYSCALL takes CS 0x08 and SS 0x10
    xor eax, eax
    mov edx, 0x00100008
    wrmsr
    mov ecx, 0xc0000082         # LSTAR
    lea rax, [rip + 3f]
    mov rdx, rax
    shr rdx, 32
    wrmsr
    mov ecx, 0xc0000084         # SYSCALL_MASK
    mov eax, 0x200
    xor edx, edx
    wrmsr
    push 0x1b                   # SS, and CS below: ring 3
    push rsp
    push 2
    push 0x23
    lea rax, [rip + 2f + 0x400000]
    push rax
    iretq
2:  mov ax, cs
    and eax, 3
    mov ebx, eax
    syscall
3:  cmp ebx, 3
    jne 4f
    mov ax, cs
    test al, 3
    jnz 4f
    OK
4:  WRONG
END syscall

PROBE timer
    mov ecx, 0x1b               # APIC_BASE
    rdmsr
    or eax, 0xc00               # enabled, x2APIC
    wrmsr
    mov r13d, 0x80b             # EOI
    xor edx, edx
    mov ecx, 0x80f              # spurious vector: software enable
    mov eax, 0x1ff
    wrmsr
    mov ecx, 0x832              # LVT timer: TSC deadline mode, vector 0x40
    mov eax, 0x40040
    wrmsr
    mfence
    rdtsc
    mov r8, rax
    mov ecx, 0x6e0              # TSC_DEADLINE
    add eax, 100000
    adc edx, 0
    wrmsr
    sti
2:  pause
    test r14, r14
    jz 2b
    cli
    OK
END timer

.popsection
