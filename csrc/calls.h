/* System calls as a list, timed: what the host's side of a VM costs. For measuring only. */
#ifndef KVMPY_CALLS_H
#define KVMPY_CALLS_H

#include "loop.h"

#include <pthread.h>

enum {
    KVMPY_CALL_IOCTL,
    KVMPY_CALL_CLOSE,
    KVMPY_CALL_WRITE, /* of the 8 bytes of `argument`, as an eventfd wants them */
    KVMPY_CALL_KICK,  /* kvmpy_kick() of the loop at `argument` */
    KVMPY_CALL_RUN,   /* kvmpy_run() of the loop at `argument`, for at most `value` ns */
    KVMPY_CALL_OPEN,  /* open the file whose name is at `argument`, to be read and written */
};

#define KVMPY_MAX_CALLS 16

struct kvmpy_call {
    uint32_t kind;
    int32_t fd;       /* or -1: what the call `from` of the same round returned */
    uint32_t from;
    int32_t error;    /* the errno that it is to fail with, or 0 */
    uint64_t request; /* of an ioctl */
    uint64_t argument;
    uint64_t *poke;   /* NULL, or where `value` is stored before the call */
    uint64_t value;
    uint32_t opens;   /* whether it returns a descriptor, for kvmpy_make_calls() */
};

/* Make all calls in order, so many times. Each time the clock is read before the call `first`
 * and after the call `last`: CLOCK_MONOTONIC ns, one pair a round. 0, or -errno of the first
 * call that does not end as it should; `failed` is then its number. */
int kvmpy_time_calls(const struct kvmpy_call *calls, uint32_t count, uint32_t first,
                     uint32_t last, uint32_t rounds, uint64_t *pairs, uint32_t *failed);

/* Make all calls in order, however many. What they return is put into `results`, which may be NULL
 * where none of them asks for what another one returned. 0, or -errno of the first that fails;
 * `failed` is then its number, and what the others have opened is closed. */
int kvmpy_make_calls(const struct kvmpy_call *calls, uint32_t count, int *results,
                     uint32_t *failed);

/* A thread on a CPU of its own that makes the calls whenever it is asked to. */
struct kvmpy_raiser {
    const struct kvmpy_call *calls;
    uint32_t count;
    int32_t cpu;
    uint64_t delay_ns; /* from being asked, so that the guest is where it shall be */

    uint64_t raised; /* when it began to, CLOCK_MONOTONIC ns */
    int32_t error;   /* -errno of a call that failed */
    uint32_t asked;
    uint32_t done;

    /* Private to C. */
    uint32_t ended;
    pthread_t thread;
};

int kvmpy_raiser_start(struct kvmpy_raiser *raiser);
void kvmpy_raiser_end(struct kvmpy_raiser *raiser);

/* Ask the raiser, run the guest until something comes of it, and note in `pair` when the
 * raiser began and when the guest was left. What kvmpy_run() returned, or the raiser's error. */
int kvmpy_raise(struct kvmpy_raiser *raiser, struct kvmpy_loop *loop, uint64_t *pair);

#endif
