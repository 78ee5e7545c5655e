// The rows of one segment, or of its candidates in a database, made ready for the tiles: scaled,
// put into a scattered order, centred, rounded, packed into panels; with the bound on what the
// rounding can change.
//
// Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
// (euclidean, inner product; for the latter each side has its own). For any vector c, with d_i =
// y_i - c,
//     <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
//     -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2
// so one product of tiles serves all metrics. c is (about) the mean row: it makes the d_i short,
// and the rounding error is proportional to their lengths.
//
// Margin. Only p_i, d_i rounded to bfloat16 (or float32), is multiplied. With the residual
// r_i = |d_i - p_i|, computed in double for every row, and Cauchy-Schwarz,
//     |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.
// The products of two bfloat16 are exact in float32; adding C of them in float32, in any order,
// errs by at most g |p_i| |p_j|, g = (C + 4) 2^-24 / (1 - (C + 4) 2^-24), and rounding u_i and u_j
// and adding them at the end by 4 * 2^-24 (|u_i| + |u_j|). The value that decides is itself
// computed in float32, as 64 sums of C / 64 products and a tree: with h = (C / 64 + 10) 2^-24, for
// products within h |y_i| |y_j|, for the square root of a sum of squares within a relative h + 4 *
// 2^-24 (see `relative`). Replacing row j's lengths by their maxima gives the margin of row i for
// all j. Numbers too small for float32's normal range count as lost: C * 2^-120 is far more than
// they can add up to. A distance is decided on as it is given back, without the scale, where it may
// be rounded below the normal range: by 2^-150, which moves the score by that, scaled, times the
// distance.
//
// Values are functions of the two rows as they came and of nothing else, so that a pair has the
// same value in any segment and beside any others. Distances come from the unscaled rows in
// float32, where their square is between kSmallSquare and kLargeSquare: what vanished changes no
// digit then. Elsewhere they are computed in double, where no square of a float leaves its range.
// For inner products every row is brought to about 1 by a power of two of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "cpu/knn.h"
#include "cpu/knn_lanes.h"
#include "cpu/knn_memory.h"
#include "cpu/knn_select.h"
#include "cpu/parallel.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr int kTileColumns = 48;  // a micro-tile is kTileRows x kTileColumns
constexpr int kTileRows = 8;
#if defined(__AVX512BF16__)
constexpr int kDepth = 2;  // channels in one 4-byte element of a panel: a pair of bfloat16
#else
constexpr int kDepth = 1;  // a float32
#endif

// Copies a row, zero-padded to `padded` channels, scaled to unit length. False (and zeros) where an
// entry isn't finite. The largest entry is divided out first: no square overflows or vanishes.
inline bool unit_row(const float* x, int64_t channels, int64_t padded, float* y) {
  float largest = 0;
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) largest = std::max(largest, std::abs(x[c]));
  if (largest > 0 && std::isfinite(largest)) {
    for (int64_t c = 0; c < channels; ++c) {
      y[c] = x[c] / largest;
      total += double{y[c]} * y[c];
    }
    const float norm = static_cast<float>(std::sqrt(total));
    for (int64_t c = 0; c < channels; ++c) y[c] /= norm;
  } else {
    std::fill(y, y + channels, 0.0f);
  }
  std::fill(y + channels, y + padded, 0.0f);
  // NaN slips through every comparison above; a sum of zeros and NaN shows it, and infinity too.
  float poison = 0;
  for (int64_t c = 0; c < channels; ++c) poison += x[c] * 0.0f;
  if (poison == 0) return true;
  std::fill(y, y + channels, 0.0f);
  return false;
}

// The same for a row times `scale`, which may be any power of two.
inline bool scaled_row(const float* x, int64_t channels, int64_t padded, double scale, float* y) {
  float poison = 0;
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = static_cast<float>(x[c] * scale);
    poison += x[c] * 0.0f;
  }
  std::fill(y + channels, y + padded, 0.0f);
  if (poison == 0) return true;
  std::fill(y, y + channels, 0.0f);
  return false;
}

// The power of two that brings the largest finite entry into [1, 2): squares neither overflow nor
// vanish, and scaling by it is exact.
inline float power_of_two_scale(const float* x, int64_t size) {
  float largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float entry = std::abs(x[i]);
    if (entry <= FLT_MAX) largest = std::max(largest, entry);
  }
  if (largest == 0) return 1;
  return std::ldexp(1.0f, std::clamp(-std::ilogb(largest), -126, 126));
}

// The power of two in a row's largest entry; 1 for a row of zeros, and of any else than numbers.
inline double power_of(const float* x, int64_t channels) {
  float largest = 0;
  for (int64_t c = 0; c < channels; ++c) largest = std::max(largest, std::abs(x[c]));
  return largest > 0 && largest <= FLT_MAX ? std::ldexp(1.0, std::ilogb(largest)) : 1.0;
}

constexpr float kSmallSquare = 0x1p-64f, kLargeSquare = 0x1p126f;

// |x - y|, of two rows as they came, in double. Symmetric in x and y.
__attribute__((noinline)) inline float wide_distance(const float* x, const float* y,
                                                     int64_t channels) {
  typedef double Doubles __attribute__((vector_size(8 * kLanes)));
  Doubles part[2] = {};
  int64_t c = 0;
  const auto add = [&](Doubles& to, const Lanes& p, const Lanes& q) {
    const Doubles difference =
        __builtin_convertvector(p, Doubles) - __builtin_convertvector(q, Doubles);
    to += difference * difference;
  };
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    add(part[0], load(x + c), load(y + c));
    add(part[1], load(x + c + kLanes), load(y + c + kLanes));
  }
  for (; c < channels; c += kLanes) {
    Lanes p = {}, q = {};
    const int64_t rest = std::min<int64_t>(kLanes, channels - c);
    std::copy(x + c, x + c + rest, reinterpret_cast<float*>(&p));
    std::copy(y + c, y + c + rest, reinterpret_cast<float*>(&q));
    add(part[0], p, q);
  }
  part[0] += part[1];
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += part[0][l];
  return static_cast<float>(std::sqrt(total));
}

// Where position p of a segment of n rows comes from: a step coprime to n near the golden ratio.
// Any run of positions is then a fair sample of the segment, so thresholds rise early whatever the
// order of the input.
inline int64_t scatter_step(int64_t n) {
  int64_t step = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887498949 * n));
  while (std::gcd(step, n) != 1) ++step;
  return step;
}

struct Panels {
  // Room for segments of up to `n` rows.
  Panels(int64_t n, int64_t channels)
      : padded_channels(round_up(std::max<int64_t>(channels, 1), 4 * kLanes)),
        steps(padded_channels / kDepth),
        rows(round_up(n, kTileColumns) * padded_channels),
        elements(round_up(n, kTileColumns) * steps),
        offset(round_up(n, kTileColumns)),
        power(round_up(n, kTileColumns)),
        length(round_up(n, kTileColumns)),
        residual(round_up(n, kTileColumns)),
        index(round_up(n, kTileColumns)),
        centre(padded_channels) {}

  // The rows [begin, end) of `x`, centred by themselves or as those `beside` are.
  void pack(const float* x, int64_t begin, int64_t end, int64_t channels, KnnMetric metric,
            float scale, const Panels* beside = nullptr);
  // Of row i's scores with all rows of `other`.
  float margin(int64_t i, const Panels& other) const;
  // The relative error of a value: h above.
  double value_gamma() const { return (padded_channels / 64.0 + 10) * 0x1p-24; }
  const uint32_t* panel(int64_t position) const {
    return elements.data() + position / kLanes * kLanes * steps;
  }
  const float* row(int64_t position) const { return rows.data() + position * padded_channels; }
  const float* input(int64_t position) const {  // of no row: any, as nothing reads its values
    return x + std::max(index[position], 0) * channels;
  }

  int64_t padded_channels, steps;
  int64_t n = 0, padded_n = 0;
  const float* x = nullptr;  // the input
  int64_t channels = 0;
  Array<float> rows;         // [n, padded_channels], by position: y without the scale of all
  Array<uint32_t> elements;  // p: panels of 16 rows, [steps][16] each
  Array<float> offset;       // u; -inf where there is no (finite) row
  Array<double> power;       // inner product: what a row was divided by, else 1
  Array<float> length;       // |d|
  Array<float> residual;     // |d - p|
  Array<int32_t> index;      // the row's index in the input
  Array<float> centre;
  double gamma = 0, centre_length = 0;
  float scale = 1;  // of all rows
  float max_offset = 0, max_length = 0, max_residual = 0;
  KnnMetric metric = KnnMetric::kCosine;

 private:
  bool take_row(const float* source, float* y, double* its_power) const;
  void find_centre();
  void pack_row(int64_t position);
  double factor(int64_t position) const { return power[position] * scale; }
};

// Whether the row is finite.
inline bool Panels::take_row(const float* source, float* y, double* its_power) const {
  *its_power = 1;
  if (metric == KnnMetric::kCosine) return unit_row(source, channels, padded_channels, y);
  if (metric == KnnMetric::kInnerProduct) *its_power = power_of(source, channels);
  return scaled_row(source, channels, padded_channels, 1 / *its_power, y);
}

// Any vector will do: the mean of some thousand rows.
inline void Panels::find_centre() {
  std::fill(centre.data(), centre.data() + padded_channels, 0.0f);
  const int64_t stride = std::max<int64_t>(1, n / 1024);
  for (int64_t i = 0; i < n; i += stride)
    for (int64_t c = 0; c < padded_channels; ++c)
      centre[c] += static_cast<float>(row(i)[c] * factor(i));
  const float share = static_cast<float>(stride) / static_cast<float>(n + stride - 1);
  for (int64_t c = 0; c < padded_channels; ++c) centre[c] *= share;
}

inline uint32_t round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float from_bf16(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline void Panels::pack_row(int64_t position) {
  const float* rows = row(position);
  const double by = factor(position);
  uint32_t* out = elements.data() + position / kLanes * kLanes * steps + position % kLanes;
  double length2 = 0, residual2 = 0, along = 0, centre2 = 0;
  for (int64_t s = 0; s < steps; ++s) {
    uint32_t element = 0;
    for (int64_t c = s * kDepth; c < (s + 1) * kDepth; ++c) {
      const double y = rows[c] * by;
      const double d = y - centre[c];
      const float near = static_cast<float>(d);
      float rounded = near;
      if constexpr (kDepth == 2) {
        const uint32_t bits = round_to_bf16(near);
        rounded = from_bf16(bits);
        element |= bits << 16 * (c % 2);
      } else {
        std::memcpy(&element, &near, sizeof(element));
      }
      length2 += d * d;
      residual2 += (d - rounded) * (d - rounded);
      along += y * centre[c];
      centre2 += double{centre[c]} * centre[c];
    }
    out[s * kLanes] = element;
  }
  const double u = metric == KnnMetric::kEuclidean ? -0.5 * length2 : along - 0.5 * centre2;
  constexpr double kUp = 1 + 1e-6;  // covers the rounding of these sums and of the casts
  offset[position] = static_cast<float>(u);
  length[position] = static_cast<float>(std::sqrt(length2) * kUp);
  residual[position] = static_cast<float>(std::sqrt(residual2) * kUp);
}

inline void Panels::pack(const float* input_rows, int64_t first, int64_t end_row,
                         int64_t channel_count, KnnMetric its_metric, float its_scale,
                         const Panels* beside) {
  x = input_rows;
  n = end_row - first;
  padded_n = round_up(n, kTileColumns);
  channels = channel_count;
  metric = its_metric;
  scale = its_scale;
  gamma = (channels + 4.0) * 0x1p-24;
  gamma = gamma < 0.5 ? gamma / (1 - gamma) : 1e30;
  const int64_t step = scatter_step(n);
  parallel_for(0, padded_n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t from = p * step % n;
      float* y = rows.data() + p * padded_channels;
      const bool inside = p < n;
      index[p] = inside ? static_cast<int32_t>(first + from) : -1;
      power[p] = 1;
      const bool finite = inside && take_row(x + (first + from) * channels, y, &power[p]);
      if (!inside) std::fill(y, y + padded_channels, 0.0f);
      offset[p] = finite ? 0 : -kInfinity;
    }
  });
  if (beside) {
    std::copy(beside->centre.data(), beside->centre.data() + padded_channels, centre.data());
  } else {
    find_centre();
  }
  double centre2 = 0;
  for (int64_t c = 0; c < padded_channels; ++c) centre2 += double{centre[c]} * centre[c];
  centre_length = std::sqrt(centre2);
  parallel_for(0, padded_n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const bool there = offset[p] == 0;
      pack_row(p);
      if (!there) {
        offset[p] = -kInfinity;
        length[p] = residual[p] = 0;
      }
    }
  });
  max_offset = max_length = max_residual = 0;
  for (int64_t p = 0; p < n; ++p) {
    if (offset[p] != -kInfinity) max_offset = std::max(max_offset, std::abs(offset[p]));
    max_length = std::max(max_length, length[p]);
    max_residual = std::max(max_residual, residual[p]);
  }
}

inline float Panels::margin(int64_t i, const Panels& other) const {
  const double packed = double{length[i]} + residual[i];
  const double max_packed = double{other.max_length} + other.max_residual;
  const double rounding = residual[i] * double{other.max_length} + packed * other.max_residual;
  const double summing =
      gamma * packed * max_packed + 4 * 0x1p-24 * (double{std::abs(offset[i])} + other.max_offset);
  double values = 0, lost = padded_channels * 0x1p-120;
  if (metric == KnnMetric::kEuclidean) {
    const double unit = 0x1p-149 * scale;
    lost += unit * (packed + max_packed + unit);
  } else {
    const bool unit_rows = metric == KnnMetric::kCosine;
    const double lengths =
        unit_rows ? 1 : (length[i] + centre_length) * (other.max_length + centre_length);
    values = 1.01 * value_gamma() * lengths;
    if (!unit_rows) lost += 0x1p-149 * scale * other.scale;
  }
  return static_cast<float>((rounding + summing + values + lost) * (1 + 1e-6));
}

}  // namespace nefkern::cpu::NEFKERN_ISA
