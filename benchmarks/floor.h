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
    int image_fd;           /* floor_spawn: the file of its RAM */
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

/* What open() and close() of a machine have in common with floor_spawn(). */
int floor_open_vm(struct floor_machine *machine, const struct floor_guest *guest);

enum {
    FLOOR_KNOWN,     /* copy the pages that the guest is known to write */
    FLOOR_LOGGED,    /* copy those in KVM's dirty log */
    FLOOR_DISCARDED, /* a private mapping, thrown away as a whole */
};

/* A guest that writes `pages` pages from `first` on, and then exits for MMIO. */
struct floor_reset {
    int method;
    const uint8_t *saved;   /* all of its RAM */
    const uint8_t *regs;    /* struct kvm_regs */
    uint64_t first, pages;
    uint64_t *bitmap;       /* room for a bit for each page */
};

/* Have KVM log the pages that are written. */
int floor_log(struct floor_machine *machine);

/* Restore and run so many times. */
int floor_resets(const struct floor_reset *reset, struct floor_machine *machine, uint64_t times);

/* A vCPU's state, each as its ioctl takes it. */
struct floor_state {
    const uint8_t *cpuid, *xcrs, *sregs, *msrs, *xsave, *regs, *debugregs, *events;
    uint64_t clock;
};

/* Make a machine with that state, its RAM mapped privately from guest->image_fd, and run it to its
 * first exit: the nanoseconds of all that, or -errno. */
int64_t floor_spawn(struct floor_machine *machine, const struct floor_guest *guest,
                    const struct floor_state *state);

/* Open, run to the first exit of whatever kind, close. */
int floor_life(const struct floor_guest *guest);

/* kvmpy's own C loop (a struct kvmpy_loop), with a KVM_RUN that does nothing: the exit that
 * the mapping holds is served again and again. */
int noop_run(void *loop);
