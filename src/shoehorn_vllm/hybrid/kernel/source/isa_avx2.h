/* AVX2 and AVX-VNNI: 256 bits. WITH_VNNI says which. Two halves of 64 k make a block. */
#include <immintrin.h>

#include "product.h"

#if WITH_VNNI
#define NAME(x) avxvnni_##x
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#else
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#endif
#define FN TARGET static inline __attribute__((always_inline))
#define EXPORT TARGET
#define VEC __m256
#define LANES 8
#define ROWS_FOR(M) 1

FN VEC NAME(zero)(void) { return _mm256_setzero_ps(); }
FN VEC NAME(load)(const float *p) { return _mm256_loadu_ps(p); }
FN VEC NAME(negated)(VEC a, VEC b, VEC sum) { return _mm256_fnmadd_ps(a, b, sum); }
FN float NAME(sum)(VEC v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Sums of four products of unsigned codes and signed activations, of half a block. */
FN __m256i NAME(dot)(__m256i low, __m256i high, const int8_t *x) {
    const __m256i even = _mm256_loadu_si256((const __m256i *)x);
    const __m256i odd = _mm256_loadu_si256((const __m256i *)(x + BLOCK / 2));
#if WITH_VNNI
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), low, even), high, odd);
#else /* at most 4 * 24 * 127 = 12,192: no overflow */
    const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
}

/* The scales of half h of a block, one in each lane. */
FN VEC NAME(spread)(const int G, const float *scales, int h) {
    if (G == 128) return _mm256_broadcast_ss(scales);
    if (G == 64) return _mm256_broadcast_ss(scales + h);
    const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m128i pair = _mm_loadl_epi64((const __m128i *)(scales + 2 * h));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_castsi128_ps(pair)), lanes);
}

FN void NAME(block)(const int R, const int M, const int G, const int format, const uint8_t *codes, int64_t stride,
                    int64_t ahead, const float *scales, const int8_t *x, const float *x_scales, VEC *sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(MXFP4_TABLE));
    for (int r = 0; r < R; r++) {
        const uint8_t *p = codes + r * stride;
        _mm_prefetch((const char *)(p + ahead), _MM_HINT_T1);
        for (int half = 0; half < 2; half++) {
            const __m256i pair = _mm256_loadu_si256((const __m256i *)p + half);
            __m256i low = _mm256_and_si256(pair, mask), high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), mask);
            if (format == FORMAT_MXFP4) low = _mm256_shuffle_epi8(table, low), high = _mm256_shuffle_epi8(table, high);
            VEC scale = NAME(spread)(G, scales + r * CHUNK_GROUPS, half);
            __asm__("" : "+x"(scale)); /* else GCC multiplies scalars and spreads each product: an instruction more */
            for (int m = 0; m < M; m++) {
                const __m256i sum = NAME(dot)(low, high, x + m * BLOCK + half * 32);
                const VEC factor = _mm256_mul_ps(scale, NAME(spread)(X_GROUP, x_scales + m * BLOCK_SCALES, half));
                sums[r * M + m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, sums[r * M + m]);
            }
        }
    }
}
#include "rows.h"
