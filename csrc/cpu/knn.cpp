#include "cpu/knn.h"

#include <algorithm>
#include <limits>

#include "cpu/knn_direct.h"
#include "cpu/knn_pack.h"
#include "cpu/knn_rerank.h"
#include "cpu/knn_select.h"
#include "cpu/knn_tile.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

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
      values[c] = euclidean() ? -value + 0.0f : value;
      indices[c] = key_index(keys_[c]);
    }
    missing(index, found);
  }

  // What row `index` has from its place `found` on.
  void missing(int64_t index, int64_t found) {
    float* values = args_.values + index * args_.k;
    int32_t* indices = args_.indices + index * args_.k;
    std::fill(values + found, values + args_.k, euclidean() ? kInfinity : -kInfinity);
    std::fill(indices + found, indices + args_.k, -1);
  }

 private:
  bool euclidean() const { return args_.metric == KnnMetric::kEuclidean; }

  const KnnArgs& args_;
  Array<uint64_t> keys_;
  KeySorter sorter_;
};

// Powers of two that bring the rows, and their candidates, into the range of the estimates. A
// distance needs the same for both.
struct Scales {
  explicit Scales(const KnnArgs& args) {
    if (args.metric == KnnMetric::kCosine) return;
    rows = power_of_two_scale(args.features, args.n * args.channels);
    others = args.across() ? power_of_two_scale(args.database, args.database_rows * args.channels)
                           : rows;
    if (args.metric == KnnMetric::kEuclidean) rows = others = std::min(rows, others);
  }
  float rows = 1, others = 1;
};

// ---- many channels: tiles of products ----

struct TileWorkspace {
  // Room for `n` rows of one segment at a time, and for its `others` in a database, if any.
  TileWorkspace(int64_t n, int64_t others, const KnnArgs& args)
      : panels(n, args.channels),
        others(others, args.channels),
        candidates(round_up(n, kTileColumns), args.k, args.across() ? others : n) {}
  Panels panels, others;
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

void start(Candidates& candidates, const Panels& panels, const Panels& others) {
  for (int64_t p = 0; p < panels.padded_n; ++p)
    candidates.reset(p, panels.offset[p] == -kInfinity ? kInfinity : kLowest,
                     panels.margin(p, others));
}

// The results of the rows in `exact.a`.
void finish(const KnnArgs& args, const ExactRows& exact, Candidates& candidates) {
  const Panels& panels = exact.a;
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

void tile_segment(const KnnArgs& args, int64_t s, const Scales& scales, int64_t threads,
                  TileWorkspace& workspace) {
  Panels& panels = workspace.panels;
  panels.pack(args.features, args.offsets[s], args.offsets[s + 1], args.channels, args.metric,
              scales.rows);
  start(workspace.candidates, panels, panels);
  const ExactRows exact(panels, panels);
  collect(Tiles(panels, workspace.candidates, args.include_self, exact), panels.padded_n, threads);
  finish(args, exact, workspace.candidates);
}

// Queries whose candidates are held at a time: with k = 64, 15 MB.
constexpr int64_t kQueries = 8192;

// Threads take blocks of queries, each of which meets the whole database.
void collect_across(const CrossTiles& tiles, const Panels& queries, int64_t threads) {
  const int64_t rows = round_up(queries.n, kTileRows);
  const int64_t share = round_up((rows + 4 * threads - 1) / (4 * threads), kTileRows);
  const int64_t block = std::min(cached_rows(queries), share);
  for_each_piece((rows + block - 1) / block, threads, [&](int64_t piece, int64_t) {
    tiles.pairs(piece * block, std::min((piece + 1) * block, rows));
  });
}

void cross_segment(const KnnArgs& args, int64_t s, const Scales& scales, int64_t threads,
                   TileWorkspace& workspace) {
  Panels& panels = workspace.panels;
  Panels& others = workspace.others;
  if (args.database_offsets[s] == args.database_offsets[s + 1]) {
    Writer writer(args, 1);
    for (int64_t i = args.offsets[s]; i < args.offsets[s + 1]; ++i) writer.missing(i, 0);
    return;
  }
  others.pack(args.database, args.database_offsets[s], args.database_offsets[s + 1], args.channels,
              args.metric, scales.others);
  for (int64_t first = args.offsets[s]; first < args.offsets[s + 1]; first += kQueries) {
    panels.pack(args.features, first, std::min(first + kQueries, args.offsets[s + 1]),
                args.channels, args.metric, scales.rows, &others);
    start(workspace.candidates, panels, others);
    const ExactRows exact(panels, others);
    collect_across(CrossTiles(workspace.candidates, exact), panels, threads);
    finish(args, exact, workspace.candidates);
  }
}

// Sizes of the segments that all threads work on together, or of those that one thread does.
struct Largest {
  Largest(const KnnArgs& args, bool of_shared) {
    for (int64_t s = 0; s < args.segments; ++s) {
      if (!any(args, s) || shared(args, s) != of_shared) continue;
      const int64_t n = args.offsets[s + 1] - args.offsets[s];
      rows = std::max(rows, args.across() ? std::min(n, kQueries) : n);
      if (args.across())
        others = std::max(others, args.database_offsets[s + 1] - args.database_offsets[s]);
    }
  }
  static bool any(const KnnArgs& args, int64_t s) { return args.offsets[s] < args.offsets[s + 1]; }
  static bool shared(const KnnArgs& args, int64_t s) {
    const int64_t n = args.offsets[s + 1] - args.offsets[s];
    if (!args.across()) return n >= kSharedSegment;
    return n + args.database_offsets[s + 1] - args.database_offsets[s] >= 2 * kSharedSegment;
  }
  int64_t rows = 0, others = 0;
};

void tile_knn(const KnnArgs& args, const Scales& scales) {
  const auto segment = args.across() ? cross_segment : tile_segment;
  const Largest shared(args, true), small(args, false);
  if (shared.rows > 0) {
    TileWorkspace workspace(shared.rows, shared.others, args);
    for (int64_t s = 0; s < args.segments; ++s)
      if (Largest::any(args, s) && Largest::shared(args, s))
        segment(args, s, scales, num_threads(), workspace);
  }
  if (small.rows == 0) return;
  parallel_for(0, args.segments, 1, [&](int64_t first, int64_t last) {
    TileWorkspace workspace(small.rows, small.others, args);
    for (int64_t s = first; s < last; ++s)
      if (Largest::any(args, s) && !Largest::shared(args, s))
        segment(args, s, scales, 1, workspace);
  });
}

// ---- few channels: direct ----

using ScanRow = decltype(&scan_row<0>);

template <int... kChannels>
ScanRow scan_for(int64_t channels, std::integer_sequence<int, kChannels...>) {
  static constexpr ScanRow kTable[] = {scan_row<kChannels>...};
  return kTable[channels];
}

void direct_knn(const KnnArgs& args, const Scales& scales) {
  const int64_t channels = args.channels, others = args.across() ? args.database_rows : args.n;
  const int64_t* bounds = args.across() ? args.database_offsets : args.offsets;
  const int64_t plane = others + kLanes;
  const ExactScores exact(args, scales.rows, scales.others);
  Array<float> planes(std::max<int64_t>(1, channels) * plane);
  parallel_for(0, others, 256, [&](int64_t first, int64_t last) {
    float y[kDirectChannels];
    for (int64_t j = first; j < last; ++j) {
      ready_row(args, exact.others + j * channels, scales.others, y);
      for (int64_t c = 0; c < channels; ++c) planes[c * plane + j] = y[c];
    }
  });
  for (int64_t c = 0; c < channels; ++c)
    std::fill(planes.data() + c * plane + others, planes.data() + (c + 1) * plane, 0.0f);
  const ScanRow scan = scan_for(channels, std::make_integer_sequence<int, kDirectChannels + 1>());
  const bool leave_out = !args.across() && !args.include_self;
  parallel_for(0, args.n, 16, [&](int64_t first, int64_t last) {
    Candidates candidates(1, args.k, others);
    Writer writer(args, candidates.capacity());
    float y[kDirectChannels];
    int64_t s =
        std::upper_bound(args.offsets, args.offsets + args.segments + 1, first) - args.offsets - 1;
    for (int64_t i = first; i < last; ++i) {
      while (args.offsets[s + 1] <= i) ++s;
      ready_row(args, args.features + i * channels, scales.rows, y);
      candidates.reset(0, kLowest, exact.margin(y));
      const Row row = candidates.row(0);
      scan(y, planes.data(), plane, channels, i, bounds[s], bounds[s + 1], leave_out ? i : -1,
           args.k, candidates.limit(), exact, row);
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
  const Scales scales(args);
  if (args.channels <= kDirectChannels) {
    direct_knn(args, scales);
  } else {
    tile_knn(args, scales);
  }
}

}  // namespace nefkern::cpu::NEFKERN_ISA
