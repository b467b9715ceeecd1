/* Read both by the C compiler and, as the cdef, by cffi: declarations only. */

struct peer_count {
    uint64_t writes;
    uint64_t sum; /* of the values written */
};

/* Run until HLT, or until `limit` writes of four bytes have been counted; 0, or -errno
 * (-EINTR: call again). `mapping` is the vCPU's struct kvm_run. */
int peer_loop(int cpu, void *mapping, uint64_t limit, struct peer_count *count);
