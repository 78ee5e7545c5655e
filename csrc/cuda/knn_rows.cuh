// The rows that decide, and what estimates of their values are made of.
//
// Scores. Let y_i be the rows that decide: unit rows (cosine) or the features times a power of two
// (euclidean). For any vector c, with d_i = y_i - c,
//     <y_i, y_j>         = <d_i, d_j> + u_i + u_j,   u_i = <c, y_i> - |c|²/2
//     -|y_i - y_j|² / 2  = <d_i, d_j> + u_i + u_j,   u_i = -|d_i|²/2
// so one product of tiles serves both metrics. c is (about) the mean row: the d_i are short, and so
// is the error. Of inner products c is 0, and the y_i are features times powers of two: a query's
// own, or one for all candidates.
//
// Margin. Only p_i, d_i rounded to float16, is multiplied: entries are below 4 whatever the input,
// so its range suffices, and it has three bits more than bfloat16 at the same speed. With u = 2^-24
// and the residual r_i = |d_i - p_i|, computed in double from what p_i is, by Cauchy-Schwarz
//     |<d_i, d_j> - <p_i, p_j>| = |<d_i - p_i, d_j> + <p_i, d_j - p_j>| <= r_i |d_j| + |p_i| r_j.
// Products of two float16 are exact in float32. A tensor core adds T of them and the accumulator
// after aligning all to the largest and cutting, which errs by at most T + 2 times 2u of the
// largest (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; T >= 4 since the first
// generation): C/T such steps err by at most 3 C u |p_i| |p_j|, and 4 C + 8 is taken. Rounding the
// u_i and adding them errs by 4u (|u_i| + |u_j|). The value that decides is a sum in float32 of
// C/32 chains of 32 fused multiply-adds (see "values"): with h = (32 + C/32 + 8) u, within h |y_i|
// |y_j| for cosine, and, for euclidean, its square within a relative h of the squared distance.
// Replacing row j's lengths by their maxima gives the margin m_i for all j. Numbers below float32's
// normal range count as lost: C 2^-120 is far more than they can add up to. A distance is decided
// on as it is given back, without the scale, where it may be rounded below the normal range: by
// 2^-150, which moves the score by that, scaled, times the distance. So is an inner product, which
// has been summed with a power of two taken out of either row, whatever the size of the others:
// within h |x_i| |x_j|.
//
// Small distances. The squares of differences below 2^-63 of the largest entry vanish, so where the
// sum is below kSmallSquare the distance is computed from the rows as they came, in double: no
// square of a float leaves its range. Above, what vanished changes no digit.
//
// Selection. Let s be a score that at least k candidates reach. Their values are at least s - m, so
// the k-th best is, and whoever is among the k best has a score of at least s - 2m; for euclidean
// the relative error of a squared value takes off 2.1 h (|s| + m) more. Values beyond the largest
// float tie: of those at the upper end s is taken down to that float, and at the lower end everyone
// is a candidate.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/knn.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {

constexpr float kNothing = std::numeric_limits<float>::infinity();  // threshold of a row left out
constexpr float kAnything = -FLT_MAX;
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kSumChannels = 32;  // of a chain: see "values"

__device__ __forceinline__ float warp_max(float x) {
  for (int d = kWarp / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// The order of floats that are not negative is that of their bits.
__device__ __forceinline__ void atomic_max(unsigned* target, float x) {
  if (x > 0) atomicMax(target, __float_as_uint(x));
}

// ---- the rows that decide ----

// Queries, then the database's rows where there is one.
struct Rows {
  const float* features;  // [queries, channels]: as they came
  const float* database;  // [n - queries, channels]
  int64_t channels;
  float* values;           // y: [n, depth], padded with zeros; zeros where not finite
  unsigned char* present;  // [n]: whether all entries are finite
  int* exponent;           // [n]: of the power of two that was taken out of a row (inner product)
  int* begin;              // [queries]: the row's candidates are rows [begin, end)
  int* end;
  unsigned* largest;   // [1]: bits of the largest finite entry (euclidean), of the candidates'
                       // (inner product)
  int64_t queries;     // n without a database
  int64_t candidates;  // the first of all candidates: 0 or, with a database, `queries`
  int64_t n;
  int64_t depth;

  __device__ const float* row(int64_t i) const {
    return i < queries ? features + i * channels : database + (i - queries) * channels;
  }
};

// The largest finite entry of `size`, in absolute value, into *largest, which is 0 before.
__global__ void __launch_bounds__(kRowThreads)
    find_largest(const float* features, int64_t size, unsigned* largest) {
  float found = 0;
  const int64_t stride = int64_t{gridDim.x} * kRowThreads;
  for (int64_t e = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; e < size; e += stride) {
    const float entry = fabsf(features[e]);
    if (entry <= FLT_MAX) found = fmaxf(found, entry);
  }
  found = warp_max(found);
  if (lane_id() == 0) atomic_max(largest, found);
}

// The power of two that brings `largest` into [1, 2): squares neither overflow nor vanish, and
// scaling by it is exact.
__device__ __forceinline__ float power_of_two(float largest) {
  if (largest == 0) return 1;
  return ldexpf(1.0f, min(max(-ilogbf(largest), -126), 126));
}

// What the rows were multiplied by (euclidean).
__device__ __forceinline__ float scale_of(const Rows& rows) {
  return power_of_two(__uint_as_float(*rows.largest));
}

// The exponent that brings `largest` into [1, 2).
__device__ __forceinline__ int exponent_of(float largest) {
  return largest == 0 ? 0 : ilogbf(largest);
}

// Where row i's candidates are. `offsets`: of the queries' segments; `others`: of the database's.
__device__ __forceinline__ void find_candidates(const Rows& rows, int64_t i, const int64_t* offsets,
                                                const int64_t* others, int64_t segments) {
  if (!offsets) {  // one segment
    rows.begin[i] = static_cast<int>(rows.candidates);
    rows.end[i] = static_cast<int>(rows.n);
    return;
  }
  int64_t low = 0, high = segments;  // the last s with offsets[s] <= i: empty ones are passed over
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t* bounds = others ? others : offsets;
  rows.begin[i] = static_cast<int>(rows.candidates + bounds[low]);
  rows.end[i] = static_cast<int>(rows.candidates + bounds[low + 1]);
}

// One warp a row: y_i, and its candidates. A row of unit length has its largest entry divided out
// first: no square overflows or vanishes.
template <KnnMetric kMetric>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows(Rows rows, const int64_t* offsets, const int64_t* others, int64_t segments) {
  const int64_t i = global_warp();
  if (i >= rows.n) return;
  const int lane = lane_id();
  const float* x = rows.row(i);
  float* y = rows.values + i * rows.depth;
  float largest = 0;
  bool finite = true;
  for (int64_t c = lane; c < rows.channels; c += kWarp) {
    const float entry = fabsf(x[c]);
    finite = finite && entry <= FLT_MAX;
    largest = fmaxf(largest, entry);
  }
  finite = __all_sync(kAllLanes, finite);
  float scale = 1, norm = 1;
  int exponent = 0;
  if constexpr (kMetric == KnnMetric::kEuclidean) {
    scale = scale_of(rows);
  } else if constexpr (kMetric == KnnMetric::kInnerProduct) {
    largest = warp_max(largest);
    if (finite) exponent = exponent_of(largest);
  } else {
    largest = warp_max(largest);
    double total = 0;
    if (finite && largest > 0) {
      for (int64_t c = lane; c < rows.channels; c += kWarp) {
        const float entry = x[c] / largest;
        total += static_cast<double>(entry) * entry;
      }
    } else {
      largest = 1;
    }
    total = warp_sum(total);
    if (total > 0) norm = static_cast<float>(sqrt(total));
  }
  for (int64_t c = lane; c < rows.depth; c += kWarp) {
    const float entry = finite && c < rows.channels ? x[c] : 0.0f;
    if constexpr (kMetric == KnnMetric::kEuclidean) {
      y[c] = entry * scale;
    } else if constexpr (kMetric == KnnMetric::kInnerProduct) {
      y[c] = ldexpf(entry, -exponent);
    } else {
      y[c] = entry / largest / norm;
    }
  }
  if (lane != 0) return;
  rows.present[i] = finite;
  if constexpr (kMetric == KnnMetric::kInnerProduct) rows.exponent[i] = exponent;
  if (i < rows.queries) find_candidates(rows, i, offsets, others, segments);
}

// ---- estimates ----

// Bits of the largest |u|, |d|, r of all candidates.
struct Maxima {
  unsigned offset, length, residual;
};

struct Estimates {
  __half* packed;   // p: [n, depth]
  float* centre;    // c: [depth]
  float* offset;    // u; -inf where there is no (finite) row
  float* length;    // |d|
  float* residual;  // r = |d - p|
  Maxima* maxima;
};

// Any vector will do: the mean of some thousand rows. A block has kWarp channels.
__global__ void __launch_bounds__(kRowThreads) find_centre(Rows rows, float* centre) {
  struct Sums {
    float part[kRowWarps][kWarp];
  };
  Sums& sums = block_shared<Sums>();
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t c = int64_t{blockIdx.x} * kWarp + lane;
  const int64_t stride = max(int64_t{1}, rows.n / 1024);
  const int64_t count = (rows.n + stride - 1) / stride;
  float sum = 0;
  for (int64_t s = warp; s < count; s += kRowWarps) sum += rows.values[s * stride * rows.depth + c];
  sums.part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < kRowWarps; ++w) sum += sums.part[w][lane];
  centre[c] = sum / static_cast<float>(count);
}

// The exponent of the power of two by which x_i was divided for the estimates of inner products:
// all candidates' is the same, so that a row's scores compare.
__device__ __forceinline__ int packed_exponent(const Rows& rows, int64_t i) {
  return i < rows.candidates ? rows.exponent[i] : exponent_of(__uint_as_float(*rows.largest));
}

// One warp a row: p, u, |d| and r.
template <KnnMetric kMetric>
__global__ void __launch_bounds__(kRowThreads) pack_rows(Rows rows, Estimates estimates) {
  const int64_t i = global_warp();
  if (i >= rows.n) return;
  const int lane = lane_id();
  const float* y = rows.values + i * rows.depth;
  double unit = 1, length = 0, residual = 0, along = 0, middle = 0;
  if constexpr (kMetric == KnnMetric::kInnerProduct)
    unit = ldexp(1.0, rows.exponent[i] - packed_exponent(rows, i));
  for (int64_t c = lane; c < rows.depth; c += kWarp) {
    const double entry = y[c] * unit, centre = estimates.centre[c], d = entry - centre;
    const __half p = __float2half_rn(static_cast<float>(d));
    const double rest = d - static_cast<double>(__half2float(p));
    estimates.packed[i * rows.depth + c] = p;
    length += d * d;
    residual += rest * rest;
    along += entry * centre;
    middle += centre * centre;
  }
  length = warp_sum(length);
  residual = warp_sum(residual);
  along = warp_sum(along);
  middle = warp_sum(middle);
  if (lane != 0) return;
  constexpr double kUp = 1 + 1e-6;  // covers the rounding of these sums and of the casts
  const bool there = rows.present[i];
  const float u =
      static_cast<float>(kMetric == KnnMetric::kEuclidean ? -0.5 * length : along - 0.5 * middle);
  estimates.offset[i] = there ? u : -kNothing;
  estimates.length[i] = there ? static_cast<float>(sqrt(length) * kUp) : 0.0f;
  estimates.residual[i] = there ? static_cast<float>(sqrt(residual) * kUp) : 0.0f;
  if (!there || i < rows.candidates) return;
  atomic_max(&estimates.maxima->offset, fabsf(u));
  atomic_max(&estimates.maxima->length, estimates.length[i]);
  atomic_max(&estimates.maxima->residual, estimates.residual[i]);
}

// Bounds the difference between an estimate and its value, as derived above.
struct Margin {
  double absolute;
  double relative;
  double lowest;   // scores from here down, and from `highest` up, are of values beyond the largest
  double highest;  // float, which all tie

  // The threshold once k candidates reach `score`.
  __device__ float threshold_from(float score) const {
    const double reached = fmin(static_cast<double>(score), highest);
    const double bound = reached - 2 * absolute - relative * (fabs(reached) + absolute);
    if (bound <= lowest) return kAnything;
    return fmaxf(kAnything, nextafterf(static_cast<float>(bound), -kNothing));
  }
};

template <KnnMetric kMetric>
__device__ Margin margin_of(const Rows& rows, const Estimates& estimates, int64_t i) {
  constexpr double kUnit = 1.0 / (1 << 24);
  const int64_t depth = rows.depth;
  const double max_offset = __uint_as_float(estimates.maxima->offset);
  const double max_length = __uint_as_float(estimates.maxima->length);
  const double max_residual = __uint_as_float(estimates.maxima->residual);
  const double length = estimates.length[i], residual = estimates.residual[i];
  const double packed = length + residual, max_packed = max_length + max_residual;
  const double value = 1.01 * kUnit * (kSumChannels + depth / kSumChannels + 8);  // h
  double gamma = static_cast<double>(4 * depth + 8) * kUnit;
  gamma = gamma < 0.04 ? gamma / (1 - gamma) : 1e30;  // beyond, nothing is known: all are redone
  const double rounding = residual * max_length + packed * max_residual;
  const double summing = gamma * packed * max_packed +
                         4 * kUnit * (fabs(static_cast<double>(estimates.offset[i])) + max_offset) +
                         (kMetric == KnnMetric::kCosine ? 1.01 * value : 0) +
                         (kMetric == KnnMetric::kInnerProduct ? value * length * max_length : 0);
  double lost = static_cast<double>(depth) * 0x1p-120, lowest = -HUGE_VAL, highest = HUGE_VAL;
  if constexpr (kMetric == KnnMetric::kEuclidean) {
    const double smallest = 0x1p-149 * scale_of(rows);  // of values, scaled
    lost += smallest * (packed + max_packed + smallest);
    const double largest = 0x1.fffffep127 * scale_of(rows);  // the largest float, scaled
    lowest = -0.5 * (1 - 1e-5) * largest * largest;
  }
  if constexpr (kMetric == KnnMetric::kInnerProduct) {
    const int exponent = exponent_of(__uint_as_float(*rows.largest)) + packed_exponent(rows, i);
    lost += ldexp(1.0, -149 - exponent);
    highest = (1 - 1e-5) * ldexp(0x1.fffffep127, -exponent);
    lowest = -highest;
  }
  return {(rounding + summing + lost) * (1 + 1e-6),
          kMetric == KnnMetric::kEuclidean ? 2.1 * value : 0, lowest, highest};
}

// ---- values ----
//
// The sum over a pair's channels is a tree of two levels, the same for every pair: chains of
// kSumChannels neighbouring channels, each from zero and in their order; then the chains' sums, in
// their order. It is symmetric in x and y. So copies of a row tie exactly, and no tile or thread
// changes a value.

// One more channel of a chain.
template <KnnMetric kMetric>
__device__ __forceinline__ float add_channel(float chain, float x, float y) {
  if constexpr (kMetric == KnnMetric::kEuclidean) {
    const float difference = __fsub_rn(x, y);
    return __fmaf_rn(difference, difference, chain);
  } else {
    return __fmaf_rn(x, y, chain);
  }
}

template <KnnMetric kMetric>
__device__ __forceinline__ float add_channels(float chain, const float4& x, const float4& y) {
  chain = add_channel<kMetric>(chain, x.x, y.x);
  chain = add_channel<kMetric>(chain, x.y, y.y);
  chain = add_channel<kMetric>(chain, x.z, y.z);
  return add_channel<kMetric>(chain, x.w, y.w);
}

constexpr float kSmallSquare = 0x1p-64f;
constexpr float kSmall = 1;  // stands for the value of such a pair: no distance's minus is positive

// What decides, greater is better: the cosine, the inner product, or minus the distance, infinite
// beyond the largest float; kSmall where small_distance must say. `total`: of rows i and j;
// `unscale`: 1 / scale_of(rows).
template <KnnMetric kMetric>
__device__ __forceinline__ float value_of(const Rows& rows, float total, int64_t i, int64_t j,
                                          float unscale) {
  if constexpr (kMetric == KnnMetric::kEuclidean) {
    return total >= kSmallSquare ? -(__fsqrt_rn(total) * unscale) : kSmall;
  } else if constexpr (kMetric == KnnMetric::kInnerProduct) {
    return ldexpf(total, rows.exponent[i] + rows.exponent[j]);
  } else {
    return total;
  }
}

template <KnnMetric kMetric>
__device__ __forceinline__ float unscale_of(const Rows& rows) {
  if constexpr (kMetric == KnnMetric::kEuclidean) return 1 / scale_of(rows);
  return 1;
}

// |x_i - x_j|, of rows that are near for the size of their entries: no difference overflows.
__device__ __forceinline__ float small_distance(const Rows& rows, int64_t i, int64_t j) {
  const float* x = rows.row(i);
  const float* y = rows.row(j);
  double total = 0;
#pragma unroll 1  // rare, and registers are not
  for (int64_t c = 0; c < rows.channels; ++c) {
    const double difference = __fsub_rn(x[c], y[c]);
    total += difference * difference;
  }
  return static_cast<float>(sqrt(total));
}

// A value that decides, from one of value_of.
template <KnnMetric kMetric>
__device__ __forceinline__ float settled(const Rows& rows, float value, int64_t i, int64_t j) {
  return kMetric == KnnMetric::kEuclidean && value > 0 ? -small_distance(rows, i, j) : value;
}

// The value of rows i and j of no more than one chain of channels.
template <KnnMetric kMetric>
__device__ __forceinline__ float pair_value(const Rows& rows, int64_t i, int64_t j, float unscale) {
  const int64_t depth = rows.depth;  // rows are aligned to 16 bytes
  const float4* a = reinterpret_cast<const float4*>(rows.values + i * depth);
  const float4* b = reinterpret_cast<const float4*>(rows.values + j * depth);
  float total = 0;
#pragma unroll 4
  for (int64_t c = 0; c < depth / 4; ++c)
    total = add_channels<kMetric>(total, __ldg(a + c), __ldg(b + c));
  return settled<kMetric>(rows, value_of<kMetric>(rows, total, i, j, unscale), i, j);
}

}  // namespace nefkern::cuda
