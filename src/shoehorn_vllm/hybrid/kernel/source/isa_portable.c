/* Plain C: any processor; also the yardstick of the tests. */
#include "product.h"

#define ONE_FOR_ALL
#define NAME(x) portable_##x
#define FN static inline __attribute__((always_inline))
#define EXPORT
#define VEC float
#define LANES 1
#define ROWS_FOR(M) 1

FN float portable_zero(void) { return 0.0f; }
FN float portable_load(const float *p) { return *p; }
FN float portable_negated(float a, float b, float sum) { return sum - a * b; }
FN float portable_sum(float v) { return v; }

FN void portable_block(const int R, const int M, const int G, const int format, const uint8_t *codes, int64_t stride,
                       int64_t ahead, const float *scales, const int8_t *x, const float *x_scales, float *sums) {
    (void)ahead;
    static const uint8_t table[16] = { MXFP4_TABLE };
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++)
            for (int part = 0; part < BLOCK / X_GROUP; part++) {
                const uint8_t *p = codes + r * stride + part * (X_GROUP / 2);
                const int8_t *even = x + m * BLOCK + part * (X_GROUP / 2), *odd = even + BLOCK / 2;
                int32_t dot = 0;
                for (int i = 0; i < X_GROUP / 2; i++) {
                    const int low = p[i] & 15, high = p[i] >> 4;
                    dot += (format ? table[low] : low) * even[i] + (format ? table[high] : high) * odd[i];
                }
                const float factor = scales[r * CHUNK_GROUPS + part * X_GROUP / G] * x_scales[m * BLOCK_SCALES + part];
                sums[r * M + m] += (float)dot * factor;
            }
}

static inline int round_to_int8(float value) { /* ties to even, as the vector units do */
    if (!(value >= -128.0f)) return -128; /* NaN too */
    return value > 127.0f ? 127 : (int)((value + 12582912.0f) - 12582912.0f);
}

void portable_quantize(const uint16_t *x, int64_t first, int64_t end, int group, float offset, const struct tile *out,
                       int slot) {
    for (int64_t at = first; at < end; at += X_GROUP) {
        uint32_t top = 0;
        for (int i = 0; i < X_GROUP; i++) {
            const uint32_t size = x[at + i] & 0x7fffu;
            top = size > top ? size : top;
        }
        const float largest = bf16_to_float((uint16_t)top), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        int8_t *codes = out->codes + (at / BLOCK * out->tokens + slot) * BLOCK + at % BLOCK / 2;
        int32_t sum = 0;
        for (int i = 0; i < X_GROUP / 2; i++) {
            const int even = round_to_int8(bf16_to_float(x[at + 2 * i]) * inverse);
            const int odd = round_to_int8(bf16_to_float(x[at + 2 * i + 1]) * inverse);
            codes[i] = (int8_t)even;
            codes[BLOCK / 2 + i] = (int8_t)odd;
            sum += even + odd;
        }
        write_scale(out, at, group, slot, largest / 127.0f, offset * (float)sum);
    }
}
#include "rows.h"

rows_fn portable_rows(void) { return portable_any; }
