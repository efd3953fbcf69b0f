/* A team of pinned threads that works through phases of items together with the calling thread.
 *
 * Rules:
 * - Thread 0 is the caller, it is never pinned. The others are pinned to one CPU each, receive no signals, spin for
 *   a while after a job and then sleep on a futex.
 * - A thread that waits for the others within a job spins for the same while, then sleeps too: beside other processes a
 *   spinning thread would take the time of those that it waits for.
 * - A job is closed when its last item is done. A thread that wakes late finds it closed, so nobody waits for a sleeper.
 * - A thread that took an item and makes no progress for `timeout` is reported; the team is broken from then on,
 *   because that thread may still write to the caller's memory.
 * - After a fork the child starts a team of its own at its first job.
 */
#ifndef POOL_H
#define POOL_H

#include <stdint.h>

#define MAX_THREADS 256
#define MAX_PHASES 4

typedef void (*item_fn)(void *context, int64_t item);
struct phase {
    item_fn run;
    int64_t items;
};

/* 0, or a negative errno. Stops the team that is there. */
int pool_start(const int32_t *cpus, int32_t threads, int32_t spin_us);
int pool_stop(void);
/* One job at a time: pool_enter() waits for its turn, and a fork waits for pool_leave(). */
void pool_enter(void);
void pool_leave(void);
/* Between pool_enter and pool_leave. 0; -ETIMEDOUT where a thread hangs (pool_culprit() names it); -EOWNERDEAD once the team is broken. */
int pool_run(const struct phase *phases, int count, void *context, double timeout);
int pool_threads(void);
int pool_culprit(void);
/* Items that each thread has done since the start, thread 0 first. */
int pool_items(int64_t *items, int32_t length);
/* Fault injection: thread number `thread` hangs this long in its next item. */
int pool_inject(int32_t thread, int32_t milliseconds);

#endif
