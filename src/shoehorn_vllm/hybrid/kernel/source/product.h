/* What the exported functions share: the choice of an instruction set, scratch memory, quantizing a tile. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "layout.h"

enum { ISA_PORTABLE = 0, ISA_AVX2 = 1, ISA_AVXVNNI = 2, ISA_AVX512VNNI = 3, ISA_COUNT = 4 };
enum { OUT_FLOAT = 0, OUT_BF16 = 1 };

enum { ACTIVATION_SILU = 0, ACTIVATION_GELU = 1, ACTIVATION_GELU_TANH = 2, ACTIVATION_SWIGLU_OAI = 3 };

/* The experts of a layer. */
struct experts {
    struct weights up;            /* of expert 0: rows of the gate, then as many of up; in turns for SWIGLU_OAI */
    struct weights down;
    const uint16_t *up_bias;      /* bf16 of expert 0, or 0 */
    const uint16_t *down_bias;
    int64_t up_bias_step, down_bias_step; /* values from one expert to the next */
    int64_t count;
    int32_t activation;
    float alpha, limit;           /* of SWIGLU_OAI */
};

#define SLICE 4096            /* k values that are quantized at a time: a multiple of BLOCK */
#define ITEM_BYTES 65536      /* weights of an item of work */
#define ITEM_ROWS 256

static inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Rows for one item, where a row has `bytes`: a multiple of 16, at most ITEM_ROWS, and few enough for all threads. */
int64_t rows_per_item(int64_t rows, int64_t bytes);

rows_fn portable_rows(void);
void portable_quantize(const uint16_t *x, int64_t first, int64_t end, int group, float offset, const struct tile *out,
                       int slot);
#if defined(__x86_64__)
extern const rows_fn avx2_rows[4][TILE], avxvnni_rows[4][TILE], avx512_rows[4][TILE]; /* by format and group, tokens */
void avx2_quantize(const uint16_t *x, int64_t first, int64_t end, int group, float offset, const struct tile *out,
                   int slot);
void avx2_unpack(const uint8_t *pairs, int64_t count, const uint16_t table[16], uint16_t *out);
uint64_t avx2_read(const uint8_t *at, int64_t bytes);
#endif

int isa_available(int isa);
rows_fn rows_function(int isa, int group, int format, int tokens);
quantize_fn quantize_function(int isa);
int check_weights(const struct weights *w);
int check_experts(const struct experts *e);
int linear_run(const struct weights *w, const uint16_t *x, int64_t tokens, int64_t x_stride, const uint16_t *bias,
               void *y, int64_t y_stride, int32_t out, int32_t isa, double timeout);
int experts_run(const struct experts *e, const uint16_t *x, int64_t tokens, int64_t x_stride, const int32_t *ids,
                const float *router, int64_t top_k, void *y, int64_t y_stride, int32_t out, int32_t isa, double timeout);

int64_t tile_bytes(int64_t k, int group, int tokens);
/* A tile in memory at `at`, which has tile_bytes() bytes and is aligned to 64. */
struct tile tile_at(uint8_t *at, int64_t k, int group, int tokens);
/* Quantize slice number `slice` of one token into slot `slot`. */
void quantize_slice(quantize_fn quantize, const uint16_t *x, int64_t slice, int64_t k, int group, float offset,
                    const struct tile *out, int slot);
/* Memory that stays until a larger piece is asked for; one owner at a time. 0 where there is none. */
struct scratch { uint8_t *memory; int64_t bytes; };
uint8_t *scratch_of(struct scratch *scratch, int64_t bytes);

#endif
