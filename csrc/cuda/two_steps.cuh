// A graph is assembled in two steps: the sizes of its rows, which the host must know before it can
// allocate the rest, and the rows themselves.
#pragma once

#include "cuda/primitives.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

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
inline cudaError_t offsets_from_sizes(void* temporary, size_t bytes, int64_t* row_offsets,
                                      int64_t num_nodes, Summary* summary, cudaStream_t stream) {
  cudaError_t error = launch(clear_last, dim3(1), dim3(1), 0, stream, row_offsets, num_nodes);
  if (error != cudaSuccess) return error;
  error = exclusive_scan(temporary, bytes, row_offsets, num_nodes + 1, stream);
  if (error != cudaSuccess) return error;
  return launch(note_nnz, dim3(1), dim3(1), 0, stream, static_cast<const int64_t*>(row_offsets),
                num_nodes, summary);
}

// The one place where the host waits: nnz, or -1 if a kernel called the input invalid.
inline cudaError_t read_nnz(const Summary* summary, int64_t* nnz, cudaStream_t stream) {
  Summary read;
  cudaError_t error = cudaMemcpyAsync(&read, summary, sizeof read, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  *nnz = read.invalid ? -1 : read.nnz;
  return error;
}

}  // namespace
}  // namespace nefkern::cuda
