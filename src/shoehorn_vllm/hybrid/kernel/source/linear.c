/* The dense product, and unpacking weights for large batches. */
#include <errno.h>

#include "pool.h"
#include "product.h"

struct linear {
    const struct weights *w;
    const uint16_t *x, *bias;
    void *y;
    int64_t tokens, x_stride, y_stride, tiles, slices, rows;
    int isa, out;
    struct tile *tile;
    quantize_fn quantize;
};

static void quantize_item(void *context, int64_t item) {
    const struct linear *job = context;
    const int64_t token = item / job->slices;
    quantize_slice(job->quantize, job->x + token * job->x_stride, item % job->slices, job->w->k, job->w->group,
                   code_offset(job->w->format), &job->tile[token / TILE], (int)(token % TILE));
}

static void rows_item(void *context, int64_t item) {
    const struct linear *job = context;
    const int64_t first = item * job->rows;
    const int64_t count = first + job->rows < job->w->rows ? job->rows : job->w->rows - first;
    float y[TILE * ITEM_ROWS];
    for (int64_t t = 0; t < job->tiles; t++) {
        const struct tile *x = &job->tile[t];
        rows_function(job->isa, job->w->group, job->w->format, x->tokens)(job->w, first, count, x, y, ITEM_ROWS);
        for (int m = 0; m < x->tokens; m++) {
            const int64_t at = (t * TILE + m) * job->y_stride + first;
            for (int64_t r = 0; r < count; r++) {
                const float sum = y[m * ITEM_ROWS + r] + (job->bias ? bf16_to_float(job->bias[first + r]) : 0.0f);
                if (job->out == OUT_BF16) ((uint16_t *)job->y)[at + r] = float_to_bf16(sum);
                else ((float *)job->y)[at + r] = sum;
            }
        }
    }
}

/* y[token, row] = x[token] . w[row] + bias[row]. x and bias are bf16, y is bf16 or float; strides count values. */
int linear_run(const struct weights *w, const uint16_t *x, int64_t tokens, int64_t x_stride, const uint16_t *bias,
               void *y, int64_t y_stride, int32_t out, int32_t isa, double timeout) {
    static struct scratch scratch;
    const int invalid = check_weights(w);
    if (invalid || !x || !y || tokens < 1 || !isa_available(isa)) return -EINVAL;
    struct linear job = { .w = w, .x = x, .bias = bias, .y = y, .tokens = tokens, .x_stride = x_stride,
                          .y_stride = y_stride, .tiles = divided_up(tokens, TILE), .slices = divided_up(w->k, SLICE),
                          .rows = rows_per_item(w->rows, w->k / 2), .isa = isa, .out = out, .quantize = quantize_function(isa) };
    const int64_t whole = tile_bytes(w->k, w->group, TILE);
    pool_enter();
    uint8_t *memory = scratch_of(&scratch, job.tiles * (whole + (int64_t)sizeof *job.tile));
    int failed = -ENOMEM;
    if (memory) {
        job.tile = (struct tile *)(memory + job.tiles * whole);
        for (int64_t t = 0; t < job.tiles; t++) {
            const int64_t left = tokens - t * TILE;
            job.tile[t] = tile_at(memory + t * whole, w->k, w->group, left < TILE ? (int)left : TILE);
        }
        struct phase phases[] = { { quantize_item, tokens * job.slices }, { rows_item, divided_up(w->rows, job.rows) } };
        const int alone = phases[0].items <= 2; /* the caller is done before another thread would have begun */
        for (int64_t i = 0; alone && i < phases[0].items; i++) quantize_item(&job, i);
        failed = pool_run(phases + alone, 2 - alone, &job, timeout);
    }
    pool_leave();
    return failed;
}

struct unpacking {
    const struct weights *w;
    uint16_t *out;
    int64_t rows;
    int isa;
};

static void unpack_item(void *context, int64_t item) {
    static const uint8_t mxfp4[16] = { MXFP4_TABLE };
    const struct unpacking *job = context;
    const struct weights *w = job->w;
    const int64_t first = item * job->rows, groups = w->k / w->group;
    const int64_t end = first + job->rows < w->rows ? first + job->rows : w->rows;
    for (int64_t row = first; row < end; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = row * groups + g;
            const float scale = w->format == FORMAT_INT4 ? bf16_to_float(((const uint16_t *)w->scales)[at])
                                                         : e8m0_to_float(((const uint8_t *)w->scales)[at]);
            uint16_t table[16];
            for (int code = 0; code < 16; code++)
                table[code] = float_to_bf16((float)(w->format == FORMAT_INT4 ? code - 8 : mxfp4[code] - 12) * scale);
            const uint8_t *pairs = w->codes + at * (w->group / 2);
            uint16_t *out = job->out + at * w->group;
#if defined(__x86_64__)
            if (job->isa != ISA_PORTABLE) {
                avx2_unpack(pairs, w->group, table, out);
                continue;
            }
#endif
            for (int i = 0; i < w->group / 2; i++) out[2 * i] = table[pairs[i] & 15], out[2 * i + 1] = table[pairs[i] >> 4];
        }
}

/* out[rows, k] in bf16. */
int unpack_run(const struct weights *w, uint16_t *out, int32_t isa, double timeout) {
    if (check_weights(w) || !out || !isa_available(isa)) return -EINVAL;
    struct unpacking job = { w, out, rows_per_item(w->rows, w->k / 2), isa };
    const struct phase phase = { unpack_item, divided_up(w->rows, job.rows) };
    pool_enter();
    const int failed = pool_run(&phase, 1, &job, timeout);
    pool_leave();
    return failed;
}

struct reading {
    const uint8_t *at;
    int64_t bytes;
    int isa;
    uint64_t sum;
};

static void read_item(void *context, int64_t item) {
    struct reading *job = context;
    const int64_t first = item * (ITEM_BYTES * 16), left = job->bytes - first;
    const int64_t bytes = left < ITEM_BYTES * 16 ? left : ITEM_BYTES * 16;
    uint64_t sum = 0;
#if defined(__x86_64__)
    if (job->isa != ISA_PORTABLE) sum = avx2_read(job->at + first, bytes);
    else
#endif
        for (int64_t i = 0; i + 8 <= bytes; i += 8) sum += *(const uint64_t *)(job->at + first + i);
    __atomic_fetch_xor(&job->sum, sum, __ATOMIC_RELAXED);
}

/* Read memory with all threads, for a measurement of its bandwidth. */
int read_run(const uint8_t *at, int64_t bytes, int32_t isa, uint64_t *sum, double timeout) {
    if (!at || bytes < 1 || (uintptr_t)at % 8 || !sum || !isa_available(isa)) return -EINVAL;
    struct reading job = { at, bytes, isa, 0 };
    const struct phase phase = { read_item, divided_up(bytes, ITEM_BYTES * 16) };
    pool_enter();
    const int failed = pool_run(&phase, 1, &job, timeout);
    pool_leave();
    *sum = job.sum;
    return failed;
}
