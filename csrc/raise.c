/* Events for a guest from another thread, timed from there to where they show. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>

static void *raise_when_asked(void *argument)
{
    struct kvmpy_raiser *raiser = argument;
    uint32_t done = 0, failed;
    uint64_t pair[2];

    while (!__atomic_load_n(&raiser->ended, __ATOMIC_ACQUIRE)) {
        if (__atomic_load_n(&raiser->asked, __ATOMIC_ACQUIRE) == done) {
            __builtin_ia32_pause();
            continue;
        }
        uint64_t start = kvmpy_clock() + raiser->delay_ns;
        while (kvmpy_clock() < start)
            __builtin_ia32_pause();
        int result = kvmpy_time_calls(raiser->calls, raiser->count, 0, 0, 1, pair, &failed);
        raiser->raised = pair[0];
        if (result < 0)
            __atomic_store_n(&raiser->error, result, __ATOMIC_RELEASE);
        __atomic_store_n(&raiser->done, ++done, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* Start the thread; it takes no signal but those that are sent to it. */
int kvmpy_raiser_start(struct kvmpy_raiser *raiser)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    cpu_set_t cpus;

    CPU_ZERO(&cpus);
    CPU_SET(raiser->cpu, &cpus);
    pthread_attr_init(&attributes);
    int result = pthread_attr_setaffinity_np(&attributes, sizeof(cpus), &cpus);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (result == 0)
        result = pthread_create(&raiser->thread, &attributes, raise_when_asked, raiser);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -result;
}

void kvmpy_raiser_end(struct kvmpy_raiser *raiser)
{
    __atomic_store_n(&raiser->ended, 1, __ATOMIC_RELEASE);
    pthread_join(raiser->thread, NULL);
}

int kvmpy_raise(struct kvmpy_raiser *raiser, struct kvmpy_loop *loop, uint64_t *pair)
{
    uint32_t asked = __atomic_add_fetch(&raiser->asked, 1, __ATOMIC_RELEASE);
    int result;

    do
        result = kvmpy_run(loop);
    while (result == KVMPY_HEARTBEAT &&
           !__atomic_load_n(&raiser->error, __ATOMIC_ACQUIRE));
    pair[1] = kvmpy_clock();
    /* It may still be at the calls that come after the one that the guest has seen. */
    while (__atomic_load_n(&raiser->done, __ATOMIC_ACQUIRE) != asked)
        __builtin_ia32_pause();
    pair[0] = raiser->raised;
    return raiser->error < 0 ? raiser->error : result;
}
