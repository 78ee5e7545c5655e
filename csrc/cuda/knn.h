// k nearest neighbours by cosine similarity or Euclidean distance, within segments, on a GPU.
//
// Nothing here allocates, waits for the device or uses a stream but the one given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace nefkern::cuda {

// How neighbours are found; the results are the same to the last bit.
enum class KnnMethod {
  kAuto,      // kFused where knn_fuses() says that it pays
  kBaseline,  // all values in float32, a block of rows at a time, then a selection
  kFused,     // estimates on tensor cores choose the candidates whose values are then computed
};

// Sizes that decide on speed and memory, never on results. Estimates, not measured on a GPU yet.
struct KnnTuning {
  int64_t score_bytes = int64_t{32} << 20;  // of a block of rows' scores: they stay in the L2 cache
  int64_t fused_rows = 4096;                // segments from this length on are fused,
  int64_t fused_share = 8;                  // if k is at most this part of them
  int64_t chunk_rows = 16384;               // whose candidates are held at a time; 128 divides it
  int64_t sample_share = 16;                // a threshold comes from this part of a segment
  int64_t keep = 2048;  // neighbours sorted at a time in shared memory, at most 4096; a larger k
                        // takes several passes over a row's values, and is never fused
};

struct KnnArgs {
  const float* features;  // device, [n, channels], rows adjacent
  int64_t n;              // below 2^31
  int64_t channels;
  const int64_t* offsets;         // host, [segments + 1], from 0 to n, never falling
  const int64_t* device_offsets;  // the same on the device; null if there is one segment
  int64_t segments;
  int64_t k;
  bool euclidean;
  bool include_self;
  KnnMethod method;
  float* values;     // device, [n, k], best first; -inf (cosine) or +inf (euclidean) where missing.
                     // A distance beyond the largest float is +inf, too
  int32_t* indices;  // device, [n, k]; -1 where missing
  KnnTuning tuning = {};
};

// Whether kAuto takes tensor cores for a segment of `length` rows.
bool knn_fuses(const KnnArgs& args, int64_t length);

// Bytes of the workspace that a call with these sizes needs; reads no device memory. 0 where knn()
// would answer cudaErrorInvalidValue.
size_t knn_workspace(const KnnArgs& args);

// Enqueues everything on `stream`. `workspace`: device memory of knn_workspace(args) bytes, aligned
// to 256. Returns the first error of a launch, or cudaErrorInvalidValue, and nothing is enqueued,
// for sizes or tuning outside what is said above.
cudaError_t knn(const KnnArgs& args, void* workspace, cudaStream_t stream);

}  // namespace nefkern::cuda
