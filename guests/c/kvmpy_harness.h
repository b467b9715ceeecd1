/*
 * A guest that takes inputs from its harness, again and again: fuzz targets, and whatever else
 * is run from a snapshot. docs/harness.md says what the other side does.
 *
 * A target for libFuzzer becomes one by a file of two lines:
 *
 *     #include "kvmpy_harness.h"
 *     KVMPY_FUZZ(4096, 4096);
 *
 * with the target itself in another one, that alone is built with -fsanitize-coverage=trace-pc.
 */
#ifndef KVMPY_HARNESS_H
#define KVMPY_HARNESS_H

#include "kvmpy.h"

#ifndef KVMPY_HARNESS
#define KVMPY_HARNESS 0xd0010000u /* where the device is attached */
#endif

/* What its first register reads as: "kvmpyHRN". All ones: no harness is attached. */
#define KVMPY_HARNESS_IDENTITY 0x4e524879706d766bull

enum {
    KVMPY_HARNESS_ID = 0x00,
    KVMPY_HARNESS_BUFFER = 0x08,
    KVMPY_HARNESS_BUFFER_SIZE = 0x10,
    KVMPY_HARNESS_MAP = 0x18,
    KVMPY_HARNESS_MAP_SIZE = 0x20,
    KVMPY_HARNESS_ENTROPY = 0x28,
    KVMPY_HARNESS_GENERATION = 0x30,
    KVMPY_HARNESS_READY = 0x38,
    KVMPY_HARNESS_CRASH_ADDRESS = 0x40,
    KVMPY_HARNESS_CRASH = 0x48,
    KVMPY_HARNESS_DONE = 0x50,
};

#define KVMPY_ABORTED 134 /* the code of abort(): what a shell makes of SIGABRT */

static inline uint64_t kvmpy_get(unsigned offset)
{
    return mmio_read64(KVMPY_HARNESS + offset);
}

static inline void kvmpy_put(unsigned offset, uint64_t value)
{
    mmio_write64(KVMPY_HARNESS + offset, value);
}

/* Whether a harness is attached. */
static inline int kvmpy_harnessed(void)
{
    return kvmpy_get(KVMPY_HARNESS_ID) == KVMPY_HARNESS_IDENTITY;
}

/* Say where inputs go and where coverage is counted (a map of size 0: it is not). The run ends;
   what comes after this call is run once for each input. */
static inline void kvmpy_ready(void *buffer, size_t size, void *map, size_t map_size)
{
    kvmpy_put(KVMPY_HARNESS_BUFFER, (uintptr_t)buffer);
    kvmpy_put(KVMPY_HARNESS_BUFFER_SIZE, size);
    kvmpy_put(KVMPY_HARNESS_MAP, (uintptr_t)map);
    kvmpy_put(KVMPY_HARNESS_MAP_SIZE, map_size);
    kvmpy_put(KVMPY_HARNESS_READY, 1);
    __asm__ volatile("" : : : "memory"); /* the input has come meanwhile */
}

/* The input is dealt with. (A write of less than 8 bytes is the cheapest to go back from.) */
static inline _Noreturn void kvmpy_done(uint32_t status)
{
    for (;;)
        mmio_write32(KVMPY_HARNESS + KVMPY_HARNESS_DONE, status);
}

/* Something is wrong, as found out at an address, or 0. */
static inline _Noreturn void kvmpy_crash(uint64_t code, const void *address)
{
    kvmpy_put(KVMPY_HARNESS_CRASH_ADDRESS, (uintptr_t)address);
    for (;;)
        kvmpy_put(KVMPY_HARNESS_CRASH, code);
}

/* Eight bytes that no copy of this guest has had or will have. */
static inline uint64_t kvmpy_random(void)
{
    return kvmpy_get(KVMPY_HARNESS_ENTROPY);
}

/* Another number in each copy of this guest, and after each return to a snapshot: who keeps
   random numbers, or hands out unique ones, looks whether it has changed. */
static inline uint64_t kvmpy_generation(void)
{
    return kvmpy_get(KVMPY_HARNESS_GENERATION);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/*
 * All of a fuzz target but LLVMFuzzerTestOneInput(): for inputs of at most `capacity` bytes, with a
 * coverage map of `map_size`, a power of two of up to 64 KiB. Its own code must not be built with
 * -fsanitize-coverage.
 *
 * An edge is a pair of places, counted as in AFL: each place has a number, and the edge's is that
 * of the place xor half of that of the place before. The multiplier is 2^64 / golden ratio.
 */
#define KVMPY_FUZZ(capacity, map_size)                                                        \
    KVMPY_RING(3);                                                                            \
    _Static_assert((map_size) && !((map_size) & ((map_size) - 1)) && (map_size) <= 65536,     \
                   "the size of a coverage map is a power of two of up to 65536");            \
    static uint8_t kvmpy_map[map_size] __attribute__((aligned(64)));                          \
    static struct {                                                                           \
        uint64_t place; /* beside what is written anyway: another page is another microsecond */ \
        uint64_t size;                                                                        \
        uint8_t data[capacity];                                                               \
    } kvmpy_input __attribute__((aligned(64)));                                               \
                                                                                              \
    void __sanitizer_cov_trace_pc(void);                                                      \
    void __sanitizer_cov_trace_pc(void)                                                       \
    {                                                                                         \
        uint64_t place = (uint64_t)__builtin_return_address(0) * 0x9e3779b97f4a7c15ull >> 48; \
        kvmpy_map[(place ^ kvmpy_input.place) & ((map_size) - 1)]++;                          \
        kvmpy_input.place = place >> 1;                                                       \
    }                                                                                         \
                                                                                              \
    _Noreturn void abort(void);                                                               \
    _Noreturn void abort(void)                                                                \
    {                                                                                         \
        kvmpy_crash(KVMPY_ABORTED, __builtin_return_address(0));                              \
    }                                                                                         \
                                                                                              \
    int main(void)                                                                            \
    {                                                                                         \
        kvmpy_ready(&kvmpy_input.size, 8 + (capacity), kvmpy_map, (map_size));                 \
        kvmpy_done((uint32_t)LLVMFuzzerTestOneInput(kvmpy_input.data, kvmpy_input.size));     \
    }                                                                                         \
    _Static_assert(1, "") /* takes the semicolon */

#endif
