// The rows of one segment, made ready for the tiles: scaled, put into a scattered order, centred,
// rounded, packed into panels; with the bound on what the rounding can change.
//
// Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
// (euclidean). For any vector c, with d_i = y_i - c,
//     <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
//     -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2
// so one product of tiles serves both metrics. c is (about) the mean row: it makes the d_i short,
// and the rounding error is proportional to their lengths.
//
// Margin. Only p_i, d_i rounded to bfloat16 (or float32), is multiplied. With the residual
// r_i = |d_i - p_i|, computed in double for every row, and Cauchy-Schwarz,
//     |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.
// The products of two bfloat16 are exact in float32; adding C of them in float32, in any order,
// errs by at most g |p_i| |p_j|, g = (C + 4) 2^-24 / (1 - (C + 4) 2^-24), and rounding u_i and u_j
// and adding them at the end by 4 * 2^-24 (|u_i| + |u_j|). The value that decides is itself
// computed in float32, as 64 sums of C / 64 products and a tree: with h = (C / 64 + 10) 2^-24, for
// cosine within h |y_i| |y_j|, for the square root of a sum of squares within a relative h + 4 *
// 2^-24 (see `relative`). Replacing row j's lengths by their maxima gives the margin of row i for
// all j. Numbers too small for float32's normal range count as lost: C * 2^-120 is far more than
// they can add up to. A distance is decided on as it is given back, without the scale, where it may
// be rounded below the normal range: by 2^-150, which moves the score by that, scaled, times the
// distance.
//
// Small distances. The squares of differences below 2^-63 of the largest entry vanish, so where the
// sum is below kSmallSquare the distance is computed from the rows as they came, in double: no
// square of a float leaves its range. Above, what vanished changes no digit.
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

// The same for a row times `scale`.
inline bool scaled_row(const float* x, int64_t channels, int64_t padded, float scale, float* y) {
  float poison = 0;
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = x[c] * scale;
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

constexpr float kSmallSquare = 0x1p-64f;

// |x - y|, of two rows as they came that are near for the size of their entries: no difference
// overflows. Symmetric in x and y.
__attribute__((noinline)) inline float small_distance(const float* x, const float* y,
                                                      int64_t channels) {
  typedef double Doubles __attribute__((vector_size(8 * kLanes)));
  Doubles part[2] = {};
  int64_t c = 0;
  const auto add = [&](Doubles& to, const Lanes& difference) {
    const Doubles wide = __builtin_convertvector(difference, Doubles);
    to += wide * wide;
  };
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    add(part[0], load(x + c) - load(y + c));
    add(part[1], load(x + c + kLanes) - load(y + c + kLanes));
  }
  for (; c < channels; c += kLanes) {
    Lanes rest = {};
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, channels - c); ++l)
      rest[l] = x[c + l] - y[c + l];
    add(part[0], rest);
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
        length(round_up(n, kTileColumns)),
        residual(round_up(n, kTileColumns)),
        index(round_up(n, kTileColumns)),
        centre(padded_channels) {}

  void pack(const float* x, int64_t count, int64_t first_index, int64_t channels, bool euclidean,
            float scale);
  float margin(int64_t i) const;
  // The relative error of a value: h above.
  double value_gamma() const { return (padded_channels / 64.0 + 10) * 0x1p-24; }
  const uint32_t* panel(int64_t position) const {
    return elements.data() + position / kLanes * kLanes * steps;
  }
  const float* row(int64_t position) const { return rows.data() + position * padded_channels; }

  int64_t padded_channels, steps;
  int64_t n = 0, padded_n = 0;
  Array<float> rows;         // y [n, padded_channels], by position
  Array<uint32_t> elements;  // p: panels of 16 rows, [steps][16] each
  Array<float> offset;       // u; -inf where there is no (finite) row
  Array<float> length;       // |d|
  Array<float> residual;     // |d - p|
  Array<int32_t> index;      // the row's index in the input
  Array<float> centre;
  double gamma = 0;
  double unit = 0;  // of values below float32's normal range, scaled
  float max_offset = 0, max_length = 0, max_residual = 0;
  bool euclidean_ = false;

 private:
  void find_centre();
  void pack_row(int64_t position);
};

// Any vector will do: the mean of some thousand rows.
inline void Panels::find_centre() {
  std::fill(centre.data(), centre.data() + padded_channels, 0.0f);
  const int64_t stride = std::max<int64_t>(1, n / 1024);
  for (int64_t i = 0; i < n; i += stride)
    for (int64_t c = 0; c < padded_channels; ++c) centre[c] += row(i)[c];
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
  const float* y = row(position);
  uint32_t* out = elements.data() + position / kLanes * kLanes * steps + position % kLanes;
  double length2 = 0, residual2 = 0, along = 0, centre2 = 0;
  for (int64_t s = 0; s < steps; ++s) {
    uint32_t element = 0;
    for (int64_t c = s * kDepth; c < (s + 1) * kDepth; ++c) {
      const double d = double{y[c]} - centre[c];
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
      along += double{y[c]} * centre[c];
      centre2 += double{centre[c]} * centre[c];
    }
    out[s * kLanes] = element;
  }
  const double u = euclidean_ ? -0.5 * length2 : along - 0.5 * centre2;
  constexpr double kUp = 1 + 1e-6;  // covers the rounding of these sums and of the casts
  offset[position] = static_cast<float>(u);
  length[position] = static_cast<float>(std::sqrt(length2) * kUp);
  residual[position] = static_cast<float>(std::sqrt(residual2) * kUp);
}

inline void Panels::pack(const float* x, int64_t count, int64_t first_index, int64_t channels,
                         bool euclidean, float scale) {
  n = count;
  padded_n = round_up(n, kTileColumns);
  euclidean_ = euclidean;
  unit = euclidean ? 0x1p-149 * scale : 0;
  gamma = (channels + 4.0) * 0x1p-24;
  gamma = gamma < 0.5 ? gamma / (1 - gamma) : 1e30;
  const int64_t step = scatter_step(n);
  parallel_for(0, padded_n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t from = p * step % n;
      float* y = rows.data() + p * padded_channels;
      const bool inside = p < n;
      index[p] = inside ? static_cast<int32_t>(first_index + from) : -1;
      const float* source = x + from * channels;
      const bool finite =
          inside && (euclidean ? scaled_row(source, channels, padded_channels, scale, y)
                               : unit_row(source, channels, padded_channels, y));
      if (!inside) std::fill(y, y + padded_channels, 0.0f);
      offset[p] = finite ? 0 : -kNothing;
    }
  });
  find_centre();
  parallel_for(0, padded_n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const bool there = offset[p] == 0;
      pack_row(p);
      if (!there) {
        offset[p] = -kNothing;
        length[p] = residual[p] = 0;
      }
    }
  });
  max_offset = max_length = max_residual = 0;
  for (int64_t p = 0; p < n; ++p) {
    if (offset[p] != -kNothing) max_offset = std::max(max_offset, std::abs(offset[p]));
    max_length = std::max(max_length, length[p]);
    max_residual = std::max(max_residual, residual[p]);
  }
}

inline float Panels::margin(int64_t i) const {
  const double packed = double{length[i]} + residual[i];
  const double max_packed = double{max_length} + max_residual;
  const double rounding = residual[i] * double{max_length} + packed * max_residual;
  const double summing = gamma * packed * max_packed +
                         4 * 0x1p-24 * (double{std::abs(offset[i])} + max_offset) +
                         (euclidean_ ? 0 : 1.01 * value_gamma());
  const double lost = padded_channels * 0x1p-120 + unit * (packed + max_packed + unit);
  return static_cast<float>((rounding + summing + lost) * (1 + 1e-6));
}

}  // namespace nefkern::cpu::NEFKERN_ISA
