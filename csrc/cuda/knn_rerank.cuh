// Candidates get their values, and the best of them are the neighbours.
//
// A block takes kQueries rows that follow one another. What their candidates' scores and the margin
// leave of each row's candidates is joined: neighbouring rows (patches of an image) have most of
// them in common, and a candidate's row is fetched once for all. Then a warp takes 64 candidates at
// a time. Their rows go through shared memory, 16 channels at a time, whole sectors of them; a lane
// reads those of two candidates of its own, and sums their pairs with all of the block's rows.
#pragma once

#include "cuda/knn_fused.cuh"

namespace nefkern::cuda {

constexpr int kRerankStages = 2;
constexpr int kRerankDepth = 16;                 // channels: 64 bytes of a row
constexpr int kRerankPieces = kRerankDepth / 4;  // of 16 bytes
constexpr unsigned kNoRow = ~0u;
// The most candidates of a row that get their values.
template <class Owner>
constexpr int kMostReranked = Owner::kWarps == 1 ? 1024 : 4096;
static_assert(kSumChannels % kRerankDepth == 0);
constexpr int kLaneCandidates = 2;  // the l-th lane of a warp has the l-th and the (l + 32)-th
constexpr int kWarpCandidates = kLaneCandidates * kWarp;

// Channels of a warp's candidates, then of the block's rows. A piece's place is exchanged with
// others of its row by the row's number: eight rows' pieces of the same channels, which are read at
// once, then lie in different banks.
template <int kQueries>
struct RerankStage {
  alignas(128) float rows[(kWarpCandidates + kQueries) * kRerankDepth];

  __device__ __forceinline__ float* place(int row, int piece) {
    return rows + row * kRerankDepth + (piece ^ (row >> 1 & 3)) * 4;
  }
  __device__ __forceinline__ float4 read(int row, int piece) {
    return *reinterpret_cast<const float4*>(place(row, piece));
  }
};

// A block's shared memory, for `size` candidates of each of kQueries rows. One after the other in
// the same place: scores of all candidates, the table by which candidates are joined, stages, and
// keys. After it the list of joined candidates.
template <int kQueries>
class RerankMemory {
 public:
  using Stage = RerankStage<kQueries>;

  static constexpr size_t bytes(int64_t size, int64_t capacity) {
    const int64_t joined = kQueries * size;
    const size_t needed = shared_place(joined) + joined * (sizeof(unsigned) + kMask);
    const size_t scores = kQueries * capacity * sizeof(unsigned);
    return needed > scores ? needed : scores;
  }

  __device__ explicit RerankMemory(int size)
      : memory_(dynamic_shared<char>()), size_(size), joined_(kQueries * size) {}

  __device__ __forceinline__ Stage* stages(int warp) {
    return reinterpret_cast<Stage*>(memory_) + warp * kRerankStages;
  }
  __device__ __forceinline__ unsigned* orders(int q, int64_t capacity) {
    return reinterpret_cast<unsigned*>(memory_) + q * capacity;
  }
  __device__ __forceinline__ uint64_t* keys(int q) {
    return reinterpret_cast<uint64_t*>(memory_) + static_cast<int64_t>(q) * size_;
  }
  // The list: a candidate's row, and by bits whose candidate it is.
  __device__ __forceinline__ unsigned& row(int at) { return rows()[at]; }
  __device__ __forceinline__ unsigned members(int at) const {
    if constexpr (kQueries == 1) return 1;
    return masks()[at];
  }

  // ---- the table: open addressing; kNoRow is free ----

  __device__ __forceinline__ void clear_table() {
    for (int at = threadIdx.x; at < joined_; at += kSelectThreads) {
      table()[at] = kNoRow;
      table_members()[at] = 0;
    }
  }
  // Row j is a candidate of the block's q-th row. The table has room for all.
  __device__ __forceinline__ void join(unsigned j, int q) {
    unsigned at = (j * 0x9e3779b1u >> 7) & (joined_ - 1);
    for (;; at = (at + 1) & (joined_ - 1)) {
      const unsigned there = atomicCAS(&table()[at], kNoRow, j);
      if (there == kNoRow || there == j) break;
    }
    atomicOr(&table_members()[at], 1u << q);
  }
  // Lists what the table has, a warp a part of it, in no order; `listed` counts.
  __device__ __forceinline__ void list_table(int& listed) {
    for (int first = 0; first < joined_; first += kSelectThreads) {
      const int at = first + threadIdx.x;  // joined_ is a power of two, and not below the threads
      const unsigned j = table()[at];
      const unsigned taken = __ballot_sync(kAllLanes, j != kNoRow);
      int base = 0;
      if (lane_id() == 0) base = atomicAdd(&listed, __popc(taken));
      base = __shfl_sync(kAllLanes, base, 0) + __popc(taken & lanes_below(lane_id()));
      if (j == kNoRow) continue;
      rows()[base] = j;
      masks()[base] = static_cast<uint16_t>(table_members()[at]);
    }
  }

 private:
  static constexpr size_t kMask = kQueries > 1 ? sizeof(uint16_t) : 0;

  static __host__ __device__ constexpr size_t shared_place(int64_t joined) {
    const size_t stages = kSelectWarps * kRerankStages * sizeof(Stage);
    const size_t keys = joined * sizeof(uint64_t);
    return stages > keys ? stages : keys;
  }

  __device__ __forceinline__ unsigned* table() const {
    return reinterpret_cast<unsigned*>(memory_);
  }
  __device__ __forceinline__ unsigned* table_members() const { return table() + joined_; }
  __device__ __forceinline__ unsigned* rows() const {
    return reinterpret_cast<unsigned*>(memory_ + shared_place(joined_));
  }
  __device__ __forceinline__ uint16_t* masks() const {
    return reinterpret_cast<uint16_t*>(rows() + joined_);
  }

  char* memory_;
  int size_, joined_;
};

// ---- what is left of a row's candidates ----

__device__ __forceinline__ int count_below(const unsigned* orders, int count, unsigned bound,
                                           int thread, int threads) {
  int below = 0;
  for (int c = thread; c < count; c += threads) below += orders[c] < bound;
  return below;
}

// The order of a score that at least k and, where the scores allow, not many more than k of them
// reach. Bisection: a count costs a fraction of a sort.
template <class Owner>
__device__ __forceinline__ unsigned about_kth(Owner& group, const unsigned* orders, int count,
                                              int k) {
  unsigned low = kNoOrder, high = 0;
  for (int c = Owner::thread(); c < count; c += Owner::kThreads) {
    low = min(low, orders[c]);
    high = max(high, orders[c]);
  }
  group.extremes(low, high);
  ++high;  // fewer than k lie below `low`, at least k below `high`
  const int enough = k + k / 32;
  for (int step = 0; step < 24 && high - low > 1; ++step) {
    const unsigned middle = low + (high - low) / 2;
    const int below =
        group.sum(count_below(orders, count, middle, Owner::thread(), Owner::kThreads));
    if (below < k) {
      low = middle;
    } else {
      high = middle;
      if (below <= enough) break;
    }
  }
  return high - 1;
}

// A row's candidates: `count` of them, of which those get their values whose order is at most
// `last`. None: the row has no neighbours, or is on the list of rows to redo.
struct Shortlist {
  int count;
  unsigned last;
};

template <KnnMetric kMetric, class Owner>
__device__ __forceinline__ Shortlist shortlist(const Rows& rows, const Estimates& estimates,
                                               const Chunk& chunk, const Candidates& candidates,
                                               int64_t r, int size, int k, unsigned* orders) {
  const int64_t i = chunk.first + r;
  if (i >= chunk.last || !rows.present[i]) return {0, 0};
  const int count = candidates.count[r];
  if (count >= k && count <= candidates.capacity) {
    Owner group;
    for (int c = Owner::thread(); c < count; c += Owner::kThreads)
      orders[c] = order_of(candidates.score[r * candidates.capacity + c]);
    Owner::sync();
    const unsigned kth = about_kth(group, orders, count, k);
    const float bound =
        margin_of<kMetric>(rows, estimates, i).threshold_from(key_value(key_of(kth, 0)));
    const unsigned last = order_of(bound);
    const int kept =
        group.sum(count_below(orders, count, last + 1, Owner::thread(), Owner::kThreads));
    if (bound >= candidates.threshold[r] && kept <= size) return {count, last};
  }
  if (Owner::thread() == 0)
    candidates.redo[atomicAdd(candidates.redo_count, 1)] = static_cast<int>(i);
  return {0, 0};
}

// ---- values ----

// The sums of a lane's candidates with the block's rows.
template <KnnMetric kMetric, int kQueries>
struct PairSums {
  float chain[kLaneCandidates][kQueries], total[kLaneCandidates][kQueries];

  __device__ __forceinline__ void add(RerankStage<kQueries>& stage) {
#pragma unroll
    for (int piece = 0; piece < kRerankPieces; ++piece) {
      float4 y[kLaneCandidates];
#pragma unroll
      for (int m = 0; m < kLaneCandidates; ++m) y[m] = stage.read(lane_id() + kWarp * m, piece);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const float4 x = stage.read(kWarpCandidates + q, piece);
#pragma unroll
        for (int m = 0; m < kLaneCandidates; ++m)
          chain[m][q] = add_channels<kMetric>(chain[m][q], x, y[m]);
      }
    }
  }
  __device__ __forceinline__ void end_chain() {
#pragma unroll
    for (int m = 0; m < kLaneCandidates; ++m)
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        total[m][q] = __fadd_rn(total[m][q], chain[m][q]);
        chain[m][q] = 0;
      }
  }
};

// A lane's part of a stage's loads: a piece of every eighth candidate, and one of the block's rows.
template <int kQueries>
struct RerankLoads {
  static constexpr int kRows = kWarp / kRerankPieces;  // at a time
  static constexpr int kTimes = kWarpCandidates / kRows;
  static_assert(kQueries <= kRows);

  const float* candidates[kTimes];  // null: zeros
  const float* query;               // null: none

  static __device__ __forceinline__ int row() { return lane_id() / kRerankPieces; }
  static __device__ __forceinline__ int piece() { return lane_id() % kRerankPieces; }

  __device__ __forceinline__ void start(RerankStage<kQueries>& stage, int64_t c,
                                        const float* anywhere) const {
#pragma unroll
    for (int h = 0; h < kTimes; ++h)
      cp_async_16(stage.place(row() + kRows * h, piece()),
                  candidates[h] ? candidates[h] + c : anywhere, candidates[h] != nullptr);
    if (query) cp_async_16(stage.place(kWarpCandidates + row(), piece()), query + c);
  }
};

template <KnnMetric kMetric, int kQueries>
__device__ __forceinline__ void sum_pairs(PairSums<kMetric, kQueries>& sums,
                                          RerankStage<kQueries>* stages,
                                          const RerankLoads<kQueries>& loads, const Rows& rows) {
  loads.start(stages[0], 0, rows.values);
  cp_async_commit();
  int now = 0;
#pragma unroll 1
  for (int64_t c = 0; c < rows.depth; c += kRerankDepth) {
    const int64_t next = c + kRerankDepth;
    if (next < rows.depth) loads.start(stages[now ^ 1], next, rows.values);
    cp_async_commit();
    cp_async_wait<kRerankStages - 1>();
    __syncwarp();  // this stage has arrived for all lanes
    sums.add(stages[now]);
    if (next % kSumChannels == 0) sums.end_chain();
    __syncwarp();  // and all are done with it
    now ^= 1;
  }
}

struct RerankCounts {
  int listed;
  int valued[kSelectWarps];  // candidates of every row
};

// The values of the pairs of the list's candidates [first, first + kWarpCandidates), by one warp.
// They take the place of the candidates' scores.
template <KnnMetric kMetric, int kQueries>
__device__ __forceinline__ void find_values(const Rows& rows, const Chunk& chunk, int64_t first_row,
                                            const Candidates& candidates,
                                            RerankMemory<kQueries>& memory, RerankCounts& counts,
                                            int first, float unscale) {
  const int listed = counts.listed, lane = lane_id();
  const int64_t first_query = chunk.first + first_row, last_query = chunk.last - 1;
  using Loads = RerankLoads<kQueries>;
  const auto piece_of = [&](int64_t row) {
    return rows.values + row * rows.depth + Loads::piece() * 4;
  };
  Loads loads;
#pragma unroll
  for (int h = 0; h < Loads::kTimes; ++h) {
    const int at = first + Loads::row() + Loads::kRows * h;
    loads.candidates[h] = at < listed ? piece_of(memory.row(at)) : nullptr;
  }
  loads.query =
      Loads::row() < kQueries ? piece_of(min(first_query + Loads::row(), last_query)) : nullptr;
  PairSums<kMetric, kQueries> sums = {};
  sum_pairs(sums, memory.stages(threadIdx.x / kWarp), loads, rows);

#pragma unroll
  for (int m = 0; m < kLaneCandidates; ++m) {
    const int at = first + kWarp * m + lane;
    const int j = at < listed ? static_cast<int>(memory.row(at)) : 0;
    const unsigned members = at < listed ? memory.members(at) : 0;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const bool member = members >> q & 1;
      const unsigned all = __ballot_sync(kAllLanes, member);
      int base = 0;
      if (lane == 0 && all) base = atomicAdd(&counts.valued[q], __popc(all));
      base = __shfl_sync(kAllLanes, base, 0) + __popc(all & lanes_below(lane));
      if (!member) continue;
      const int64_t i = first_query + q, to = (first_row + q) * candidates.capacity + base;
      const float value = value_of<kMetric>(rows, sums.total[m][q], i, j, unscale);
      candidates.score[to] = settled<kMetric>(rows, value, i, j);
      candidates.index[to] = j;
    }
  }
}

// Blocks on a multiprocessor at least. ptxas needs more registers for Blackwell's than four leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRerankBlocks = 3;
#else
constexpr int kRerankBlocks = 4;
#endif

// Rows of the chunk, each the `Owner`'s: results, or a place on the list of rows to redo. `size`:
// the most candidates of a row that get their values, a power of two and at least kSelectThreads.
template <KnnMetric kMetric, class Owner>
__global__ void __launch_bounds__(kSelectThreads, kRerankBlocks)
    rerank_rows(Rows rows, Estimates estimates, Chunk chunk, Candidates candidates, int size,
                Output out) {
  constexpr int kQueries = Owner::kRows;
  RerankMemory<kQueries> memory(size);
  RerankCounts& counts = block_shared<RerankCounts>();
  const int q = Owner::in_block(), k = static_cast<int>(out.k);
  const int64_t first_row = int64_t{blockIdx.x} * kQueries, r = first_row + q;
  const Shortlist mine = shortlist<kMetric, Owner>(rows, estimates, chunk, candidates, r, size, k,
                                                   memory.orders(q, candidates.capacity));
  if (threadIdx.x == 0) counts.listed = 0;
  if (threadIdx.x < kQueries) counts.valued[threadIdx.x] = 0;
  __syncthreads();  // the scores are done with
  if constexpr (kQueries > 1) {
    memory.clear_table();
    __syncthreads();
  }
  for (int c = Owner::thread(); c < mine.count; c += Owner::kThreads) {
    const int64_t at = r * candidates.capacity + c;
    if (order_of(candidates.score[at]) > mine.last) continue;
    const unsigned j = static_cast<unsigned>(candidates.index[at]);
    if constexpr (kQueries > 1) {
      memory.join(j, q);
    } else {
      memory.row(atomicAdd(&counts.listed, 1)) = j;
    }
  }
  __syncthreads();
  if constexpr (kQueries > 1) {
    memory.list_table(counts.listed);
    __syncthreads();
  }
  const float unscale = unscale_of<kMetric>(rows);
  for (int first = threadIdx.x / kWarp * kWarpCandidates; first < counts.listed;
       first += kSelectWarps * kWarpCandidates)
    find_values<kMetric, kQueries>(rows, chunk, first_row, candidates, memory, counts, first,
                                   unscale);
  __syncthreads();
  const int64_t i = chunk.first + r;
  if (i >= chunk.last || (mine.count == 0 && rows.present[i])) return;
  const int found = counts.valued[q];
  uint64_t* keys = memory.keys(q);
  for (int c = Owner::thread(); c < found; c += Owner::kThreads) {
    const int64_t at = r * candidates.capacity + c;
    keys[c] = sort_key(candidates.score[at], candidates.index[at]);
  }
  if (found > 0)
    sort_keys<Owner, Owner::kWarps == 1 ? 2 : 8, kMostReranked<Owner> / Owner::kThreads>(keys,
                                                                                         found);
  write_places<kMetric, Owner>(out, i, 0, out.k, keys, min(found, k));
}

}  // namespace nefkern::cuda
