// y[m, n] = x[m, k] @ W[k, n] for few rows: symmetric INT4 weights in the layout of vLLM's Machete or Marlin kernel,
// bf16 or fp16 activations.
//
// Bound by the weights' bytes: each is read once, with 16 bytes per lane, and multiplied on tensor cores. The weights are
// the first operand (16 columns of W by 16 of k), the rows of x the second, so up to 8 rows cost the same. A unit of work
// is 64 columns by CHUNK of k for one warp; the units are divided evenly over the blocks, and a warp loads its next unit
// while it multiplies one. Where several blocks share 64 columns, the last one to arrive adds their parts in the order of
// the blocks, so the result does not depend on timing.
//
// Definitions by the compiler: GROUP (32, 64, 128), TILES (8 rows each), WARPS, QUARTERS (64 of k each), MIN_BLOCKS,
// IS_BF16, IS_MACHETE.

#define STEPS (4 * QUARTERS)                  // 16 of k each
#define CHUNK (16 * STEPS)
#define SETS ((CHUNK + GROUP - 1) / GROUP)    // sets of scales in a chunk
#define STEPS_PER_SET (STEPS / SETS)
#define VALUES (16 * TILES)                   // accumulators of a lane
#if IS_BF16
#define MAGIC 0x43004300u                     // 128: the low bits of its mantissa take a nibble
#define ONE 0x3f803f80u
#define OFFSET 0xc308c308u                    // -(128 + 8)
#define FMA "fma.rn.bf16x2 %0, %1, %2, %3;"
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MAGIC 0x64006400u                     // 1024
#define ONE 0x3c003c00u
#define OFFSET 0xe408e408u                    // -(1024 + 8)
#define FMA "fma.rn.f16x2 %0, %1, %2, %3;"
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

typedef unsigned int u32;
typedef unsigned short u16;

#ifdef __CUDACC__  // a test runs the kernel on the CPU, with primitives of its own
__device__ __forceinline__ uint4 read_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ float read_shared_by_blocks(const float* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
    return v;
}

__device__ __forceinline__ u32 sum_of_halves(u32 a, u32 b) {
    u32 v;
    asm(FMA : "=r"(v) : "r"(a), "r"(ONE), "r"(b));
    return v;
}

// sum += a (16 x 16, rows lane / 4 and + 8) times b (16 x 8), the fragments of mma.m16n8k16
__device__ __forceinline__ void add_product(float* sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float number(u32 half) {  // of the low 16 bits
#if IS_BF16
    return __uint_as_float(half << 16);
#else
    float v;
    u16 low = (u16)half;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(low));
    return v;
#endif
}

__device__ __forceinline__ u16 rounded(float value) {
    u16 v;
#if IS_BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(value));
#endif
    return v;
}

#endif

__device__ __forceinline__ u32 pair(u32 codes) {  // two nibbles, bits 0 and 16, as numbers minus 8
    return sum_of_halves((codes & 0x000f000fu) | MAGIC, OFFSET);
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

struct Unit {  // what one warp loads at a time
    uint4 codes[STEPS];
    u32 low[STEPS][TILES], high[STEPS][TILES];
#if IS_MACHETE
    u16 scale[SETS][8];
#else
    uint4 scale[SETS];
#endif
};

__device__ __forceinline__ void load(Unit& unit, const uint4* weights, const void* scales, const u32* x, int tile, int chunk,
                                     int m, int n, int k) {
    const int lane = threadIdx.x & 31, row = lane >> 2, column = lane & 3;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#if IS_MACHETE  // 16 columns by 64 of k lie together; a lane's words are steps of 16 of k
        const long long place = ((long long)(chunk * QUARTERS + s / 4) * (n >> 4) + tile * 4 + s % 4) * 32;
#else           // 64 columns by 16 of k lie together; a lane's words are groups of 16 columns
        const long long place = ((long long)(chunk * STEPS + s) * (n >> 6) + tile) * 32;
#endif
        unit.codes[s] = read_once(weights + place + lane);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        const int token = t * 8 + row;
        const u32* part = x + ((long long)token * k + chunk * CHUNK) / 2 + column;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            unit.low[s][t] = token < m ? __ldg(part + 8 * s) : 0u;
            unit.high[s][t] = token < m ? __ldg(part + 8 * s + 4) : 0u;
        }
    }
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        const long long place = (long long)(chunk * CHUNK / GROUP + set) * n + tile * 64;
#if IS_MACHETE
#pragma unroll
        for (int i = 0; i < 8; i++) unit.scale[set][i] = __ldg((const u16*)scales + place + 8 * i + row);
#else
        unit.scale[set] = __ldg((const uint4*)scales + place / 8 + row);
#endif
    }
}

// total += scales * (16 columns x k) @ (k x rows of x), for the four groups of 16 columns
__device__ __forceinline__ void multiply(float* total, const Unit& unit) {
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        float sum[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum[i] = 0.f;
#pragma unroll
        for (int of_set = 0; of_set < STEPS_PER_SET; of_set++) {
            const int s = set * STEPS_PER_SET + of_set;
#pragma unroll
            for (int j = 0; j < 4; j++) {
#if IS_MACHETE
                const u32 q = word(unit.codes[s / 4 * 4 + j], s % 4);
                const u32 a0 = pair(q), a1 = pair(q >> 4), a2 = pair(q >> 8), a3 = pair(q >> 12);
#else
                const u32 q = word(unit.codes[s], j);
                const u32 a0 = pair(q), a2 = pair(q >> 4), a1 = pair(q >> 8), a3 = pair(q >> 12);
#endif
#pragma unroll
                for (int t = 0; t < TILES; t++)
                    add_product(sum + t * 16 + j * 4, a0, a1, a2, a3, unit.low[s][t], unit.high[s][t]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
#if IS_MACHETE
            const float upper = number(unit.scale[set][2 * j]), lower = number(unit.scale[set][2 * j + 1]);
#else
            const u32 both = word(unit.scale[set], j);  // of columns 16 j + row and 16 j + row + 8
            const float upper = number(both & 0xffffu), lower = number(both >> 16);
#endif
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int i = t * 16 + j * 4;
                total[i] += upper * sum[i];
                total[i + 1] += upper * sum[i + 1];
                total[i + 2] += lower * sum[i + 2];
                total[i + 3] += lower * sum[i + 3];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
int4_decode(const uint4* __restrict__ weights, const void* __restrict__ scales, const u32* __restrict__ x,
            u16* __restrict__ y, const u16* __restrict__ bias, float* __restrict__ partial, int* __restrict__ arrivals,
            int m, int n, int k, int has_bias) {
    __shared__ float sums[WARPS][VALUES][32];
    __shared__ int is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tiles = n >> 6, chunks = k / CHUNK;
    const long long units = (long long)tiles * chunks, blocks = gridDim.x;
    int unit = (int)(units * blockIdx.x / blocks);
    const int end = (int)(units * (blockIdx.x + 1) / blocks);
    int own = unit + warp, tile_loaded = own / chunks, chunk_loaded = own % chunks;  // the warp's unit in `now`
    Unit now, next;
    if (own < end) load(now, weights, scales, x, tile_loaded, chunk_loaded, m, n, k);

    while (unit < end) {
        const int tile = unit / chunks, first = unit % chunks, last = min(chunks, first + end - unit);
        const int after = unit + last - first;
        float total[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) total[i] = 0.f;

        while (own < after) {
            own += WARPS;
            for (chunk_loaded += WARPS; chunk_loaded >= chunks; chunk_loaded -= chunks) tile_loaded++;
            if (own < end) load(next, weights, scales, x, tile_loaded, chunk_loaded, m, n, k);
            multiply(total, now);
            now = next;
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++) sums[warp][i][lane] = total[i];
        __syncthreads();

        const long long of_tile = (long long)tile * chunks;
        const bool whole = first == 0 && last == chunks;
        float* slot = partial + ((long long)blockIdx.x * 2 + (first == 0)) * VALUES * 32;
        for (int v = threadIdx.x; v < VALUES * 32; v += WARPS * 32) {
            float value = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) value += sums[w][v >> 5][v & 31];
            if (whole)
                sums[0][v >> 5][v & 31] = value;
            else
                slot[v] = value;
        }
        const int first_block = (int)(((of_tile + 1) * blocks - 1) / units);
        const int last_block = (int)(((of_tile + chunks) * blocks - 1) / units);
        if (!whole) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) is_last = atomicAdd(arrivals + tile, 1) == last_block - first_block;
            __syncthreads();
            if (is_last) {
                __threadfence();
                for (int v = threadIdx.x; v < VALUES * 32; v += WARPS * 32) {
                    float value = 0.f;
                    for (int block = first_block; block <= last_block; block++)
                        value += read_shared_by_blocks(
                            partial + ((long long)block * 2 + (block == first_block)) * VALUES * 32 + v);
                    sums[0][v >> 5][v & 31] = value;
                }
                if (threadIdx.x == 0) arrivals[tile] = 0;
            }
        }
        if (whole || is_last) {
            for (int v = threadIdx.x; v < VALUES * 32; v += WARPS * 32) {
                const int i = v >> 5, of = v & 31, t = i >> 4, j = (i >> 2) & 3, c = i & 3;
                const int token = t * 8 + 2 * (of & 3) + (c & 1);
                const int of_tile_n = j * 16 + (c >> 1) * 8 + (of >> 2);
                if (token < m) {
                    float value = sums[0][i][of];
#if IS_MACHETE
                    const int place = of_tile_n;
#else
                    const int place = (of_tile_n & 32) + (of_tile_n >> 1 & 3) * 8 + (of_tile_n >> 3 & 3) * 2 +
                                      (of_tile_n & 1);
#endif
                    if (has_bias) value += number(bias[tile * 64 + place]);
                    y[(long long)token * n + tile * 64 + of_tile_n] = rounded(value);
                }
            }
        }
        __syncthreads();
        unit = after;
    }
}
