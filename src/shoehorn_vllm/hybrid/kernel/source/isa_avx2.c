/* AVX2, and what all processors with AVX2 share: quantizing activations, unpacking weights. */
#define WITH_VNNI 0
#include "isa_avx2.h"

/* As portable_quantize, 32 values at a time. */
TARGET void avx2_quantize(const uint16_t *x, int64_t first, int64_t end, int group, float offset, const struct tile *out,
                          int slot) {
    const __m256i size = _mm256_set1_epi16(0x7fff), high = _mm256_set1_epi32((int)0xffff0000u);
    for (int64_t at = first; at < end; at += X_GROUP) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(x + at));
        const __m256i b = _mm256_loadu_si256((const __m256i *)(x + at) + 1);
        const __m256i top = _mm256_max_epu16(_mm256_and_si256(a, size), _mm256_and_si256(b, size));
        __m128i half = _mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        half = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
        const float largest = bf16_to_float((uint16_t)~_mm_extract_epi16(half, 0));
        const __m256 inverse = _mm256_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
#define TO_INT(v) _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(v), inverse))
        const __m256i even = _mm256_packs_epi32(TO_INT(_mm256_slli_epi32(a, 16)), TO_INT(_mm256_slli_epi32(b, 16)));
        const __m256i odd = _mm256_packs_epi32(TO_INT(_mm256_and_si256(a, high)), TO_INT(_mm256_and_si256(b, high)));
#undef TO_INT
        const __m256i sums = _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1));
        /* 32-bit parts after both packs: e0 e2 o0 o2 | e1 e3 o1 o3, each of four bytes */
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(even, odd),
                                                          _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        int8_t *codes = out->codes + (at / BLOCK * out->tokens + slot) * BLOCK + at % BLOCK / 2;
        _mm_storeu_si128((__m128i *)codes, _mm256_castsi256_si128(bytes));
        _mm_storeu_si128((__m128i *)(codes + BLOCK / 2), _mm256_extracti128_si256(bytes, 1));
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
        write_scale(out, at, group, slot, largest / 127.0f, offset * (float)_mm_cvtsi128_si32(sum));
    }
}

/* Unpack `count` codes of one row to bf16; `pairs` holds two of them a byte. */
TARGET void avx2_unpack(const uint8_t *pairs, int64_t count, const uint16_t table[16], uint16_t *out) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)table[i], high[i] = (uint8_t)(table[i] >> 8);
    const __m128i lows = _mm_loadu_si128((const __m128i *)low), highs = _mm_loadu_si128((const __m128i *)high);
    const __m128i mask = _mm_set1_epi8(15);
    for (int64_t i = 0; i < count; i += 32) {
        const __m128i both = _mm_loadu_si128((const __m128i *)(pairs + i / 2));
        const __m128i even = _mm_and_si128(both, mask), odd = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        for (int half = 0; half < 2; half++) {
            const __m128i codes = half ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
            const __m128i a = _mm_shuffle_epi8(lows, codes), b = _mm_shuffle_epi8(highs, codes);
            _mm_storeu_si128((__m128i *)(out + i + 16 * half), _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128((__m128i *)(out + i + 16 * half + 8), _mm_unpackhi_epi8(a, b));
        }
    }
}

/* The sum of 64-bit words, to measure how fast memory is read. */
TARGET uint64_t avx2_read(const uint8_t *at, int64_t bytes) {
    __m256i sums[4] = { 0 };
    for (int64_t i = 0; i + 128 <= bytes; i += 128) {
        _mm_prefetch((const char *)(at + i + 4096), _MM_HINT_T0);
        _mm_prefetch((const char *)(at + i + 4160), _MM_HINT_T0);
        for (int j = 0; j < 4; j++)
            sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256((const __m256i *)(at + i + 32 * j)));
    }
    const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    return (uint64_t)(_mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 1) + _mm256_extract_epi64(sum, 2) +
                      _mm256_extract_epi64(sum, 3));
}
