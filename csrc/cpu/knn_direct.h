// Few channels: the values themselves, row against row, are as cheap as any estimate.
#pragma once

#include "cpu/knn_select.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr int64_t kDirectChannels = 16;  // up to here

// Scores are values already: cosine itself, or minus the squared distance.
struct ExactScores {
  bool euclidean;
  double relative;

  float value(int32_t, int32_t, float score) const {
    return euclidean ? -std::sqrt(-score) : score;
  }
  float score(float value) const { return euclidean ? -value * value : value; }
  int32_t index(int32_t position) const { return position; }
};

// The candidates of row i among rows [begin, end) into row.score and row.position. `planes` holds
// the rows' channels [channels][plane].
template <int kChannels>
void scan_row(const float* planes, int64_t plane, int64_t channels, int64_t i, int64_t begin,
              int64_t end, bool include_self, int64_t k, int64_t limit, const ExactScores& exact,
              const Row& row) {
  const int64_t count = kChannels ? kChannels : channels;
  for (int64_t j = begin; j < end; j += kLanes) {
    Lanes total = {};
    for (int64_t c = 0; c < count; ++c) {
      const Lanes x = broadcast(planes[c * plane + i]);
      const Lanes y = load(planes + c * plane + j);
      if (exact.euclidean) {
        total -= (x - y) * (x - y);
      } else {
        total += x * y;
      }
    }
    uint32_t mask = at_least(total, broadcast(*row.threshold));
    if (!mask) continue;
    if (end - j < kLanes) mask &= (1u << (end - j)) - 1;
    if (!include_self && i >= j && i - j < kLanes) mask &= ~(1u << (i - j));
    *row.count += append_lanes(row.score + *row.count, row.position + *row.count, total,
                               static_cast<int32_t>(j), mask);
    if (*row.count > limit) compact(row, static_cast<int32_t>(i), k, limit, exact);
  }
}

}  // namespace nefkern::cpu::NEFKERN_ISA
