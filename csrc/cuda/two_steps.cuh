// A graph is assembled in two steps: the sizes of its rows, which the host must know before it can
// allocate the rest, and the rows themselves.
#pragma once

#include "cuda/launches.h"
#include "cuda/primitives.h"
#include "cuda/warp.cuh"
#include "cuda/workspace.h"

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

// What every assembly has in its workspace, and what came of laying that out.
struct Scratch {
  Summary* summary;
  void* temporary;  // of scan and sort
  size_t temporary_bytes;
  size_t bytes;  // of the whole workspace
  cudaError_t error;
};

namespace {

__global__ void __launch_bounds__(1)
    note_nnz(const int64_t* row_offsets, int64_t num_nodes, Summary* summary) {
  summary->nnz = row_offsets[num_nodes];
}

__global__ void __launch_bounds__(1) clear_last(int64_t* row_offsets, int64_t num_nodes) {
  row_offsets[num_nodes] = 0;
}

// Temporary memory of the rows' scan. cudaErrorInvalidValue: int32 columns can't name all nodes.
inline cudaError_t offsets_bytes(int64_t num_nodes, size_t* bytes) {
  if (num_nodes < 0 || num_nodes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  return scan_bytes(num_nodes + 1, bytes);
}

// Taken last: its `bytes` are all that `space` gave. `error`: of asking for temporary_bytes.
inline Scratch take_scratch(Workspace& space, size_t temporary_bytes, cudaError_t error) {
  Summary* const summary = space.take<Summary>(1);
  void* const temporary = space.take<char>(static_cast<int64_t>(temporary_bytes));
  return {summary, temporary, temporary_bytes, space.bytes(), error};
}

inline cudaError_t bytes_of(const Scratch& scratch, size_t* bytes) {
  *bytes = scratch.bytes;
  return scratch.error;
}

// row_offsets [num_nodes + 1] holds the rows' sizes, and becomes what it says.
inline void offsets_from_sizes(Launches& launch, const Scratch& scratch, int64_t* row_offsets,
                               int64_t num_nodes) {
  launch(clear_last, 1, 1, 0, row_offsets, num_nodes);
  launch.then([&](cudaStream_t stream) {
    return exclusive_scan(scratch.temporary, scratch.temporary_bytes, row_offsets, num_nodes + 1,
                          stream);
  });
  launch(note_nnz, 1, 1, 0, row_offsets, num_nodes, scratch.summary);
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

// The first step, in which count_rows(launch) writes the rows' sizes to args.row_offsets. Without
// an nnz to write, nothing is read back and nothing waited for.
template <class Args, class CountRows>
cudaError_t count_step(const Args& args, const Scratch& scratch, int64_t* nnz, cudaStream_t stream,
                       const CountRows& count_rows) {
  Launches launch(stream, scratch.error);
  launch.zero(scratch.summary, sizeof(Summary));
  count_rows(launch);
  offsets_from_sizes(launch, scratch, args.row_offsets, args.num_nodes);
  return nnz ? read_nnz(launch, scratch.summary, nnz) : launch.error();
}

}  // namespace
}  // namespace nefkern::cuda
