// The emulator's own tests: kernels whose results are known, and kernels with planted defects,
// chosen by defect=1, 2, ... (0: none).
#include "cuda/device.cuh"
#include "driver.h"

namespace {

using nefkern::emulator::Case;
using namespace nefkern::cuda;

enum Defect {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kNoSyncwarp,
  kDivergentBarrier,
  kExitedLane,
  kGlobalOffByOne,
  kSharedOffByOne,
  kUninitialised,
  kSilentRace,
  kRaceBetweenBlocks,
  kNoWait,
  kMisaligned,
  kTooMuchShared,
};

constexpr int kThreads = 96;

struct Tile {
  float numbers[kThreads];
};

// y[i] = x[n - 1 - i] block by block through shared memory, twice; sum gets the total of x.
__global__ void reverse(const float* x, float* y, float* sum, int n, int defect) {
  Tile& tile = block_shared<Tile>();
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  const int size = min(kThreads, n - static_cast<int>(blockIdx.x) * kThreads);
  if (defect == kExitedLane && t >= size) return;
  for (int round = 0; round < 2; ++round) {
    if (t < size) tile.numbers[t] = round ? y[i] : x[i];
    if (defect != kNoBarrier) __syncthreads();
    if (defect == kDivergentBarrier && t < 32) __syncthreads();
    if (t < size) y[i] = tile.numbers[size - 1 - t];
    if (defect == kSharedOffByOne && t < size) y[i] += tile.numbers[size + kThreads - t - 1];
    if (defect == kUninitialised && t < size) y[i] += 0 * tile.numbers[kThreads - 1];
    if (defect != kNoSecondBarrier) __syncthreads();
  }
  float mine = t < size ? y[i] : 0;
  if (defect == kGlobalOffByOne) mine = x[i < n ? i : n];
  for (int d = 16; d; d /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, d);
  if (t % 32 == 0) atomicAdd(sum, mine);
  if (defect == kSilentRace && t < size) tile.numbers[0] = 1;
  if (defect == kRaceBetweenBlocks && t == 0) *sum = 7;
}

void run_reverse(Case& one) {
  const int n = static_cast<int>(one.number("n")), defect = static_cast<int>(one.number("defect"));
  float* sum = one.output<float>("sum", 1);
  *sum = 0;
  launch(reverse, dim3((n + kThreads - 1) / kThreads), dim3(kThreads), 0, nullptr,
         one.input<float>("x"), one.output<float>("y", n), sum, n, defect);
}

struct WarpRows {
  alignas(16) float rows[4][32];
};

// Each warp copies 32 floats by cp.async, and writes them back reversed.
__global__ void copy_reversed(const float* x, float* y, int defect) {
  float* row = block_shared<WarpRows>().rows[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, begin = blockIdx.x * 128 + threadIdx.x / 32 * 32;
  if (lane < 8) cp_async_16(row + 4 * lane, x + begin + 4 * lane + (defect == kMisaligned));
  cp_async_commit();
  if (defect != kNoWait) cp_async_wait<0>();
  if (defect != kNoSyncwarp) __syncwarp();
  y[begin + lane] = row[31 - lane];
  if (defect == kNoWait) cp_async_wait<0>();
}

void run_copy(Case& one) {
  const int n = static_cast<int>(one.number("n")), defect = static_cast<int>(one.number("defect"));
  const size_t shared_bytes = defect == kTooMuchShared ? kMaxDynamicShared + 1 : 0;
  launch(copy_reversed, dim3(n / 128), dim3(128), shared_bytes, nullptr, one.input<float>("x"),
         one.output<float>("y", n), defect);
}

// Warp collectives, one result each.
__global__ void collectives(int* out) {
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffffu;
  int* mine = out + 12 * lane;
  mine[0] = __shfl_sync(all, lane * lane, lane / 2);
  mine[1] = __shfl_up_sync(all, lane, 3);
  mine[2] = __shfl_down_sync(all, lane, 5, 16);
  mine[3] = __shfl_xor_sync(all, lane, 9);
  mine[4] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
  mine[5] = __any_sync(all, lane == 31);
  mine[6] = __all_sync(all, lane < 31);
  mine[7] = static_cast<int>(__match_any_sync(all, lane % 5));
  mine[8] = __reduce_add_sync(all, lane);
  mine[9] = __syncthreads_count(lane < 7);
  mine[10] = -1;
  if (lane < 4) mine[10] = __shfl_sync(0xfu, lane, 3 - lane);
  mine[11] = __reduce_max_sync(all, lane % 20);
}

void run_collectives(Case& one) {
  launch(collectives, dim3(1), dim3(32), 0, nullptr, one.output<int>("out", 32 * 12));
}

// c = a bT for a [16, 16] and b [8, 16], float16 by ldmatrix: the rows of b are columns of c.
__global__ void product_f16(const uint16_t* a, const uint16_t* b, float* c) {
  struct Operands {
    alignas(16) uint16_t a[16][16];
    alignas(16) uint16_t b[8][16];
  };
  Operands& operands = block_shared<Operands>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) operands.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) operands.b[i / 16][i % 16] = b[i];
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, &operands.a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4(right, &operands.b[lane % 8][lane / 8 % 2 * 8]);
  const uint32_t first[2] = {right[0], right[1]};
  const float zero[4] = {};
  float sum[4];
  mma_m16n8k16_f16(sum, left, first, zero);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

void run_product_f16(Case& one) {
  launch(product_f16, dim3(1), dim3(32), 0, nullptr, one.input<uint16_t>("a"),
         one.input<uint16_t>("b"), one.output<float>("c", 128));
}

struct Words {
  alignas(16) float of[32 * 32];
};

// A warp's accesses whose costs are known: shared[lane * stride] (a conflict for every common
// factor with 32), x[lane * stride], and what costs.py counts by other names.
__global__ void costs(const float* x, float* y, int stride) {
  Words& words = block_shared<Words>();
  const int lane = threadIdx.x;
  words.of[lane * stride] = x[lane * stride];
  __syncthreads();
  y[lane] = __shfl_down_sync(0xffffffffu, words.of[0], 1);
}

// One access of 16 bytes a lane, adjacent, and atomic operations of all lanes on one word.
__global__ void wide_costs(const float* x, float* y) {
  Words& words = block_shared<Words>();
  const int lane = threadIdx.x;
  reinterpret_cast<float4*>(words.of)[lane] = reinterpret_cast<const float4*>(x)[lane];
  __syncthreads();
  atomicAdd(&words.of[0], 1.0f);
  if (lane == 0) y[0] = 1;
}

void run_costs(Case& one) {
  const float* x = one.input<float>("x");
  launch(costs, dim3(1), dim3(32), 0, nullptr, x, one.output<float>("y", 32),
         static_cast<int>(one.number("stride")));
  launch(wide_costs, dim3(2), dim3(32), 0, nullptr, x, one.output<float>("z", 1));
}

}  // namespace

int main(int argc, char** argv) {
  return nefkern::emulator::run_cases(argc, argv,
                                      {{"reverse", &run_reverse},
                                       {"copy", &run_copy},
                                       {"collectives", &run_collectives},
                                       {"costs", &run_costs},
                                       {"product_f16", &run_product_f16}});
}
