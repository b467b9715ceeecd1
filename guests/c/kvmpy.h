/*
 * What a C guest of kvmpy needs: ports, memory-mapped I/O, the debug console, and ways to end.
 *
 * A guest starts in 64-bit long mode with memory mapped one to one, on a stack that kvmpy set
 * up, without interrupts, without a C library. start.S calls main().
 */
#ifndef KVMPY_H
#define KVMPY_H

#include <stddef.h>
#include <stdint.h>

/* Which ring to start in, 0 or 3: written once, outside of any function. kvmpy reads it from
   the symbol table. In ring 3 the I/O bitmap opens every port, and code runs natively on every
   backend; privileged instructions such as HLT end the guest with an exception. */
#define KVMPY_RING(ring) __asm__(".globl kvmpy_ring\n.set kvmpy_ring, " #ring)

#define KVMPY_CONSOLE 0xe9    /* debug console: each byte written is printed */
#define KVMPY_DEBUG_EXIT 0xf4 /* isa-debug-exit: a value v ends with status (v << 1) | 1 */
#define KVMPY_POWER 0x604     /* power management: 0x2000 switches off, status 0 */

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* Plain MOVs, written out: a compiler may turn a volatile access into another instruction, and
   KVM has to emulate whichever it is. */
static inline uint8_t mmio_read8(uintptr_t address)
{
    uint8_t value;
    __asm__ volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
    return value;
}

static inline uint16_t mmio_read16(uintptr_t address)
{
    uint16_t value;
    __asm__ volatile("movw (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline uint32_t mmio_read32(uintptr_t address)
{
    uint32_t value;
    __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline uint64_t mmio_read64(uintptr_t address)
{
    uint64_t value;
    __asm__ volatile("movq (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}

static inline void mmio_write8(uintptr_t address, uint8_t value)
{
    __asm__ volatile("movb %0, (%1)" : : "q"(value), "r"(address) : "memory");
}

static inline void mmio_write16(uintptr_t address, uint16_t value)
{
    __asm__ volatile("movw %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

static inline void mmio_write32(uintptr_t address, uint32_t value)
{
    __asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

static inline void mmio_write64(uintptr_t address, uint64_t value)
{
    __asm__ volatile("movq %0, (%1)" : : "r"(value), "r"(address) : "memory");
}

/* Print a byte. */
static inline void putch(char character)
{
    outb(KVMPY_CONSOLE, (uint8_t)character);
}

/* Print a string as it is; unlike the C library's puts(), without a newline after it. */
static inline void print(const char *text)
{
    while (*text)
        putch(*text++);
}

/* Print a number in decimal. */
static inline void print_number(uint64_t number)
{
    char digits[21]; /* 2^64 - 1 has 20 */
    char *first = digits + sizeof digits - 1;

    *first = '\0';
    do
        *--first = (char)('0' + number % 10);
    while (number /= 10);
    print(first);
}

/* End the guest with a value: `kvmpy run` ends with status ((value << 1) | 1) & 255. */
static inline _Noreturn void kvmpy_exit(uint32_t value)
{
    for (;;)
        outl(KVMPY_DEBUG_EXIT, value);
}

/* Switch the machine off: `kvmpy run` ends with status 0. */
static inline _Noreturn void power_off(void)
{
    for (;;)
        outw(KVMPY_POWER, 0x2000);
}

/* Stop the processor: `kvmpy run` ends with status 0. In ring 0 only: HLT is privileged. */
static inline _Noreturn void halt(void)
{
    for (;;)
        __asm__ volatile("hlt");
}

#endif
