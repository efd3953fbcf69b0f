// y[m, n] = x[m, k] @ W[k, n] for few rows: symmetric INT4 weights in Marlin's layout, bf16 or fp16 activations.
//
// Bound by the weights' bytes: each is read once, with 16 bytes per lane, and multiplied on tensor cores. The weights are
// the first operand (16 columns of W by 16 of k), the rows of x the second, so up to 8 rows cost the same. The units of
// work (64 columns by CHUNK of k) are divided evenly over the blocks; where several blocks share 64 columns, the last one
// to arrive adds their parts in the order of the blocks, so the result does not depend on timing.
//
// Definitions by the compiler: GROUP (32, 64, 128), TILES (8 rows each), WARPS, STEPS (16 of k each), MIN_BLOCKS, IS_BF16.

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

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
int4_decode(const uint4* __restrict__ weights, const uint4* __restrict__ scales, const u32* __restrict__ x,
            u16* __restrict__ y, const u16* __restrict__ bias, float* __restrict__ partial, int* __restrict__ arrivals,
            int m, int n, int k, int has_bias) {
    __shared__ float sums[WARPS][VALUES][32];
    __shared__ int is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, column = lane & 3;
    const int tiles = n >> 6, chunks = k / CHUNK;
    const long long units = (long long)tiles * chunks, blocks = gridDim.x;
    long long unit = units * blockIdx.x / blocks;
    const long long end = units * (blockIdx.x + 1) / blocks;

    while (unit < end) {
        const int tile = (int)(unit / chunks), first = (int)(unit % chunks);
        const int last = (int)min((long long)chunks, first + end - unit);
        float total[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) total[i] = 0.f;

        for (int chunk = first + warp; chunk < last; chunk += WARPS) {
            uint4 codes[STEPS], scale[SETS];
            u32 low[STEPS][TILES], high[STEPS][TILES];
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                codes[s] = read_once(weights + ((long long)(chunk * STEPS + s) * tiles + tile) * 32 + lane);
#pragma unroll
            for (int set = 0; set < SETS; set++)
                scale[set] = __ldg(scales + ((long long)(chunk * CHUNK / GROUP + set) * n + tile * 64) / 8 + row);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int token = t * 8 + row;
                const u32* part = x + ((long long)token * k + chunk * CHUNK) / 2 + column;
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    low[s][t] = token < m ? __ldg(part + 8 * s) : 0u;
                    high[s][t] = token < m ? __ldg(part + 8 * s + 4) : 0u;
                }
            }
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
                        const u32 q = word(codes[s], j);
                        const u32 a0 = pair(q), a2 = pair(q >> 4), a1 = pair(q >> 8), a3 = pair(q >> 12);
#pragma unroll
                        for (int t = 0; t < TILES; t++)
                            add_product(sum + t * 16 + j * 4, a0, a1, a2, a3, low[s][t], high[s][t]);
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 both = word(scale[set], j);  // of columns 16 j + row and 16 j + row + 8
                    const float upper = number(both & 0xffffu), lower = number(both >> 16);
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
                    if (has_bias)  // in Marlin's order of columns
                        value += number(bias[tile * 64 + (of_tile_n & 32) + (of_tile_n >> 1 & 3) * 8 +
                                             (of_tile_n >> 3 & 3) * 2 + (of_tile_n & 1)]);
                    y[(long long)token * n + tile * 64 + of_tile_n] = rounded(value);
                }
            }
        }
        __syncthreads();
        unit += last - first;
    }
}
