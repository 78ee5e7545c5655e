// A graph is assembled in two steps: the sizes of its rows, which the host must know before it can
// allocate the rest, and the rows themselves.
#pragma once

#include "cuda/launches.h"
#include "cuda/primitives.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {

constexpr int kThreads = 256;

// Blocks of kThreads that have a thread, or a warp, for each of `count` items.
constexpr int64_t blocks_of_threads(int64_t count) { return tiles(count, kThreads); }
constexpr int64_t blocks_of_warps(int64_t count) { return tiles(count, kThreads / kWarp); }

// What the host reads between the steps.
struct Summary {
  int64_t nnz;
  int invalid;  // set to 1 by a kernel that meets what it must not follow
};

namespace {

__global__ void __launch_bounds__(1)
    note_nnz(const int64_t* row_offsets, int64_t num_nodes, Summary* summary) {
  summary->nnz = row_offsets[num_nodes];
}

__global__ void __launch_bounds__(1) clear_last(int64_t* row_offsets, int64_t num_nodes) {
  row_offsets[num_nodes] = 0;
}

// row_offsets [num_nodes + 1] holds the rows' sizes, and becomes what it says.
inline void offsets_from_sizes(Launches& launch, void* temporary, size_t bytes,
                               int64_t* row_offsets, int64_t num_nodes, Summary* summary) {
  launch(clear_last, 1, 1, 0, row_offsets, num_nodes);
  launch.then([&](cudaStream_t stream) {
    return exclusive_scan(temporary, bytes, row_offsets, num_nodes + 1, stream);
  });
  launch(note_nnz, 1, 1, 0, row_offsets, num_nodes, summary);
}

// The one place where the host waits: nnz, or -1 if a kernel called the input invalid.
inline cudaError_t read_nnz(Launches& launch, const Summary* summary, int64_t* nnz) {
  Summary read{};
  launch.then([&](cudaStream_t stream) {
    return cudaMemcpyAsync(&read, summary, sizeof read, cudaMemcpyDeviceToHost, stream);
  });
  launch.then([](cudaStream_t stream) { return cudaStreamSynchronize(stream); });
  *nnz = read.invalid ? -1 : read.nnz;
  return launch.error();
}

}  // namespace
}  // namespace nefkern::cuda
