// With H the symmetric part of the gradient, s = d^(-1/2), p_i = sum_j a_ij s_i s_j H_ij / d_i, an
// edge e from i to j that a_ij takes the share c_e of has the gradient
//     c_e (2 H_ij s_i s_j - p_i - p_j) .
// All sums run over a node's stored row, in order and in double, so that no thread changes them:
// what node i gives j is first written to the place (i, j). Sums then need the transposed places
// (j, i). In a symmetric structure these are found without a search: whoever walks the rows in
// order meets those of row j in order, so one cursor a row is enough.
#include "cpu/normalized_adjacency_backward.h"

#include <algorithm>
#include <cmath>

#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

using Args = AdjacencyBackwardArgs;

// f(piece, worker) says whether all was well; so does this.
template <class F>
bool all_pieces(int64_t pieces, int64_t workers, const F& f) {
  std::atomic<bool> valid{true};
  for_each_piece(pieces, workers, [&](int64_t piece, int64_t worker) {
    if (!f(piece, worker)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

// The same of f(row, worker), for all rows.
template <class F>
bool for_each_row(const Args& args, const F& f) {
  constexpr int64_t kRowsAPiece = 64;
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  return all_pieces(pieces, args.workers, [&](int64_t piece, int64_t worker) {
    const int64_t begin = piece * kRowsAPiece;
    bool good = true;
    for (int64_t i = begin; i < begin + kRowsAPiece && i < args.num_nodes; ++i)
      good &= f(i, worker);
    return good;
  });
}

// ---- a row's listed edges and their places ----

// The places of one row by column. What other rows left there is told apart by a look at the
// column.
class RowPlaces {
 public:
  RowPlaces(const Args& args, int64_t row, int64_t worker)
      : local_(args.local + worker * args.num_nodes),
        columns_(args.columns + args.row_offsets[row]),
        begin_(args.row_offsets[row]),
        size_(args.row_offsets[row + 1] - begin_) {}

  // False if a column is none.
  bool enter(int64_t num_nodes) {
    bool good = true;
    for (int64_t e = 0; e < size_; ++e) {
      const bool inside = static_cast<uint32_t>(columns_[e]) < static_cast<uint64_t>(num_nodes);
      if (inside) local_[columns_[e]] = static_cast<int32_t>(e);
      good &= inside;
    }
    return good;
  }

  // Where the row stores this node, or -1.
  int64_t of(int64_t node) const {
    const int64_t e = local_[node];
    return e < size_ && columns_[e] == node ? begin_ + e : -1;
  }

 private:
  int32_t* local_;
  const int32_t* columns_;
  int64_t begin_, size_;
};

// f(slot, node, clamped weight, whether the weight passed the clamp) for every edge of a row;
// padding and weight 0 are left out. False if a node is none, or f says so.
template <class Index, class F>
bool for_each_edge(const Args& args, int64_t row, const F& f) {
  // Copies: f's stores might be to `args` for all that the compiler knows.
  const int64_t size = args.lists.size, num_nodes = args.num_nodes;
  const float clamp_min = args.lists.clamp_min;
  const auto* nodes = static_cast<const Index*>(args.lists.indices) + row * size;
  const float* weights = args.lists.weights + row * size;
  bool good = true;
  for (int64_t slot = 0; slot < size; ++slot) {
    const int64_t node = nodes[slot];
    const bool passed = weights[slot] >= clamp_min;
    const float weight = passed ? weights[slot] : clamp_min;
    good &= node < num_nodes;
    if (node >= 0 && node < num_nodes && weight > 0) good &= f(slot, node, weight, passed);
  }
  return good;
}

// Stores a row's places.
template <class Index>
bool store_row(const Args& args, int64_t row, int64_t worker) {
  RowPlaces places(args, row, worker);
  if (!places.enter(args.num_nodes)) return false;
  for (int64_t e = args.row_offsets[row]; e < args.row_offsets[row + 1]; ++e)
    args.stored[e] = {0, 0, args.gradient[e], args.columns[e]};
  StoredPlace* stored = args.stored;
  return for_each_edge<Index>(args, row, [&](int64_t, int64_t node, float weight, bool) {
    const int64_t e = places.of(node);
    if (e < 0) return false;
    const StoredPlace before = stored[e];
    const int32_t times = weight > before.weight ? 1 : before.times + (weight == before.weight);
    stored[e].weight = std::max(weight, before.weight);
    stored[e].times = times;
    return true;
  });
}

// ---- sums over rows ----

MergedPlace merge(const StoredPlace& own, const StoredPlace& other, bool take_union) {
  const float h = static_cast<float>(0.5 * (static_cast<double>(own.gradient) + other.gradient));
  if (!take_union)
    return {0.5 * (static_cast<double>(own.weight) + other.weight), h, 2 * own.times};
  const bool loses = own.weight < other.weight, ties = own.weight == other.weight;
  return {std::max(own.weight, other.weight), h, loses ? 0 : own.times + (ties ? other.times : 0)};
}

constexpr int64_t kAhead = 16;  // places whose transposed ones are on their way

// Joins every place of a part of the rows with its transposed one, and finds the rows' scales.
// False if the structure is not symmetric.
bool merge_part(const Args& args, int64_t part, int64_t worker) {
  const int64_t n = args.num_nodes, first = part_begin(n, args.workers, part);
  int64_t* cursors = args.cursors + worker * n;
  for (int64_t j = 0; j < n; ++j)
    cursors[j] = std::lower_bound(args.columns + args.row_offsets[j],
                                  args.columns + args.row_offsets[j + 1], first) -
                 args.columns;
  for (int64_t i = first; i < part_begin(n, args.workers, part + 1); ++i) {
    double degree = 0;
    const int64_t end = args.row_offsets[i + 1];
    for (int64_t e = args.row_offsets[i]; e < end; ++e) {
      if (e + kAhead < end) __builtin_prefetch(args.stored + cursors[args.columns[e + kAhead]]);
      const StoredPlace& own = args.stored[e];
      const int64_t mirror = cursors[own.column]++;
      if (mirror >= args.row_offsets[own.column + 1]) return false;
      const StoredPlace& other = args.stored[mirror];
      if (other.column != i) return false;
      args.merged[e] = merge(own, other, args.take_union);
      degree += args.merged[e].entry;
    }
    args.scale[i] = degree > 0 ? 1 / std::sqrt(degree) : 1;
  }
  return true;
}

void find_pull(const Args& args, int64_t i) {
  double sum = 0;
  for (int64_t e = args.row_offsets[i]; e < args.row_offsets[i + 1]; ++e) {
    const MergedPlace& place = args.merged[e];
    // Where only the pixel graph has an entry the gradient may be anything.
    sum += place.entry > 0 ? place.entry * args.scale[args.columns[e]] * place.symmetric : 0;
  }
  args.pull[i] = sum * args.scale[i] * args.scale[i] * args.scale[i];
}

// ---- weights ----

template <class Index>
void write_row(const Args& args, int64_t row, int64_t worker) {
  RowPlaces places(args, row, worker);
  places.enter(args.num_nodes);
  float* found = args.weights_gradient + row * args.lists.size;
  std::fill_n(found, args.lists.size, 0.0f);
  const StoredPlace* stored = args.stored;
  const MergedPlace* merged = args.merged;
  const double *scale = args.scale, *pull = args.pull, own_scale = scale[row], own_pull = pull[row];
  for_each_edge<Index>(args, row, [&](int64_t slot, int64_t node, float weight, bool passed) {
    const int64_t e = places.of(node);
    const MergedPlace& place = merged[e];
    if (!passed || weight != stored[e].weight || place.sharers == 0) return true;
    const double slope = place.symmetric * (own_scale * scale[node]);
    found[slot] = static_cast<float>((2 * slope - own_pull - pull[node]) / place.sharers);
    return true;
  });
}

template <class Index>
bool backward(const Args& args) {
  std::fill_n(args.local, args.workers * args.num_nodes, 0);
  return for_each_row(args, [&](int64_t i, int64_t w) { return store_row<Index>(args, i, w); }) &&
         all_pieces(args.workers, args.workers,
                    [&](int64_t part, int64_t w) { return merge_part(args, part, w); }) &&
         for_each_row(args, [&](int64_t i, int64_t) { return find_pull(args, i), true; }) &&
         for_each_row(args,
                      [&](int64_t i, int64_t w) { return write_row<Index>(args, i, w), true; });
}

}  // namespace

bool adjacency_backward(const AdjacencyBackwardArgs& args) {
  return args.lists.wide_indices ? backward<int64_t>(args) : backward<int32_t>(args);
}

}  // namespace nefkern::cpu::NEFKERN_ISA
