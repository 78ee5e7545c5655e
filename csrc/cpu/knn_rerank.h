// From estimates to results: the values of the candidates that are left, sorted.
//
// A candidate's value needs two whole rows, and one after another they would come from main memory:
// N k rows of 4 C bytes. So a block of rows meets the candidates block by block, both in the
// second-level cache.
#pragma once

#include "cpu/knn_select.h"
#include "cpu/knn_sort.h"
#include "cpu/knn_tile.h"

namespace nefkern::cpu::NEFKERN_ISA {

class Rerank {
 public:
  Rerank(const ExactRows& exact, Candidates& candidates)
      : exact_(exact),
        candidates_(candidates),
        step_(rows_in(kStepBytes)),
        scratch_(candidates.capacity()),
        begin_(exact.b.padded_n / step_ + 2),
        next_(rows_in(kBlockBytes)) {}

  int64_t block() const { return rows_in(kBlockBytes); }

  // Replaces the scores of all candidates of at most block() rows by their values.
  void values(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Row row = candidates_.row(i);
      const bool known = settle(row, static_cast<int32_t>(i), candidates_.k(), exact_);
      next_[i - first] = known ? *row.count : 0;
      if (!known) order(row);
    }
    for (int64_t end = step_; end < exact_.b.n + step_; end += step_) {
      for (int64_t i = first; i < last; ++i) {
        const Row row = candidates_.row(i);
        int32_t c = next_[i - first];
        const int32_t self = static_cast<int32_t>(i);
        for (; c + 1 < *row.count && row.position[c + 1] < end; c += 2)
          exact_.values<2>(self, row.position + c, row.score + c);
        if (c < *row.count && row.position[c] < end) {
          row.score[c] = exact_.value(self, row.position[c], 0);
          ++c;
        }
        next_[i - first] = c;
      }
    }
  }

 private:
  static constexpr int64_t kBlockBytes = 384 << 10, kStepBytes = 256 << 10;

  int64_t rows_in(int64_t bytes) const {
    return std::max<int64_t>(16, bytes / 4 / exact_.b.padded_channels);
  }

  // Counting sort of a row's positions by their block.
  void order(const Row& row) {
    const int64_t blocks = exact_.b.padded_n / step_ + 1;
    const uint32_t step = static_cast<uint32_t>(step_);
    std::fill(begin_.data(), begin_.data() + blocks + 1, 0);
    for (int32_t c = 0; c < *row.count; ++c)
      ++begin_[static_cast<uint32_t>(row.position[c]) / step + 1];
    for (int64_t b = 0; b < blocks; ++b) begin_[b + 1] += begin_[b];
    for (int32_t c = 0; c < *row.count; ++c)
      scratch_[begin_[static_cast<uint32_t>(row.position[c]) / step]++] = row.position[c];
    std::copy(scratch_.data(), scratch_.data() + *row.count, row.position);
  }

  const ExactRows& exact_;
  Candidates& candidates_;
  int64_t step_;
  Array<int32_t> scratch_, begin_, next_;
};

}  // namespace nefkern::cpu::NEFKERN_ISA
