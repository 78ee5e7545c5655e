// Few channels: the values themselves, row against row, are as cheap as any estimate.
#pragma once

#include "cpu/knn_pack.h"
#include "cpu/knn_select.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr int64_t kDirectChannels = 16;  // up to here

// Scores are values already: cosine itself; or the scaled product, or minus the scaled squared
// distance, whose values are computed anew in double.
struct ExactScores {
  // `scale`: of the rows, `other_scale`: of the candidates.
  ExactScores(const KnnArgs& all, float scale, float other_scale)
      : args(all),
        others(all.across() ? all.database : all.features),
        scale(double{scale} * other_scale) {
    if (args.metric == KnnMetric::kCosine) return;
    range.lowest = -(1 - 1e-5) * FLT_MAX * this->scale * (euclidean() ? FLT_MAX : 1);
    if (euclidean()) {
      relative = 2 * (args.channels + 8) * 0x1p-24;
    } else {
      range.highest = -range.lowest;
    }
  }

  bool euclidean() const { return args.metric == KnnMetric::kEuclidean; }

  // How far the scores of a row, scaled `y`, may be from their values' (see knn_pack.h): what
  // vanished of the products, the rounding of a value below the normal range (entries are below 2,
  // distances below 16), and of a sum of products.
  float margin(const float* y) const {
    if (args.metric == KnnMetric::kCosine) return 0;
    const double unit = 0x1p-149 * (euclidean() ? std::sqrt(scale) : scale);
    const double lost = (args.channels + 1) * 0x1p-120;
    if (euclidean()) return static_cast<float>(lost + unit * (64 + unit));
    double length2 = 0;
    for (int64_t c = 0; c < args.channels; ++c) length2 += double{y[c]} * y[c];
    const double lengths = std::sqrt(length2 * args.channels) * 2;
    return static_cast<float>(lost + unit + (args.channels + 4) * 0x1p-24 * lengths);
  }

  float value(int32_t i, int32_t j, float score) const {
    if (args.metric == KnnMetric::kCosine) return score;
    const float* x = args.features + i * args.channels;
    const float* y = others + j * args.channels;
    if (euclidean()) return -wide_distance(x, y, args.channels);
    double total = 0;
    for (int64_t c = 0; c < args.channels; ++c) total += double{x[c]} * y[c];
    return static_cast<float>(total);
  }
  float score(float value) const {
    if (args.metric == KnnMetric::kCosine) return value;
    if (euclidean()) return static_cast<float>(-scale * value * value);
    return static_cast<float>(std::min(value, FLT_MAX) * scale);
  }
  int32_t index(int32_t position) const { return position; }

  const KnnArgs& args;
  const float* others;
  double scale;
  double relative = 0;
  Range range;
};

// A row [channels] made ready: of unit length, or scaled. NaN where it isn't finite.
inline void ready_row(const KnnArgs& args, const float* x, float scale, float* y) {
  const bool finite = args.metric == KnnMetric::kCosine
                          ? unit_row(x, args.channels, args.channels, y)
                          : scaled_row(x, args.channels, args.channels, scale, y);
  if (!finite) std::fill(y, y + args.channels, std::numeric_limits<float>::quiet_NaN());
}

// The candidates of row i, which is `x` [channels] when made ready, among rows [begin, end) but
// `left_out` into row.score and row.position. `planes` holds these rows' channels
// [channels][plane].
template <int kChannels>
void scan_row(const float* x, const float* planes, int64_t plane, int64_t channels, int64_t i,
              int64_t begin, int64_t end, int64_t left_out, int64_t k, int64_t limit,
              const ExactScores& exact, const Row& row) {
  const int64_t count = kChannels ? kChannels : channels;
  const bool euclidean = exact.euclidean();
  for (int64_t j = begin; j < end; j += kLanes) {
    Lanes total = {};
    for (int64_t c = 0; c < count; ++c) {
      const Lanes p = broadcast(x[c]);
      const Lanes q = load(planes + c * plane + j);
      if (euclidean) {
        total -= (p - q) * (p - q);
      } else {
        total += p * q;
      }
    }
    uint32_t mask = at_least(total, broadcast(*row.threshold));
    if (!mask) continue;
    if (end - j < kLanes) mask &= (1u << (end - j)) - 1;
    if (left_out >= j && left_out - j < kLanes) mask &= ~(1u << (left_out - j));
    *row.count += append_lanes(row.score + *row.count, row.position + *row.count, total,
                               static_cast<int32_t>(j), mask);
    if (*row.count > limit) compact(row, static_cast<int32_t>(i), k, limit, exact);
  }
}

}  // namespace nefkern::cpu::NEFKERN_ISA
