// k nearest neighbours by cosine, Euclidean distance or inner product, within segments, on a GPU:
// among the same rows, or in a database.
//
// Nothing here allocates, waits for the device or uses a stream but the one given.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace nefkern::cuda {

enum class KnnMetric { kCosine, kEuclidean, kInnerProduct };

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
  // Candidates are held for all rows of a segment, which halves the products, as long as they need
  // no more than this; else for fewer rows at a time.
  int64_t candidate_bytes = int64_t{4} << 30;
  int64_t chunk_rows = int64_t{1} << 30;  // nor for more rows than these; 128 divides it
  int64_t tile_side = 16;                 // tiles are taken by squares of so many rows of them
  int64_t sample_share = 16;              // a threshold comes from this part of a segment
  int64_t keep = 2048;  // neighbours found at a time, at most 2048; a larger k takes several passes
                        // over a row's values, and is never fused
};

struct KnnArgs {
  const float* features;  // device, [n, channels], rows adjacent
  int64_t n;              // below 2^31
  int64_t channels;
  const int64_t* offsets;         // host, [segments + 1], from 0 to n, never falling
  const int64_t* device_offsets;  // the same on the device; null if there is one segment
  int64_t segments;
  int64_t k;
  KnnMetric metric;
  bool include_self;  // without a database
  KnnMethod method;
  float* values;     // device, [n, k], best first; -inf, of distances +inf, where missing. What is
                     // beyond the largest float is infinite, too
  int32_t* indices;  // device, [n, k]; -1 where missing
  KnnTuning tuning = {};
  // The candidates, where they are not the rows themselves: [rows, channels], and their segments,
  // as many. Every row of segment s is one for every row of segment s of the features.
  const float* database = nullptr;  // device
  int64_t database_rows = 0;        // with n below 2^31
  // Host; not null: there is a database, maybe an empty one.
  const int64_t* database_offsets = nullptr;
  const int64_t* device_database_offsets = nullptr;  // the same; null if there is one segment

  bool across() const { return database_offsets != nullptr; }
};

// Whether a segment of `length` candidates takes tensor cores.
bool knn_fuses(const KnnArgs& args, int64_t length);

// Bytes of the workspace that a call with these sizes needs; reads no device memory. 0 where knn()
// would answer cudaErrorInvalidValue.
size_t knn_workspace(const KnnArgs& args);

// Enqueues everything on `stream`. `workspace`: device memory of knn_workspace(args) bytes, aligned
// to 256. Returns the first error of a launch, or cudaErrorInvalidValue, and nothing is enqueued,
// for sizes or tuning outside what is said above.
cudaError_t knn(const KnnArgs& args, void* workspace, cudaStream_t stream);

}  // namespace nefkern::cuda
