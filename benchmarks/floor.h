/* The floor that kvmpy is measured against: the same work in plain C.
 * Read both by the C compiler and, as the cdef, by cffi: declarations only. */

/* What a guest is made of; all of it comes from kvmpy, so that both run the same guest. */
struct floor_guest {
    uint64_t memory;        /* bytes of RAM from address 0 on */
    const uint8_t *area;    /* page tables, GDT and TSS */
    uint64_t area_address, area_size;
    const uint8_t *image;
    uint64_t image_address, image_size;
    const uint8_t *cpuid;   /* struct kvm_cpuid2 */
    const uint8_t *sregs;   /* struct kvm_sregs */
    const uint8_t *regs;    /* struct kvm_regs */
    uint64_t identity_map_address, tss_address;
    uint32_t sync;          /* KVM_SYNC_X86_* that kvm_run carries; without, ioctls do */
    uint32_t valid;         /* of these, the ones that every exit brings along */
};

struct floor_machine {
    int kvm, vm, cpu;
    uint8_t *ram;
    uint64_t ram_size;
    uint8_t *run;
    int64_t run_size;
};

/* Each returns 0 or -errno. */
int floor_open(struct floor_machine *machine, const struct floor_guest *guest);
void floor_close(struct floor_machine *machine);

/* The bare loop: enter the guest until it has exited `exits` times for a port. */
int floor_run(struct floor_machine *machine, uint64_t exits);

/* Open, run to the first exit of whatever kind, close. */
int floor_life(const struct floor_guest *guest);

/* kvmpy's own C loop (a struct kvmpy_loop), with a KVM_RUN that does nothing: the exit that
 * the mapping holds is served again and again. */
int noop_run(void *loop);
