// Candidate buffers: every row keeps the candidates that may still be among its k best, and a
// threshold that nearly all others fail.
//
// A candidate comes with a *score*: an estimate, greater is better, of the *value* that decides.
// `margin` bounds the difference for all pairs of a row (proof in knn_pack.h). Let s be a score
// that at least k candidates reach. Their exact scores are at least s - margin, so the k-th best
// exact score is too, and whoever is to be among the k best has an estimate of at least s - 2
// margin: candidates below are dropped, and so is every later one. `relative` covers the rounding
// of the value itself where it is no plain sum (the square root of the distance).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/knn_lanes.h"
#include "cpu/knn_memory.h"
#include "cpu/knn_sort.h"

namespace nefkern::cpu::NEFKERN_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();  // threshold of a row left out
constexpr float kLowest = -FLT_MAX;
constexpr uint64_t kNobody = ~uint64_t{0};  // a key that every candidate's comes before
constexpr int32_t kValued = INT32_MIN;      // bit of a position: the score is the value itself

// One row's buffer: scores and positions of its candidates, in no order; and, once the row is
// crowded, the key of its last: see keep_best.
struct Row {
  float* score;
  int32_t* position;
  int32_t* count;
  float* threshold;
  uint64_t* last;
  float margin;

  bool crowded() const { return *last != kNobody; }
};

inline void append(const Row& row, float score, int32_t position) {
  const int32_t at = (*row.count)++;
  row.score[at] = score;
  row.position[at] = position;
}

// Writes the lanes of `mask`, in order, and how many they were. Touches a whole vector.
inline int32_t append_lanes(float* scores, int32_t* positions, const Lanes& score,
                            int32_t first_position, uint32_t mask) {
#if defined(__AVX512F__)
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first_position), iota);
  const __mmask16 m = static_cast<__mmask16>(mask);
  _mm512_storeu_ps(scores, _mm512_maskz_compress_ps(m, (__m512)score));
  _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(m, position));
#else
  int at = 0;
  for_each_bit(mask, [&](int l) {
    scores[at] = score[l];
    positions[at++] = first_position + l;
  });
#endif
  return __builtin_popcount(mask);
}

class Candidates {
 public:
  // At most this many candidates a row, whatever the input.
  static int64_t capacity(int64_t k, int64_t n) {
    return round_up(std::min(2 * k, n) + 96, kLanes);
  }

  Candidates(int64_t rows, int64_t k, int64_t n)
      : k_(k),
        capacity_(capacity(k, n)),
        score_(rows * capacity_),
        position_(rows * capacity_),
        count_(rows),
        threshold_(rows),
        margin_(rows),
        last_(rows) {}

  void reset(int64_t row, float threshold, float margin) {
    count_[row] = 0;
    threshold_[row] = threshold;
    margin_[row] = margin;
    last_[row] = kNobody;
  }

  int64_t k() const { return k_; }
  int64_t capacity() const { return capacity_; }
  int64_t limit() const { return capacity_ - kLanes; }  // room for one more vector of candidates
  const float* threshold() const { return threshold_.data(); }
  Row row(int64_t i) {
    return {score_.data() + i * capacity_,
            position_.data() + i * capacity_,
            &count_[i],
            &threshold_[i],
            &last_[i],
            margin_[i]};
  }

  uint64_t last(int64_t i) const { return last_[i]; }
  bool crowded(int64_t i) const { return last_[i] != kNobody; }
  bool any_crowded(int64_t begin, int64_t end) const {
    uint64_t all = kNobody;
    for (int64_t i = begin; i < end; ++i) all &= last_[i];
    return all != kNobody;
  }

  // Append to a row; true when that fills its buffer.
  bool append(int64_t i, float score, int32_t position) {
    const int32_t at = count_[i]++;
    score_[i * capacity_ + at] = score;
    position_[i * capacity_ + at] = position;
    return at + 1 > limit();
  }
  bool append(int64_t i, const Lanes& score, int32_t first_position, uint32_t mask) {
    const int64_t at = i * capacity_ + count_[i];
    count_[i] +=
        append_lanes(score_.data() + at, position_.data() + at, score, first_position, mask);
    return count_[i] > limit();
  }

 private:
  int64_t k_, capacity_;
  Array<float> score_;
  Array<int32_t> position_;
  Array<int32_t> count_;
  Array<float> threshold_, margin_;
  Array<uint64_t> last_;
};

inline int32_t count_at_least(const float* score, int32_t count, float bound) {
  int32_t found = 0;
  const Lanes bounds = broadcast(bound);
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    found += __builtin_popcount(at_least(load(score + i), bounds));
  for (; i < count; ++i) found += score[i] >= bound;
  return found;
}

// A score that at least k and, where the scores allow, not many more than k candidates reach.
// Bisection: a pass over the scores costs less than one step of a partition around a pivot does.
inline float about_kth(const float* score, int32_t count, int64_t k) {
  float low = score[0], high = score[0];
  for (int32_t i = 1; i < count; ++i) {
    low = std::min(low, score[i]);
    high = std::max(high, score[i]);
  }
  const int64_t enough = k + k / 32;
  for (int step = 0; step < 24; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    if (middle <= low || middle >= high) break;
    const int32_t reached = count_at_least(score, count, middle);
    if (reached < k) {
      high = middle;
    } else {
      low = middle;
      if (reached <= enough) break;
    }
  }
  return low;
}

// Drops the candidates below `bound`, keeping the order of the others.
inline void keep_at_least(const Row& row, float bound) {
  const int32_t count = *row.count;
  const Lanes bounds = broadcast(bound);
  *row.count = 0;
  for (int32_t i = 0; i < count; i += kLanes) {
    const uint32_t inside = i + kLanes <= count ? 0xFFFFu : (1u << (count - i)) - 1;
    const Lanes score = load(row.score + i);
    const uint32_t mask = at_least(score, bounds) & inside;
#if defined(__AVX512F__)
    const __mmask16 m = static_cast<__mmask16>(mask);
    const __m512i position = _mm512_loadu_si512(row.position + i);
    _mm512_storeu_ps(row.score + *row.count, _mm512_maskz_compress_ps(m, (__m512)score));
    _mm512_storeu_si512(row.position + *row.count, _mm512_maskz_compress_epi32(m, position));
    *row.count += __builtin_popcount(mask);
#else
    for_each_bit(mask, [&](int l) { append(row, score[l], row.position[i + l]); });
#endif
  }
}

// The scores at which values leave the range of float32. Beyond, all tie, whatever their scores.
struct Range {
  double lowest = -HUGE_VAL, highest = HUGE_VAL;
};

// The threshold once k candidates reach `score`.
inline float threshold_from(float score, float margin, double relative, const Range& range) {
  double bound = score - 2.0 * margin - relative * (std::abs(double{score}) + margin);
  if (bound <= range.lowest) return kLowest;
  bound = std::min(bound, range.highest - margin);
  return std::max(kLowest, std::nextafterf(static_cast<float>(bound), -kInfinity));
}

// Keeps the k best candidates by their values: where too many estimates lie near the k-th. From
// then on the row is *crowded*: it holds values instead of scores where the position says so, and
// who comes later must come before the last of these k by value, lest the row be full again at
// once. `Exact` knows the values:
//   float value(int32_t row, int32_t position, float score)   what decides, greater is better
//   float score(float value)                                  the same as a score
//   int32_t index(int32_t position)                           breaks ties, lower first
//   double relative; Range range
template <class Exact>
__attribute__((noinline)) void keep_best(const Row& row, int32_t i, int64_t k, const Exact& exact) {
  struct Entry {
    uint64_t key;
    int32_t position;
  };
  const int32_t count = *row.count;
  Array<Entry> entries(count);
  for (int32_t c = 0; c < count; ++c) {
    const int32_t position = row.position[c] & ~kValued;
    const float value =
        row.position[c] & kValued ? row.score[c] : exact.value(i, position, row.score[c]);
    entries[c] = {sort_key(value, exact.index(position)), position};
  }
  std::nth_element(entries.data(), entries.data() + (k - 1), entries.data() + count,
                   [](const Entry& a, const Entry& b) { return a.key < b.key; });
  *row.count = 0;
  for (int64_t c = 0; c < k; ++c)
    append(row, key_value(entries[c].key), entries[c].position | kValued);
  *row.last = entries[k - 1].key;
  const float kth = exact.score(key_value(*row.last));
  *row.threshold =
      std::max(*row.threshold, threshold_from(kth, row.margin, exact.relative, exact.range));
}

// Makes room in a full buffer.
template <class Exact>
void compact(const Row& row, int32_t i, int64_t k, int64_t limit, const Exact& exact) {
  if (!row.crowded()) {
    const float bound = threshold_from(about_kth(row.score, *row.count, k), row.margin,
                                       exact.relative, exact.range);
    *row.threshold = std::max(*row.threshold, bound);
    keep_at_least(row, *row.threshold);
    if (*row.count <= (k + limit) / 2 + 1) return;
  }
  keep_best(row, i, k, exact);
}

// Drops what can no longer be among the k best, now that all candidates were seen. True where the
// values of those left are known and stand in place of their scores.
template <class Exact>
bool settle(const Row& row, int32_t i, int64_t k, const Exact& exact) {
  if (row.crowded()) {
    keep_best(row, i, k, exact);
    for (int32_t c = 0; c < *row.count; ++c) row.position[c] &= ~kValued;
    return true;
  }
  if (*row.count > k)
    keep_at_least(row, threshold_from(about_kth(row.score, *row.count, k), row.margin,
                                      exact.relative, exact.range));
  return false;
}

}  // namespace nefkern::cpu::NEFKERN_ISA
