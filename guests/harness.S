# harness - takes inputs from a harness, and adds up the bytes of each
#
# Shows what a guest does that is run again and again from a snapshot: it says where its input
# goes, says that it is ready, and is run from there on once for each input. To the guest it is as
# if the write to READY took a while, and an input came meanwhile. docs/harness.md has the
# registers, and the other side:
#     harness = Harness()
#     with Machine.from_image("harness") as machine:
#         harness.attach(machine)
#         machine.run(timeout=1)
#         snapshot = machine.snapshot()
#     inputs = [harness.pack(data) for data in (b"abc", b"\xff" * 100)]
#     for one in runs(snapshot, inputs, harness.buffer, timeout=1, attach=harness.attach):
#         print(one.outcome, one.value)
# An empty input counts as a crash, with code 1.
#
# At entry: ring 3, as kvmpy leaves it: 64-bit mode, memory one to one, MMIO at the harness's
# address. Without a harness nothing answers there, and reads give all ones.
#
# mode: long
# ring: 3
# load: 0x1000
# memory: 1M
# output: "No harness is attached\n"

        .equ CONSOLE, 0xe9
        .equ POWER, 0x604
        .equ POWER_OFF, 0x2000

        .equ HARNESS, 0xd0010000
        .equ IDENTITY, 0x00             # offsets of registers
        .equ BUFFER, 0x08
        .equ BUFFER_SIZE, 0x10
        .equ READY, 0x38
        .equ CRASH_ADDRESS, 0x40
        .equ CRASH, 0x48
        .equ DONE, 0x50
        .equ THERE, 0x4e524879706d766b  # "kvmpyHRN": the identity of a harness

        .equ INPUT, 0x4000              # 8 bytes of length, and the input
        .equ INPUT_SIZE, 0x1000

start:
        cld
        mov     ebx, HARNESS            # writing EBX clears the upper half of RBX
        mov     rax, [rbx + IDENTITY]
        mov     rcx, THERE
        cmp     rax, rcx
        jne     alone

        mov     eax, INPUT
        mov     [rbx + BUFFER], rax
        mov     eax, INPUT_SIZE
        mov     [rbx + BUFFER_SIZE], rax
        mov     [rbx + READY], eax      # any value; here the snapshot is taken

        mov     rcx, [INPUT]
        lea     rsi, [INPUT + 8]
        xor     edx, edx
        xor     eax, eax
        test    rcx, rcx
        jz      nothing
add_up:
        lodsb
        add     edx, eax
        dec     rcx
        jnz     add_up
        mov     [rbx + DONE], edx       # the run ends here
nothing:
        lea     rax, [rip + nothing]
        mov     [rbx + CRASH_ADDRESS], rax
        mov     eax, 1
        mov     [rbx + CRASH], rax      # or here

alone:
        lea     rsi, [rip + alone_text]
print:
        lodsb
        test    al, al
        jz      printed
        out     CONSOLE, al
        jmp     print
printed:
        mov     edx, POWER
        mov     eax, POWER_OFF
        out     dx, ax                  # in ring 3 there is no HLT
        jmp     printed

alone_text:
        .asciz  "No harness is attached\n"
