// Row i of A + A^T is the union of node i's own list and of the lists that name i. The latter come
// from a counting sort by column (the transposition); the union from a bitmap with one bit a node,
// read out in order, so that neither lists nor rows are ever sorted by comparison.
#include "cpu/normalized_adjacency.h"

#include <cmath>
#include <cstring>

#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

constexpr int64_t kRowsAPiece = 64;
constexpr int64_t kBlock = 4096;  // nodes a summary byte stands for

// The clamped weight of list entry `slot`; 0 says that the edge is dropped, a NaN is kept.
inline float edge_weight(const AdjacencyArgs& args, int64_t slot) {
  if (!args.weights) return 1.0f;
  const float weight = args.weights[slot];
  return weight < args.clamp_min ? args.clamp_min : weight;
}

inline float larger(float a, float b) { return b > a || b != b ? b : a; }

template <class Index>
inline const Index* list_of(const AdjacencyArgs& args, int64_t row) {
  return static_cast<const Index*>(args.indices) + row * args.list_size;
}

// ---- transposition: a counting sort, each part of the rows writing to places of its own ----

// Counts part `p`'s edges into every node; false if an index is out of range.
template <class Index>
bool count_part(const AdjacencyArgs& args, int64_t p) {
  int64_t* counts = args.cursors + p * args.num_nodes;
  std::memset(counts, 0, static_cast<size_t>(args.num_nodes) * sizeof *counts);
  bool valid = true;
  const int64_t end = part_begin(args.num_nodes, args.parts, p + 1);
  for (int64_t row = part_begin(args.num_nodes, args.parts, p); row < end; ++row) {
    const Index* list = list_of<Index>(args, row);
    for (int64_t slot = 0; slot < args.list_size; ++slot) {
      const Index node = list[slot];
      if (node < 0 || node >= args.num_nodes)
        valid &= node == -1;
      else
        counts[node] += !(edge_weight(args, row * args.list_size + slot) <= 0);
    }
  }
  return valid;
}

// Counts to places: edges into node 0 from part 0, from part 1, ..., then those into node 1.
void counts_to_cursors(const AdjacencyArgs& args) {
  int64_t place = 0;
  for (int64_t node = 0; node < args.num_nodes; ++node) {
    args.incoming_offsets[node] = place;
    for (int64_t p = 0; p < args.parts; ++p) {
      const int64_t count = args.cursors[p * args.num_nodes + node];
      args.cursors[p * args.num_nodes + node] = place;
      place += count;
    }
  }
  args.incoming_offsets[args.num_nodes] = place;
}

template <class Index>
void scatter_part(const AdjacencyArgs& args, int64_t p) {
  int64_t* cursors = args.cursors + p * args.num_nodes;
  const int64_t end = part_begin(args.num_nodes, args.parts, p + 1);
  for (int64_t row = part_begin(args.num_nodes, args.parts, p); row < end; ++row) {
    const Index* list = list_of<Index>(args, row);
    for (int64_t slot = 0; slot < args.list_size; ++slot) {
      const float weight = edge_weight(args, row * args.list_size + slot);
      if (list[slot] >= 0 && !(weight <= 0))
        args.incoming[cursors[list[slot]]++] = {static_cast<int32_t>(row), weight};
    }
  }
}

template <class Index>
bool transpose_lists(const AdjacencyArgs& args) {
  std::atomic<bool> valid{true};
  for_each_piece(args.parts, args.workers, [&](int64_t p, int64_t) {
    if (!count_part<Index>(args, p)) valid.store(false, std::memory_order_relaxed);
  });
  if (!valid.load()) return false;
  counts_to_cursors(args);
  for_each_piece(args.parts, args.workers,
                 [&](int64_t p, int64_t) { scatter_part<Index>(args, p); });
  return true;
}

// ---- a row as a bitmap ----

// One bit a node, and one byte for every 4096 nodes that says where to look. All bits are zero
// between rows.
class Bitmap {
 public:
  Bitmap(const AdjacencyArgs& args, int64_t worker)
      : blocks_((args.num_nodes + kBlock - 1) / kBlock),
        bits_(args.bitmaps + worker * adjacency_bitmap_words(args.num_nodes)),
        touched_(reinterpret_cast<uint8_t*>(bits_ + blocks_ * 64)) {}

  // Sets the node's bit; returns whether it was set before.
  bool insert(int64_t node) {
    uint64_t& word = bits_[node >> 6];
    const bool before = word >> (node & 63) & 1;
    word |= uint64_t{1} << (node & 63);
    touched_[node / kBlock] = 1;
    return before;
  }

  // Calls f(first node, bits) for every word with bits, in ascending order, and clears all.
  template <class F>
  void drain(const F& f) {
    for (int64_t block = 0; block < blocks_; ++block) {
      if (!touched_[block]) continue;
      touched_[block] = 0;
      for (int64_t w = block * 64; w < block * 64 + 64; ++w) {
        if (bits_[w]) f(w * 64, bits_[w]);
        bits_[w] = 0;
      }
    }
  }

 private:
  int64_t blocks_;
  uint64_t* bits_;
  uint8_t* touched_;
};

template <class Index>
int64_t count_row(const AdjacencyArgs& args, Bitmap& bitmap, int64_t row) {
  const Index* list = list_of<Index>(args, row);
  for (int64_t slot = 0; slot < args.list_size; ++slot)
    if (list[slot] >= 0 && !(edge_weight(args, row * args.list_size + slot) <= 0))
      bitmap.insert(list[slot]);
  for (int64_t e = args.incoming_offsets[row]; e < args.incoming_offsets[row + 1]; ++e)
    bitmap.insert(args.incoming[e].row);
  int64_t count = 0;
  bitmap.drain([&](int64_t, uint64_t bits) { count += __builtin_popcountll(bits); });
  return count;
}

// Writes the row's columns and values of A, not yet normalised, and its scale d^(-1/2).
template <class Index>
void fill_row(const AdjacencyArgs& args, Bitmap& bitmap, float* dense, int64_t row) {
  const Index* list = list_of<Index>(args, row);
  for (int64_t slot = 0; slot < args.list_size; ++slot) {
    const int64_t node = list[slot];
    const float weight = edge_weight(args, row * args.list_size + slot);
    if (node >= 0 && !(weight <= 0))
      dense[node] = bitmap.insert(node) ? larger(dense[node], weight) : weight;
  }
  const int64_t end = args.incoming_offsets[row + 1];
  for (int64_t e = args.incoming_offsets[row]; e < end; ++e) {
    const int32_t node = args.incoming[e].row;
    float weight = args.incoming[e].weight;
    while (e + 1 < end && args.incoming[e + 1].row == node)  // listed twice by the same node
      weight = larger(weight, args.incoming[++e].weight);
    const bool mutual = bitmap.insert(node);
    const float own = mutual ? dense[node] : 0.0f;
    dense[node] = args.take_union ? larger(own, weight) : own + weight;
  }
  const float share = args.take_union ? 1.0f : 0.5f;
  int64_t place = args.row_offsets[row];
  double degree = 0;
  bitmap.drain([&](int64_t first, uint64_t bits) {
    for (; bits; bits &= bits - 1) {
      const int64_t node = first + __builtin_ctzll(bits);
      const float value = share * dense[node];
      args.columns[place] = static_cast<int32_t>(node);
      args.values[place++] = value;
      degree += value;
    }
  });
  args.scale[row] = static_cast<float>(1 / std::sqrt(degree));
}

template <class Index>
void fill_rows(const AdjacencyArgs& args) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  for_each_piece(pieces, args.workers, [&](int64_t piece, int64_t worker) {
    Bitmap bitmap(args, worker);
    float* dense = args.dense + worker * args.num_nodes;
    const int64_t begin = piece * kRowsAPiece;
    for (int64_t row = begin; row < begin + kRowsAPiece && row < args.num_nodes; ++row)
      fill_row<Index>(args, bitmap, dense, row);
  });
}

template <class Index>
void count_rows(const AdjacencyArgs& args) {
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  for_each_piece(pieces, args.workers, [&](int64_t piece, int64_t worker) {
    Bitmap bitmap(args, worker);
    const int64_t begin = piece * kRowsAPiece;
    for (int64_t row = begin; row < begin + kRowsAPiece && row < args.num_nodes; ++row)
      args.row_offsets[row + 1] = count_row<Index>(args, bitmap, row);
  });
  args.row_offsets[0] = 0;
  for (int64_t row = 0; row < args.num_nodes; ++row)
    args.row_offsets[row + 1] += args.row_offsets[row];
}

}  // namespace

bool adjacency_count(const AdjacencyArgs& args) {
  const int64_t words = args.workers * adjacency_bitmap_words(args.num_nodes);
  std::memset(args.bitmaps, 0, static_cast<size_t>(words) * sizeof *args.bitmaps);
  if (args.wide_indices) {
    if (!transpose_lists<int64_t>(args)) return false;
    count_rows<int64_t>(args);
  } else {
    if (!transpose_lists<int32_t>(args)) return false;
    count_rows<int32_t>(args);
  }
  return true;
}

void adjacency_fill(const AdjacencyArgs& args) {
  if (args.wide_indices)
    fill_rows<int64_t>(args);
  else
    fill_rows<int32_t>(args);
  const int64_t pieces = (args.num_nodes + kRowsAPiece - 1) / kRowsAPiece;
  for_each_piece(pieces, args.workers, [&](int64_t piece, int64_t) {
    const int64_t begin = piece * kRowsAPiece;
    for (int64_t row = begin; row < begin + kRowsAPiece && row < args.num_nodes; ++row)
      for (int64_t e = args.row_offsets[row]; e < args.row_offsets[row + 1]; ++e)
        args.values[e] *= args.scale[row] * args.scale[args.columns[e]];
  });
}

}  // namespace nefkern::cpu::NEFKERN_ISA
