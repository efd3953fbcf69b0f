/* AVX-512 with VNNI: a block of 128 k is one vector. */
#include <immintrin.h>

#include "product.h"

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define FN TARGET static inline __attribute__((always_inline))
#define EXPORT TARGET
#define VEC __m512
#define LANES 16
#define ROWS_FOR(M) ((M) == 1 ? 1 : (M) <= 4 ? 4 : 2)

FN VEC NAME(zero)(void) { return _mm512_setzero_ps(); }
FN VEC NAME(load)(const float *p) { return _mm512_loadu_ps(p); }
FN VEC NAME(negated)(VEC a, VEC b, VEC sum) { return _mm512_fnmadd_ps(a, b, sum); }
FN float NAME(sum)(VEC v) { return _mm512_reduce_add_ps(v); }

/* The scales of a block, one in each lane. */
FN VEC NAME(spread)(const int G, const float *scales) {
    if (G == 128) return _mm512_set1_ps(*scales);
    if (G == 64) return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
}

FN void NAME(block)(const int R, const int M, const int G, const int format, const uint8_t *codes, int64_t stride,
                    int64_t ahead, const float *scales, const int8_t *x, const float *x_scales, VEC *sums) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(MXFP4_TABLE));
    __m512i low[MAX_ROWS], high[MAX_ROWS];
    VEC scale[MAX_ROWS];
    for (int r = 0; r < R; r++) {
        const uint8_t *p = codes + r * stride;
        if (R == 1) _mm_prefetch((const char *)(p + ahead), _MM_HINT_T1);
        else _mm_prefetch((const char *)(p + ahead), _MM_HINT_T0);
        const __m512i pair = _mm512_loadu_si512(p);
        low[r] = _mm512_and_si512(pair, mask);
        high[r] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
        if (format == FORMAT_MXFP4) {
            low[r] = _mm512_shuffle_epi8(table, low[r]);
            high[r] = _mm512_shuffle_epi8(table, high[r]);
        }
        scale[r] = NAME(spread)(G, scales + r * CHUNK_GROUPS);
        __asm__("" : "+v"(scale[r])); /* else GCC multiplies scalars and spreads each product: an instruction more */
    }
    for (int m = 0; m < M; m++) {
        const __m512i even = _mm512_loadu_si512(x + m * BLOCK), odd = _mm512_loadu_si512(x + m * BLOCK + BLOCK / 2);
        const VEC x_scale = NAME(spread)(X_GROUP, x_scales + m * BLOCK_SCALES);
        for (int r = 0; r < R; r++) {
            __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low[r], even);
            sum = _mm512_dpbusd_epi32(sum, high[r], odd);
            sums[r * M + m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale[r], x_scale), sums[r * M + m]);
        }
    }
}
#include "rows.h"
