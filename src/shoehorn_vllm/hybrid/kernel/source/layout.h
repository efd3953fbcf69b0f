/* Data layout that all parts of the kernel share.
 *
 * Weights: codes of 4 bits in rows of k / 2 bytes, the even k in the low half of a byte; one scale per group of a row.
 *   INT4   value = (code - 8) * scale, scale in bf16 (compressed-tensors, W4A16 symmetric)
 *   MXFP4  value = table[code] * 2^(scale - 127), scale in E8M0, groups of 32
 * Activations: a tile of up to 8 tokens. Blocks of 128 k (the last one padded with zeros); of each block, for each token,
 *   64 int8 of the even k, then 64 of the odd k. Order in memory: block, token, byte; scales: block, token, 4 floats.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

#include <stdint.h>
#include <string.h>

#define BLOCK 128             /* k values in a block */
#define BLOCK_BYTES 64        /* bytes of codes in a block */
#define X_GROUP 32            /* activations that share a scale, whatever the weights' group */
#define TILE 8                /* tokens in a tile */
#define CHUNK 32              /* blocks whose scales are converted at a time */
#define CHUNK_GROUPS (CHUNK * 4)
#define MAX_ROWS 4            /* rows of weights that are multiplied side by side */
#define BLOCK_SCALES 4        /* scales of a block's activations */

enum { FORMAT_INT4 = 0, FORMAT_MXFP4 = 1 };

struct weights {
    const uint8_t *codes;     /* [rows, k / 2] */
    const void *scales;       /* [rows, k / group]: uint16 (bf16) or uint8 (E8M0) */
    int64_t rows, k;
    int64_t codes_step, scales_step; /* bytes from one expert to the next */
    int32_t group, format;
};

struct tile {
    int8_t *codes;            /* [blocks, tokens, 128] */
    float *scales;            /* [blocks, tokens, 4] */
    float *offsets;           /* [tokens, offset_stride]: offset of the codes * scale * sum of the activations */
    int64_t offset_stride;
    int32_t tokens;
};

typedef void (*rows_fn)(const struct weights *w, int64_t first, int64_t count, const struct tile *x, float *y, int64_t ldy);
/* Quantize x[first .. end) of one token to int8; both are multiples of the weights' group. */
typedef void (*quantize_fn)(const uint16_t *x, int64_t first, int64_t end, int group, float offset,
                            const struct tile *out, int slot);

static inline int64_t blocks_of(int64_t k) { return (k + BLOCK - 1) / BLOCK; }
static inline int64_t offset_stride_of(int64_t k, int group) { return (k / group + 15) / 16 * 16; }

static inline float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Half of 2^(code - 127), because the table holds twice the values; 255 is NaN. */
static inline float e8m0_to_float(uint8_t code) {
    uint32_t bits = code == 255 ? 0x7fc00000u : code > 1 ? (uint32_t)(code - 1) << 23 : 0x400000u >> (1 - code);
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Write the scale of 32 activations, and add what the codes' offset times their sum makes to the weights' group. */
static inline void write_scale(const struct tile *x, int64_t at, int group, int slot, float scale, float offset_sum) {
    float *offset = x->offsets + slot * x->offset_stride + at / group;
    x->scales[(at / BLOCK * x->tokens + slot) * BLOCK_SCALES + at % BLOCK / X_GROUP] = scale;
    *offset = (at % group ? *offset : 0.0f) + scale * offset_sum;
}

static inline float code_offset(int format) { return format == FORMAT_MXFP4 ? 12.0f : 8.0f; }

/* Twice the values of E2M1 plus 12, so that they are unsigned. */
#define MXFP4_TABLE 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0

#endif
