/* The product of rows of weights and a tile of activations, for one instruction set.
 *
 * Included once for each instruction set, which defines before: NAME(x), FN (attributes of an inlined function), EXPORT
 * (attributes of another), VEC (vector of floats), LANES, ROWS_FOR(tokens), and NAME(zero), NAME(load), NAME(negated),
 * NAME(sum) and NAME(block).
 */

FN void NAME(scales_to_float)(float *out, const struct weights *w, int64_t row, int64_t first, int64_t count,
                              const int format) {
    const int64_t per_row = w->k / w->group;
    if (format == FORMAT_INT4) {
        const uint16_t *in = (const uint16_t *)w->scales + row * per_row + first;
        for (int64_t i = 0; i < count; i++) {
            const uint32_t bits = (uint32_t)in[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    } else {
        const uint8_t *in = (const uint8_t *)w->scales + row * per_row + first;
        for (int64_t i = 0; i < count; i++) out[i] = e8m0_to_float(in[i]);
    }
    for (int64_t i = count; i < (count + 15) / 16 * 16; i++) out[i] = 0.0f;
}

/* Rows first .. first + R of w times M tokens; all loops over R and M are unrolled. */
FN void NAME(group_of_rows)(const int R, const int M, const int G, const int format, const struct weights *w, int64_t first,
                            const struct tile *x, float *y, int64_t ldy) {
    const int64_t k = w->k, blocks = blocks_of(k), groups = k / G, stride = k / 2;
    const int64_t ahead = R == 1 ? 4096 : R * stride <= 16384 ? R * stride : 512; /* measured: Xeons of generation 4 and 5 */
    const uint8_t *codes = w->codes + first * stride;
    float scales[MAX_ROWS][CHUNK_GROUPS];
    /* Row r, token m at r * M + m. An array whose length is an argument would not be kept in registers. */
    VEC sums[MAX_ROWS * TILE];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r * M + m] = NAME(zero)();
    for (int64_t start = 0; start < blocks; start += CHUNK) {
        const int64_t end = start + CHUNK < blocks ? start + CHUNK : blocks;
        const int64_t from = start * (BLOCK / G), left = groups - from;
        const int64_t count = left < CHUNK * (BLOCK / G) ? left : CHUNK * (BLOCK / G);
        for (int r = 0; r < R; r++) NAME(scales_to_float)(scales[r], w, first + r, from, count, format);
        for (int64_t g = 0; g < count; g += LANES)
            for (int m = 0; m < M; m++) {
                const VEC offsets = NAME(load)(x->offsets + m * x->offset_stride + from + g);
                for (int r = 0; r < R; r++) sums[r * M + m] = NAME(negated)(NAME(load)(scales[r] + g), offsets, sums[r * M + m]);
            }
        const int64_t full = end * BLOCK <= k ? end : end - 1;
        for (int64_t b = start; b < full; b++)
            NAME(block)(R, M, G, format, codes + b * BLOCK_BYTES, stride, ahead, scales[0] + (b - start) * (BLOCK / G),
                        x->codes + b * M * BLOCK, x->scales + b * M * BLOCK_SCALES, sums);
        if (full < end) { /* the last block holds fewer than 128 k: read no byte beyond the row */
            uint8_t padded[MAX_ROWS][BLOCK_BYTES];
            for (int r = 0; r < R; r++) {
                memset(padded[r], 0, BLOCK_BYTES);
                memcpy(padded[r], codes + r * stride + full * BLOCK_BYTES, (size_t)(stride - full * BLOCK_BYTES));
            }
            NAME(block)(R, M, G, format, padded[0], BLOCK_BYTES, 0, scales[0] + (full - start) * (BLOCK / G),
                        x->codes + full * M * BLOCK, x->scales + full * M * BLOCK_SCALES, sums);
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * ldy + r] = NAME(sum)(sums[r * M + m]);
}

#ifdef ONE_FOR_ALL /* no unrolling: the numbers are looked up */
static void NAME(any)(const struct weights *w, int64_t first, int64_t count, const struct tile *x, float *y, int64_t ldy) {
    for (int64_t row = 0; row < count; row++)
        NAME(group_of_rows)(1, x->tokens, w->group, w->format, w, first + row, x, y + row, ldy);
}
#else
#define ROWS(M, G, F) \
    EXPORT static void NAME(rows_##M##_##G##_##F)(const struct weights *w, int64_t first, int64_t count, \
                                                  const struct tile *x, float *y, int64_t ldy) { \
        int64_t row = 0; \
        for (; row + ROWS_FOR(M) <= count; row += ROWS_FOR(M)) \
            NAME(group_of_rows)(ROWS_FOR(M), M, G, F, w, first + row, x, y + row, ldy); \
        for (; row < count; row++) NAME(group_of_rows)(1, M, G, F, w, first + row, x, y + row, ldy); \
    }
#define ROWS_OF(G, F) \
    ROWS(1, G, F) ROWS(2, G, F) ROWS(3, G, F) ROWS(4, G, F) ROWS(5, G, F) ROWS(6, G, F) ROWS(7, G, F) ROWS(8, G, F)
ROWS_OF(32, 0) ROWS_OF(64, 0) ROWS_OF(128, 0) ROWS_OF(32, 1)
#define TABLE_OF(G, F) { \
    NAME(rows_1_##G##_##F), NAME(rows_2_##G##_##F), NAME(rows_3_##G##_##F), NAME(rows_4_##G##_##F), \
    NAME(rows_5_##G##_##F), NAME(rows_6_##G##_##F), NAME(rows_7_##G##_##F), NAME(rows_8_##G##_##F) }
const rows_fn NAME(rows)[4][TILE] = { TABLE_OF(32, 0), TABLE_OF(64, 0), TABLE_OF(128, 0), TABLE_OF(32, 1) };
#endif
