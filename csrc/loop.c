/* The hot loop: enter the guest, serve in C what has a route in C, hand over the rest. */
#include "record.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

/* KVM_RUN leaves the branch predictors cold, so the way of a port access is laid out in one
 * piece, without a call and with hardly a jump that is taken: 1 % of an exit. */
#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define HOT static inline __attribute__((always_inline))

int kvmpy_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int kvmpy_ioctl_buffer(int fd, unsigned long request, void *argument)
{
    return kvmpy_ioctl(fd, request, (uintptr_t)argument);
}

static void lock(struct kvmpy_action *action)
{
    while (__atomic_exchange_n(&action->lock, 1, __ATOMIC_ACQUIRE))
        ;
}

static void unlock(struct kvmpy_action *action)
{
    __atomic_store_n(&action->lock, 0, __ATOMIC_RELEASE);
}

/* Move at most limit captured bytes out of a KVMPY_CAPTURE action; how many it moved. `alone`: this
 * is the child of a fork, where whoever has the lock may not exist. */
uint64_t kvmpy_take(struct kvmpy_action *action, uint8_t *into, uint64_t limit, int alone)
{
    if (!alone)
        lock(action);
    uint64_t count = action->length < limit ? action->length : limit;
    memcpy(into, action->buffer, count);
    memmove(action->buffer, action->buffer + count, action->length - count);
    action->length -= count;
    unlock(action);
    return count;
}

static int capture(struct kvmpy_action *action, const uint8_t *data, uint32_t size)
{
    lock(action);
    int fits = action->length + size <= action->capacity;
    if (fits) {
        memcpy(action->buffer + action->length, data, size);
        action->length += size;
    }
    unlock(action);
    return fits;
}

/* Little-endian numbers of 1 to 8 bytes. Nearly all have 1, 2 or 4, and memcpy of a size that
 * the compiler does not know is a call. */
HOT uint64_t load(const uint8_t *data, uint32_t size)
{
    uint64_t value = 0;

    if (LIKELY(size == 1))
        value = *data;
    else if (size == 4)
        memcpy(&value, data, 4);
    else if (size == 2)
        memcpy(&value, data, 2);
    else
        memcpy(&value, data, size);
    return value;
}

HOT void store(uint8_t *data, uint64_t value, uint32_t size)
{
    if (LIKELY(size == 1))
        *data = (uint8_t)value;
    else if (size == 4)
        memcpy(data, &value, 4);
    else if (size == 2)
        memcpy(data, &value, 2);
    else
        memcpy(data, &value, size);
}

/* A write that ends the run. What is left of the exit, the next run serves first. */
static int ended(struct kvmpy_loop *loop, struct kvmpy_action *action, const uint8_t *data,
                 uint32_t size)
{
    __atomic_fetch_add(&action->writes, 1, __ATOMIC_RELAXED);
    loop->value = load(data, size);
    loop->element++;
    return KVMPY_ENDED;
}

/* Serve one access in C. 1: done; 0: it is Python's. */
HOT int served(struct kvmpy_action *action, uint8_t *data, uint32_t size, int write)
{
    uint64_t answer = ~0ull;

    if (action->kind == KVMPY_TO_PYTHON)
        return 0;

    switch (action->kind) {
    case KVMPY_CAPTURE:
        if (write && !capture(action, data, size))
            return 0; /* full: Python takes what is there, and this access */
        break;
    case KVMPY_CONSTANT:
        answer = action->value;
        break;
    case KVMPY_SINK:
    case KVMPY_COUNTER:
        break;
    default:
        return 0;
    }
    __atomic_fetch_add(write ? &action->writes : &action->reads, 1, __ATOMIC_RELAXED);
    if (!write)
        store(data, answer, size);
    return 1;
}

/* Hand one access to Python; a read that nobody answers reads as all ones. */
HOT int hand_over(struct kvmpy_loop *loop, const uint8_t *data, uint32_t size, int write)
{
    loop->value = LIKELY(write) ? load(data, size) : ~0ull >> (64 - 8 * size);
    loop->awaiting = 1;
    if (UNLIKELY(loop->watch & KVMPY_RECORD))
        kvmpy_record_python(loop);
    return write ? KVMPY_WRITE : 0;
}

HOT uint8_t *io_data(struct kvm_run *run, uint32_t element)
{
    return (uint8_t *)run + run->io.data_offset + (uint64_t)element * run->io.size;
}

/* A string instruction's exit carries count elements; each is an access of its own. */
HOT int serve_io(struct kvmpy_loop *loop, struct kvm_run *run)
{
    uint32_t size = run->io.size;
    int write = run->io.direction == KVM_EXIT_IO_OUT;
    struct kvmpy_action *action = loop->routes->actions + loop->routes->ports[run->io.port];

    for (; loop->element < run->io.count; loop->element++) {
        uint8_t *data = io_data(run, loop->element);
        if (!served(action, data, size, write)) {
            if (action->kind == KVMPY_END && write)
                return ended(loop, action, data, size);
            loop->address = run->io.port;
            return hand_over(loop, data, size, write) | KVMPY_PORT |
                   (size >> 1) << KVMPY_SIZE_SHIFT | run->io.port;
        }
    }
    return 0;
}

static const struct kvmpy_range *find_range(struct kvmpy_loop *loop, uint64_t address)
{
    const struct kvmpy_ranges *ranges = __atomic_load_n(&loop->routes->ranges, __ATOMIC_ACQUIRE);
    uint32_t low = 0, high = ranges->count;

    if (loop->last_range < high) {
        const struct kvmpy_range *last = ranges->at + loop->last_range;
        if (last->start <= address && address < last->end)
            return last;
    }
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        const struct kvmpy_range *range = ranges->at + middle;
        if (address < range->start)
            high = middle;
        else if (address >= range->end)
            low = middle + 1;
        else {
            loop->last_range = middle;
            return range;
        }
    }
    return NULL;
}

static int serve_mmio(struct kvmpy_loop *loop, struct kvm_run *run)
{
    uint32_t size = run->mmio.len;
    int write = run->mmio.is_write != 0;

    if (loop->element)
        return 0;
    const struct kvmpy_range *range = find_range(loop, run->mmio.phys_addr);
    if (range) {
        struct kvmpy_action *action = loop->routes->actions + range->action;
        if (served(action, run->mmio.data, size, write)) {
            loop->element = 1;
            return 0;
        }
        if (action->kind == KVMPY_END && write)
            return ended(loop, action, run->mmio.data, size);
    }
    loop->address = run->mmio.phys_addr;
    loop->offset = run->mmio.phys_addr - (range ? range->start : 0);
    return hand_over(loop, run->mmio.data, size, write) | KVMPY_MMIO |
           size << (KVMPY_SIZE_SHIFT - 4) | (range ? range->row : 0);
}

/* Python has served the access that it was handed: put a read's answer in its place. */
HOT void answer(struct kvmpy_loop *loop, struct kvm_run *run)
{
    if (UNLIKELY(run->exit_reason == KVM_EXIT_MMIO)) {
        if (!run->mmio.is_write)
            store(run->mmio.data, loop->value, run->mmio.len);
    } else if (run->io.direction == KVM_EXIT_IO_IN) {
        store(io_data(run, loop->element), loop->value, run->io.size);
    }
    loop->element++;
    loop->awaiting = 0;
}

/* Serve what is left of the current exit; an access for Python, or 0 when all is served. */
HOT int serve(struct kvmpy_loop *loop, struct kvm_run *run)
{
    if (loop->awaiting)
        answer(loop, run);
    int io = run->exit_reason == KVM_EXIT_IO;
    int access = LIKELY(io) ? serve_io(loop, run) : serve_mmio(loop, run);
    loop->open = access != 0;
    return access;
}

/* After these the kernel finishes the instruction at the next KVM_RUN. */
static int unfinished(const struct kvm_run *run)
{
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
    case KVM_EXIT_MMIO:
    case KVM_EXIT_HYPERCALL:
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
    case KVM_EXIT_HYPERV:
    case KVM_EXIT_XEN:
        return 1;
    default:
        return 0;
    }
}

/* An unanswered read of the raw kind reads as all ones too. */
static void fill_with_ones(struct kvm_run *run)
{
    if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
        memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
    else if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_IN)
        memset(io_data(run, 0), 0xff, (size_t)run->io.size * run->io.count);
}

/* Whether the exit at hand is an access to serve, from its first element on. */
HOT int is_access(struct kvmpy_loop *loop, struct kvm_run *run)
{
    if (run->exit_reason != KVM_EXIT_IO && run->exit_reason != KVM_EXIT_MMIO)
        return 0;
    if (loop->raw) {
        fill_with_ones(run);
        return 0;
    }
    loop->element = 0;
    return 1;
}

/* KVM_RUN came back with an exit: count it, and say whether it is one to serve. */
HOT int arrived(struct kvmpy_loop *loop, struct kvm_run *run)
{
    uint32_t reason = run->exit_reason & (KVMPY_REASONS - 1);
    int io = reason == KVM_EXIT_IO, mmio = reason == KVM_EXIT_MMIO;
    int write = io ? run->io.direction == KVM_EXIT_IO_OUT : mmio && run->mmio.is_write;

    loop->exits[reason + (write ? KVMPY_REASONS : 0)]++;
    loop->exits_left -= loop->exits_left != 0; /* finishing may take one more */
    loop->incomplete = LIKELY(io) || unfinished(run);
    return is_access(loop, run);
}

/* What so many pairs of readings take, in ns: the cost of a sample, to be shown beside it. */
uint64_t kvmpy_clock_cost(uint32_t pairs)
{
    uint64_t started = kvmpy_clock();
    for (uint32_t pair = 0; pair < pairs; pair++) {
        kvmpy_clock();
        kvmpy_clock();
    }
    return kvmpy_clock() - started;
}

HOT int enter(struct kvmpy_loop *loop, int may_ask)
{
    if (UNLIKELY(loop->watch))
        return kvmpy_enter_watched(loop, may_ask);
    int result = ioctl(loop->fd, KVM_RUN, 0);
    loop->entries++;
    return result < 0 ? -errno : 0;
}

/* Coalesced writes came before the exit at hand, so they are served before it. */
HOT int posted(const struct kvmpy_loop *loop)
{
    return loop->ring && !loop->raw && loop->ring[0] != loop->ring[1];
}

HOT int run_guest(struct kvmpy_loop *loop)
{
    struct kvm_run *run = loop->run;

    for (;;) {
        if (UNLIKELY(posted(loop)))
            return KVMPY_POSTED;
        if (loop->open) {
            int access = serve(loop, run);
            if (access)
                return access;
        }
        if (UNLIKELY(loop->held)) {
            loop->held = 0;
            loop->open = is_access(loop, run);
            if (!loop->open)
                return KVMPY_EXIT;
            continue;
        }
        if (UNLIKELY(__atomic_load_n(&loop->stop, __ATOMIC_ACQUIRE)) && kvmpy_unkick(loop))
            return KVMPY_STOPPED;
        if (UNLIKELY(!loop->exits_left))
            return KVMPY_MAX_EXITS;

        int result = enter(loop, 1);
        if (UNLIKELY(result)) {
            if (result == -EINTR) {
                loop->incomplete = 0;
                result = kvmpy_interrupted(loop);
            }
            if (result == -EAGAIN || result == KVMPY_EXIT)
                continue; /* EAGAIN: it waited for INIT and SIPI, and one has just come */
            return result;
        }
        loop->open = arrived(loop, run);
        if (UNLIKELY(!loop->open)) {
            if (!posted(loop))
                return KVMPY_EXIT;
            loop->held = 1;
        }
    }
}

/* Whether Python has at hand what serves this access: guests often repeat themselves. */
HOT int again(struct kvmpy_loop *loop, int access)
{
    uint32_t generation = __atomic_load_n(&loop->routes->generation, __ATOMIC_RELAXED);

    if (LIKELY(access == loop->handed && generation == loop->handed_generation))
        return 1;
    loop->handed = access;
    loop->handed_generation = generation;
    return 0;
}

/* Run the guest until Python is needed. */
int kvmpy_run(struct kvmpy_loop *loop)
{
    int result = run_guest(loop);

    if (result >= KVMPY_PORT && again(loop, result))
        result = KVMPY_AGAIN;
    return loop->returned = result;
}

/* A signal handler raised before Python saw what kvmpy_run() returned: have the next call
 * return it again. An access is handed over again where `awaiting` is cleared. */
void kvmpy_unread(struct kvmpy_loop *loop)
{
    if (loop->returned == KVMPY_EXIT)
        loop->held = 1;
    else if (loop->returned == KVMPY_STOPPED)
        __atomic_store_n(&loop->stop, STOPPED_BEFORE, __ATOMIC_SEQ_CST);
    else if (loop->returned == KVMPY_ENDED)
        loop->element--;
    loop->returned = KVMPY_HEARTBEAT;
}

/* kvmpy_finish() between kvmpy_claim() and kvmpy_release(). */
int kvmpy_finish_claimed(struct kvmpy_loop *loop)
{
    struct kvm_run *run = loop->run;

    loop->handed = 0; /* Python may be about to serve another access than kvmpy_run()'s last */
    for (;;) {
        if (loop->open) {
            int access = serve(loop, run);
            if (access == KVMPY_ENDED)
                continue; /* nothing runs that could end */
            if (access)
                return access;
        }
        if (!loop->incomplete)
            return KVMPY_COMPLETED;
        if (loop->held) { /* nobody has seen it yet */
            loop->open = is_access(loop, run);
            if (!loop->open)
                return KVMPY_EXIT;
            loop->held = 0;
            continue;
        }

        run->immediate_exit = 1;
        int result = enter(loop, 0);
        __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&loop->stop, __ATOMIC_SEQ_CST) ||
            __atomic_load_n(&loop->beat, __ATOMIC_SEQ_CST))
            run->immediate_exit = 1; /* somebody meant it for the next run */
        if (result == -EINTR || result == -EAGAIN) {
            loop->incomplete = 0;
            return KVMPY_COMPLETED;
        }
        if (result < 0)
            return result;
        loop->open = arrived(loop, run);
        if (!loop->open) {
            loop->held = 1;
            return loop->incomplete ? KVMPY_EXIT : KVMPY_COMPLETED;
        }
    }
}

/* Finish the exit at hand without running the guest any further: KVM_RUN with
 * immediate_exit commits it (KVM API, 5. "The kvm_run structure", immediate_exit). A split or
 * exchanging access gives another exit, which is served as well. -EBUSY: another thread has the
 * vCPU, or it is retired. */
int kvmpy_finish(struct kvmpy_loop *loop)
{
    int claimed = kvmpy_claim(loop);
    if (claimed < 0)
        return claimed;
    int result = kvmpy_finish_claimed(loop);
    if (claimed)
        kvmpy_release(loop);
    return result;
}
