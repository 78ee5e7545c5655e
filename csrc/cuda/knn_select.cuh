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

// ---- sort ----

// What a place takes of its key and of the one it is compared with.
__device__ __forceinline__ uint64_t chosen(uint64_t mine, uint64_t other, bool least) {
  return (mine < other) == least ? mine : other;
}

__device__ __forceinline__ void put_in_order(uint64_t& a, uint64_t& b, bool ascending) {
  const uint64_t least = a < b ? a : b, most = a < b ? b : a;
  a = ascending ? least : most;
  b = ascending ? most : least;
}

// Compares the keys of threads `distance` (a power of two) apart, place by place; this one keeps
// the least or the greatest.
template <class Group, int kEach>
__device__ __forceinline__ void compare_threads(uint64_t (&key)[kEach], uint64_t* room,
                                                int distance, bool least) {
  if constexpr (Group::kWarps > 1) {
    if (distance >= kWarp) {
      const int thread = Group::thread();
#pragma unroll
      for (int e = 0; e < kEach; ++e) room[e * Group::kThreads + thread] = key[e];
      Group::sync();
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        key[e] = chosen(key[e], room[e * Group::kThreads + (thread ^ distance)], least);
      return Group::sync();
    }
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    key[e] = chosen(key[e], __shfl_xor_sync(kAllLanes, key[e], distance), least);
}

// Bitonic sort of kEach neighbouring keys a thread, in registers: two of a thread are compared for
// nothing, two of a warp by shuffles, others through `room`, which holds all.
template <class Group, int kEach>
__device__ __forceinline__ void sort_registers(uint64_t (&key)[kEach], uint64_t* room) {
  const int thread = Group::thread();
#pragma unroll
  for (int run = 2; run < kEach; run *= 2)
#pragma unroll
    for (int stride = run / 2; stride > 0; stride /= 2)
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        if ((e & stride) == 0) put_in_order(key[e], key[e | stride], (e & run) == 0);
#pragma unroll 1
  for (int run = kEach > 1 ? kEach : 2; run <= kEach * Group::kThreads; run *= 2) {
    const bool ascending = (thread * kEach & run) == 0;
#pragma unroll 1
    for (int distance = run / 2 / kEach; distance > 0; distance /= 2)
      compare_threads<Group>(key, room, distance, ((thread & distance) == 0) == ascending);
#pragma unroll
    for (int stride = kEach / 2; stride > 0; stride /= 2)
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        if ((e & stride) == 0) put_in_order(key[e], key[e | stride], ascending);
  }
}

// Where the sorted key of a place is on its way to it: sixteen threads' keys in different banks.
__device__ __forceinline__ int passing_place(int place) { return place ^ (place >> 4 & 15); }

// Sorts `count` keys, at most kMostEach a thread. There is room for the next power of two, and for
// kEach a thread. Begins and ends with a barrier of the group.
template <class Group, int kEach, int kMostEach>
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  constexpr int kThreads = Group::kThreads;
  if constexpr (kEach < kMostEach) {
    if (count > kEach * kThreads) return sort_keys<Group, 2 * kEach, kMostEach>(keys, count);
  }
  uint64_t key[kEach];
  Group::sync();
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int at = e * kThreads + Group::thread();
    key[e] = at < count ? keys[at] : kNoKey;
  }
  sort_registers<Group>(key, keys);
  Group::sync();
#pragma unroll
  for (int e = 0; e < kEach; ++e) keys[passing_place(Group::thread() * kEach + e)] = key[e];
  Group::sync();
#pragma unroll
  for (int e = 0; e < kEach; ++e) key[e] = keys[passing_place(e * kThreads + Group::thread())];
  Group::sync();
#pragma unroll
  for (int e = 0; e < kEach; ++e) keys[e * kThreads + Group::thread()] = key[e];
  Group::sync();
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

// The orders of a chunk of candidates are in registers, where bisection, at which
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
  static constexpr int kMinBlocks = kRoom > 1024 ? 4 : 5;

  // Shared memory of a block.
  static constexpr size_t bytes() { return kRows * sizeof(Memory); }

  __device__ RegisterSelector() : memory_(dynamic_shared<Memory>()[Group::in_block()]) {}

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
    sort_keys<Group, 1, kMostKept / Group::kThreads>(memory_.keys, count_);
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
using LargeSelector = RegisterSelector<WholeBlock, 4096>;

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
  Selector selector;
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
