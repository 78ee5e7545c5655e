// The order of results, as integer keys; the lowest keys of a stream; results from keys.
#pragma once

#include "cuda/knn_rows.cuh"

namespace nefkern::cuda {

constexpr int kSelectThreads = 128;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr uint64_t kNoKey = ~uint64_t{0};
constexpr unsigned kNoOrder = ~0u;  // of what is no candidate; no number has it

// Ascending where the value descends. -0 counts as 0.
__device__ __forceinline__ unsigned order_of(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return ~(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u));
}

// Ascending keys: value descending, then index ascending.
__device__ __forceinline__ uint64_t key_of(unsigned order, int64_t index) {
  return static_cast<uint64_t>(order) << 32 | static_cast<unsigned>(index);
}
__device__ __forceinline__ uint64_t sort_key(float value, int index) {
  return key_of(order_of(value), index);
}

__device__ __forceinline__ float key_value(uint64_t key) {
  const unsigned ascending = ~static_cast<unsigned>(key >> 32);
  return __uint_as_float(ascending ^ (ascending >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ int key_index(uint64_t key) {
  return static_cast<int>(static_cast<unsigned>(key));
}

// ---- the warps that have a row ----

struct Exchange {
  uint2 part[2][kSelectWarps];
};

// kWarps neighbouring warps of a block of kSelectThreads: one, or all.
template <int kWarps_>
class Group {
 public:
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kSelectWarps / kWarps;  // groups of a block
  static_assert(kWarps == 1 || kWarps == kSelectWarps, "there are two barriers");

  static __device__ __forceinline__ int thread() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int warp() { return thread() / kWarp; }
  static __device__ __forceinline__ int in_block() { return threadIdx.x / kThreads; }
  static __device__ __forceinline__ void sync() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The sum over the group, and that over the warps before this one.
  __device__ __forceinline__ unsigned sum(unsigned value, unsigned& before) {
    value = __reduce_add_sync(kAllLanes, value);
    before = 0;
    if constexpr (kWarps > 1) {
      const uint2* part = exchange({value, 0});
      value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp()) before += part[w].x;
        value += part[w].x;
      }
    }
    return value;
  }
  __device__ __forceinline__ unsigned sum(unsigned value) {
    unsigned before;
    return sum(value, before);
  }

  __device__ __forceinline__ void extremes(unsigned& least, unsigned& most) {
    least = __reduce_min_sync(kAllLanes, least);
    most = __reduce_max_sync(kAllLanes, most);
    if constexpr (kWarps > 1) {
      const uint2* part = exchange({least, most});
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        least = min(least, part[w].x);
        most = max(most, part[w].y);
      }
    }
  }

 private:
  // Every warp's values. In turn in two places: who writes one has passed the barrier after which
  // all others had read it.
  __device__ __forceinline__ const uint2* exchange(uint2 value) {
    uint2* part = block_shared<Exchange>().part[turn_];
    turn_ ^= 1;
    if (lane_id() == 0) part[warp()] = value;
    sync();
    return part;
  }

  int turn_ = 0;
};

using Warp = Group<1>;
using WholeBlock = Group<kSelectWarps>;

// Sorts `count` keys (bitonic). There is room for the next power of two; begins and ends with a
// barrier of the group.
template <class Group>
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + Group::thread(); i < size; i += Group::kThreads) keys[i] = kNoKey;
  Group::sync();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = Group::thread(); pair < size / 2; pair += Group::kThreads) {
        const int low = (pair & ~(stride - 1)) * 2 + (pair & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      Group::sync();
    }
  }
}

// ---- selection ----
//
// A selector finds the `keep` lowest keys of a stream, those of order_of_candidate(0), ...,
// (total - 1) with the indices first_index, first_index + 1, ..., that are greater than `floor`,
// and leaves them sorted in keys(). It has kRows rows of a block under way, each by one `Group`.

__host__ __device__ constexpr int next_power_of_two(int64_t count) {
  int size = 1;
  while (size < count) size *= 2;
  return size;
}

// Few neighbours. The orders of a chunk of candidates are in registers, where bisection, at which
// every step counts those below a bound, finds what may be among the lowest; that is appended to a
// buffer, and once this is full, it is cut to about `keep` in the same way. At the end only about
// `keep` keys are sorted. Entries of the buffer are in the order of their indices, so that of equal
// ones the first are kept.
template <class Group_, int kRoom>
class RegisterSelector {
 public:
  using Group = Group_;
  static constexpr int kRows = Group::kRows;
  static constexpr int kMostKept = kRoom / 2;
  static constexpr int kChunk = 1024;
  static constexpr int kEach = kChunk / Group::kThreads, kRoomEach = kRoom / Group::kThreads;
  static constexpr int kMinBlocks = 5;

  // Shared memory of a block.
  static constexpr size_t bytes(int64_t) { return kRows * sizeof(Memory); }

  __device__ explicit RegisterSelector(int)
      : memory_(dynamic_shared<Memory>()[Group::in_block()]) {}

  __device__ __forceinline__ uint64_t* keys() { return memory_.keys; }

  template <class OrderOf>
  __device__ __forceinline__ int lowest(int keep, uint64_t floor, int64_t total,
                                        int64_t first_index, const OrderOf& order_of_candidate) {
    const int enough = next_power_of_two(keep);  // to sort as many costs no more
    unsigned limit = kNoOrder;                   // who comes now, and does not lie below, is late
    count_ = 0;
    Group::sync();  // the keys may be in use still
    for (int64_t first = 0; first < total; first += kChunk) {
      unsigned mine = 0;
#pragma unroll 2
      for (int e = 0; e < kEach; ++e) {
        const int64_t at = first + place<kEach>(e);
        unsigned order = at < total ? order_of_candidate(at) : kNoOrder;
        if (order >= limit || key_of(order, first_index + at) <= floor) order = kNoOrder;
        mine += order != kNoOrder;
        memory_.staged[place<kEach>(e)] = order;  // for this very thread
      }
      int found = group_.sum(mine);
      if (found == 0) continue;
      unsigned order[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) order[e] = memory_.staged[place<kEach>(e)];
      if (count_ + found > kRoom && count_ > enough) {
        limit = cut(keep, enough);
        found = count_below(order, limit);
      }
      Bound bound{limit, 0};
      if (count_ + found > kRoom) {
        bound = bisect(order, keep, enough);
        limit = bound.order;
      }
      append(order, bound, [&](int e) { return first_index + first + place<kEach>(e); });
    }
    Group::sync();
    if (count_ > enough) cut(keep, enough);
    sort_keys<Group>(memory_.keys, count_);
    return min(count_, keep);
  }

 private:
  struct Memory {
    uint64_t keys[kRoom];
    unsigned staged[kChunk];
  };

  // What is kept: orders below `order`, and of those equal to it the first `ties`.
  struct Bound {
    unsigned order;
    int ties;
  };

  // A thread's e-th place. A warp's are adjacent, so that indices ascend with warp, e and lane.
  template <int kCount>
  static __device__ __forceinline__ int place(int e) {
    return (Group::warp() * kCount + e) * kWarp + lane_id();
  }

  template <int kCount>
  __device__ __forceinline__ int count_below(const unsigned (&order)[kCount], unsigned bound) {
    unsigned below = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) below += order[e] < bound;
    return group_.sum(below);
  }

  // Keeps at least `keep`, at most `enough`, of more than these.
  template <int kCount>
  __device__ __forceinline__ Bound bisect(const unsigned (&order)[kCount], int keep, int enough) {
    unsigned low = kNoOrder, most = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      low = min(low, order[e]);
      if (order[e] != kNoOrder) most = max(most, order[e]);
    }
    group_.extremes(low, most);
    unsigned high = most + 1;
    int below_low = 0;  // fewer than `keep` lie below `low`, more than `enough` below `high`
    while (high - low > 1) {
      const unsigned middle = low + (high - low) / 2;
      const int below = count_below(order, middle);
      if (below < keep) {
        low = middle;
        below_low = below;
      } else if (below <= enough) {
        return {middle, 0};
      } else {
        high = middle;
      }
    }
    return {low, keep - below_low};
  }

  template <int kCount, class IndexOf>
  __device__ __forceinline__ void append(const unsigned (&order)[kCount], const Bound& bound,
                                         const IndexOf& index_of) {
    unsigned below = 0, equal = 0, equal_before = 0, before = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) below += order[e] < bound.order;
    if (bound.ties > 0) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) equal += order[e] == bound.order;
      equal = __reduce_add_sync(kAllLanes, equal);
      group_.sum(lane_id() == 0 ? equal : 0, equal_before);
      const int left = max(bound.ties - static_cast<int>(equal_before), 0);
      if (lane_id() == 0) below += min(static_cast<int>(equal), left);
    }
    const int total = group_.sum(below, before);
    const unsigned earlier = lanes_below(lane_id());
    int at = count_ + before;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      bool kept = order[e] < bound.order;
      if (bound.ties > 0) {
        const bool ties = order[e] == bound.order;
        const unsigned tied = __ballot_sync(kAllLanes, ties);
        kept =
            kept || (ties && static_cast<int>(equal_before) + __popc(tied & earlier) < bound.ties);
        equal_before += __popc(tied);
      }
      const unsigned all = __ballot_sync(kAllLanes, kept);
      if (kept) memory_.keys[at + __popc(all & earlier)] = key_of(order[e], index_of(e));
      at += __popc(all);
    }
    count_ += total;
  }

  // Cuts the buffer, which has more than `enough`; who comes later must lie below the result.
  __device__ __forceinline__ unsigned cut(int keep, int enough) {
    unsigned order[kRoomEach];
    int index[kRoomEach];
    Group::sync();
#pragma unroll
    for (int e = 0; e < kRoomEach; ++e) {
      const int at = place<kRoomEach>(e);
      const uint64_t key = at < count_ ? memory_.keys[at] : kNoKey;
      order[e] = static_cast<unsigned>(key >> 32);
      index[e] = key_index(key);
    }
    Group::sync();
    const Bound bound = bisect(order, keep, enough);
    count_ = 0;
    append(order, bound, [&](int e) { return index[e]; });
    return bound.order;
  }

  Memory& memory_;
  Group group_;
  int count_ = 0;
};

using WarpSelector = RegisterSelector<Warp, 128>;
using BlockSelector = RegisterSelector<WholeBlock, 1024>;

struct SelectionCount {
  int appended;
};

// Any number of neighbours. Keys that may still be among the lowest are appended; when the room
// ends, sorting it raises the bar for all others.
class SortingSelector {
 public:
  using Group = WholeBlock;
  static constexpr int kRows = 1;
  static constexpr int kEach = 4;  // keys a thread looks at between barriers
  static constexpr int kChunk = kSelectThreads * kEach;
  static constexpr int kMinBlocks = 6;

  static __host__ __device__ constexpr int size(int64_t keep) {
    return next_power_of_two(keep + kChunk);
  }
  static constexpr size_t bytes(int64_t keep) { return size(keep) * sizeof(uint64_t); }

  __device__ explicit SortingSelector(int keep) : size_(size(keep)) {}

  __device__ __forceinline__ uint64_t* keys() { return dynamic_shared<uint64_t>(); }

  template <class OrderOf>
  __device__ __forceinline__ int lowest(int keep, uint64_t floor, int64_t total,
                                        int64_t first_index, const OrderOf& order_of_candidate) {
    int& appended = block_shared<SelectionCount>().appended;
    uint64_t bar = kNoKey;
    __syncthreads();  // keys and the count may be in use still
    if (threadIdx.x == 0) appended = 0;
    __syncthreads();
    for (int64_t first = 0; first < total; first += kChunk) {
      bool full = false;
      for (int e = 0; e < kEach; ++e) {
        const int64_t at = first + e * kSelectThreads + threadIdx.x;
        const unsigned order = at < total ? order_of_candidate(at) : kNoOrder;
        const uint64_t key = key_of(order, first_index + at);
        if (order == kNoOrder || key >= bar || key <= floor) continue;
        const int slot = atomicAdd(&appended, 1);
        keys()[slot] = key;
        full = full || slot >= size_ - kChunk;
      }
      if (__syncthreads_or(full)) {
        sort_keys<Group>(keys(), appended);
        bar = keys()[keep - 1];
        if (threadIdx.x == 0) appended = keep;
        __syncthreads();
      }
    }
    __syncthreads();
    const int count = appended;
    sort_keys<Group>(keys(), count);
    return min(count, keep);
  }

 private:
  int size_;
};

// ---- results ----

struct Output {
  float* values;  // [n, k]
  int* indices;   // [n, k]
  int64_t k;
  int64_t keep;        // places found in one pass
  int64_t candidates;  // the row that has index 0
};

// Writes places [first, last) of row i: `found` sorted keys, and marks for the missing ones.
template <KnnMetric kMetric, class Group>
__device__ __forceinline__ void write_places(const Output& out, int64_t i, int64_t first,
                                             int64_t last, const uint64_t* keys, int found) {
  for (int64_t place = first + Group::thread(); place < last; place += Group::kThreads) {
    const bool there = place - first < found;
    const uint64_t key = there ? keys[place - first] : kNoKey;
    const float value = there ? key_value(key) : -kNothing;
    out.values[i * out.k + place] = kMetric == KnnMetric::kEuclidean ? -value + 0.0f : value;
    out.indices[i * out.k + place] = there ? key_index(key) - static_cast<int>(out.candidates) : -1;
  }
}

// All k places of row i from a stream of its candidates: `keep` at a time, each time those after
// the last. So any k works, at the cost of ceil(k / keep) passes.
template <KnnMetric kMetric, class Selector, class OrderOf>
__device__ __forceinline__ void write_lowest(const Output& out, int64_t i, int64_t total,
                                             int64_t first_index,
                                             const OrderOf& order_of_candidate) {
  Selector selector(static_cast<int>(min(out.k, out.keep)));
  uint64_t floor = 0;  // the key of a NaN: below all
  for (int64_t first = 0; first < out.k; first += out.keep) {
    const int keep = static_cast<int>(min(out.k - first, out.keep));
    const int found = selector.lowest(keep, floor, total, first_index, order_of_candidate);
    // Once the candidates are exhausted only marks are left to write.
    const int64_t last = found < keep ? out.k : first + keep;
    write_places<kMetric, typename Selector::Group>(out, i, first, last, selector.keys(), found);
    if (found < keep) return;
    floor = selector.keys()[found - 1];
  }
}

}  // namespace nefkern::cuda
