/* Going back to a snapshot.
 *
 * KVM's dirty log is read and not cleared (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): a page that one
 * run has written is most likely written by the next one, and to look at it again costs a
 * twentieth of what it costs to protect it and take a fault. When many pages have been looked
 * at for nothing, the log is cleared and begins anew. */
#include "reset.h"
#include "pages.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define IDLE_PER_CHANGED 25 /* looks at a page, for the price of protecting one */
#define IDLE_AT_LEAST 2000
#define ACCESSED_DIRTY 0x60 /* bits of a page-table entry that the processor sets, SDM Vol.3 4.8 */

static int read_log(int vm, struct kvmpy_reset_region *region)
{
    struct kvm_dirty_log log = {.slot = region->slot, .dirty_bitmap = region->dirty};

    return ioctl(vm, KVM_GET_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

static int clear_log(int vm, struct kvmpy_reset_region *region)
{
    struct kvm_clear_dirty_log log = {
        .slot = region->slot,
        .num_pages = (uint32_t)region->pages,
        .dirty_bitmap = region->dirty,
    };

    return ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

/* Whether a page table says something else, but for what the processor notes in it. */
static int maps_differently(const uint8_t *one, const uint8_t *other)
{
    const uint64_t *a = (const uint64_t *)one, *b = (const uint64_t *)other;

    for (int at = 0; at < KVMPY_PAGE / 8; at++)
        if ((a[at] ^ b[at]) & ~(uint64_t)ACCESSED_DIRTY)
            return 1;
    return 0;
}

static void put_back(struct kvmpy_reset *reset, struct kvmpy_reset_region *region)
{
    for (uint64_t word = 0; word < (region->pages + 63) / 64; word++) {
        uint64_t left = region->dirty[word] | region->more[word];
        region->more[word] = 0;
        for (; left; left &= left - 1) {
            uint64_t page = 64 * word + (uint64_t)__builtin_ctzll(left);
            uint8_t *ram = region->ram + page * KVMPY_PAGE;
            const uint8_t *saved = region->saved + page * KVMPY_PAGE;
            reset->looked++;
            if (memcmp(ram, saved, KVMPY_PAGE) == 0)
                continue;
            reset->changed++;
            if (region->tables[word] >> (page % 64) & 1 && maps_differently(ram, saved))
                reset->paging = 1;
            memcpy(ram, saved, KVMPY_PAGE);
        }
    }
}

/* Whether the exit at hand is a write to MMIO of which nothing is left to do: when KVM is entered
 * again, it forgets it and changes no register, so that registers may be written before. Of a write
 * that it hands over in pieces (across a page's end, or of more than 8 bytes) each but the last
 * ends at a page's end or has 8 bytes. */
static int is_whole_write(const struct kvm_run *run)
{
    return run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.len < 8 &&
           (run->mmio.phys_addr + run->mmio.len) % KVMPY_PAGE;
}

/* Finish the exit at hand; what it brings up is of no interest. */
static int settle(struct kvmpy_loop *loop)
{
    int result;

    kvmpy_forget_end(loop);
    if (loop->ring)
        loop->ring[0] = loop->ring[1]; /* what was posted is undone, too */
    loop->open = loop->awaiting = loop->held = 0;
    if (!loop->incomplete || is_whole_write(loop->run))
        return 0;
    loop->raw = 1;
    while ((result = kvmpy_finish_claimed(loop)) == KVMPY_EXIT)
        loop->held = 0;
    return result < 0 ? result : 0;
}

/* Which registers in the mapping are those of the vCPU: brought along by an exit since anybody
 * wrote others. */
static uint64_t valid_registers(const struct kvmpy_reset_cpu *cpu)
{
    const struct kvm_run *run = cpu->loop->run;

    return cpu->loop->entries > cpu->stale ? run->kvm_valid_regs : 0;
}

/* Whether the guest has loaded other page tables, or turned paging to something else. */
static int pages_differently(const struct kvmpy_reset_cpu *cpu)
{
    const struct kvm_run *run = cpu->loop->run;
    const struct kvm_sregs *now = &run->s.regs.sregs;

    if (!(valid_registers(cpu) & KVM_SYNC_X86_SREGS))
        return 1; /* not known */
    return now->cr0 != cpu->paging[0] || now->cr3 != cpu->paging[1] ||
           now->cr4 != cpu->paging[2] || now->efer != cpu->paging[3];
}

/* Deleting any memory slot makes KVM forget what it has derived from the guest's page tables. */
static int drop_mappings(const struct kvmpy_reset *reset)
{
    struct kvm_userspace_memory_region slot = {
        .slot = reset->spare_slot,
        .guest_phys_addr = reset->spare_address,
        .memory_size = KVMPY_PAGE,
        .userspace_addr = (uint64_t)(uintptr_t)reset->spare_page,
    };

    if (ioctl(reset->vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
        return -errno;
    slot.memory_size = 0;
    return ioctl(reset->vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0 ? -errno : 0;
}

/* Put registers into the mapping. Writing special registers makes KVM load its whole state
 * anew, which takes as long as an exit: those that are what they were are left alone. */
static void set_registers(const struct kvmpy_reset_cpu *cpu, struct kvm_run *run)
{
    const struct kvm_sync_regs *saved = (const struct kvm_sync_regs *)cpu->sync;
    struct kvm_sync_regs *now = &run->s.regs;
    uint64_t valid = valid_registers(cpu);

    now->regs = saved->regs;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    if (!(valid & KVM_SYNC_X86_SREGS) || memcmp(&now->sregs, &saved->sregs, sizeof(now->sregs))) {
        now->sregs = saved->sregs;
        run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
    }
    if (!(valid & KVM_SYNC_X86_EVENTS) ||
        memcmp(&now->events, &saved->events, sizeof(now->events))) {
        now->events = saved->events;
        run->kvm_dirty_regs |= KVM_SYNC_X86_EVENTS;
    }
}

static int reset_claimed(struct kvmpy_reset *reset)
{
    int result = 0;

    reset->looked = reset->changed = 0;
    reset->failed = reset->count; /* none of the calls, until one does */
    reset->paging = reset->drop;
    reset->drop = 1; /* until it is done: the next one may not see what changed */
    for (uint32_t at = 0; at < reset->cpus && result == 0; at++) {
        struct kvmpy_reset_cpu *cpu = reset->cpu + at;
        result = settle(cpu->loop);
        reset->paging |= (uint32_t)pages_differently(cpu);
    }
    for (uint32_t at = 0; at < reset->regions && result == 0; at++) {
        result = read_log(reset->vm, reset->region + at);
        if (result == 0)
            put_back(reset, reset->region + at);
    }
    reset->idle += reset->looked - reset->changed;
    if (reset->idle > IDLE_PER_CHANGED * reset->changed + IDLE_AT_LEAST) {
        reset->idle = 0;
        for (uint32_t at = 0; at < reset->regions && result == 0; at++)
            result = clear_log(reset->vm, reset->region + at);
    }
    if (result == 0 && reset->paging)
        result = drop_mappings(reset);
    if (result == 0)
        result = kvmpy_make_calls(reset->calls, reset->count, NULL, &reset->failed);
    for (uint32_t at = 0; at < reset->cpus && result == 0; at++) {
        struct kvmpy_reset_cpu *cpu = reset->cpu + at;
        struct kvm_run *run = cpu->loop->run;
        if (cpu->sync)
            set_registers(cpu, run);
    }
    reset->drop = result != 0;
    return result;
}

/* While it is under way, no other thread begins to run a vCPU, or unmaps what is written to. */
int kvmpy_reset(struct kvmpy_reset *reset)
{
    int claimed[reset->cpus + 1], result = 0;
    uint32_t have = 0;

    while (have < reset->cpus && result == 0) {
        claimed[have] = kvmpy_claim(reset->cpu[have].loop);
        if (claimed[have] < 0)
            result = claimed[have];
        else
            have++;
    }
    if (result == 0)
        result = reset_claimed(reset);
    while (have--)
        if (claimed[have])
            kvmpy_release(reset->cpu[have].loop);
    return result;
}

int kvmpy_touched(const struct kvmpy_reset *reset, uint64_t *bitmap)
{
    for (uint32_t at = 0; at < reset->regions; at++) {
        struct kvmpy_reset_region *region = reset->region + at;
        int result = read_log(reset->vm, region);
        if (result < 0)
            return result;
        for (uint64_t word = 0; word < (region->pages + 63) / 64; word++) {
            uint64_t left = region->dirty[word] | region->more[word], found = 0;
            for (; left; left &= left - 1) {
                uint64_t start = (64 * word + (uint64_t)__builtin_ctzll(left)) * KVMPY_PAGE;
                if (memcmp(region->ram + start, region->saved + start, KVMPY_PAGE))
                    found |= left & -left;
            }
            *bitmap++ = found;
        }
    }
    return 0;
}

/* Write an input, and remember where: the host's writes are not in KVM's log. */
static void write_input(struct kvmpy_reset_region *region, uint64_t offset, const uint8_t *data,
                        uint64_t size)
{
    memcpy(region->ram + offset, data, size);
    for (uint64_t page = offset / KVMPY_PAGE; page <= (offset + size - 1) / KVMPY_PAGE; page++)
        region->more[page / 64] |= 1ull << (page % 64);
}

static int run_one(const struct kvmpy_batch *batch, uint32_t at)
{
    struct kvmpy_loop *loop = batch->loop;
    uint64_t start = at ? batch->ends[at - 1] : 0, size = batch->ends[at] - start;
    int result = kvmpy_reset(batch->reset);

    if (result < 0)
        return result;
    if (size)
        write_input(batch->reset->region + batch->region, batch->offset, batch->data + start,
                    size);
    kvmpy_next(loop, batch->timeout_ns);
    loop->raw = 0;
    loop->exits_left = batch->max_exits;
    batch->runs[at].code = kvmpy_run(loop);
    return 0;
}

int kvmpy_run_batch(struct kvmpy_batch *batch)
{
    const struct kvm_run *run = batch->loop->run;

    for (uint32_t at = batch->first; at < batch->count; at++) {
        struct kvmpy_run *record = batch->runs + at;
        int result = run_one(batch, at);
        if (result < 0)
            return result;
        record->reason = run->exit_reason;
        record->changed = batch->reset->changed;
        record->value = batch->loop->value;
        record->regs = run->s.regs.regs;
        if (record->code < 0 || record->code > KVMPY_ENDED)
            return (int)at + 1;
        if (batch->collect_size)
            memcpy(batch->collected + at * batch->collect_size, batch->collect,
                   batch->collect_size);
        if (batch->touched)
            result = kvmpy_touched(batch->reset, batch->touched + at * batch->touched_words);
        if (result < 0)
            return result;
        if (record->code == KVMPY_EXIT && record->reason != KVM_EXIT_HLT)
            return (int)at + 1;
    }
    return (int)batch->count;
}
