// k nearest neighbours by cosine similarity or Euclidean distance, within segments.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace nefkern::cpu {

struct KnnArgs {
  const float* features;  // [n, channels], rows adjacent
  int64_t n;
  int64_t channels;
  const int64_t* offsets;  // [segments + 1], from 0 to n, never falling
  int64_t segments;
  int64_t k;
  bool euclidean;
  bool include_self;
  float* values;     // [n, k], best first; -inf (cosine) or +inf (euclidean) where missing. A
                     // distance beyond the largest float is +inf, too
  int32_t* indices;  // [n, k]; -1 where missing
};

NEFKERN_DECLARE(void, knn, (const KnnArgs& args));

}  // namespace nefkern::cpu
