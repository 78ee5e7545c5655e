// Scores of all pairs between two blocks of rows, each computed once: of one set, where it is
// inserted in both rows, or of queries and a database.
#pragma once

#include "cpu/knn_pack.h"
#include "cpu/knn_select.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr int kTileVectors = kTileColumns / kLanes;

// One element of row a (same in every lane) times one of 16 rows b, added to `sum`.
inline void multiply_add(Lanes& sum, uint32_t a, const uint32_t* b) {
#if defined(__AVX512BF16__)
  sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                (__m512bh)_mm512_load_si512(b));
#else
  float value;
  std::memcpy(&value, &a, sizeof(value));
  sum += broadcast(value) * load(reinterpret_cast<const float*>(b));
#endif
}

// tile[r][v]: scores of rows i + r of `rows` with the 16 rows from j + 16 v of `columns`.
inline void score_tile(const Panels& rows, const Panels& columns, int64_t i, int64_t j,
                       Lanes (&tile)[kTileRows][kTileVectors]) {
  const uint32_t* a = rows.panel(i) + i % kLanes;
  const uint32_t* b = columns.panel(j);
  const int64_t panel = rows.steps * kLanes;
  Lanes sum[kTileRows][kTileVectors] = {};
  for (int64_t s = 0; s < rows.steps; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v)
        multiply_add(sum[r][v], a[s * kLanes + r], b + v * panel + s * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v)
      tile[r][v] = sum[r][v] +
                   (broadcast(rows.offset[i + r]) + load(columns.offset.data() + j + kLanes * v));
}

// The values that decide, from the unrounded rows. One fixed order of summation, symmetric in the
// two rows: the result doesn't depend on tiles or threads, and copies of a row tie exactly.
struct ExactRows {
  // `i` is a row of the one, `j` of the other, which may be the same.
  ExactRows(const Panels& rows, const Panels& others)
      : a(rows), b(others), metric(rows.metric), scale(double{rows.scale} * others.scale) {
    if (metric == KnnMetric::kCosine) return;
    range.lowest = -(1 - 1e-5) * FLT_MAX * scale * (euclidean() ? 0.5 * FLT_MAX : 1);
    if (euclidean()) {
      relative = 4 * (a.value_gamma() + 8 * 0x1p-24);
    } else {
      range.highest = -range.lowest;
    }
  }

  bool euclidean() const { return metric == KnnMetric::kEuclidean; }

  float value(int32_t i, int32_t j, float) const {
    float result;
    values<1>(i, &j, &result);
    return result;
  }

  // The values of row i with kCount others at once, which share the loads of row i.
  template <int kCount>
  void values(int32_t i, const int32_t* j, float* result) const {
    euclidean() ? values_by<true, kCount>(i, j, result) : values_by<false, kCount>(i, j, result);
  }

  float score(float value) const {
    if (metric == KnnMetric::kCosine) return value;
    if (euclidean()) return static_cast<float>(-0.5 * scale * value * value);
    return static_cast<float>(std::min(value, FLT_MAX) * scale);
  }
  int32_t index(int32_t position) const { return b.index[position]; }

  const Panels& a;
  const Panels& b;
  KnnMetric metric;
  double scale;  // from a squared distance, or an inner product, to a score's
  double relative = 0;
  Range range;

 private:
  template <bool kEuclidean, int kCount>
  void values_by(int32_t i, const int32_t* j, float* result) const {
    const float* x = a.row(i);
    const float* y[kCount];
    for (int n = 0; n < kCount; ++n) y[n] = b.row(j[n]);
    Lanes part[kCount][kParts] = {};
    for (int64_t c = 0; c < a.padded_channels; c += kParts * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < kParts; ++u) {
        const Lanes p = load(x + c + u * kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n) {
          const Lanes q = load(y[n] + c + u * kLanes);
          part[n][u] += kEuclidean ? (p - q) * (p - q) : p * q;
        }
      }
    }
    for (int n = 0; n < kCount; ++n) {
      const float total = sum((part[n][0] + part[n][1]) + (part[n][2] + part[n][3]));
      result[n] = kEuclidean ? -distance(i, j[n], total) : product(i, j[n], total);
    }
  }

  float distance(int32_t i, int32_t j, float square) const {
    if (square >= kSmallSquare && square <= kLargeSquare) return std::sqrt(square);
    return wide_distance(a.input(i), b.input(j), a.channels);
  }
  float product(int32_t i, int32_t j, float total) const {
    return metric == KnnMetric::kCosine ? total
                                        : static_cast<float>(total * (a.power[i] * b.power[j]));
  }

  static constexpr int kParts = 4;
};

// A block of rows that stays in the second-level cache while columns pass by.
inline int64_t cached_rows(const Panels& panels) {
  constexpr int64_t kBytes = 384 << 10;
  return std::max<int64_t>(kTileRows, kBytes / (4 * panels.steps) / kTileRows * kTileRows);
}

class Tiles {
 public:
  Tiles(const Panels& panels, Candidates& candidates, bool include_self, const ExactRows& exact)
      : panels_(panels), candidates_(candidates), include_self_(include_self), exact_(exact) {}

  // All pairs of rows [a, a_end) with rows [b, b_end): the same range, or two apart with a < b.
  void pairs(int64_t a, int64_t a_end, int64_t b, int64_t b_end) const {
    const int64_t block = cached_rows(panels_);
    for (int64_t i_block = a; i_block < a_end; i_block += block) {
      const int64_t i_end = std::min(i_block + block, a_end);
      for (int64_t j = b; j < b_end; j += kTileColumns) {
        if (j + kTileColumns <= i_block) continue;  // the transposed tile has these pairs
        for (int64_t i = i_block; i < std::min(i_end, j + kTileColumns); i += kTileRows) tile(i, j);
      }
    }
  }

 private:
  static constexpr int kValues = 4;  // computed at once

  void tile(int64_t i, int64_t j) const {
    alignas(64) Lanes score[kTileRows][kTileVectors];
    score_tile(panels_, panels_, i, j, score);
    const bool crosses = j < i + kTileRows;  // the diagonal
    if (candidates_.any_crowded(i, i + kTileRows) || candidates_.any_crowded(j, j + kTileColumns))
      return insert_by_value(i, j, score, crosses);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t first = j + v * kLanes;
        insert(i + r, first, score[r][v], passing(i + r, first, score[r][v], crosses));
      }
  }

  // Of row i and the 16 rows from j: who is a candidate for row i, and for whom row i is one.
  struct Passing {
    uint32_t for_i, for_j;
  };

  // Those whose scores reach the thresholds.
  Passing passing(int64_t i, int64_t j, const Lanes& score, bool crosses) const {
    const float* threshold = candidates_.threshold();
    uint32_t for_i = at_least(score, broadcast(threshold[i]));
    uint32_t for_j = at_least(score, load(threshold + j));
    if (crosses) {
      const uint32_t after = i < j ? 0xFFFFu : i - j < kLanes ? 0xFFFEu << (i - j) & 0xFFFFu : 0;
      const uint32_t self = include_self_ && i >= j && i - j < kLanes ? 1u << (i - j) : 0;
      for_i &= after | self;
      for_j &= after;
    }
    return {for_i, for_j};
  }

  void insert(int64_t i, int64_t j, const Lanes& score, Passing passing) const {
    if (passing.for_i && candidates_.append(i, score, static_cast<int32_t>(j), passing.for_i))
      make_room(i);
    const float* lane = reinterpret_cast<const float*>(&score);
    for_each_bit(passing.for_j, [&](int l) {
      if (candidates_.append(j + l, lane[l], static_cast<int32_t>(i))) make_room(j + l);
    });
  }

  // A tile with crowded rows, which take only what comes before their last by value. A value serves
  // both its rows. Few columns at a time: they and the rows stay in the first-level cache.
  __attribute__((noinline)) void insert_by_value(int64_t i, int64_t j,
                                                 const Lanes (&score)[kTileRows][kTileVectors],
                                                 bool crosses) const {
    Passing pass[kTileRows][kTileVectors];
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        pass[r][v] = passing(i + r, j + v * kLanes, score[r][v], crosses);
    for (int c = 0; c < kTileColumns; c += kValues)
      for (int r = 0; r < kTileRows; ++r)
        insert_into_crowded(i + r, j + c, c % kLanes, pass[r][c / kLanes]);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v) insert(i + r, j + v * kLanes, score[r][v], pass[r][v]);
  }

  // Row i and kValues rows from j, which stand at `lane` of the masks: where one is crowded the
  // other is inserted there, and taken out of the mask.
  void insert_into_crowded(int64_t i, int64_t j, int lane, Passing& pass) const {
    const uint32_t here = ((1u << kValues) - 1) << lane;
    const uint32_t for_i = candidates_.crowded(i) ? pass.for_i & here : 0;
    uint32_t for_j = 0;
    for (int n = 0; n < kValues; ++n)
      for_j |= static_cast<uint32_t>(candidates_.crowded(j + n)) << (lane + n);
    for_j &= pass.for_j;
    if (!(for_i | for_j)) return;
    pass.for_i &= ~for_i;
    pass.for_j &= ~for_j;
    int32_t position[kValues];
    float value[kValues];
    for (int n = 0; n < kValues; ++n) position[n] = static_cast<int32_t>(j + n);
    exact_.values<kValues>(static_cast<int32_t>(i), position, value);
    for (int n = 0; n < kValues; ++n) {
      if (for_i >> (lane + n) & 1) insert_value(i, value[n], position[n]);
      if (for_j >> (lane + n) & 1) insert_value(j + n, value[n], static_cast<int32_t>(i));
    }
  }

  void insert_value(int64_t i, float value, int32_t position) const {
    if (sort_key(value, panels_.index[position]) >= candidates_.last(i)) return;
    if (candidates_.append(i, value, position | kValued)) make_room(i);
  }

  __attribute__((noinline)) void make_room(int64_t i) const {
    compact(candidates_.row(i), static_cast<int32_t>(i), candidates_.k(), candidates_.limit(),
            exact_);
  }

  const Panels& panels_;
  Candidates& candidates_;
  bool include_self_;
  const ExactRows& exact_;
};

// Queries against a database: a score is inserted in the query's row alone.
class CrossTiles {
 public:
  CrossTiles(Candidates& candidates, const ExactRows& exact)
      : candidates_(candidates), exact_(exact) {}

  // All pairs of queries [begin, end) with the database.
  void pairs(int64_t begin, int64_t end) const {
    for (int64_t j = 0; j < exact_.b.padded_n; j += kTileColumns)
      for (int64_t i = begin; i < end; i += kTileRows) tile(i, j);
  }

 private:
  static constexpr int kValues = 4;  // computed at once

  void tile(int64_t i, int64_t j) const {
    alignas(64) Lanes score[kTileRows][kTileVectors];
    score_tile(exact_.a, exact_.b, i, j, score);
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const Lanes threshold = broadcast(candidates_.threshold()[i + r]);
        if (const uint32_t mask = at_least(score[r][v], threshold))
          insert(i + r, j + v * kLanes, score[r][v], mask);
      }
  }

  __attribute__((noinline)) void insert(int64_t i, int64_t j, const Lanes& score,
                                        uint32_t mask) const {
    if (candidates_.crowded(i)) return insert_by_value(i, j, mask);
    if (candidates_.append(i, score, static_cast<int32_t>(j), mask)) make_room(i);
  }

  // A crowded row takes only what comes before its last by value.
  void insert_by_value(int64_t i, int64_t j, uint32_t mask) const {
    int32_t position[kValues];
    float value[kValues];
    for (int l = 0; l < kLanes; l += kValues) {
      const uint32_t here = mask >> l & ((1u << kValues) - 1);
      if (!here) continue;
      for (int n = 0; n < kValues; ++n) position[n] = static_cast<int32_t>(j + l + n);
      exact_.values<kValues>(static_cast<int32_t>(i), position, value);
      for_each_bit(here, [&](int n) {
        if (sort_key(value[n], exact_.index(position[n])) >= candidates_.last(i)) return;
        if (candidates_.append(i, value[n], position[n] | kValued)) make_room(i);
      });
    }
  }

  void make_room(int64_t i) const {
    compact(candidates_.row(i), static_cast<int32_t>(i), candidates_.k(), candidates_.limit(),
            exact_);
  }

  Candidates& candidates_;
  const ExactRows& exact_;
};

}  // namespace nefkern::cpu::NEFKERN_ISA
