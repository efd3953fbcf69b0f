/* Mixtures of experts: the product of each token with the experts that its router chose, and their weighted sum.
 *
 * Pairs (token, expert) are sorted by expert, so that each expert's weights are read once; at most 8 pairs of an expert make
 * a tile. Four phases: quantize x, gate and up with the activation, quantize that, down. An item of the last phase owns
 * its rows of y and adds the experts in the order of their numbers: the result does not depend on the threads.
 */
#include <errno.h>
#include <math.h>

#include "pool.h"
#include "product.h"

struct group { int64_t expert; int32_t first_tile, tiles; };

struct mixture {
    const struct experts *e;
    const uint16_t *x;
    void *y;
    const float *router;
    int64_t tokens, top_k, x_stride, y_stride, pairs, inner;
    int64_t x_slices, h_slices, up_rows, up_items, down_rows;
    int isa, out, groups;
    quantize_fn quantize;
    int32_t *pair_of, *tile_of, *slot_of;  /* by position after sorting */
    int32_t *first_of;                     /* tile -> position */
    struct group *group;
    struct tile *x_tile, *h_tile;
    uint16_t *h;                           /* [positions, inner], bf16 */
    float *sum;                            /* [tokens, hidden] */
};

static struct weights of_expert(const struct weights *w, int64_t expert) {
    struct weights own = *w;
    own.codes += expert * w->codes_step;
    own.scales = (const uint8_t *)w->scales + expert * w->scales_step;
    return own;
}

static float activated(const struct experts *e, float gate, float up) {
    switch (e->activation) {
    case ACTIVATION_GELU: return up * 0.5f * gate * (1.0f + erff(gate * 0.70710678f));
    case ACTIVATION_GELU_TANH:
        return up * 0.5f * gate * (1.0f + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate)));
    case ACTIVATION_SWIGLU_OAI:
        gate = gate > e->limit ? e->limit : gate;
        up = up > e->limit ? e->limit : up < -e->limit ? -e->limit : up;
        return (up + 1.0f) * gate / (1.0f + expf(-e->alpha * gate));
    default: return up * gate / (1.0f + expf(-gate));
    }
}

static void quantize_x(void *context, int64_t item) {
    const struct mixture *job = context;
    const int64_t at = item / job->x_slices;
    const struct weights *w = &job->e->up;
    quantize_slice(job->quantize, job->x + job->pair_of[at] / job->top_k * job->x_stride, item % job->x_slices, w->k,
                   w->group, code_offset(w->format), &job->x_tile[job->tile_of[at]], job->slot_of[at]);
}

static void quantize_h(void *context, int64_t item) {
    const struct mixture *job = context;
    const int64_t at = item / job->h_slices;
    const struct weights *w = &job->e->down;
    quantize_slice(job->quantize, job->h + at * job->inner, item % job->h_slices, w->k, w->group,
                   code_offset(w->format), &job->h_tile[job->tile_of[at]], job->slot_of[at]);
}

/* Rows of gate and up that belong together, of one expert, for all its tiles. */
static void up_item(void *context, int64_t item) {
    const struct mixture *job = context;
    const struct experts *e = job->e;
    const struct group *group = &job->group[item / job->up_items];
    const struct weights w = of_expert(&e->up, group->expert);
    const uint16_t *bias = e->up_bias ? e->up_bias + group->expert * e->up_bias_step : 0;
    const int64_t first = item % job->up_items * job->up_rows;
    const int64_t count = first + job->up_rows < job->inner ? job->up_rows : job->inner - first;
    const int turns = e->activation == ACTIVATION_SWIGLU_OAI;
    float y[TILE * 2 * ITEM_ROWS];
    for (int t = group->first_tile; t < group->first_tile + group->tiles; t++) {
        const struct tile *x = &job->x_tile[t];
        const rows_fn rows = rows_function(job->isa, w.group, w.format, x->tokens);
        if (turns) rows(&w, 2 * first, 2 * count, x, y, 2 * ITEM_ROWS);
        else {
            rows(&w, first, count, x, y, 2 * ITEM_ROWS);
            rows(&w, job->inner + first, count, x, y + count, 2 * ITEM_ROWS);
        }
        for (int m = 0; m < x->tokens; m++) {
            const float *own = y + m * 2 * ITEM_ROWS;
            uint16_t *h = job->h + (job->first_of[t] + m) * job->inner + first;
            for (int64_t r = 0; r < count; r++) {
                const int64_t gate_row = turns ? 2 * (first + r) : first + r;
                const int64_t up_row = turns ? gate_row + 1 : job->inner + first + r;
                float gate = turns ? own[2 * r] : own[r], up = turns ? own[2 * r + 1] : own[count + r];
                if (bias) gate += bf16_to_float(bias[gate_row]), up += bf16_to_float(bias[up_row]);
                h[r] = float_to_bf16(activated(e, gate, up));
            }
        }
    }
}

static void down_item(void *context, int64_t item) {
    const struct mixture *job = context;
    const struct experts *e = job->e;
    const int64_t hidden = e->down.rows, first = item * job->down_rows;
    const int64_t count = first + job->down_rows < hidden ? job->down_rows : hidden - first;
    float y[TILE * ITEM_ROWS];
    for (int64_t t = 0; t < job->tokens; t++) memset(job->sum + t * hidden + first, 0, (size_t)count * sizeof(float));
    for (int g = 0; g < job->groups; g++) {
        const struct group *group = &job->group[g];
        const struct weights w = of_expert(&e->down, group->expert);
        const uint16_t *bias = e->down_bias ? e->down_bias + group->expert * e->down_bias_step + first : 0;
        for (int t = group->first_tile; t < group->first_tile + group->tiles; t++) {
            const struct tile *x = &job->h_tile[t];
            rows_function(job->isa, w.group, w.format, x->tokens)(&w, first, count, x, y, ITEM_ROWS);
            for (int m = 0; m < x->tokens; m++) {
                const int32_t pair = job->pair_of[job->first_of[t] + m];
                const float weight = job->router[pair];
                float *sum = job->sum + pair / job->top_k * hidden + first;
                for (int64_t r = 0; r < count; r++)
                    sum[r] += weight * (y[m * ITEM_ROWS + r] + (bias ? bf16_to_float(bias[r]) : 0.0f));
            }
        }
    }
    for (int64_t t = 0; t < job->tokens; t++)
        for (int64_t r = first; r < first + count; r++) {
            const float sum = job->sum[t * hidden + r];
            if (job->out == OUT_BF16) ((uint16_t *)job->y)[t * job->y_stride + r] = float_to_bf16(sum);
            else ((float *)job->y)[t * job->y_stride + r] = sum;
        }
}

/* Sort the pairs by expert and cut them into tiles; the number of tiles. An id outside 0 .. count is left out. */
static int sort_pairs(struct mixture *job, const int32_t *ids, int32_t *start) {
    const int64_t count = job->e->count;
    int tiles = 0;
    memset(start, 0, (size_t)(count + 1) * sizeof *start);
    for (int64_t p = 0; p < job->pairs; p++)
        if (ids[p] >= 0 && ids[p] < count) start[ids[p] + 1]++;
    for (int64_t i = 0; i < count; i++) {
        const int32_t own = start[i + 1];
        start[i + 1] += start[i];
        if (!own) continue;
        job->group[job->groups++] = (struct group){ i, tiles, (int32_t)divided_up(own, TILE) };
        for (int32_t at = 0; at < own; at++) {
            const int32_t place = start[i] + at;
            if (at % TILE == 0) job->first_of[tiles + at / TILE] = place;
            job->tile_of[place] = tiles + at / TILE;
            job->slot_of[place] = at % TILE;
        }
        tiles += (int)divided_up(own, TILE);
    }
    const int64_t inside = start[count];
    for (int64_t p = 0; p < job->pairs; p++) /* stable: tokens in their order */
        if (ids[p] >= 0 && ids[p] < count) job->pair_of[start[ids[p]]++] = (int32_t)p;
    job->pairs = inside;
    return tiles;
}

/* Tiles of quantized activations in memory, one after the other; with no memory only their size. */
static int64_t lay_tiles(const struct mixture *job, const struct weights *w, int tiles, uint8_t *memory, struct tile *out) {
    int64_t bytes = 0;
    for (int t = 0; t < tiles; t++) {
        const int64_t next = t + 1 < tiles ? job->first_of[t + 1] : job->pairs;
        const int tokens = (int)(next - job->first_of[t]);
        if (memory) out[t] = tile_at(memory + bytes, w->k, w->group, tokens);
        bytes += tile_bytes(w->k, w->group, tokens);
    }
    return bytes;
}

int check_experts(const struct experts *e) {
    if (check_weights(&e->up) || check_weights(&e->down) || e->count < 1) return -EINVAL;
    return e->up.rows != 2 * e->down.k || e->up.k != e->down.rows ? -EINVAL : 0;
}

#define TAKE(count, type) ((type *)(at += used, used = ((int64_t)(count) * (int64_t)sizeof(type) + 63) / 64 * 64, at))

/* y[token] = sum over its top_k experts of router weight * down(activation(gate, up)). ids and router: [tokens, top_k]. */
int experts_run(const struct experts *e, const uint16_t *x, int64_t tokens, int64_t x_stride, const int32_t *ids,
                const float *router, int64_t top_k, void *y, int64_t y_stride, int32_t out, int32_t isa, double timeout) {
    static struct scratch lists, numbers;
    if (check_experts(e) || tokens < 1 || top_k < 1 || !x || !ids || !router || !y || !isa_available(isa) ||
        tokens * top_k > INT32_MAX / 8)
        return -EINVAL;
    struct mixture job = { .e = e, .x = x, .y = y, .router = router, .tokens = tokens, .top_k = top_k, .x_stride = x_stride,
                           .y_stride = y_stride, .pairs = tokens * top_k, .inner = e->down.k,
                           .x_slices = divided_up(e->up.k, SLICE), .h_slices = divided_up(e->down.k, SLICE),
                           .up_rows = rows_per_item(e->down.k * top_k, e->up.k),
                           .down_rows = rows_per_item(e->down.rows, e->down.k / 2),
                           .isa = isa, .out = out, .quantize = quantize_function(isa) };
    job.up_items = divided_up(job.inner, job.up_rows);
    const int64_t pairs = job.pairs;
    pool_enter();
    int failed = -ENOMEM;
    uint8_t *at = scratch_of(&lists, pairs * (4 * 4 + 2 * (int64_t)sizeof(struct tile)) +
                             (e->count + 1) * (4 + (int64_t)sizeof(struct group)) + 9 * 64);
    if (!at) goto leave;
    int64_t used = 0;
    job.pair_of = TAKE(pairs, int32_t);
    job.tile_of = TAKE(pairs, int32_t);
    job.slot_of = TAKE(pairs, int32_t);
    job.first_of = TAKE(pairs, int32_t);
    int32_t *start = TAKE(e->count + 1, int32_t);
    job.group = TAKE(e->count + 1, struct group);
    job.x_tile = TAKE(pairs, struct tile);
    job.h_tile = TAKE(pairs, struct tile);
    const int tiles = sort_pairs(&job, ids, start);
    const int64_t x_bytes = lay_tiles(&job, &e->up, tiles, 0, 0), h_bytes = lay_tiles(&job, &e->down, tiles, 0, 0);
    at = scratch_of(&numbers, x_bytes + h_bytes + job.pairs * job.inner * 2 + tokens * e->down.rows * 4 + 4 * 64);
    if (!at) goto leave;
    used = 0;
    lay_tiles(&job, &e->up, tiles, TAKE(x_bytes, uint8_t), job.x_tile);
    lay_tiles(&job, &e->down, tiles, TAKE(h_bytes, uint8_t), job.h_tile);
    job.h = TAKE(job.pairs * job.inner, uint16_t);
    job.sum = TAKE(tokens * e->down.rows, float);
    const struct phase phases[] = { { quantize_x, job.pairs * job.x_slices }, { up_item, job.groups * job.up_items },
                                    { quantize_h, job.pairs * job.h_slices },
                                    { down_item, divided_up(e->down.rows, job.down_rows) } };
    failed = pool_run(phases, 4, &job, timeout);
leave:
    pool_leave();
    return failed;
}
