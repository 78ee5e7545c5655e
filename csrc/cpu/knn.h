// k nearest neighbours by cosine, Euclidean distance or inner product, within segments: among the
// same rows, or in a database.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

enum class KnnMetric { kCosine, kEuclidean, kInnerProduct };

struct KnnArgs {
  const float* features;  // [n, channels], rows adjacent
  int64_t n;
  int64_t channels;
  const int64_t* offsets;  // [segments + 1], from 0 to n, never falling
  int64_t segments;
  int64_t k;
  KnnMetric metric;
  bool include_self;
  float* values;     // [n, k], best first; -inf, of distances +inf, where missing. What is beyond
                     // the largest float is infinite, too
  int32_t* indices;  // [n, k]; -1 where missing
  // The candidates, where they are not the rows themselves: [rows, channels], and their segments,
  // as many. Every row of segment s is one for every row of segment s of the features.
  const float* database = nullptr;
  int64_t database_rows = 0;                  // below 2^31
  const int64_t* database_offsets = nullptr;  // not null: there is a database, maybe an empty one

  bool across() const { return database_offsets != nullptr; }
};

NEFKERN_DECLARE(void, knn, (const KnnArgs& args));

}  // namespace nefkern::cpu
