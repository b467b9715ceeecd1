/* Filling the recorder. Nothing here runs while loop->watch is 0. */
#include "record.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

static uint64_t number_of(const uint8_t *data, uint32_t size)
{
    uint64_t value = 0;
    memcpy(&value, data, size < 8 ? size : 8);
    return value;
}

/* FNV-1a: so that two traces of one string instruction with unlike data differ. */
static uint64_t digest_of(const uint8_t *data, uint64_t size)
{
    uint64_t digest = 0xcbf29ce484222325;

    for (uint64_t at = 0; at < size; at++)
        digest = (digest ^ data[at]) * 0x100000001b3;
    return digest;
}

/* What the page says of the data: of a write at once, of a read when it is answered. */
static void fill_value(struct kvmpy_record *record, const struct kvm_run *run)
{
    const uint8_t *data = run->mmio.data;

    if (record->reason == KVM_EXIT_IO) {
        data = (const uint8_t *)run + run->io.data_offset;
        if (record->count != 1)
            record->digest = digest_of(data, (uint64_t)record->size * record->count);
    } else if (record->reason == KVM_EXIT_X86_RDMSR) {
        data = (const uint8_t *)&run->msr.data;
    }
    record->value = number_of(data, record->size);
    record->flags |= KVMPY_RECORD_VALUE;
}

static int is_read(const struct kvmpy_record *record)
{
    return !(record->flags & (KVMPY_RECORD_WRITE | KVMPY_RECORD_VALUE)) &&
           (record->reason == KVM_EXIT_IO || record->reason == KVM_EXIT_MMIO ||
            record->reason == KVM_EXIT_X86_RDMSR);
}

/* The last exit has been served, and its page is as it was: take a read's answer from it. */
static void settle(struct kvmpy_loop *loop, struct kvmpy_recorder *recorder)
{
    struct kvmpy_record *record = recorder->current;

    recorder->current = NULL;
    if (record && is_read(record))
        fill_value(record, loop->run);
}

/* The run is over, or a device runs another machine: time passes that nothing explains. */
void kvmpy_record_end(struct kvmpy_loop *loop)
{
    struct kvmpy_recorder *recorder = loop->recorder;

    if (!(loop->watch & KVMPY_RECORD))
        return;
    recorder->detached = 1;
    struct kvmpy_record *record = recorder->current;
    /* Others may be answered yet. */
    if (record && !loop->raw && !loop->open &&
        (record->reason == KVM_EXIT_IO || record->reason == KVM_EXIT_MMIO))
        settle(loop, recorder);
}

/* The exit at hand goes to Python. */
void kvmpy_record_python(struct kvmpy_loop *loop)
{
    if (loop->recorder->current)
        loop->recorder->current->level = KVMPY_BY_PYTHON;
}

static int is_full(const struct kvmpy_recorder *recorder)
{
    return recorder->when_full != KVMPY_WRAP &&
           recorder->written - __atomic_load_n(&recorder->taken, __ATOMIC_ACQUIRE) ==
               recorder->capacity;
}

/* Reason, address, direction, size, count, value. */
static void describe(struct kvmpy_record *record, const struct kvm_run *run)
{
    record->reason = (uint8_t)run->exit_reason;
    record->count = 1;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        record->address = run->io.port;
        record->size = run->io.size;
        record->count = run->io.count;
        record->flags |= run->io.direction == KVM_EXIT_IO_OUT ? KVMPY_RECORD_WRITE : 0;
        break;
    case KVM_EXIT_MMIO:
        record->address = run->mmio.phys_addr;
        record->size = (uint8_t)run->mmio.len;
        record->flags |= run->mmio.is_write ? KVMPY_RECORD_WRITE : 0;
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        record->address = run->msr.index;
        record->size = 8;
        if (run->exit_reason == KVM_EXIT_X86_WRMSR) {
            record->value = run->msr.data;
            record->flags |= KVMPY_RECORD_VALUE;
        }
        break;
    case KVM_EXIT_HYPERCALL:
        record->address = run->hypercall.nr;
        record->value = run->hypercall.args[0];
        record->flags |= KVMPY_RECORD_VALUE;
        break;
    case KVM_EXIT_DEBUG:
        record->address = run->debug.arch.pc;
        record->value = run->debug.arch.dr6;
        record->flags |= KVMPY_RECORD_VALUE;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        record->value = run->internal.suberror;
        record->flags |= KVMPY_RECORD_VALUE;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        record->value = run->fail_entry.hardware_entry_failure_reason;
        record->flags |= KVMPY_RECORD_VALUE;
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        record->value = run->system_event.type;
        record->flags |= KVMPY_RECORD_VALUE;
        break;
    }
    if (record->flags & KVMPY_RECORD_WRITE)
        fill_value(record, run);
}

/* Port exits first: they are the most, and KVM_RUN leaves the branch predictors cold. */
static inline uint64_t key_of(const struct kvm_run *run)
{
    uint64_t key = KVMPY_TALLY | (uint64_t)(run->exit_reason & 63) << KVMPY_TALLY_SHIFT;

    if (__builtin_expect(run->exit_reason == KVM_EXIT_IO, 1))
        return key | (run->io.direction == KVM_EXIT_IO_OUT ? KVMPY_TALLY_WRITE : 0) | run->io.port;
    if (run->exit_reason == KVM_EXIT_MMIO)
        return key | (run->mmio.is_write ? KVMPY_TALLY_WRITE : 0) |
               (run->mmio.phys_addr & KVMPY_TALLY_ADDRESS);
    if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR)
        return key | run->msr.index;
    if (run->exit_reason == KVM_EXIT_HYPERCALL)
        return key | (run->hypercall.nr & KVMPY_TALLY_ADDRESS);
    return key;
}

static struct kvmpy_tally *find_tally(struct kvmpy_recorder *recorder, uint64_t key)
{
    uint64_t at = key * 0x9e3779b97f4a7c15 >> 52;

    for (uint32_t tries = 0; tries < 64; tries++, at++) {
        struct kvmpy_tally *here = &recorder->tallies[at % KVMPY_TALLIES];
        if (here->key == key || !here->key) {
            here->key = key;
            return here;
        }
    }
    return &recorder->other;
}

static void count(struct kvmpy_recorder *recorder, const struct kvm_run *run, uint64_t inside)
{
    uint64_t key = key_of(run);

    if (!recorder->last || recorder->last->key != key)
        recorder->last = find_tally(recorder, key);
    recorder->last->count++;
    recorder->last->inside += inside;
}

static void write_record(struct kvmpy_loop *loop, struct kvmpy_recorder *recorder,
                         struct kvmpy_record here, int interrupted)
{
    const struct kvm_run *run = loop->run;

    here.number = recorder->written + recorder->dropped;
    if (is_full(recorder)) {
        recorder->dropped++;
        return;
    }
    if (interrupted) {
        here.reason = KVM_EXIT_INTR; /* exit_reason may be stale */
    } else {
        describe(&here, run);
        if (!loop->raw && (here.reason == KVM_EXIT_IO || here.reason == KVM_EXIT_MMIO))
            here.level = KVMPY_BY_C; /* until it is handed over */
    }
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS) {
        here.rip = run->s.regs.regs.rip;
        here.flags |= KVMPY_RECORD_RIP;
    }
    struct kvmpy_record *place = recorder->records + recorder->at;
    *place = here;
    recorder->at = recorder->at + 1 == recorder->capacity ? 0 : recorder->at + 1;
    recorder->current = interrupted ? NULL : place;
    __atomic_store_n(&recorder->written, recorder->written + 1, __ATOMIC_RELEASE);
}

static void record(struct kvmpy_loop *loop, struct kvmpy_recorder *recorder, uint64_t entered,
                   uint64_t left, int interrupted)
{
    uint8_t first = recorder->detached ? KVMPY_RECORD_FIRST : 0;

    if (!first) {
        recorder->outside += entered - recorder->left;
        if (recorder->last)
            recorder->last->outside += entered - recorder->left;
    }
    recorder->detached = 0;
    recorder->left = left;
    recorder->inside += left - entered;
    if (interrupted) {
        recorder->interrupted++;
        recorder->last = NULL;
    } else {
        count(recorder, loop->run, left - entered);
    }
    if (recorder->records) {
        struct kvmpy_record here = {.entered = entered, .left = left, .flags = first};
        write_record(loop, recorder, here, interrupted);
    }
}

/* Records have CLOCK_MONOTONIC; reading the TSC is cheaper, and enough for sums. */
static inline uint64_t stamp(const struct kvmpy_recorder *recorder)
{
    return recorder->ticks ? __builtin_ia32_rdtsc() : kvmpy_clock();
}

uint64_t kvmpy_ticks(void)
{
    return __builtin_ia32_rdtsc();
}

static void sample(struct kvmpy_loop *loop, uint64_t entered, uint64_t left)
{
    if (loop->sample_entered) {
        entered = loop->sample_entered;
        loop->sample_entered = 0;
    }
    if (loop->sample_count < loop->sample_room) {
        loop->samples[2 * loop->sample_count] = entered;
        loop->samples[2 * loop->sample_count + 1] = left;
        loop->sample_count++;
    } else {
        loop->sample_dropped++;
    }
}

/* KVM_RUN between two readings of the clock; one that a signal ended is the beginning of the next
 * sample, or it would lack what the guest did up to then, and is a record of its own. Without
 * `may_ask`, an exit is finished: no guest runs, and EINTR says that it is done.
 * -errno, 0, or KVMPY_HEARTBEAT, with nothing entered: Python shall make room in the ring. */
int kvmpy_enter_watched(struct kvmpy_loop *loop, int may_ask)
{
    struct kvmpy_recorder *recorder = loop->watch & KVMPY_RECORD ? loop->recorder : NULL;

    if (recorder) {
        settle(loop, recorder);
        if (recorder->when_full == KVMPY_HAND) {
            int full = is_full(recorder);
            if (full && may_ask && !recorder->asked) {
                recorder->asked = 1;
                return KVMPY_HEARTBEAT;
            }
            recorder->asked = full;
        }
    }
    uint64_t sampled = loop->watch & KVMPY_SAMPLE ? kvmpy_clock() : 0;
    uint64_t entered = recorder ? stamp(recorder) : sampled;
    int error = ioctl(loop->fd, KVM_RUN, 0) < 0 ? errno : 0;
    uint64_t left = recorder ? stamp(recorder) : kvmpy_clock();

    loop->entries++;
    if (!error && loop->watch & KVMPY_SAMPLE)
        sample(loop, sampled, recorder ? kvmpy_clock() : left);
    else if (may_ask && error == EINTR && loop->watch & KVMPY_SAMPLE && !loop->sample_entered)
        loop->sample_entered = sampled;
    if (recorder && (!error || error == EINTR))
        record(loop, recorder, entered, left, error == EINTR);
    return -error;
}

/* Map a file's first `size` bytes at `start` and once more right after it: what wraps in the ring
 * does not wrap in memory. */
int kvmpy_map_twice(uint8_t *start, uint64_t size, int fd)
{
    for (int copy = 0; copy < 2; copy++) {
        int populate = copy ? 0 : MAP_POPULATE; /* no page faults between exits */
        void *made = mmap(start + copy * size, size, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_FIXED | populate, fd, 0);
        if (made == MAP_FAILED)
            return -errno;
    }
    return 0;
}
