/* A run loop as one writes it in C, for a machine that floor.c has made. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>

#include "peer_loop.h"

int peer_loop(int cpu, void *mapping, uint64_t limit, struct peer_count *count)
{
    struct kvm_run *run = mapping;

    while (count->writes < limit) {
        uint32_t value = 0;

        if (ioctl(cpu, KVM_RUN, 0) < 0)
            return -errno;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.direction != KVM_EXIT_IO_OUT || run->io.size != sizeof(value))
                return -EPROTO;
            memcpy(&value, (uint8_t *)run + run->io.data_offset, sizeof(value));
            break;
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write || run->mmio.len != sizeof(value))
                return -EPROTO;
            memcpy(&value, run->mmio.data, sizeof(value));
            break;
        case KVM_EXIT_HLT:
            return 0;
        default:
            return -EPROTO;
        }
        count->writes++;
        count->sum += value;
    }
    return 0;
}
