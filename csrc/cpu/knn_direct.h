// Few channels: the values themselves, row against row, are as cheap as any estimate.
#pragma once

#include "cpu/knn_pack.h"
#include "cpu/knn_select.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr int64_t kDirectChannels = 16;  // up to here

// How far a score may be from its value's: what vanished of the squares, and (see knn_pack.h) the
// rounding of a value below the normal range; entries are below 4, distances below 32.
inline float direct_margin(const KnnArgs& args, float scale) {
  if (!args.euclidean) return 0;
  const float unit = 0x1p-149f * scale;
  return static_cast<float>(args.channels + 1) * 0x1p-120f + unit * (64 + unit);
}

// Scores are values already: cosine itself, or minus the squared distance, scaled, unless it is
// small.
struct ExactScores {
  const KnnArgs& args;
  float scale;
  double relative;

  float value(int32_t i, int32_t j, float score) const {
    if (!args.euclidean) return score;
    if (-score >= kSmallSquare) return -(std::sqrt(-score) * (1 / scale));
    return -small_distance(args.features + i * args.channels, args.features + j * args.channels,
                           args.channels);
  }
  float score(float value) const {
    return args.euclidean ? -(value * scale) * (value * scale) : value;
  }
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
      if (exact.args.euclidean) {
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
