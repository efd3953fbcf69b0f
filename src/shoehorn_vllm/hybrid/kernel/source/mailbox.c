/* A thread that multiplies what a GPU asks for, without the interpreter.
 *
 * The GPU's stream copies activations to `x` (for experts also `ids` and `router`), writes a request into the mailbox, and
 * waits there until `done` is set; this thread polls the request, multiplies with the team, writes `y` and sets `done`.
 * One request at a time.
 *
 * Rules:
 * - a request is tokens << 16 | number of the task + 1; 0 is none. The thread clears it before it sets `done`.
 * - the GPU clears `done`, behind its wait.
 * - a failed product ends the process: the stream would wait for ever, and no token may be made from what is in `y`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "pool.h"
#include "product.h"

#define EXIT_FAILED 70        /* EX_SOFTWARE */
#define SPIN_SECONDS 0.002    /* between two requests of a forward pass */
#define NAP_NANOSECONDS 50000
#define LONG_NAP_NANOSECONDS 1000000
#define LONG_SECONDS 1.0      /* without a request: nobody decodes */

struct mailbox {
    _Alignas(64) _Atomic uint32_t request;
    _Alignas(64) _Atomic uint32_t done;
};

/* A matrix, or the experts of a layer; the other one is 0. */
struct task {
    const struct weights *matrix;
    const struct experts *experts;
    int64_t top_k;
};

/* Where the GPU writes and reads; rows of tokens without gaps. */
struct buffers {
    const uint16_t *x;      /* bf16 */
    uint16_t *y;            /* bf16 */
    const int32_t *ids;     /* [tokens, top_k]; -1 for none */
    const float *router;    /* [tokens, top_k] */
};

static struct {
    struct mailbox *box;
    struct task *tasks;
    struct buffers at;
    int32_t count, isa;
    double timeout;
    pthread_t thread;
    _Atomic int stop, started;
    _Atomic int64_t served;
} server;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void multiply(uint32_t request) {
    const int32_t number = (int32_t)(request & 0xffff) - 1;
    const int64_t tokens = request >> 16;
    int failed = -EINVAL;
    if (number >= 0 && number < server.count && tokens > 0) {
        const struct weights *w = server.tasks[number].matrix;
        const struct experts *e = server.tasks[number].experts;
        const struct buffers *at = &server.at;
        failed = w ? linear_run(w, at->x, tokens, w->k, 0, at->y, w->rows, OUT_BF16, server.isa, server.timeout)
                   : experts_run(e, at->x, tokens, e->up.k, at->ids, at->router, server.tasks[number].top_k, at->y,
                                 e->down.rows, OUT_BF16, server.isa, server.timeout);
    }
    if (!failed) return;
    if (failed == -ETIMEDOUT || failed == -EOWNERDEAD)
        fprintf(stderr, "CPU kernel: thread %d timed out after %g s. Restart the engine; look for a CPU that was taken "
                        "away or stopped.\n", pool_culprit(), server.timeout);
    else fprintf(stderr, "CPU kernel: request %u failed with error %d.\n", request, -failed);
    fflush(stderr);
    _exit(EXIT_FAILED);
}

static void *serve(void *unused) {
    (void)unused;
    double last = seconds();
    int spins = 0;
    while (!atomic_load_explicit(&server.stop, memory_order_relaxed)) {
        const uint32_t request = atomic_load_explicit(&server.box->request, memory_order_acquire);
        if (request) {
            multiply(request);
            atomic_store_explicit(&server.box->request, 0, memory_order_relaxed);
            atomic_store_explicit(&server.box->done, 1, memory_order_release);
            atomic_fetch_add_explicit(&server.served, 1, memory_order_relaxed);
            last = seconds();
            continue;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (++spins % 64) continue;
        const double idle = seconds() - last;
        if (idle < SPIN_SECONDS) continue;
        nanosleep(&(struct timespec){ 0, idle < LONG_SECONDS ? NAP_NANOSECONDS : LONG_NAP_NANOSECONDS }, 0);
    }
    return 0;
}

static int check_task(const struct task *task, const struct buffers *at) {
    if (!task->matrix == !task->experts) return -EINVAL;
    if (task->matrix) return check_weights(task->matrix);
    return check_experts(task->experts) || task->top_k < 1 || !at->ids || !at->router ? -EINVAL : 0;
}

/* Serve requests for `count` tasks, whose weights stay where they are. 0, or a negative errno. */
int mailbox_start(struct mailbox *box, const struct task *tasks, int32_t count, const struct buffers *at, int32_t cpu,
                  int32_t isa, double timeout) {
    if (!box || (uintptr_t)box % 64 || !tasks || count < 1 || count > 0xfffe || !at || !at->x || !at->y || !isa_available(isa))
        return -EINVAL;
    if (server.started) return -EBUSY;
    for (int32_t i = 0; i < count; i++)
        if (check_task(&tasks[i], at)) return -EINVAL;
    server.tasks = malloc((size_t)count * sizeof *tasks);
    if (!server.tasks) return -ENOMEM;
    memcpy(server.tasks, tasks, (size_t)count * sizeof *tasks);
    server.box = box, server.count = count, server.at = *at, server.isa = isa, server.timeout = timeout;
    atomic_store(&server.stop, 0);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&server.thread, 0, serve, 0);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (failed) {
        free(server.tasks);
        return -failed;
    }
    if (cpu >= 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(server.thread, sizeof one, &one); /* a CPU that was taken away meanwhile: not pinned */
    }
    server.started = 1;
    return 0;
}

/* End the thread; the stream must not wait for it any more. */
int mailbox_stop(void) {
    if (!server.started) return 0;
    atomic_store(&server.stop, 1);
    pthread_join(server.thread, 0);
    free(server.tasks);
    server.started = 0;
    return 0;
}

/* Requests that were served since the library was loaded. */
int64_t mailbox_served(void) { return atomic_load_explicit(&server.served, memory_order_relaxed); }
