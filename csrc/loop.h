/* The hot loop: one struct per vCPU, one call per visit to the guest. */
#ifndef KVMPY_LOOP_H
#define KVMPY_LOOP_H

#include <stdint.h>
#include <time.h>
#include <linux/kvm.h>

/* What kvmpy_run() and kvmpy_finish() return: -errno, one of these, or an access
 * (a number from KVMPY_PORT up, described below) for Python to serve. */
enum {
    KVMPY_EXIT = 0,  /* an exit that is no device access: see run->exit_reason */
    KVMPY_STOPPED,   /* kvmpy_kick() was called */
    KVMPY_DEADLINE,  /* the time given to kvmpy_begin() is over */
    KVMPY_MAX_EXITS, /* exits_left reached 0 */
    KVMPY_ENDED,     /* the guest wrote loop.value to a KVMPY_END */
    KVMPY_HEARTBEAT, /* let Python run its signal handlers, then call again */
    KVMPY_POSTED,    /* coalesced writes wait in the ring: drain it, then call again */
    KVMPY_COMPLETED, /* kvmpy_finish(): no exit is pending any more */
    KVMPY_AGAIN,     /* an access of the same number as the last one: loop.handed */
};

/* An access is one number, so that Python finds what serves it by one dict lookup:
 * KVMPY_PORT | write | log2(size) << SIZE_SHIFT | port, or
 * KVMPY_MMIO | write | size << (SIZE_SHIFT - 4) | row of the range (0: nobody's). */
#define KVMPY_PORT (1 << 20)
#define KVMPY_MMIO (1 << 21)
#define KVMPY_WRITE (1 << 19)
#define KVMPY_SIZE_SHIFT 16
#define KVMPY_MAX_ROWS 4096

/* What an access is answered with in C. */
enum { KVMPY_TO_PYTHON, KVMPY_SINK, KVMPY_CONSTANT, KVMPY_CAPTURE, KVMPY_COUNTER, KVMPY_END };

struct kvmpy_action {
    uint32_t kind;
    uint64_t value;  /* KVMPY_CONSTANT: what a read gives; else all ones */
    uint64_t reads;
    uint64_t writes;
    uint8_t *buffer; /* KVMPY_CAPTURE */
    uint64_t capacity;
    uint64_t length;
    uint32_t lock; /* guards buffer and length */
};

struct kvmpy_range {
    uint64_t start;
    uint64_t end; /* exclusive */
    uint32_t row; /* names the claim to Python; 1 .. KVMPY_MAX_ROWS - 1 */
    uint32_t action;
};

struct kvmpy_ranges {
    uint32_t count;
    struct kvmpy_range at[]; /* sorted by start, disjoint */
};

struct kvmpy_routes {
    uint16_t *ports;              /* 65536 indices into actions; 0: Python */
    struct kvmpy_ranges *ranges;  /* MMIO; never changed, but replaced as a whole */
    struct kvmpy_action *actions; /* actions[0] is KVMPY_TO_PYTHON */
    uint32_t generation;          /* of the claims: another one ends KVMPY_AGAIN */
};

#define KVMPY_REASONS 64

#define KVMPY_SAMPLE 1
#define KVMPY_RECORD 2

struct kvmpy_recorder;

struct kvmpy_loop {
    int fd;
    void *run; /* struct kvm_run, mapped by Python */
    struct kvmpy_routes *routes;
    uint32_t *ring; /* struct kvm_coalesced_mmio_ring, or NULL */
    uint64_t exits_left;
    uint64_t heartbeat_ns;
    uint32_t raw;   /* hand port and MMIO exits over whole, unserved */
    uint32_t watch; /* KVMPY_SAMPLE, KVMPY_RECORD: what is to be done around KVM_RUN */

    uint64_t *samples; /* pairs of CLOCK_MONOTONIC ns, at entry and exit */
    uint64_t sample_room;
    uint64_t sample_count;
    uint64_t sample_dropped; /* exits that found no room */
    uint64_t sample_entered; /* of an entry that a signal ended, or else 0 */
    struct kvmpy_recorder *recorder; /* see record.h */

    uint64_t value;   /* of the access handed to Python: written, or to be read; of KVMPY_END */
    uint64_t offset;  /* MMIO: bytes from the start of the range */
    uint64_t address; /* guest-physical address, or port */

    /* Exits by KVM_EXIT reason; KVM_EXIT_IO and _MMIO count reads, and the
     * same index + KVMPY_REASONS counts writes. */
    uint64_t exits[2 * KVMPY_REASONS];
    uint64_t entries;    /* returns of KVM_RUN with its run page filled */
    uint32_t incomplete; /* the kernel must be entered once more to finish the exit */
    uint32_t held;       /* an exit found while finishing another waits for its turn */
    uint32_t running;    /* between begin and end */
    uint32_t finishing;  /* a thread that does not run it is in kvmpy_finish(); or it is retired */
    uint32_t open;       /* accesses of the current exit are not all served yet */
    uint32_t batch;      /* between resume and pause: C has addresses of the VM's RAM */
    uint32_t awaiting;   /* Python has one of them; cleared, it is handed over again */
    int32_t handed;      /* the last of them; Python clears it where it keeps none */

    /* Private to C from here on. */
    int32_t returned;  /* what kvmpy_run() returned last */
    uint32_t handed_generation;
    uint32_t element;  /* index into a string instruction's data */
    uint32_t stop;     /* set by kvmpy_kick(); STOPPED_BEFORE by kvmpy_unread() */
    uint32_t beat;     /* set by the signal handler */
    uint32_t last_range;
    uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: none */
    struct kvmpy_loop *outer; /* the loop whose device is running this one */
    int32_t thread;           /* tid while running, else 0 */
    uint32_t timer_thread;    /* serial of the thread that the timer signals; 0: no timer */
    int32_t timer_process;
    int32_t was_blocked;
    uint32_t ticking;         /* the timer was left running by kvmpy_pause() */
    timer_t timer;
};

#define STOPPED_BEFORE 2
#define KVMPY_HELD 2 /* `finishing`, by kvmpy_hold() */

/* CLOCK_MONOTONIC, in ns. */
static inline uint64_t kvmpy_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

int kvmpy_begin(struct kvmpy_loop *loop, int64_t timeout_ns);
void kvmpy_end(struct kvmpy_loop *loop);
int kvmpy_resume(struct kvmpy_loop *loop, int64_t timeout_ns);
void kvmpy_next(struct kvmpy_loop *loop, int64_t timeout_ns);
void kvmpy_pause(struct kvmpy_loop *loop);
void kvmpy_quiet(struct kvmpy_loop *loop);
int kvmpy_run(struct kvmpy_loop *loop);
void kvmpy_unread(struct kvmpy_loop *loop);
int kvmpy_finish(struct kvmpy_loop *loop);
int kvmpy_finish_claimed(struct kvmpy_loop *loop);
int kvmpy_in_use(struct kvmpy_loop *loop);
int kvmpy_hold(struct kvmpy_loop *loop);
void kvmpy_retire(struct kvmpy_loop *loop);
void kvmpy_kick(struct kvmpy_loop *loop);
int kvmpy_unkick(struct kvmpy_loop *loop);
void kvmpy_forget_end(struct kvmpy_loop *loop);
void kvmpy_forget(struct kvmpy_loop *loop);
int kvmpy_interrupted(struct kvmpy_loop *loop);
int kvmpy_claim(struct kvmpy_loop *loop);
void kvmpy_release(struct kvmpy_loop *loop);
uint64_t kvmpy_clock_cost(uint32_t pairs);
uint64_t kvmpy_take(struct kvmpy_action *action, uint8_t *into, uint64_t limit, int alone);

int kvmpy_ioctl(int fd, unsigned long request, uintptr_t argument);
int kvmpy_ioctl_buffer(int fd, unsigned long request, void *argument);

#endif
