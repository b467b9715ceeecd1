# started_real - where a second vCPU starts after INIT and SIPI, for measuring the way there
#
# It notes the time-stamp counter at 0x40008, counts at 0x40010, writes to port 0x12, and waits for
# the next INIT (Intel SDM Vol. 3, 8.4.3 "MP Initialization Protocol Algorithm").
#
# mode: real
# load: 0x8000
# output: ""

        .equ DONE, 0x12
        .equ SEGMENT, 0x4000
        .equ CAME_AT, 8
        .equ COUNT, 0x10

start:
        rdtsc                           # unfenced: nothing ran before it
        mov     bx, SEGMENT
        mov     ds, bx
        mov     dword ptr [CAME_AT], eax
        mov     dword ptr [CAME_AT + 4], edx
        inc     dword ptr [COUNT]
        out     DONE, al
wait:
        jmp     wait
