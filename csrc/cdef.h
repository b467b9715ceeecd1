/* What Python sees of the compiled module. Read by cffi, not by a C compiler:
 * csrc/loop.h is the C header, and the compiler checks that the two agree. */

#define KVMPY_EXIT ...
#define KVMPY_STOPPED ...
#define KVMPY_DEADLINE ...
#define KVMPY_MAX_EXITS ...
#define KVMPY_ENDED ...
#define KVMPY_HEARTBEAT ...
#define KVMPY_POSTED ...
#define KVMPY_COMPLETED ...
#define KVMPY_AGAIN ...

#define KVMPY_PORT ...
#define KVMPY_MMIO ...
#define KVMPY_WRITE ...
#define KVMPY_SIZE_SHIFT ...

#define KVMPY_TO_PYTHON ...
#define KVMPY_SINK ...
#define KVMPY_CONSTANT ...
#define KVMPY_CAPTURE ...
#define KVMPY_COUNTER ...
#define KVMPY_END ...

#define KVMPY_HELD ...

#define KVMPY_REASONS ...
#define KVMPY_MAX_ROWS ...
#define KVMPY_SAMPLE ...
#define KVMPY_RECORD ...

struct kvmpy_action {
    uint32_t kind;
    uint64_t value;
    uint64_t reads;
    uint64_t writes;
    uint8_t *buffer;
    uint64_t capacity;
    uint64_t length;
    uint32_t lock;
};

struct kvmpy_range {
    uint64_t start;
    uint64_t end;
    uint32_t row;
    uint32_t action;
};

struct kvmpy_ranges {
    uint32_t count;
    struct kvmpy_range at[];
};

struct kvmpy_routes {
    uint16_t *ports;
    struct kvmpy_ranges *ranges;
    struct kvmpy_action *actions;
    uint32_t generation;
};

struct kvmpy_loop {
    int fd;
    void *run;
    struct kvmpy_routes *routes;
    uint32_t *ring;
    uint64_t exits_left;
    uint64_t heartbeat_ns;
    uint32_t raw;
    uint32_t watch;

    uint64_t *samples;
    uint64_t sample_room;
    uint64_t sample_count;
    uint64_t sample_dropped;
    uint64_t sample_entered; /* of an entry that a signal ended, or else 0 */
    struct kvmpy_recorder *recorder;

    uint64_t value;
    uint64_t offset;
    uint64_t address;

    uint64_t exits[...];
    uint64_t entries;
    uint32_t incomplete;
    uint32_t held;
    uint32_t running;
    uint32_t finishing;
    uint32_t open;
    uint32_t batch;
    uint32_t awaiting;
    int32_t handed;
    ...;
};

int kvmpy_begin(struct kvmpy_loop *loop, int64_t timeout_ns);
void kvmpy_end(struct kvmpy_loop *loop);
int kvmpy_run(struct kvmpy_loop *loop);
void kvmpy_unread(struct kvmpy_loop *loop);
int kvmpy_finish(struct kvmpy_loop *loop);
void kvmpy_release(struct kvmpy_loop *loop);
int kvmpy_in_use(struct kvmpy_loop *loop);
int kvmpy_hold(struct kvmpy_loop *loop);
void kvmpy_retire(struct kvmpy_loop *loop);
void kvmpy_kick(struct kvmpy_loop *loop);
int kvmpy_unkick(struct kvmpy_loop *loop);
void kvmpy_forget_end(struct kvmpy_loop *loop);
void kvmpy_forget(struct kvmpy_loop *loop);
uint64_t kvmpy_clock_cost(uint32_t pairs);
uint64_t kvmpy_take(struct kvmpy_action *action, uint8_t *into, uint64_t limit, int alone);

int kvmpy_ioctl(int fd, unsigned long request, uintptr_t argument);
int kvmpy_ioctl_buffer(int fd, unsigned long request, void *argument);

/* csrc/record.h: the recorder. */
#define KVMPY_BY_CALLER ...
#define KVMPY_BY_C ...
#define KVMPY_BY_PYTHON ...
#define KVMPY_RECORD_WRITE ...
#define KVMPY_RECORD_VALUE ...
#define KVMPY_RECORD_RIP ...
#define KVMPY_RECORD_FIRST ...
#define KVMPY_TALLY_WRITE ...
#define KVMPY_TALLY_SHIFT ...
#define KVMPY_TALLIES ...
#define KVMPY_WRAP ...
#define KVMPY_STOP ...
#define KVMPY_HAND ...

struct kvmpy_record {
    uint64_t number;
    uint64_t entered;
    uint64_t left;
    uint64_t address;
    uint64_t value;
    uint64_t rip;
    uint64_t digest;
    uint32_t count;
    uint8_t reason;
    uint8_t size;
    uint8_t level;
    uint8_t flags;
};

struct kvmpy_tally {
    uint64_t key;
    uint64_t count;
    uint64_t inside;
    uint64_t outside;
};

struct kvmpy_recorder {
    struct kvmpy_record *records;
    uint64_t capacity;
    uint64_t written;
    uint64_t taken;
    uint64_t dropped;
    uint32_t when_full;
    uint32_t detached;
    uint32_t ticks;
    uint64_t inside;
    uint64_t outside;
    uint64_t interrupted;
    struct kvmpy_tally other;
    struct kvmpy_tally tallies[...];
    ...;
};

uint64_t kvmpy_ticks(void);
int kvmpy_map_twice(uint8_t *start, uint64_t size, int fd);

/* csrc/calls.h: system calls as a list, timed. */
#define KVMPY_CALL_IOCTL ...
#define KVMPY_CALL_CLOSE ...
#define KVMPY_CALL_WRITE ...
#define KVMPY_CALL_KICK ...
#define KVMPY_CALL_RUN ...
#define KVMPY_CALL_OPEN ...
#define KVMPY_MAX_CALLS ...

struct kvmpy_call {
    uint32_t kind;
    int32_t fd;
    uint32_t from;
    int32_t error;
    uint64_t request;
    uint64_t argument;
    uint64_t *poke;
    uint64_t value;
    uint32_t opens;
};

int kvmpy_make_calls(const struct kvmpy_call *calls, uint32_t count, int *results,
                     uint32_t *failed);

struct kvmpy_raiser {
    const struct kvmpy_call *calls;
    uint32_t count;
    int32_t cpu;
    uint64_t delay_ns;
    uint64_t raised;
    int32_t error;
    uint32_t asked;
    uint32_t done;
    ...;
};

int kvmpy_time_calls(const struct kvmpy_call *calls, uint32_t count, uint32_t first,
                     uint32_t last, uint32_t rounds, uint64_t *pairs, uint32_t *failed);
int kvmpy_raiser_start(struct kvmpy_raiser *raiser);
void kvmpy_raiser_end(struct kvmpy_raiser *raiser);
int kvmpy_raise(struct kvmpy_raiser *raiser, struct kvmpy_loop *loop, uint64_t *pair);

/* csrc/pages.h: pages of guest RAM, by bitmaps. */
int64_t kvmpy_own_pages(const uint8_t *start, uint64_t pages, uint64_t *bitmap);
int64_t kvmpy_differing(const uint8_t *one, const uint8_t *other, uint64_t pages,
                        uint64_t *bitmap);
int64_t kvmpy_not_zero(const uint8_t *start, uint64_t pages, uint64_t *bitmap);
int64_t kvmpy_copy_pages(uint8_t *to, const uint8_t *from, uint64_t pages,
                         const uint64_t *bitmap);
int64_t kvmpy_write_pages(int fd, uint64_t offset, const uint8_t *start, uint64_t pages,
                          const uint64_t *bitmap);
int kvmpy_remap(uint8_t *start, uint64_t size, int fd, uint64_t offset);

/* csrc/reset.h: going back to a snapshot. */
struct kvmpy_reset_region {
    uint32_t slot;
    uint64_t pages;
    uint8_t *ram;
    const uint8_t *saved;
    uint64_t *dirty;
    uint64_t *more;
    uint64_t *tables;
};

struct kvmpy_reset_cpu {
    struct kvmpy_loop *loop;
    const uint8_t *sync;
    uint64_t stale;
    uint64_t paging[4];
};

struct kvmpy_reset {
    int32_t vm;
    uint32_t regions;
    struct kvmpy_reset_region *region;
    uint32_t cpus;
    struct kvmpy_reset_cpu *cpu;
    const struct kvmpy_call *calls;
    uint32_t count;
    uint32_t failed;
    uint32_t spare_slot;
    uint64_t spare_address;
    void *spare_page;
    uint32_t drop;
    uint64_t looked;
    uint64_t changed;
    uint32_t paging;
    uint64_t idle;
};

int kvmpy_reset(struct kvmpy_reset *reset);
int kvmpy_touched(const struct kvmpy_reset *reset, uint64_t *bitmap);
struct kvmpy_run {
    int32_t code;
    uint32_t reason;
    uint64_t changed;
    uint64_t value;
    ...;
};

struct kvmpy_batch {
    struct kvmpy_reset *reset;
    struct kvmpy_loop *loop;
    int64_t timeout_ns;
    uint64_t max_exits;
    uint32_t region;
    uint64_t offset;
    const uint8_t *data;
    const uint64_t *ends;
    uint32_t first;
    uint32_t count;
    struct kvmpy_run *runs;
    const uint8_t *collect;
    uint64_t collect_size;
    uint8_t *collected;
    uint64_t *touched;
    uint64_t touched_words;
};

int kvmpy_run_batch(struct kvmpy_batch *batch);
void kvmpy_pause(struct kvmpy_loop *loop);
void kvmpy_quiet(struct kvmpy_loop *loop);
int kvmpy_resume(struct kvmpy_loop *loop, int64_t timeout_ns);
