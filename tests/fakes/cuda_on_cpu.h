// CUDA on the CPU, for tests of decode.cu: a block's threads are threads, blocks run one after the other, in any order.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

struct uint4 { unsigned x, y, z, w; };
struct dim3 { unsigned x; };
static thread_local dim3 threadIdx;
static dim3 blockIdx, gridDim;
static std::unique_ptr<std::barrier<>> block_barrier;
struct Warp { std::barrier<> barrier{32}; uint32_t a[32][4], b[32][2]; };
static std::vector<std::unique_ptr<Warp>> warps_of_block;

#define __global__
#define __device__
#define __shared__ static
#define __restrict__
#define __forceinline__ inline
#define __launch_bounds__(...)
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __threadfence() {}
static int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); }
template <class T> static T __ldg(const T* address) { return *address; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }
static uint4 read_once(const uint4* address) { return *address; }
static float read_shared_by_blocks(const float* address) { return *address; }

#if IS_BF16
static float number(uint32_t half) { uint32_t bits = half << 16; float v; std::memcpy(&v, &bits, 4); return v; }
static uint16_t rounded(float v) {
    uint32_t bits; std::memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
static float number(uint32_t half) { uint16_t bits = (uint16_t)half; _Float16 v; std::memcpy(&v, &bits, 2); return v; }
static uint16_t rounded(float v) { _Float16 h = (_Float16)v; uint16_t bits; std::memcpy(&bits, &h, 2); return bits; }
#endif

static uint32_t sum_of_halves(uint32_t a, uint32_t b) {
    uint32_t low = rounded(number(a & 0xffff) + number(b & 0xffff)), high = rounded(number(a >> 16) + number(b >> 16));
    return low | high << 16;
}

// mma.m16n8k16, by the fragments in NVIDIA's PTX ISA, section 9.7.14.5.8
static void add_product(float* sum, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const unsigned lane = threadIdx.x & 31;
    Warp& warp = *warps_of_block[threadIdx.x >> 5];
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(warp.a[lane], a, 16);
    std::memcpy(warp.b[lane], b, 8);
    warp.barrier.arrive_and_wait();
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + (i >> 1) * 8, column = lane % 4 * 2 + (i & 1);
        for (unsigned k = 0; k < 16; k++) {
            const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][(row >> 3) + (k >> 3) * 2];
            const uint32_t right = warp.b[column * 4 + k % 8 / 2][k >> 3];
            sum[i] += number(k & 1 ? left >> 16 : left & 0xffff) * number(k & 1 ? right >> 16 : right & 0xffff);
        }
    }
    warp.barrier.arrive_and_wait();
}

template <class Call> static void run_block(unsigned block, unsigned blocks, unsigned threads, Call call) {
    blockIdx.x = block, gridDim.x = blocks;
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warps_of_block.clear();
    for (unsigned warp = 0; warp < threads / 32; warp++) warps_of_block.push_back(std::make_unique<Warp>());
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; thread++)
        running.emplace_back([=] { threadIdx.x = thread; call(); });
    for (auto& each : running) each.join();
}
