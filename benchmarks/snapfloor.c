/* What a C program on KVM does for a loop of resets, and for a machine made from a snapshot. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <linux/kvm.h>

#include "floor.h"

#define PAGE 4096
#define TRY(call)          \
    do {                   \
        if ((call) < 0)    \
            return -errno; \
    } while (0)

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* The fastest that is right for this guest: it is known which pages it writes. */
static int restore_known(const struct floor_reset *reset, uint8_t *ram)
{
    uint64_t at = reset->first, size = reset->pages * PAGE;

    memcpy(ram + at, reset->saved + at, size);
    return 0;
}

static int restore_logged(const struct floor_reset *reset, const struct floor_machine *machine)
{
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = reset->bitmap};

    TRY(ioctl(machine->vm, KVM_GET_DIRTY_LOG, &log));
    for (uint64_t word = 0; word < machine->ram_size / PAGE / 64; word++)
        for (uint64_t left = reset->bitmap[word]; left; left &= left - 1) {
            uint64_t at = (64 * word + (uint64_t)__builtin_ctzll(left)) * PAGE;
            memcpy(machine->ram + at, reset->saved + at, PAGE);
        }
    return 0;
}

static int restore_discarded(const struct floor_machine *machine)
{
    TRY(madvise(machine->ram, machine->ram_size, MADV_DONTNEED));
    return 0;
}

static int restore(const struct floor_reset *reset, struct floor_machine *machine)
{
    switch (reset->method) {
    case FLOOR_KNOWN:
        return restore_known(reset, machine->ram);
    case FLOOR_LOGGED:
        return restore_logged(reset, machine);
    default:
        return restore_discarded(machine);
    }
}

int floor_log(struct floor_machine *machine)
{
    struct kvm_userspace_memory_region region = {
        .flags = KVM_MEM_LOG_DIRTY_PAGES,
        .memory_size = machine->ram_size,
        .userspace_addr = (uintptr_t)machine->ram,
    };

    TRY(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region));
    return 0;
}

int floor_resets(const struct floor_reset *reset, struct floor_machine *machine, uint64_t times)
{
    struct kvm_run *run = (struct kvm_run *)machine->run;

    for (; times; times--) {
        int result = restore(reset, machine);
        if (result < 0)
            return result;
        memcpy(&run->s.regs.regs, reset->regs, sizeof(run->s.regs.regs));
        run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
        TRY(ioctl(machine->cpu, KVM_RUN, 0));
        if (run->exit_reason != KVM_EXIT_MMIO)
            return -EPROTO;
    }
    return 0;
}

static int add_image(struct floor_machine *machine, const struct floor_guest *guest)
{
    void *ram = mmap(NULL, guest->memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                     guest->image_fd, 0);
    struct kvm_userspace_memory_region region = {
        .memory_size = guest->memory,
        .userspace_addr = (uintptr_t)ram,
    };

    if (ram == MAP_FAILED)
        return -errno;
    machine->ram = ram;
    machine->ram_size = guest->memory;
    TRY(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region));
    return 0;
}

static int load_state(struct floor_machine *machine, const struct floor_state *state)
{
    struct kvm_clock_data clock = {.clock = state->clock};

    TRY(ioctl(machine->vm, KVM_SET_CLOCK, &clock));
    TRY(machine->cpu = ioctl(machine->vm, KVM_CREATE_VCPU, 0));
    void *run = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine->cpu, 0);
    if (run == MAP_FAILED)
        return -errno;
    machine->run = run;
    TRY(ioctl(machine->cpu, KVM_SET_CPUID2, state->cpuid));
    TRY(ioctl(machine->cpu, KVM_SET_XCRS, state->xcrs));
    TRY(ioctl(machine->cpu, KVM_SET_SREGS, state->sregs));
    TRY(ioctl(machine->cpu, KVM_SET_MSRS, state->msrs));
    TRY(ioctl(machine->cpu, KVM_SET_XSAVE, state->xsave));
    TRY(ioctl(machine->cpu, KVM_SET_REGS, state->regs));
    TRY(ioctl(machine->cpu, KVM_SET_DEBUGREGS, state->debugregs));
    TRY(ioctl(machine->cpu, KVM_SET_VCPU_EVENTS, state->events));
    ((struct kvm_run *)run)->kvm_valid_regs = KVM_SYNC_X86_REGS;
    return 0;
}

int64_t floor_spawn(struct floor_machine *machine, const struct floor_guest *guest,
                    const struct floor_state *state)
{
    uint64_t started = now();

    memset(machine, 0, sizeof(*machine));
    machine->kvm = machine->vm = machine->cpu = -1;
    int result = floor_open_vm(machine, guest);
    if (result == 0)
        result = add_image(machine, guest);
    if (result == 0)
        result = load_state(machine, state);
    if (result == 0 && ioctl(machine->cpu, KVM_RUN, 0) < 0)
        result = -errno;
    if (result < 0) {
        floor_close(machine);
        return result;
    }
    return (int64_t)(now() - started);
}
