// Row i of A + A^T is the union of node i's own list and of the lists that name i. The latter come
// from a counting sort by column (the transposition); the union from a map with one byte a node,
// read out in order, so that neither lists nor rows are ever sorted by comparison. The inner loops
// have no branch that depends on the data: a mispredicted one costs as much as five edges.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/neighbour_lists.h"
#include "cpu/tiles.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

constexpr int64_t kRowsAPiece = 64;
constexpr int64_t kWord = 64;    // nodes looked at in one step of reading a row out
constexpr int64_t kBlock = 512;  // nodes that one summary byte stands for
constexpr int64_t kAtOnce = 4;   // entries written without asking whether they exist

// Node `row`'s own list; a null weight array stands for weight 1.
template <class Index>
struct List {
  const Index* nodes;
  const float* weights;
  int64_t size;
  float clamp_min;

  List(const NeighbourLists& lists, int64_t row)
      : nodes(static_cast<const Index*>(lists.indices) + row * lists.size),
        weights(lists.weights ? lists.weights + row * lists.size : nullptr),
        size(lists.size),
        clamp_min(lists.clamp_min) {}

  // f(node, clamped weight) for every edge: padding and weight 0 are left out, a NaN is not.
  template <class F>
  void for_each_edge(const F& f) const {
    if (!weights) {
      for (int64_t slot = 0; slot < size; ++slot)
        if (nodes[slot] >= 0) f(static_cast<int64_t>(nodes[slot]), 1.0f);
      return;
    }
    for (int64_t slot = 0; slot < size; ++slot) {
      const float weight = weights[slot] < clamp_min ? clamp_min : weights[slot];
      // Without a sign, a NaN's too: kappa has a use for the sign.
      if (nodes[slot] >= 0 && !(weight <= 0))
        f(static_cast<int64_t>(nodes[slot]), std::fabs(weight));
    }
  }

  // Whether all nodes are -1 to num_nodes - 1.
  bool valid(int64_t num_nodes) const {
    bool good = true;
    for (int64_t slot = 0; slot < size; ++slot)
      good &= nodes[slot] >= -1 && nodes[slot] < num_nodes;
    return good;
  }
};

inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// ---- transposition: a counting sort, each part of the rows writing to places of its own ----

// Counts part `p`'s edges into every node; false if an index is out of range.
template <class Index>
bool count_part(const RowWorkspace& space, const NeighbourLists& lists, int64_t p) {
  int64_t* counts = space.cursors + p * space.num_nodes;
  std::fill_n(counts, space.num_nodes, int64_t{0});
  const int64_t end = part_begin(space.num_nodes, space.workers, p + 1);
  for (int64_t row = part_begin(space.num_nodes, space.workers, p); row < end; ++row) {
    const List<Index> list(lists, row);
    if (!list.valid(space.num_nodes)) return false;
    list.for_each_edge([&](int64_t node, float) { ++counts[node]; });
  }
  return true;
}

// Counts to places: edges into node 0 from part 0, from part 1, ..., then those into node 1.
void counts_to_cursors(const RowWorkspace& space, const NeighbourLists& lists) {
  int64_t place = 0;
  for (int64_t node = 0; node < space.num_nodes; ++node) {
    lists.incoming_offsets[node] = place;
    for (int64_t p = 0; p < space.workers; ++p) {
      const int64_t count = space.cursors[p * space.num_nodes + node];
      space.cursors[p * space.num_nodes + node] = place;
      place += count;
    }
  }
  lists.incoming_offsets[space.num_nodes] = place;
}

template <class Index>
void scatter_part(const RowWorkspace& space, const NeighbourLists& lists, int64_t p) {
  int64_t* cursors = space.cursors + p * space.num_nodes;
  const int64_t end = part_begin(space.num_nodes, space.workers, p + 1);
  for (int64_t row = part_begin(space.num_nodes, space.workers, p); row < end; ++row)
    List<Index>(lists, row).for_each_edge([&](int64_t node, float weight) {
      lists.incoming[cursors[node]++] = {static_cast<int32_t>(row), weight};
    });
}

template <class Index>
bool transpose_lists(const RowWorkspace& space, const NeighbourLists& lists) {
  std::atomic<bool> valid{true};
  for_each_piece(space.workers, space.workers, [&](int64_t p, int64_t) {
    if (!count_part<Index>(space, lists, p)) valid.store(false, std::memory_order_relaxed);
  });
  if (!valid.load()) return false;
  counts_to_cursors(space, lists);
  for_each_piece(space.workers, space.workers,
                 [&](int64_t p, int64_t) { scatter_part<Index>(space, lists, p); });
  return true;
}

// ---- a row as a map of bytes ----

// A byte that, unlike uint8_t, aliases nothing else: pointers stay in registers across its stores.
enum class Flag : uint8_t { kNo, kYes };

inline int64_t round_up_to_word(int64_t n) { return (n + kWord - 1) / kWord * kWord; }

// One bit for each of 64 flags.
inline uint64_t bits_of(const Flag* bytes) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
#else
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, sizeof eight);
    bits |= (eight * 0x0102040810204080u >> 56) << (8 * i);  // gathers the lowest bits
  }
  return bits;
#endif
}

// A worker's row: which nodes it has, and their weights. Empty between rows: all zeros.
class Row {
 public:
  Row(const RowWorkspace& space, int64_t worker)
      : blocks_((space.num_nodes + kBlock - 1) / kBlock),
        touched_(reinterpret_cast<Flag*>(space.maps) + worker * row_map_bytes(space.num_nodes)),
        has_(touched_ + round_up_to_word(blocks_)),
        weights_(space.dense + worker * row_dense_floats(space.num_nodes)),
        columns_(reinterpret_cast<int32_t*>(weights_ + blocks_ * kBlock + kWord)),
        values_(weights_ + 2 * (blocks_ * kBlock + kWord)) {}

  void insert(int64_t node) {
    has_[node] = Flag::kYes;
    touched_[node / kBlock] = Flag::kYes;
  }
  float& weight(int64_t node) { return weights_[node]; }

  // The number of nodes that are new: 1 or 0. The map is cleared by remove() for all of them.
  int64_t insert_new(int64_t node) {
    const int64_t is_new = has_[node] == Flag::kNo;
    has_[node] = Flag::kYes;
    return is_new;
  }
  void remove(int64_t node) { has_[node] = Flag::kNo; }

  // f(first node, bits) for every word of nodes that may have bits, ascending; clears the map.
  template <class F>
  void drain(const F& f) {
    for (int64_t word = 0; word < round_up_to_word(blocks_); word += kWord) {
      uint64_t blocks = bits_of(touched_ + word);
      std::memset(touched_ + word, 0, kWord);
      for (; blocks; blocks &= blocks - 1) {
        const int64_t begin = (word + __builtin_ctzll(blocks)) * kBlock;
        for (int64_t first = begin; first < begin + kBlock; first += kWord) {
          const uint64_t bits = bits_of(has_ + first);
          std::memset(has_ + first, 0, kWord);
          f(first, bits);
        }
      }
    }
  }

  // Moves the row's entries to columns() and values() in ascending order; returns their number.
  int64_t drain_entries() {
    int64_t place = 0;
    drain([&](int64_t first, uint64_t bits) { place += take_word(first, bits, place); });
    return place;
  }
  const int32_t* columns() const { return columns_; }
  const float* values() const { return values_; }

 private:
  // Moves a word's entries to `place`; returns their number. What is written beyond them is
  // overwritten by the next word or never read.
  int64_t take_word(int64_t first, uint64_t bits, int64_t place) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t begin = place;
    for (int64_t quarter = 0; quarter < kWord; quarter += 16, bits >>= 16) {
      const auto mask = static_cast<__mmask16>(bits);
      const __m512i nodes = _mm512_add_epi32(lanes, _mm512_set1_epi32(first + quarter));
      float* weights = weights_ + first + quarter;
      _mm512_storeu_si512(columns_ + place, _mm512_maskz_compress_epi32(mask, nodes));
      _mm512_storeu_ps(values_ + place, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(weights)));
      _mm512_storeu_ps(weights, _mm512_setzero_ps());
      place += __builtin_popcount(mask);
    }
    return place - begin;
#else
    const int64_t count = __builtin_popcountll(bits);
    float nowhere;
    for (int64_t done = 0; done < count; done += kAtOnce)
      for (int64_t i = done; i < done + kAtOnce; ++i) {
        const int64_t node = first + (bits ? __builtin_ctzll(bits) : kWord);
        columns_[place + i] = static_cast<int32_t>(node);
        values_[place + i] = weights_[node];
        *(bits ? weights_ + node : &nowhere) = 0;
        bits &= bits - 1;
      }
    return count;
#endif
  }

  int64_t blocks_;
  Flag* touched_;
  Flag* has_;
  float* weights_;
  int32_t* columns_;
  float* values_;
};

// f(node) for every edge out of and into node i.
template <class Index, class F>
void for_each_neighbour(const NeighbourLists& lists, int64_t i, const F& f) {
  List<Index>(lists, i).for_each_edge([&](int64_t node, float) { f(node); });
  for (int64_t e = lists.incoming_offsets[i]; e < lists.incoming_offsets[i + 1]; ++e)
    f(static_cast<int64_t>(lists.incoming[e].row));
}

// The number of nodes that row i has in the union of all `lists`.
template <class Index, class... Lists>
int64_t count_row(Row& row, int64_t i, const Lists&... lists) {
  int64_t size = 0;
  const auto insert = [&](int64_t node) { size += row.insert_new(node); };
  const auto remove = [&](int64_t node) { row.remove(node); };
  (for_each_neighbour<Index>(lists, i, insert), ...);
  (for_each_neighbour<Index>(lists, i, remove), ...);
  return size;
}

// A row is kept as A + A^T: exact for the smallest weights, too, whose halves are not. Where a sum
// overflows, as only sums of the largest do, all rows are collected again with half of every
// weight, which does not change the normalised matrix.
enum class Unit { kWhole, kHalf };

inline float in_unit(float weight, Unit unit) {
  return unit == Unit::kWhole ? weight : std::max(0.5f * weight, 0x1p-149f);  // none becomes 0
}

// Collects row i of A + A^T, in `unit`, or of max(A, A^T).
template <class Index, bool kUnion>
void collect_row(const NeighbourLists& lists, Row& row, int64_t i, Unit unit) {
  List<Index>(lists, i).for_each_edge([&](int64_t node, float weight) {
    row.insert(node);
    row.weight(node) = larger(row.weight(node), in_unit(weight, unit));
  });
  const int64_t end = lists.incoming_offsets[i + 1];
  for (int64_t e = lists.incoming_offsets[i]; e < end; ++e) {
    const int32_t node = lists.incoming[e].row;
    float weight = lists.incoming[e].weight;
    while (e + 1 < end && lists.incoming[e + 1].row == node)  // listed twice by the same node
      weight = larger(weight, lists.incoming[++e].weight);
    weight = in_unit(weight, unit);
    row.insert(node);
    row.weight(node) = kUnion ? larger(row.weight(node), weight) : row.weight(node) + weight;
  }
}

// Σ |value| in double: to float32 it is exact, whatever the order.
inline double sum_of_magnitudes(const float* values, int64_t size) {
  double sums[8] = {};
  int64_t e = 0;
  for (; e + 8 <= size; e += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += std::fabs(values[e + lane]);
  for (int lane = 0; e < size; ++e, ++lane) sums[lane] += std::fabs(values[e]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Of an entry: a d_i^(-1/2) d_j^(-1/2). The product of two scales has no place in float32 where
// weights are far from 1; in double it is exact, and the same for (j, i).
inline float normalized(double a, float scale_i, float scale_j) {
  return static_cast<float>(a * (double{scale_i} * scale_j));
}

// d^(-1/2) of a row whose entries add up to `degree`.
inline float inverse_root(double degree) { return static_cast<float>(1 / std::sqrt(degree)); }

// f(row workspace, row) for all rows, in parallel.
template <class F>
void for_each_row(const RowWorkspace& space, const F& f) {
  const int64_t pieces = (space.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  for_each_piece(pieces, space.workers, [&](int64_t piece, int64_t worker) {
    Row row(space, worker);
    const int64_t begin = piece * kRowsAPiece;
    for (int64_t i = begin; i < begin + kRowsAPiece && i < space.num_nodes; ++i) f(row, i);
  });
}

// fill(unit, row workspace, row) for all rows, which returns whether the row's degree is finite;
// with half of the weights where one is not.
template <class F>
void fill_rows(const RowWorkspace& space, const F& fill) {
  for (const Unit unit : {Unit::kWhole, Unit::kHalf}) {
    std::atomic<bool> finite{true};
    for_each_row(space, [&](Row& row, int64_t i) {
      if (!fill(unit, row, i)) finite.store(false, std::memory_order_relaxed);
    });
    if (finite.load()) return;
  }
}

// Row offsets from the sizes that size(row workspace, row) tells.
template <class F>
void count_rows(const RowWorkspace& space, int64_t* row_offsets, const F& size) {
  for_each_row(space, [&](Row& row, int64_t i) { row_offsets[i + 1] = size(row, i); });
  row_offsets[0] = 0;
  for (int64_t i = 0; i < space.num_nodes; ++i) row_offsets[i + 1] += row_offsets[i];
}

inline void clear(const RowWorkspace& space) {
  std::fill_n(space.maps, space.workers * row_map_bytes(space.num_nodes), uint8_t{0});
  std::fill_n(space.dense, space.workers * row_dense_floats(space.num_nodes), 0.0f);
}

}  // namespace
}  // namespace nefkern::cpu::NEFKERN_ISA
