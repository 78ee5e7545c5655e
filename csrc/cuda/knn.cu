#include <algorithm>
#include <cmath>

#include "cuda/knn.h"
#include "cuda/knn_rerank.cuh"
#include "cuda/launches.h"
#include "cuda/workspace.h"

namespace nefkern::cuda {
namespace {

constexpr int64_t kMaxKeep = LargeSelector::kMostKept;
static_assert(LargeSelector::bytes() <= kMaxDynamicShared);

// How candidates of a segment are found: see knn_fused.cuh.
struct FusedSizes {
  int64_t sample;    // rows
  int rank;          // in the sample's scores, of the threshold
  int64_t capacity;  // candidates a row
};

// `rank`: by the sample, k rows reach the threshold but once in ten thousand; `capacity`: and they
// don't fit even less often. (Of the k best, a Poisson number of about `share` is in the sample.)
FusedSizes fused_sizes(const KnnArgs& args, int64_t length) {
  FusedSizes sizes{};
  sizes.sample = std::min(round_up(tiles(length, args.tuning.sample_share), kTile), length);
  const double part = static_cast<double>(length) / static_cast<double>(sizes.sample);
  const double share = static_cast<double>(args.k) / part;
  const double rank = std::ceil(share + 4 * std::sqrt(share) + 4);
  sizes.rank = static_cast<int>(std::min(rank, static_cast<double>(sizes.sample)));
  const double most = (rank + 5 * std::sqrt(rank) + 5) * part;
  sizes.capacity = std::min(round_up(static_cast<int64_t>(most), 32), length);
  return sizes;
}

// Room for the candidates that the margin leaves of a row.
int rerank_size(int64_t k) {
  return next_power_of_two(std::max<int64_t>(k + std::max<int64_t>(k / 4, 64), kSelectThreads));
}

template <class T>
struct Chosen {
  using Type = T;
};

// f(Chosen<who has a row in a re-rank>): a warp, as long as a block's shared memory has room for
// the candidates of so many rows.
template <class F>
void with_owner(int64_t k, const F& f) {
  if (rerank_size(k) <= kMostReranked<Warp>) {
    f(Chosen<Warp>{});
  } else {
    f(Chosen<WholeBlock>{});
  }
}

// Shared memory of a block of a re-rank.
size_t rerank_bytes(int64_t k, const FusedSizes& sizes) {
  size_t bytes = 0;
  with_owner(k, [&](auto owner) {
    bytes = RerankMemory<decltype(owner)::Type::kRows>::bytes(rerank_size(k), sizes.capacity);
  });
  return bytes;
}

// Rows [begin, end) of the queries, and their candidates: rows [first, last) of all.
struct Segment {
  int64_t begin, end, first, last;

  int64_t rows() const { return end - begin; }
  int64_t candidates() const { return last - first; }
};

Segment segment_of(const KnnArgs& args, int64_t s) {
  const int64_t begin = args.offsets[s], end = args.offsets[s + 1];
  if (!args.across()) return {begin, end, begin, end};
  return {begin, end, args.n + args.database_offsets[s], args.n + args.database_offsets[s + 1]};
}

// Rows of a segment whose candidates are held at a time: all, if they may. Then every pair's score
// serves both of its rows. A grid must have room for their tiles.
int64_t chunk_rows(const KnnArgs& args, const Segment& segment) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  const int64_t bytes = fused_sizes(args, segment.candidates()).capacity *
                        static_cast<int64_t>(sizeof(float) + sizeof(int));
  const int64_t fitting = std::min(args.tuning.candidate_bytes / bytes / kTile,
                                   kMostTiles / tiles(segment.candidates(), kTile));
  return std::min(std::max<int64_t>(fitting, 1) * kTile, args.tuning.chunk_rows);
}

struct Memory {
  Rows rows{};
  Estimates estimates{};
  Candidates candidates{};
  float* scores = nullptr;
  int64_t width = 0;             // of a row of scores, at most
  int64_t score_rows = 0;        // rows of them
  int64_t candidate_floats = 0;  // the candidates' memory, as floats for scores
  size_t bytes = 0;
};

bool direct(const KnnArgs& args) { return args.channels <= kDirectChannels; }

Memory cut(const KnnArgs& args, void* memory) {
  Workspace workspace(memory);
  Memory space;
  const int64_t n = args.n, all = n + (args.across() ? args.database_rows : 0);
  const int64_t depth = direct(args) ? round_up(std::max<int64_t>(args.channels, 1), 4)
                                     : round_up(args.channels, kStageDepth);
  space.rows = {args.features,
                args.database,
                args.channels,
                workspace.take<float>(all * depth),
                workspace.take<unsigned char>(all),
                workspace.take<int>(args.metric == KnnMetric::kInnerProduct ? all : 0),
                workspace.take<int>(n),
                workspace.take<int>(n),
                workspace.take<unsigned>(1),
                n,
                args.across() ? n : 0,
                all,
                depth};
  int64_t longest = 1, fused_rows = 0, candidate_places = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    const Segment segment = segment_of(args, s);
    if (segment.rows() == 0) continue;
    longest = std::max(longest, segment.candidates());
    if (!knn_fuses(args, segment.candidates())) continue;
    const int64_t chunk = std::min(segment.rows(), chunk_rows(args, segment));
    const int64_t places = chunk * fused_sizes(args, segment.candidates()).capacity;
    fused_rows = std::max(fused_rows, chunk);
    candidate_places = std::max(candidate_places, places);
  }
  if (!direct(args)) {
    space.width = round_up(longest, 4);
    const int64_t fitting = args.tuning.score_bytes / (4 * space.width) / kTile * kTile;
    space.score_rows =
        std::clamp<int64_t>(fitting, kTile, round_up(std::max<int64_t>(n, 1), kTile));
    space.scores = workspace.take<float>(space.score_rows * space.width);
  }
  if (fused_rows > 0) {
    space.estimates = {workspace.take<__half>(all * depth), workspace.take<float>(depth),
                       workspace.take<float>(all),          workspace.take<float>(all),
                       workspace.take<float>(all),          workspace.take<Maxima>(1)};
    space.candidate_floats = 2 * candidate_places;
    float* both = workspace.take<float>(space.candidate_floats);
    space.candidates = {workspace.take<float>(fused_rows),
                        workspace.take<int>(fused_rows),
                        both,
                        both ? reinterpret_cast<int*>(both + candidate_places) : nullptr,
                        0,  // of a segment
                        workspace.take<int>(fused_rows),
                        workspace.take<int>(1)};
  }
  space.bytes = workspace.bytes();
  return space;
}

// f(Chosen<the selector of `keep` keys>).
template <class F>
void with_selector(int64_t keep, const F& f) {
  if (keep <= WarpSelector::kMostKept) {
    f(Chosen<WarpSelector>{});
  } else if (keep <= BlockSelector::kMostKept) {
    f(Chosen<BlockSelector>{});
  } else {
    f(Chosen<LargeSelector>{});
  }
}

template <KnnMetric kMetric>
class Knn {
 public:
  Knn(const KnnArgs& args, void* workspace, cudaStream_t stream)
      : args_(args),
        space_(cut(args, workspace)),
        out_{args.values, args.indices, args.k, args.tuning.keep, space_.rows.candidates},
        launch_(stream) {}

  cudaError_t run() {
    prepare();
    if (direct(args_)) {
      with_selector(kept(), [&](auto selector) {
        using Selector = typename decltype(selector)::Type;
        launch_(direct_rows<kMetric, Selector>, tiles(args_.n, Selector::kRows), kSelectThreads,
                Selector::bytes(), space_.rows, args_.include_self, out_);
      });
      return launch_.error();
    }
    if (space_.candidate_floats > 0) estimate();
    int64_t waiting = 0;  // rows from here on are the baseline's
    for (int64_t s = 0; s < args_.segments; ++s) {
      const Segment segment = segment_of(args_, s);
      const int64_t begin = segment.begin, end = segment.end;
      if (begin == end || !knn_fuses(args_, segment.candidates())) continue;
      baseline(waiting, begin);
      const int64_t step = chunk_rows(args_, segment);
      for (int64_t row = begin; row < end; row += step)
        fused({segment.first, segment.last, row, std::min(row + step, end)});
      waiting = end;
    }
    baseline(waiting, args_.n);
    return launch_.error();
  }

 private:
  // Neighbours found in one pass.
  int64_t kept() const { return std::min(args_.k, args_.tuning.keep); }

  void prepare() {
    if constexpr (kMetric != KnnMetric::kCosine) {
      launch_.zero(space_.rows.largest, sizeof(unsigned));
      if (kMetric == KnnMetric::kEuclidean || !args_.across()) largest_of(args_.features, args_.n);
      if (args_.across()) largest_of(args_.database, args_.database_rows);
    }
    launch_(prepare_rows<kMetric>, tiles(space_.rows.n, kRowWarps), kRowThreads, 0, space_.rows,
            args_.device_offsets, args_.device_database_offsets, args_.segments);
  }

  void largest_of(const float* features, int64_t rows) {
    const int64_t size = rows * args_.channels;
    launch_(find_largest, std::min<int64_t>(tiles(size, 4 * kRowThreads), 2048), kRowThreads, 0,
            features, size, space_.rows.largest);
  }

  void estimate() {
    launch_.zero(space_.estimates.maxima, sizeof(Maxima));
    if constexpr (kMetric == KnnMetric::kInnerProduct) {
      launch_.zero(space_.estimates.centre, space_.rows.depth * sizeof(float));
    } else {
      launch_(find_centre, space_.rows.depth / 32, kRowThreads, 0, space_.rows,
              space_.estimates.centre);
    }
    launch_(pack_rows<kMetric>, tiles(space_.rows.n, kRowWarps), kRowThreads, 0, space_.rows,
            space_.estimates);
  }

  void baseline(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += space_.score_rows) {
      const int64_t end = std::min(row + space_.score_rows, last);
      exact({nullptr, nullptr, row, end}, tile_columns(row, end), space_.scores);
    }
  }

  // The most columns of a tile of these rows: all that there are from its first row's candidates to
  // its last row's.
  int64_t tile_columns(int64_t first, int64_t last) const {
    int64_t most = 0;
    for (int64_t row = first; row < last; row += kTile) {
      const int64_t end = segment_of(args_, segment_at(std::min(row + kTile, last) - 1)).last;
      most = std::max(most, end - segment_of(args_, segment_at(row)).first);
    }
    return most;
  }

  // The segment that a row is in.
  int64_t segment_at(int64_t row) const {
    const int64_t* end = args_.offsets + args_.segments + 1;
    return std::upper_bound(args_.offsets, end, row) - args_.offsets - 1;
  }

  void exact(const RowBlock& block, int64_t columns, float* scores) {
    const int64_t rows = block.last - block.first, column_tiles = tiles(columns, kExactColumns);
    launch_(exact_tile<kMetric>, tiles(rows, kTile) * column_tiles, kExactThreads, 0, space_.rows,
            block, column_tiles, args_.include_self, scores, space_.width);
    with_selector(kept(), [&](auto selector) {
      using Selector = typename decltype(selector)::Type;
      launch_(select_rows<kMetric, Selector>, tiles(rows, Selector::kRows), kSelectThreads,
              Selector::bytes(), space_.rows, block, static_cast<const float*>(scores),
              space_.width, out_);
    });
  }

  void fused(const Chunk& chunk) {
    const int64_t rows = chunk.last - chunk.first, length = chunk.end - chunk.begin;
    const FusedSizes sizes = fused_sizes(args_, length);
    Candidates& candidates = space_.candidates;
    candidates.capacity = sizes.capacity;
    threshold(chunk, sizes);
    launch_.zero(candidates.redo_count, sizeof(int));
    const bool mirrored = !args_.across();
    const TileOrder order = tile_order(rows, length, (chunk.first - chunk.begin) / kTile, mirrored);
    launch_(estimate_tiles<false>, order.blocks(), kTileThreads, kTileBytes,
            TileTask{space_.estimates.packed, space_.estimates.offset, space_.rows.depth, chunk,
                     args_.include_self, Sample{}, order},
            static_cast<float*>(nullptr), candidates);
    with_owner(args_.k, [&](auto owner) {
      using Owner = typename decltype(owner)::Type;
      launch_(rerank_rows<kMetric, Owner>, tiles(rows, Owner::kRows), kSelectThreads,
              rerank_bytes(args_.k, sizes), space_.rows, space_.estimates, chunk, candidates,
              rerank_size(args_.k), out_);
    });
    redo(rows, length);
  }

  TileOrder tile_order(int64_t rows, int64_t columns, int64_t first_own, bool mirrored) const {
    return {static_cast<unsigned>(tiles(rows, kTile)), static_cast<unsigned>(tiles(columns, kTile)),
            static_cast<unsigned>(mirrored ? first_own : 0),
            static_cast<unsigned>(args_.tuning.tile_side), mirrored};
  }

  // Thresholds of a chunk, as many rows at a time as their scores with the sample have room for.
  void threshold(const Chunk& chunk, const FusedSizes& sizes) {
    const Sample sample{chunk.begin, chunk.end - chunk.begin, sizes.sample};
    const int64_t step = space_.score_rows * space_.width / sizes.sample / kTile * kTile;
    for (int64_t first = chunk.first; first < chunk.last; first += step) {
      const Chunk part{chunk.begin, chunk.end, first, std::min(first + step, chunk.last)};
      Candidates candidates = space_.candidates;
      candidates.threshold += first - chunk.first;
      candidates.count += first - chunk.first;
      const TileOrder order = tile_order(part.last - first, sizes.sample, 0, false);
      launch_(estimate_tiles<true>, order.blocks(), kTileThreads, kTileBytes,
              TileTask{space_.estimates.packed, space_.estimates.offset, space_.rows.depth, part,
                       args_.include_self, sample, order},
              space_.scores, candidates);
      with_selector(sizes.rank, [&](auto selector) {
        using Selector = typename decltype(selector)::Type;
        launch_(set_thresholds<kMetric, Selector>, tiles(part.last - first, Selector::kRows),
                kSelectThreads, Selector::bytes(), space_.rows, space_.estimates, part,
                static_cast<const float*>(space_.scores), sizes.sample, sizes.rank, candidates);
      });
    }
  }

  // The rows on the list. How many they are the host doesn't know: launches for all, most of which
  // find nothing to do. The candidates are done with, so their memory makes these launches few.
  void redo(int64_t rows, int64_t length) {
    const Candidates& candidates = space_.candidates;
    const int64_t reused = space_.candidate_floats / space_.width / kTile * kTile;
    const bool reuse = reused >= space_.score_rows;
    const int64_t step = reuse ? reused : space_.score_rows;
    for (int64_t first = 0; first < rows; first += step)
      exact({candidates.redo, candidates.redo_count, first, std::min(first + step, rows)}, length,
            reuse ? candidates.score : space_.scores);
  }

  const KnnArgs& args_;
  Memory space_;
  Output out_;
  Launches launch_;
};

// Whether sizes and tuning make sense. What the offsets say is the caller's to see to.
bool valid(const KnnArgs& args) {
  const KnnTuning& tuning = args.tuning;
  const bool known = args.device_offsets != nullptr;
  const bool other_known = args.device_database_offsets != nullptr;
  return args.n >= 0 && args.database_rows >= 0 && args.n + args.database_rows < int64_t{1} << 31 &&
         args.channels >= 0 && args.segments >= 0 && args.k > 0 &&
         (args.n == 0 || args.segments == 1 || known) && (!args.across() || known == other_known) &&
         tuning.fused_share > 0 && tuning.sample_share > 0 && tuning.keep > 0 &&
         tuning.keep <= kMaxKeep && tuning.chunk_rows > 0 && tuning.chunk_rows % kTile == 0 &&
         tuning.candidate_bytes >= 0 && tuning.tile_side > 0 && tuning.tile_side <= 1024;
}

}  // namespace

bool knn_fuses(const KnnArgs& args, int64_t length) {
  if (direct(args) || length == 0 || args.k > args.tuning.keep ||
      args.k > length / args.tuning.fused_share)
    return false;
  const FusedSizes sizes = fused_sizes(args, length);
  const bool possible = sizes.rank <= kMaxKeep && rerank_bytes(args.k, sizes) <= kMaxDynamicShared;
  if (args.method != KnnMethod::kAuto) return possible && args.method == KnnMethod::kFused;
  return possible && length >= args.tuning.fused_rows;
}

size_t knn_workspace(const KnnArgs& args) { return valid(args) ? cut(args, nullptr).bytes : 0; }

cudaError_t knn(const KnnArgs& args, void* workspace, cudaStream_t stream) {
  if (!valid(args)) return cudaErrorInvalidValue;
  if (args.n == 0) return cudaSuccess;
  switch (args.metric) {
    case KnnMetric::kCosine:
      return Knn<KnnMetric::kCosine>(args, workspace, stream).run();
    case KnnMetric::kEuclidean:
      return Knn<KnnMetric::kEuclidean>(args, workspace, stream).run();
    case KnnMetric::kInnerProduct:
      return Knn<KnnMetric::kInnerProduct>(args, workspace, stream).run();
  }
  return cudaErrorInvalidValue;
}

}  // namespace nefkern::cuda
