/* Lists of system calls, timed. */
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int run_for(struct kvmpy_loop *loop, uint64_t limit_ns)
{
    int result = kvmpy_begin(loop, (int64_t)limit_ns);

    if (result == 0) {
        do
            result = kvmpy_run(loop);
        while (result == KVMPY_HEARTBEAT);
    }
    kvmpy_end(loop);
    return result == KVMPY_DEADLINE ? -ETIMEDOUT : result;
}

static int make(const struct kvmpy_call *call, const int *results)
{
    int opening = call->kind == KVMPY_CALL_OPEN;
    int fd = call->fd < 0 && !opening ? results[call->from] : call->fd, result;

    if (call->poke)
        *call->poke = call->value;
    switch (call->kind) {
    case KVMPY_CALL_CLOSE:
        result = close(fd);
        break;
    case KVMPY_CALL_WRITE:
        result = (int)write(fd, &call->argument, sizeof(call->argument));
        break;
    case KVMPY_CALL_KICK:
        kvmpy_kick((struct kvmpy_loop *)call->argument);
        return 0;
    case KVMPY_CALL_OPEN:
        result = open((const char *)call->argument, O_RDWR | O_CLOEXEC);
        break;
    case KVMPY_CALL_RUN:
        return run_for((struct kvmpy_loop *)call->argument, call->value);
    default:
        result = ioctl(fd, call->request, call->argument);
    }
    return result < 0 ? -errno : result;
}

/* Close what a round that failed has opened. */
static void clean_up(const struct kvmpy_call *calls, uint32_t count, uint32_t failed,
                     const int *results)
{
    for (uint32_t at = failed + 1; at < count; at++)
        if (calls[at].kind == KVMPY_CALL_CLOSE && calls[at].fd < 0 && calls[at].from < failed)
            close(results[calls[at].from]);
}

int kvmpy_make_calls(const struct kvmpy_call *calls, uint32_t count, int *results,
                     uint32_t *failed)
{
    for (uint32_t at = 0; at < count; at++) {
        int result;
        do
            result = make(calls + at, results);
        while (result == -EINTR); /* a signal came while the kernel made a VM */
        if (result < 0) {
            *failed = at;
            while (at--)
                if (calls[at].opens) {
                    close(results[at]);
                    results[at] = -1;
                }
            return result;
        }
        if (results)
            results[at] = result;
    }
    return 0;
}

int kvmpy_time_calls(const struct kvmpy_call *calls, uint32_t count, uint32_t first,
                     uint32_t last, uint32_t rounds, uint64_t *pairs, uint32_t *failed)
{
    int results[KVMPY_MAX_CALLS];

    if (count > KVMPY_MAX_CALLS)
        return -E2BIG;
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t at = 0; at < count; at++) {
            if (at == first)
                pairs[2 * round] = kvmpy_clock();
            int result = results[at] = make(calls + at, results);
            if (at == last)
                pairs[2 * round + 1] = kvmpy_clock();
            if (calls[at].error ? result != -calls[at].error : result < 0) {
                *failed = at;
                clean_up(calls, count, at, results);
                return result < 0 ? result : -EPROTO;
            }
        }
    }
    return 0;
}
