/* Going back to a snapshot: only what changed, in one call. */
#ifndef KVMPY_RESET_H
#define KVMPY_RESET_H

#include "calls.h"

struct kvmpy_reset_region {
    uint32_t slot;
    uint64_t pages;
    uint8_t *ram;
    const uint8_t *saved;
    uint64_t *dirty;   /* what KVM has logged, a bit a page; written by each reset */
    uint64_t *more;    /* pages that the host wrote; cleared by each reset */
    uint64_t *tables;  /* pages that are page tables of the guest's in the snapshot */
};

struct kvmpy_reset_cpu {
    struct kvmpy_loop *loop;
    const uint8_t *sync; /* struct kvm_sync_regs, or NULL: its parts are written by ioctls */
    uint64_t stale;      /* loop->entries when somebody last wrote registers */
    uint64_t paging[4];  /* CR0, CR3, CR4 and EFER of the snapshot */
};

struct kvmpy_reset {
    int32_t vm;
    uint32_t regions;
    struct kvmpy_reset_region *region;
    uint32_t cpus;
    struct kvmpy_reset_cpu *cpu;
    const struct kvmpy_call *calls; /* the state that needs an ioctl */
    uint32_t count;
    uint32_t failed;  /* the number of the call that failed; `count`: it was another thing */

    uint32_t spare_slot;    /* a memory slot, an address and a page for dropping mappings */
    uint64_t spare_address;
    void *spare_page;
    uint32_t drop;          /* drop them in any case */

    uint64_t looked;  /* pages that were looked at, by the last reset */
    uint64_t changed; /* pages that were put back */
    uint32_t paging;  /* whether page tables, or what they hang on, were changed */
    uint64_t idle;    /* pages looked at for nothing since the log was cleared */
};

/* Bring RAM and vCPUs back. 0, or -errno. */
int kvmpy_reset(struct kvmpy_reset *reset);

/* Mark the pages that differ from the snapshot: a bit a page, whole words for each region, one
 * region after the other. 0, or -errno. */
int kvmpy_touched(const struct kvmpy_reset *reset, uint64_t *bitmap);

struct kvmpy_run {
    int32_t code;     /* what kvmpy_run() returned */
    uint32_t reason;  /* of the exit, where there was one */
    uint64_t changed; /* pages that the reset before it put back */
    uint64_t value;   /* with KVMPY_ENDED */
    struct kvm_regs regs;
};

/* Run a prepared guest for each input from number `first` on: reset it, write the input, run it.
 * `region` and `offset` say where inputs go; `ends` are the offsets in `data` of their ends. Of
 * the region's RAM, `collect_size` bytes at `collect` are kept after each run, and a bitmap of
 * the pages that it changed if there is room for those: `touched_words` for each run. */
struct kvmpy_batch {
    struct kvmpy_reset *reset;
    struct kvmpy_loop *loop;
    int64_t timeout_ns;
    uint64_t max_exits;
    uint32_t region;
    uint64_t offset;
    const uint8_t *data;
    const uint64_t *ends;
    uint32_t first;
    uint32_t count;
    struct kvmpy_run *runs;
    const uint8_t *collect;
    uint64_t collect_size;
    uint8_t *collected;
    uint64_t *touched; /* or NULL */
    uint64_t touched_words;
};

/* How many inputs have been run, or -errno of a reset; between kvmpy_resume() and kvmpy_pause(), so
 * that nobody takes the RAM away. It ends early after a run that is not over, which needs Python to
 * be finished; or after an exit of which struct kvm_run has more to say than that the guest
 * halted. */
int kvmpy_run_batch(struct kvmpy_batch *batch);

#endif
