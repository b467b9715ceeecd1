/* kvmpy's C loop as it is, but for KVM_RUN. */
#include <stdint.h>
#include <sys/ioctl.h>

static inline int noop_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    (void)fd, (void)request, (void)argument;
    return 0;
}

#define ioctl noop_ioctl
#include "loop.c"
#include "record.c"

#include "floor.h"

/* Nobody kicks a loop that runs no guest, and there is no other thread. */
int kvmpy_unkick(struct kvmpy_loop *loop)
{
    (void)loop;
    return 0;
}

int kvmpy_interrupted(struct kvmpy_loop *loop)
{
    (void)loop;
    return KVMPY_HEARTBEAT;
}

int kvmpy_claim(struct kvmpy_loop *loop)
{
    (void)loop;
    return 0;
}

void kvmpy_release(struct kvmpy_loop *loop)
{
    (void)loop;
}

int noop_run(void *loop)
{
    return kvmpy_run(loop);
}
