/* The choice of an instruction set, tiles of quantized activations, scratch memory. */
#include <errno.h>
#include <stdlib.h>

#include "pool.h"
#include "product.h"

#if defined(__x86_64__)
#include <cpuid.h>
static uint64_t enabled_state(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int detected(void) { /* a bit for each instruction set */
    uint32_t a, b, c, d;
    int isas = 1 << ISA_PORTABLE;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return isas;
    if (!(c >> 27 & 1) || !(c >> 12 & 1) || (enabled_state() & 0x6) != 0x6) return isas; /* OSXSAVE, FMA, AVX state */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return isas;          /* AVX2 */
    isas |= 1 << ISA_AVX2;
    if ((b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1) && /* F DQ BW VL VNNI */
        (enabled_state() & 0xe6) == 0xe6)
        isas |= 1 << ISA_AVX512VNNI;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1)) isas |= 1 << ISA_AVXVNNI;
    return isas;
}
#else
static int detected(void) { return 1 << ISA_PORTABLE; }
#endif

static int available;
__attribute__((constructor)) static void detect(void) { available = detected(); } /* CPUID costs 10 us in a VM */

int isa_available(int isa) { return isa >= 0 && isa < ISA_COUNT && (available >> isa & 1); }

int isa_best(void) {
    for (int isa = ISA_COUNT - 1; isa > 0; isa--)
        if (isa_available(isa)) return isa;
    return ISA_PORTABLE;
}

rows_fn rows_function(int isa, int group, int format, int tokens) {
    const int row = format == FORMAT_MXFP4 ? 3 : group == 32 ? 0 : group == 64 ? 1 : 2;
#if defined(__x86_64__)
    if (isa == ISA_AVX2) return avx2_rows[row][tokens - 1];
    if (isa == ISA_AVXVNNI) return avxvnni_rows[row][tokens - 1];
    if (isa == ISA_AVX512VNNI) return avx512_rows[row][tokens - 1];
#endif
    (void)isa;
    (void)row;
    (void)tokens;
    return portable_rows();
}

quantize_fn quantize_function(int isa) {
#if defined(__x86_64__)
    if (isa != ISA_PORTABLE) return avx2_quantize;
#endif
    (void)isa;
    return portable_quantize;
}

/* Size of what callers hand over: another one means a library of other sources. */
int layout_bytes(void) { return (int)sizeof(struct experts); }

int check_weights(const struct weights *w) {
    if (!w->codes || !w->scales || w->rows < 1 || w->k < 1) return -EINVAL;
    if (w->group != 32 && w->group != 64 && w->group != 128) return -EINVAL;
    if (w->format != FORMAT_INT4 && (w->format != FORMAT_MXFP4 || w->group != 32)) return -EINVAL;
    return w->k % w->group ? -EINVAL : 0;
}

int64_t rows_per_item(int64_t rows, int64_t bytes) {
    const int64_t fair = divided_up(rows, 4 * pool_threads()), most = ITEM_BYTES / bytes;
    const int64_t limit = fair < most ? fair : most;
    return limit < 16 ? 16 : limit > ITEM_ROWS ? ITEM_ROWS : limit / 16 * 16;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t tile_bytes(int64_t k, int group, int tokens) {
    return aligned(blocks_of(k) * tokens * BLOCK) + aligned(blocks_of(k) * tokens * BLOCK_SCALES * 4) +
           aligned(offset_stride_of(k, group) * tokens * 4);
}

struct tile tile_at(uint8_t *at, int64_t k, int group, int tokens) {
    struct tile tile = { .codes = (int8_t *)at, .offset_stride = offset_stride_of(k, group), .tokens = tokens };
    at += aligned(blocks_of(k) * tokens * BLOCK);
    tile.scales = (float *)at;
    tile.offsets = (float *)(at + aligned(blocks_of(k) * tokens * BLOCK_SCALES * 4));
    return tile;
}

void quantize_slice(quantize_fn quantize, const uint16_t *x, int64_t slice, int64_t k, int group, float offset,
                    const struct tile *out, int slot) {
    const int64_t first = slice * SLICE, end = first + SLICE < k ? first + SLICE : k;
    if (end == k) { /* what the last block and the last vector of offsets hold beyond k */
        const int64_t last = blocks_of(k) - 1, groups = k / group;
        memset(out->codes + (last * out->tokens + slot) * BLOCK, 0, BLOCK);
        memset(out->scales + (last * out->tokens + slot) * BLOCK_SCALES, 0, BLOCK_SCALES * 4);
        memset(out->offsets + slot * out->offset_stride + groups, 0, (size_t)(out->offset_stride - groups) * 4);
    }
    quantize(x, first, end, group, offset, out, slot);
}

uint8_t *scratch_of(struct scratch *scratch, int64_t bytes) {
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        scratch->bytes = 0;
        scratch->memory = aligned_alloc(64, (size_t)aligned(bytes));
        if (!scratch->memory) return 0;
        scratch->bytes = aligned(bytes);
    }
    return scratch->memory;
}
