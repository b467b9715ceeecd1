/* The recorder: a record for each return of KVM_RUN, in a ring that the reader sees in one piece,
 * and counts by kind and address. docs/tracing.md has the layout for readers of views. */
#ifndef KVMPY_RECORD_H
#define KVMPY_RECORD_H

#include "loop.h"

/* Who served an exit. */
enum { KVMPY_BY_CALLER, KVMPY_BY_C, KVMPY_BY_PYTHON };

#define KVMPY_RECORD_WRITE 1 /* the guest wrote `value` */
#define KVMPY_RECORD_VALUE 2 /* `value` and `digest` are known: of a read, once it is answered */
#define KVMPY_RECORD_RIP 4   /* `rip` is known (KVM_CAP_SYNC_REGS) */
#define KVMPY_RECORD_FIRST 8 /* what came before `entered` was no serving of an exit: of a run */

struct kvmpy_record {
    uint64_t number;  /* of this vCPU's records before it, dropped ones included */
    uint64_t entered; /* CLOCK_MONOTONIC, ns, before KVM_RUN ... */
    uint64_t left;    /* ... and after it */
    uint64_t address; /* port, guest-physical address, MSR: see describe() in record.c */
    uint64_t value;   /* of the first element of a string instruction */
    uint64_t rip;
    uint64_t digest;  /* of all elements: FNV-1a, 64 bits; 0 where there is one */
    uint32_t count;
    uint8_t reason;   /* KVM_EXIT; KVM_EXIT_INTR: a signal ended KVM_RUN */
    uint8_t size;
    uint8_t level;
    uint8_t flags;
};

/* What all exits of one kind at one address come to. */
struct kvmpy_tally {
    uint64_t key; /* 0: free; else KVMPY_TALLY, reason, direction, address */
    uint64_t count;
    uint64_t inside;  /* time in KVM_RUN, up to the exit */
    uint64_t outside; /* from the exit to the next entry of the same run */
};

#define KVMPY_TALLY (1ull << 63)
#define KVMPY_TALLY_WRITE (1ull << 62)
#define KVMPY_TALLY_SHIFT 56
#define KVMPY_TALLY_ADDRESS ((1ull << 52) - 1)
#define KVMPY_TALLIES 4096

enum { KVMPY_WRAP, KVMPY_STOP, KVMPY_HAND };

struct kvmpy_recorder {
    struct kvmpy_record *records; /* capacity of them, mapped twice in a row; NULL: only counts */
    uint64_t capacity;
    uint64_t written; /* since the start; those that wrapping has lost are among them */
    uint64_t taken;   /* KVMPY_HAND: how many the reader is done with */
    uint64_t dropped; /* those that found no room */
    uint32_t when_full;
    uint32_t detached; /* the next entry does not follow on the last exit */
    uint32_t ticks;    /* the sums are of the TSC, not of CLOCK_MONOTONIC: never with records */

    uint64_t inside;      /* time in KVM_RUN, that of entries that signals ended included */
    uint64_t outside;     /* from exits to the next entries of the same run */
    uint64_t interrupted; /* entries that a signal ended */
    struct kvmpy_tally other; /* exits that found no place in the table */
    struct kvmpy_tally tallies[KVMPY_TALLIES];

    /* Private to C from here on. */
    struct kvmpy_record *current; /* whose value is not known yet, or whose level may change */
    struct kvmpy_tally *last;
    uint64_t at; /* written, modulo capacity */
    uint64_t left;
    uint32_t asked; /* Python knows that the ring is full */
};

int kvmpy_enter_watched(struct kvmpy_loop *loop, int may_ask);
void kvmpy_record_python(struct kvmpy_loop *loop);
void kvmpy_record_end(struct kvmpy_loop *loop);
uint64_t kvmpy_ticks(void);
int kvmpy_map_twice(uint8_t *start, uint64_t size, int fd);

#endif
