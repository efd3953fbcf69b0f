#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif
#define OPEN 0x80000000u          /* in `door`: the job may be joined; the other bits count who is inside */
#define SLEEP_NS 100000000L        /* longest sleep of the caller before it looks at the clock */

struct member {
    _Alignas(64) pthread_t thread;
    int32_t cpu;
    _Atomic int hang_ms;
    _Atomic int inside;           /* between joining a job and leaving it */
    _Atomic int64_t items;
};

static struct {
    _Alignas(64) _Atomic uint32_t job;       /* number of the job: sleepers wait for its change */
    _Alignas(64) _Atomic uint32_t door;
    _Alignas(64) _Atomic int32_t sleepers;
    _Alignas(64) _Atomic int64_t next[MAX_PHASES];
    _Alignas(64) _Atomic int64_t done[MAX_PHASES];
    _Alignas(64) _Atomic uint32_t bell;      /* changes when a phase is done, a job is abandoned or its last member leaves */
    _Alignas(64) _Atomic int32_t listeners;  /* who sleep until it changes */
    _Atomic int abandoned, stop;
    const struct phase *phases;
    int count;
    void *context;
    struct member members[MAX_THREADS];
    int wanted;                              /* threads, the caller among them */
    int started;                             /* in this process */
    int spin_us, broken, culprit;
} pool = { .wanted = 1, .started = 1, .culprit = -1 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void ring(void) {
    atomic_fetch_add(&pool.bell, 1);
    if (atomic_load(&pool.listeners) > 0) syscall(SYS_futex, &pool.bell, FUTEX_WAKE_PRIVATE, MAX_THREADS, 0, 0, 0);
}

/* Wait once: spin until `until`, then sleep until the bell differs from `rung`. sched_yield would not do: Linux 6.18
 * charges it as a whole time slice, which starves the caller beside other processes. */
static void pause_once(int *spins, double until, uint32_t rung) {
    RELAX();
    if (++*spins % 64 || now() < until) return;
    atomic_fetch_add(&pool.listeners, 1);
    syscall(SYS_futex, &pool.bell, FUTEX_WAIT_PRIVATE, rung, &(struct timespec){ 0, SLEEP_NS }, 0, 0);
    atomic_fetch_sub(&pool.listeners, 1);
}

static int64_t progress(void) {
    int64_t total = 0;
    for (int i = 0; i < pool.wanted; i++) total += atomic_load_explicit(&pool.members[i].items, memory_order_relaxed);
    return total;
}

/* Wait until the phase is done; only thread 0 decides that another one hangs. */
static int wait_for_phase(int phase, int number, double timeout) {
    const int64_t items = pool.phases[phase].items;
    int spins = 0;
    int64_t seen = progress();
    double since = now();
    const double until = since + 1e-6 * pool.spin_us;
    for (;;) {
        const uint32_t rung = atomic_load(&pool.bell);
        if (atomic_load_explicit(&pool.done[phase], memory_order_acquire) >= items) return 0;
        if (atomic_load_explicit(&pool.abandoned, memory_order_relaxed)) return -ETIMEDOUT;
        pause_once(&spins, until, rung);
        if (number || spins % 64) continue;
        const int64_t present = progress();
        if (present != seen) seen = present, since = now();
        else if (now() - since > timeout) return -ETIMEDOUT;
    }
}

static int participate(int number, double timeout) {
    struct member *self = &pool.members[number];
    for (int phase = 0; phase < pool.count; phase++) {
        const struct phase work = pool.phases[phase];
        int64_t mine = 0;
        for (;;) {
            const int64_t item = atomic_fetch_add_explicit(&pool.next[phase], 1, memory_order_relaxed);
            if (item >= work.items) break;
            const int hang = atomic_exchange_explicit(&self->hang_ms, 0, memory_order_relaxed);
            if (hang) nanosleep(&(struct timespec){ hang / 1000, hang % 1000 * 1000000L }, 0);
            work.run(pool.context, item);
            atomic_fetch_add_explicit(&self->items, 1, memory_order_relaxed);
            mine++;
        }
        if (mine && atomic_fetch_add(&pool.done[phase], mine) + mine == work.items) ring();
        if (number && phase + 1 == pool.count) return 0;
        const int failed = wait_for_phase(phase, number, timeout);
        if (failed) return failed;
    }
    return 0;
}

static int join_job(void) {
    uint32_t door = atomic_load_explicit(&pool.door, memory_order_relaxed);
    while (door & OPEN)
        if (atomic_compare_exchange_weak_explicit(&pool.door, &door, door + 1, memory_order_acquire, memory_order_relaxed))
            return 1;
    return 0;
}

static void *serve(void *argument) {
    const int number = (int)(intptr_t)argument;
    struct member *self = &pool.members[number];
    uint32_t seen = 0;
    while (!atomic_load_explicit(&pool.stop, memory_order_relaxed)) {
        const double until = now() + 1e-6 * pool.spin_us;
        int spins = 0;
        while (atomic_load_explicit(&pool.job, memory_order_acquire) == seen) {
            RELAX();
            if (++spins % 64 || now() < until) continue;
            atomic_fetch_add(&pool.sleepers, 1);
            syscall(SYS_futex, &pool.job, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
            atomic_fetch_sub(&pool.sleepers, 1);
        }
        seen = atomic_load_explicit(&pool.job, memory_order_acquire);
        if (!join_job()) continue;
        atomic_store_explicit(&self->inside, 1, memory_order_relaxed);
        participate(number, 0.0);
        atomic_store_explicit(&self->inside, 0, memory_order_relaxed);
        if (atomic_fetch_sub(&pool.door, 1) == 1) ring(); /* closed, and nobody inside */
    }
    return 0;
}

static void wake(void) {
    atomic_fetch_add(&pool.job, 1);
    if (atomic_load(&pool.sleepers) > 0) syscall(SYS_futex, &pool.job, FUTEX_WAKE_PRIVATE, MAX_THREADS, 0, 0, 0);
}

static int stop_locked(void) {
    if (pool.broken) return -EOWNERDEAD;
    atomic_store(&pool.stop, 1);
    wake();
    for (int i = 1; i < pool.started; i++) pthread_join(pool.members[i].thread, 0);
    atomic_store(&pool.stop, 0);
    pool.started = 1;
    return 0;
}

static int start_locked(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (; pool.started < pool.wanted && !failed; pool.started += !failed) {
        struct member *member = &pool.members[pool.started];
        failed = pthread_create(&member->thread, 0, serve, (void *)(intptr_t)pool.started);
        if (failed || member->cpu < 0) continue;
        cpu_set_t cpu;
        CPU_ZERO(&cpu);
        CPU_SET(member->cpu, &cpu);
        pthread_setaffinity_np(member->thread, sizeof cpu, &cpu); /* a CPU that was taken away meanwhile: not pinned */
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (failed) pool.wanted = pool.started;
    return -failed;
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void after_fork_in_child(void) { /* its only thread is the one that forked */
    pool.started = 1;
    pool.broken = 0;
    pool.culprit = -1;
    atomic_store(&pool.door, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.listeners, 0);
    atomic_store(&pool.abandoned, 0);
    pthread_mutex_unlock(&lock);
}
__attribute__((constructor)) static void register_fork(void) {
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
}

int pool_start(const int32_t *cpus, int32_t threads, int32_t spin_us) {
    if (threads < 1 || threads > MAX_THREADS || spin_us < 0) return -EINVAL;
    pthread_mutex_lock(&lock);
    int failed = stop_locked();
    if (!failed) {
        for (int i = 0; i < threads; i++) {
            pool.members[i].cpu = cpus ? cpus[i] : -1;
            atomic_store(&pool.members[i].items, 0);
        }
        pool.wanted = threads;
        pool.spin_us = spin_us;
        failed = start_locked();
    }
    pthread_mutex_unlock(&lock);
    return failed;
}

int pool_stop(void) {
    pthread_mutex_lock(&lock);
    const int failed = stop_locked();
    if (!failed) pool.wanted = 1;
    pthread_mutex_unlock(&lock);
    return failed;
}

void pool_enter(void) { pthread_mutex_lock(&lock); }
void pool_leave(void) { pthread_mutex_unlock(&lock); }

int pool_run(const struct phase *phases, int count, void *context, double timeout) {
    if (pool.broken) return -EOWNERDEAD;
    if (pool.started < pool.wanted) start_locked(); /* after a fork; with fewer threads where none can be made */
    for (int i = 0; i < count; i++) {
        atomic_store_explicit(&pool.next[i], 0, memory_order_relaxed);
        atomic_store_explicit(&pool.done[i], 0, memory_order_relaxed);
    }
    pool.phases = phases;
    pool.count = count;
    pool.context = context;
    if (pool.started > 1) {
        atomic_store_explicit(&pool.door, OPEN, memory_order_release);
        wake();
    }
    int failed = participate(0, timeout);
    if (pool.started == 1) return failed;
    atomic_fetch_and_explicit(&pool.door, ~OPEN, memory_order_acq_rel);
    if (failed) {
        atomic_store(&pool.abandoned, 1);
        ring();
    }
    int spins = 0;
    const double start = now(), limit = failed ? 1.0 : timeout; /* those inside have no item left: they leave at once */
    for (;;) {
        const uint32_t rung = atomic_load(&pool.bell);
        if (!atomic_load_explicit(&pool.door, memory_order_acquire)) break;
        pause_once(&spins, start + 1e-6 * pool.spin_us, rung);
        if (spins % 64 == 0 && now() - start > limit) { failed = -ETIMEDOUT; break; }
    }
    if (failed) {
        pool.broken = 1;
        for (int i = 1; i < pool.started; i++)
            if (atomic_load(&pool.members[i].inside)) pool.culprit = i;
    }
    return failed;
}

int pool_threads(void) { return pool.wanted; }
int pool_culprit(void) { return pool.culprit; }

int pool_items(int64_t *items, int32_t length) {
    const int count = pool.wanted < length ? pool.wanted : length;
    for (int i = 0; i < count; i++) items[i] = atomic_load(&pool.members[i].items);
    return count;
}

int pool_inject(int32_t thread, int32_t milliseconds) {
    if (thread < 1 || thread >= pool.wanted || milliseconds < 1) return -EINVAL;
    atomic_store(&pool.members[thread].hang_ms, milliseconds);
    return 0;
}
