#include "cpu/knn.h"

#include <algorithm>
#include <limits>

#include "cpu/knn_direct.h"
#include "cpu/knn_pack.h"
#include "cpu/knn_rerank.h"
#include "cpu/knn_select.h"
#include "cpu/knn_tile.h"
#include "cpu/parallel.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// Segments from this size on are worked on by all threads together, smaller ones by one thread
// each.
constexpr int64_t kSharedSegment = 768;

// Sorts rows' candidates by their values and writes the results, with marks for the missing ones.
class Writer {
 public:
  Writer(const KnnArgs& args, int64_t capacity) : args_(args), keys_(capacity), sorter_(capacity) {}

  template <class Exact>
  void row(int64_t index, const Row& row, const Exact& exact) {
    const int64_t count = *row.count, found = std::min(args_.k, count);
    for (int64_t c = 0; c < count; ++c)
      keys_[c] = sort_key(row.score[c], exact.index(row.position[c]));
    sorter_.sort(keys_.data(), count);
    float* values = args_.values + index * args_.k;
    int32_t* indices = args_.indices + index * args_.k;
    for (int64_t c = 0; c < found; ++c) {
      const float value = key_value(keys_[c]);
      values[c] = args_.euclidean ? -value + 0.0f : value;
      indices[c] = key_index(keys_[c]);
    }
    std::fill(values + found, values + args_.k, args_.euclidean ? kNothing : -kNothing);
    std::fill(indices + found, indices + args_.k, -1);
  }

 private:
  const KnnArgs& args_;
  Array<uint64_t> keys_;
  KeySorter sorter_;
};

// ---- many channels: tiles of products ----

struct TileWorkspace {
  TileWorkspace(int64_t n, const KnnArgs& args)
      : panels(n, args.channels), candidates(round_up(n, kTileColumns), args.k, n) {}
  Panels panels;
  Candidates candidates;
};

// Blocks of rows, and rounds of pairs of blocks as in a tournament: no block is in two pairs of a
// round, so the pairs of a round run at the same time without a lock.
class Tournament {
 public:
  Tournament(int64_t padded_n, int64_t threads)
      : columns_(padded_n / kTileColumns),
        blocks_(std::max<int64_t>(1, std::min(2 * threads, columns_))) {}

  int64_t blocks() const { return blocks_; }
  int64_t begin(int64_t block) const { return block * columns_ / blocks_ * kTileColumns; }
  int64_t rounds() const { return even() - 1; }
  int64_t pairs() const { return even() / 2; }

  // The pair-th pair of a round (circle method): one block stays, the others turn around it.
  std::pair<int64_t, int64_t> pair(int64_t round, int64_t pair) const {
    const int64_t turning = even() - 1;
    const int64_t a = pair == 0 ? turning : (round + pair) % turning;
    const int64_t b = (round - pair + turning) % turning;
    return {std::min(a, b), std::max(a, b)};
  }

 private:
  int64_t even() const { return blocks_ + blocks_ % 2; }  // with an odd number one sits out
  int64_t columns_, blocks_;
};

void collect(const Tiles& tiles, int64_t padded_n, int64_t threads) {
  const Tournament tournament(padded_n, threads);
  parallel_for(0, tournament.blocks(), 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      tiles.pairs(tournament.begin(b), tournament.begin(b + 1), tournament.begin(b),
                  tournament.begin(b + 1));
  });
  for (int64_t round = 0; round < tournament.rounds(); ++round) {
    parallel_for(0, tournament.pairs(), 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const auto [a, b] = tournament.pair(round, p);
        if (b >= tournament.blocks()) continue;
        tiles.pairs(tournament.begin(a), tournament.begin(a + 1), tournament.begin(b),
                    tournament.begin(b + 1));
      }
    });
  }
}

void tile_segment(const KnnArgs& args, int64_t begin, int64_t end, float scale, int64_t threads,
                  TileWorkspace& workspace) {
  Panels& panels = workspace.panels;
  Candidates& candidates = workspace.candidates;
  panels.pack(args.features + begin * args.channels, end - begin, begin, args.channels,
              args.euclidean, scale);
  for (int64_t p = 0; p < panels.padded_n; ++p)
    candidates.reset(p, panels.offset[p] == -kNothing ? kNothing : kAnything, panels.margin(p));
  const ExactRows exact{panels, args, scale,
                        args.euclidean ? 4 * (panels.value_gamma() + 8 * 0x1p-24) : 0.0};
  collect(Tiles(panels, candidates, args.include_self, exact), panels.padded_n, threads);
  parallel_for(0, panels.n, 64, [&](int64_t first, int64_t last) {
    Rerank rerank(exact, candidates);
    Writer writer(args, candidates.capacity());
    for (int64_t p = first; p < last; p += rerank.block()) {
      const int64_t end = std::min(p + rerank.block(), last);
      rerank.values(p, end);
      for (int64_t i = p; i < end; ++i) writer.row(panels.index[i], candidates.row(i), exact);
    }
  });
}

void tile_knn(const KnnArgs& args, float scale) {
  int64_t largest = 0, largest_small = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t n = args.offsets[s + 1] - args.offsets[s];
    (n >= kSharedSegment ? largest : largest_small) =
        std::max(n >= kSharedSegment ? largest : largest_small, n);
  }
  if (largest > 0) {
    TileWorkspace workspace(largest, args);
    for (int64_t s = 0; s < args.segments; ++s)
      if (args.offsets[s + 1] - args.offsets[s] >= kSharedSegment)
        tile_segment(args, args.offsets[s], args.offsets[s + 1], scale, num_threads(), workspace);
  }
  if (largest_small == 0) return;
  parallel_for(0, args.segments, 1, [&](int64_t first, int64_t last) {
    TileWorkspace workspace(largest_small, args);
    for (int64_t s = first; s < last; ++s) {
      const int64_t n = args.offsets[s + 1] - args.offsets[s];
      if (n > 0 && n < kSharedSegment)
        tile_segment(args, args.offsets[s], args.offsets[s + 1], scale, 1, workspace);
    }
  });
}

// ---- few channels: direct ----

using ScanRow = decltype(&scan_row<0>);

template <int... kChannels>
ScanRow scan_for(int64_t channels, std::integer_sequence<int, kChannels...>) {
  static constexpr ScanRow kTable[] = {scan_row<kChannels>...};
  return kTable[channels];
}

void direct_knn(const KnnArgs& args, float scale) {
  const int64_t plane = args.n + kLanes;
  Array<float> planes(std::max<int64_t>(1, args.channels) * plane);
  parallel_for(0, args.n, 256, [&](int64_t first, int64_t last) {
    float y[kDirectChannels];
    for (int64_t i = first; i < last; ++i) {
      const float* x = args.features + i * args.channels;
      const bool finite = args.euclidean ? scaled_row(x, args.channels, args.channels, scale, y)
                                         : unit_row(x, args.channels, args.channels, y);
      for (int64_t c = 0; c < args.channels; ++c)
        planes[c * plane + i] = finite ? y[c] : std::numeric_limits<float>::quiet_NaN();
    }
  });
  for (int64_t c = 0; c < args.channels; ++c)
    std::fill(planes.data() + c * plane + args.n, planes.data() + (c + 1) * plane, 0.0f);
  const ScanRow scan =
      scan_for(args.channels, std::make_integer_sequence<int, kDirectChannels + 1>());
  const ExactScores exact{args, scale, args.euclidean ? 16 * 0x1p-24 : 0.0};
  const float margin = direct_margin(args, scale);
  parallel_for(0, args.n, 16, [&](int64_t first, int64_t last) {
    Candidates candidates(1, args.k, args.n);
    Writer writer(args, candidates.capacity());
    int64_t s =
        std::upper_bound(args.offsets, args.offsets + args.segments + 1, first) - args.offsets - 1;
    for (int64_t i = first; i < last; ++i) {
      while (args.offsets[s + 1] <= i) ++s;
      candidates.reset(0, kAnything, margin);
      const Row row = candidates.row(0);
      scan(planes.data(), plane, args.channels, i, args.offsets[s], args.offsets[s + 1],
           args.include_self, args.k, candidates.limit(), exact, row);
      if (!settle(row, static_cast<int32_t>(i), args.k, exact))
        for (int32_t c = 0; c < *row.count; ++c)
          row.score[c] = exact.value(static_cast<int32_t>(i), row.position[c], row.score[c]);
      writer.row(i, row, exact);
    }
  });
}

}  // namespace

void knn(const KnnArgs& args) {
  if (args.n == 0) return;
  const float scale =
      args.euclidean ? power_of_two_scale(args.features, args.n * args.channels) : 1.0f;
  if (args.channels <= kDirectChannels) {
    direct_knn(args, scale);
  } else {
    tile_knn(args, scale);
  }
}

}  // namespace nefkern::cpu::NEFKERN_ISA
