/* A KVM program as one writes it in C, without anything that it could do without. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/kvm.h>

#include "floor.h"

#define TRY(call)          \
    do {                   \
        if ((call) < 0)    \
            return -errno; \
    } while (0)

int floor_open_vm(struct floor_machine *machine, const struct floor_guest *guest)
{
    uint64_t identity = guest->identity_map_address;

    TRY(machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (ioctl(machine->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        return -ENODEV;
    TRY(machine->run_size = ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    TRY(machine->vm = ioctl(machine->kvm, KVM_CREATE_VM, 0));
    /* Only VMX has these two. */
    ioctl(machine->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
    ioctl(machine->vm, KVM_SET_TSS_ADDR, guest->tss_address);
    return 0;
}

static int add_memory(struct floor_machine *machine, const struct floor_guest *guest)
{
    void *ram = mmap(NULL, guest->memory, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct kvm_userspace_memory_region region = {
        .memory_size = guest->memory,
        .userspace_addr = (uintptr_t)ram,
    };

    if (ram == MAP_FAILED)
        return -errno;
    machine->ram = ram;
    machine->ram_size = guest->memory;
    TRY(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region));
    memcpy(machine->ram + guest->area_address, guest->area, guest->area_size);
    memcpy(machine->ram + guest->image_address, guest->image, guest->image_size);
    return 0;
}

static int set_registers(struct floor_machine *machine, const struct floor_guest *guest)
{
    struct kvm_run *run = (struct kvm_run *)machine->run;
    struct kvm_sregs before, sregs;
    struct kvm_regs regs;

    TRY(ioctl(machine->cpu, KVM_GET_SREGS, &before));
    memcpy(&sregs, guest->sregs, sizeof(sregs));
    memcpy(&regs, guest->regs, sizeof(regs));
    sregs.apic_base = before.apic_base;
    if (guest->sync & KVM_SYNC_X86_SREGS) {
        run->s.regs.sregs = sregs;
        run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
    } else {
        TRY(ioctl(machine->cpu, KVM_SET_SREGS, &sregs));
    }
    if (guest->sync & KVM_SYNC_X86_REGS) {
        run->s.regs.regs = regs;
        run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    } else {
        TRY(ioctl(machine->cpu, KVM_SET_REGS, &regs));
    }
    run->kvm_valid_regs = guest->valid;
    return 0;
}

static int add_cpu(struct floor_machine *machine, const struct floor_guest *guest)
{
    TRY(machine->cpu = ioctl(machine->vm, KVM_CREATE_VCPU, 0));
    void *run = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine->cpu, 0);
    if (run == MAP_FAILED)
        return -errno;
    machine->run = run;
    TRY(ioctl(machine->cpu, KVM_SET_CPUID2, guest->cpuid));
    return set_registers(machine, guest);
}

int floor_open(struct floor_machine *machine, const struct floor_guest *guest)
{
    memset(machine, 0, sizeof(*machine));
    machine->kvm = machine->vm = machine->cpu = -1;
    int result = floor_open_vm(machine, guest);
    if (result == 0)
        result = add_memory(machine, guest);
    if (result == 0)
        result = add_cpu(machine, guest);
    if (result < 0)
        floor_close(machine);
    return result;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void floor_close(struct floor_machine *machine)
{
    if (machine->run)
        munmap(machine->run, machine->run_size);
    machine->run = NULL;
    close_fd(&machine->cpu);
    close_fd(&machine->vm);
    if (machine->ram)
        munmap(machine->ram, machine->ram_size);
    machine->ram = NULL;
    close_fd(&machine->kvm);
}

int floor_run(struct floor_machine *machine, uint64_t exits)
{
    const struct kvm_run *run = (const struct kvm_run *)machine->run;

    while (exits) {
        if (ioctl(machine->cpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (run->exit_reason != KVM_EXIT_IO)
            return -EPROTO;
        exits--;
    }
    return 0;
}

int floor_life(const struct floor_guest *guest)
{
    struct floor_machine machine;

    int result = floor_open(&machine, guest);
    if (result < 0)
        return result;
    result = ioctl(machine.cpu, KVM_RUN, 0) < 0 ? -errno : 0;
    floor_close(&machine);
    return result;
}
