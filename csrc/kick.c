/* Ending KVM_RUN from outside: the kick, the deadline and the heartbeat.
 *
 * All three work alike: set a flag, set run->immediate_exit, signal the thread. A signal
 * that comes while the guest runs ends KVM_RUN with EINTR; one that comes just before
 * finds immediate_exit set, and KVM_RUN returns at once. Neither can be lost.
 *
 * The signal is a real-time one that the process does not use, found when it is first
 * needed, so no handler of the caller's is replaced. The heartbeat makes KVM_RUN return
 * a few times a second, so that Python runs its own signal handlers (Ctrl-C among them)
 * also when their signal came on another thread or just before KVM_RUN. */
#define _GNU_SOURCE
#include "record.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static pthread_mutex_t signal_mutex = PTHREAD_MUTEX_INITIALIZER;
static int kick_signal; /* 0: none chosen yet */
static __thread struct kvmpy_loop *innermost __attribute__((tls_model("initial-exec")));

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    for (struct kvmpy_loop *loop = innermost; loop; loop = loop->outer) {
        __atomic_store_n(&loop->beat, 1, __ATOMIC_SEQ_CST);
        ((struct kvm_run *)loop->run)->immediate_exit = 1;
    }
}

static int is_ours(int number)
{
    struct sigaction now;
    return number && sigaction(number, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) &&
           now.sa_sigaction == on_signal;
}

static int choose_signal(void)
{
    int result = -EBUSY;

    pthread_mutex_lock(&signal_mutex);
    for (int number = SIGRTMAX - 1; number > SIGRTMIN && !is_ours(kick_signal); number--) {
        struct sigaction now, ours;
        if (sigaction(number, NULL, &now) || (now.sa_flags & SA_SIGINFO) ||
            now.sa_handler != SIG_DFL)
            continue;
        memset(&ours, 0, sizeof(ours));
        ours.sa_sigaction = on_signal;
        /* KVM_RUN answers EINTR itself; SA_RESTART spares the caller's other system calls. */
        ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
        if (sigaction(number, &ours, NULL) == 0)
            kick_signal = number;
    }
    if (is_ours(kick_signal))
        result = kick_signal;
    pthread_mutex_unlock(&signal_mutex);
    return result;
}

/* Set the timer for the deadline or the next heartbeat, whichever is first. */
static int arm(struct kvmpy_loop *loop, int64_t first_ns)
{
    int64_t period = loop->heartbeat_ns;
    if (first_ns < 1)
        first_ns = 1;
    struct itimerspec times = {
        .it_value = {first_ns / 1000000000, first_ns % 1000000000},
        .it_interval = {period / 1000000000, period % 1000000000},
    };
    return timer_settime(loop->timer, 0, &times, NULL) ? -errno : 0;
}

struct thread {
    int32_t process;
    int32_t id;
    uint32_t serial; /* unlike the id, no later thread has it: the kernel's timers know that */
};

static const struct thread *this_thread(void)
{
    static __thread struct thread me __attribute__((tls_model("initial-exec")));
    static uint32_t threads;

    if (me.process != getpid()) { /* the first call, or the child of a fork */
        me.process = getpid();
        me.id = (int32_t)syscall(SYS_gettid);
        me.serial = __atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED);
    }
    return &me;
}

/* Delete the timer. A forked child must not: its timer of that number is another's. */
void kvmpy_forget(struct kvmpy_loop *loop)
{
    if (loop->timer_thread && loop->timer_process == getpid())
        timer_delete(loop->timer);
    loop->timer_thread = 0;
    loop->ticking = 0; /* its number may become another's */
}

static int make_timer(struct kvmpy_loop *loop, int number, const struct thread *thread)
{
    struct sigevent event;

    kvmpy_forget(loop);
    memset(&event, 0, sizeof(event));
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = number;
    event.sigev_notify_thread_id = thread->id;
    if (timer_create(CLOCK_MONOTONIC, &event, &loop->timer))
        return -errno;
    loop->timer_thread = thread->serial;
    loop->timer_process = thread->process;
    return 0;
}

/* `running` and `finishing` exclude each other, but for one thread: whoever sets one looks at the
 * other afterwards, so that of two threads at least one sees the other. */
static int take_running(struct kvmpy_loop *loop)
{
    uint32_t free = 0;

    if (!__atomic_compare_exchange_n(&loop->running, &free, 1, 0, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return 0;
    if (!__atomic_load_n(&loop->finishing, __ATOMIC_SEQ_CST))
        return 1;
    __atomic_store_n(&loop->running, 0, __ATOMIC_SEQ_CST);
    return 0;
}

/* Keep other threads from running and finishing. 1: until kvmpy_release(); 0: this thread runs it,
 * and so they are kept already; -EBUSY: one of them does. */
int kvmpy_claim(struct kvmpy_loop *loop)
{
    uint32_t free = 0;

    if (__atomic_load_n(&loop->thread, __ATOMIC_SEQ_CST) == this_thread()->id)
        return 0;
    if (!__atomic_compare_exchange_n(&loop->finishing, &free, 1, 0, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return -EBUSY;
    if (!__atomic_load_n(&loop->running, __ATOMIC_SEQ_CST))
        return 1;
    kvmpy_release(loop);
    return -EBUSY;
}

void kvmpy_release(struct kvmpy_loop *loop)
{
    __atomic_store_n(&loop->finishing, 0, __ATOMIC_SEQ_CST);
}

/* Whether C may have in its hands what the loop pointed to before this call. */
int kvmpy_in_use(struct kvmpy_loop *loop)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&loop->running, __ATOMIC_SEQ_CST) ||
           __atomic_load_n(&loop->finishing, __ATOMIC_SEQ_CST);
}

/* Keep all threads from running and finishing, until kvmpy_release(); again: nothing. Waits for a
 * kvmpy_finish() or kvmpy_reset() under way, which enter no guest. -EBUSY: a thread runs it. */
int kvmpy_hold(struct kvmpy_loop *loop)
{
    uint32_t found = 0;

    while (!__atomic_compare_exchange_n(&loop->finishing, &found, KVMPY_HELD, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
        if (found == KVMPY_HELD)
            return 0;
        found = 0;
        sched_yield();
    }
    if (!__atomic_load_n(&loop->running, __ATOMIC_SEQ_CST))
        return 0;
    kvmpy_release(loop);
    return -EBUSY;
}

/* The vCPU's mapping goes: nothing in C may touch it any more. After kvmpy_hold(), or in the child
 * of a fork, where the other threads do not exist; but it may be in the midst of a device, so that
 * there is something to come back to. */
void kvmpy_retire(struct kvmpy_loop *loop)
{
    static struct kvm_run nothing;

    loop->open = loop->awaiting = loop->held = loop->incomplete = 0;
    loop->ring = NULL;
    loop->fd = -1;
    loop->run = &nothing;
}

/* Make this thread the one that runs the vCPU; timeout_ns < 0 means no deadline.
 * -EBUSY: another thread has it, or this one further up its stack. */
int kvmpy_begin(struct kvmpy_loop *loop, int64_t timeout_ns)
{
    sigset_t signals, before;
    const struct thread *thread = this_thread();

    if (!take_running(loop))
        return -EBUSY;
    int number = is_ours(kick_signal) ? kick_signal : choose_signal();
    int result = number;
    if (number > 0 && loop->timer_thread != thread->serial)
        result = make_timer(loop, number, thread);
    if (result < 0) {
        __atomic_store_n(&loop->running, 0, __ATOMIC_SEQ_CST);
        return number < 0 ? -ENOSPC : result;
    }

    loop->returned = KVMPY_HEARTBEAT;
    loop->sample_entered = 0;
    loop->ticking = 0;
    loop->deadline_ns = timeout_ns < 0 ? 0 : kvmpy_clock() + (uint64_t)timeout_ns;
    loop->outer = innermost;
    innermost = loop;
    __atomic_store_n(&loop->thread, thread->id, __ATOMIC_SEQ_CST);

    sigemptyset(&signals);
    sigaddset(&signals, number);
    pthread_sigmask(SIG_UNBLOCK, &signals, &before);
    loop->was_blocked = sigismember(&before, number) ? number : 0;

    int64_t first = (int64_t)loop->heartbeat_ns;
    return arm(loop, timeout_ns >= 0 && timeout_ns < first ? timeout_ns : first);
}

/* This thread is done with the vCPU; nothing where kvmpy_begin() has not succeeded, so that
 * it can be called whatever interrupted the caller. */
void kvmpy_end(struct kvmpy_loop *loop)
{
    static const struct itimerspec never;
    sigset_t signals;

    if (innermost != loop)
        return;
    timer_settime(loop->timer, 0, &never, NULL);
    loop->ticking = 0;
    loop->batch = 0;
    kvmpy_record_end(loop);
    if (loop->was_blocked) {
        sigemptyset(&signals);
        sigaddset(&signals, loop->was_blocked);
        pthread_sigmask(SIG_BLOCK, &signals, NULL);
    }
    innermost = loop->outer;
    __atomic_store_n(&loop->thread, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&loop->running, 0, __ATOMIC_SEQ_CST);
}

/* Another run of the thread that has the vCPU already. */
void kvmpy_next(struct kvmpy_loop *loop, int64_t timeout_ns)
{
    loop->returned = KVMPY_HEARTBEAT;
    loop->sample_entered = 0;
    loop->deadline_ns = timeout_ns < 0 ? 0 : kvmpy_clock() + (uint64_t)timeout_ns;
}

/* kvmpy_begin() for runs that follow each other closely: where kvmpy_pause() has left the timer
 * ticking for this thread, no system call is made. A deadline is then seen at a heartbeat. */
int kvmpy_resume(struct kvmpy_loop *loop, int64_t timeout_ns)
{
    if (!loop->ticking || loop->timer_thread != this_thread()->serial) {
        int result = kvmpy_begin(loop, timeout_ns);
        loop->ticking = result == 0;
        if (result == 0)
            loop->batch = 1;
        return result;
    }
    if (!take_running(loop))
        return -EBUSY;
    kvmpy_next(loop, timeout_ns);
    loop->outer = innermost;
    innermost = loop;
    __atomic_store_n(&loop->thread, this_thread()->id, __ATOMIC_SEQ_CST);
    loop->batch = 1;
    return 0;
}

/* kvmpy_end() that leaves the timer ticking. */
void kvmpy_pause(struct kvmpy_loop *loop)
{
    if (innermost != loop)
        return;
    if (loop->was_blocked || !loop->ticking) {
        kvmpy_end(loop);
        return;
    }
    loop->batch = 0;
    kvmpy_record_end(loop);
    innermost = loop->outer;
    __atomic_store_n(&loop->thread, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&loop->running, 0, __ATOMIC_SEQ_CST);
}

/* Stop the timer that kvmpy_pause() has left ticking; from any thread. */
void kvmpy_quiet(struct kvmpy_loop *loop)
{
    static const struct itimerspec never;

    if (loop->ticking && loop->timer_process == getpid() &&
        !__atomic_load_n(&loop->running, __ATOMIC_SEQ_CST)) {
        timer_settime(loop->timer, 0, &never, NULL);
        loop->ticking = 0;
    }
}

/* End the run under way, or the next one, whichever thread runs it. A kick that no run has
 * answered yet is enough: real-time signals queue, and a thread that gets them faster than it
 * can take them never comes to anything else. */
void kvmpy_kick(struct kvmpy_loop *loop)
{
    if (__atomic_exchange_n(&loop->stop, 1, __ATOMIC_SEQ_CST))
        return;
    __atomic_store_n(&((struct kvm_run *)loop->run)->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int32_t thread = __atomic_load_n(&loop->thread, __ATOMIC_SEQ_CST);
    if (thread)
        syscall(SYS_tgkill, getpid(), thread, kick_signal);
}

/* Take back a kick that no run has answered yet: 1 if there was one. */
int kvmpy_unkick(struct kvmpy_loop *loop)
{
    return __atomic_exchange_n(&loop->stop, 0, __ATOMIC_SEQ_CST) != 0;
}

/* What the machine was doing is undone: it ends no run any more. A kick that is not answered yet
 * is for the next one. */
void kvmpy_forget_end(struct kvmpy_loop *loop)
{
    uint32_t before = STOPPED_BEFORE;

    __atomic_compare_exchange_n(&loop->stop, &before, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* KVM_RUN said EINTR: why? The flags are looked at after immediate_exit is cleared, so
 * that whoever sets them later sets immediate_exit again. */
int kvmpy_interrupted(struct kvmpy_loop *loop)
{
    struct kvm_run *run = loop->run;

    __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&loop->beat, 0, __ATOMIC_SEQ_CST);
    if (kvmpy_unkick(loop))
        return KVMPY_STOPPED;
    if (loop->deadline_ns) {
        int64_t left = (int64_t)(loop->deadline_ns - kvmpy_clock());
        if (left <= 0)
            return KVMPY_DEADLINE;
        if (left < (int64_t)loop->heartbeat_ns)
            arm(loop, left);
    }
    return KVMPY_HEARTBEAT;
}
