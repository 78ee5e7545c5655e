// The order of results, as integer keys; the lowest keys of a stream; results from keys.
#pragma once

#include "cuda/knn_rows.cuh"

namespace nefkern::cuda {

constexpr int kSelectThreads = 128;
constexpr int kSelectEach = 4;  // keys a thread looks at between barriers
constexpr int kSelectChunk = kSelectThreads * kSelectEach;
constexpr uint64_t kNoKey = ~uint64_t{0};

// Ascending keys: value descending, then index ascending. -0 counts as 0.
__device__ __forceinline__ uint64_t sort_key(float value, int index) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  const unsigned ascending = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<unsigned>(index);
}

__device__ __forceinline__ float key_value(uint64_t key) {
  const unsigned ascending = ~static_cast<unsigned>(key >> 32);
  return __uint_as_float(ascending ^ (ascending >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ int key_index(uint64_t key) {
  return static_cast<int>(static_cast<unsigned>(key));
}

// Sorts `count` keys (bitonic). There is room for the next power of two; begins and ends with a
// barrier of the block.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  int size = 1;
  while (size < count) size *= 2;
  const int threads = blockDim.x;
  for (int i = count + threadIdx.x; i < size; i += threads) keys[i] = kNoKey;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += threads) {
        const int low = (pair & ~(stride - 1)) * 2 + (pair & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Keys a block can hold to select the `keep` lowest.
constexpr int selection_size(int64_t keep) {
  int size = 1;
  while (size < keep + kSelectChunk) size *= 2;
  return size;
}

struct SelectionCount {
  int appended;
};

// The `keep` lowest of key_of(0), ..., key_of(total - 1) that are greater than `floor`, sorted into
// keys[0 .. result). Keys differ, but for kNoKey, which is never among them. Keys that may still be
// among the lowest are appended; when the room ends, sorting it raises the bar for all others.
template <class KeyOf>
__device__ __forceinline__ int select_lowest(uint64_t* keys, int size, int keep, uint64_t floor,
                                             int64_t total, const KeyOf& key_of) {
  int& appended = block_shared<SelectionCount>().appended;
  uint64_t bar = kNoKey;
  __syncthreads();  // keys and the count may be in use still
  if (threadIdx.x == 0) appended = 0;
  __syncthreads();
  for (int64_t first = 0; first < total; first += kSelectChunk) {
    bool full = false;
    for (int u = 0; u < kSelectEach; ++u) {
      const int64_t at = first + u * kSelectThreads + threadIdx.x;
      const uint64_t key = at < total ? key_of(at) : kNoKey;
      if (key >= bar || key <= floor) continue;
      const int slot = atomicAdd(&appended, 1);
      keys[slot] = key;
      full = full || slot >= size - kSelectChunk;
    }
    if (__syncthreads_or(full)) {
      sort_keys(keys, appended);
      bar = keys[keep - 1];
      if (threadIdx.x == 0) appended = keep;
      __syncthreads();
    }
  }
  __syncthreads();
  const int count = appended;
  sort_keys(keys, count);
  return min(count, keep);
}

// ---- results ----

struct Output {
  float* values;  // [n, k]
  int* indices;   // [n, k]
  int64_t k;
  int64_t keep;        // places found in one pass
  int64_t candidates;  // the row that has index 0
};

// Writes places [first, last) of row i: `found` sorted keys, and marks for the missing ones.
template <KnnMetric kMetric>
__device__ __forceinline__ void write_places(const Output& out, int64_t i, int64_t first,
                                             int64_t last, const uint64_t* keys, int found) {
  for (int64_t place = first + threadIdx.x; place < last; place += blockDim.x) {
    const bool there = place - first < found;
    const uint64_t key = there ? keys[place - first] : kNoKey;
    const float value = there ? key_value(key) : -kNothing;
    out.values[i * out.k + place] = kMetric == KnnMetric::kEuclidean ? -value + 0.0f : value;
    out.indices[i * out.k + place] = there ? key_index(key) - static_cast<int>(out.candidates) : -1;
  }
}

// All k places of row i from a stream of its candidates' keys: `keep` at a time, each time those
// after the last. So any k works, at the cost of ceil(k / keep) passes.
template <KnnMetric kMetric, class KeyOf>
__device__ __forceinline__ void write_lowest(const Output& out, int64_t i, uint64_t* keys, int size,
                                             int64_t total, const KeyOf& key_of) {
  uint64_t floor = 0;  // the key of a NaN: below all
  for (int64_t first = 0; first < out.k; first += out.keep) {
    const int keep = static_cast<int>(min(out.k - first, out.keep));
    const int found = select_lowest(keys, size, keep, floor, total, key_of);
    // Once the candidates are exhausted only marks are left to write.
    const int64_t last = found < keep ? out.k : first + keep;
    write_places<kMetric>(out, i, first, last, keys, found);
    if (found < keep) return;
    floor = keys[found - 1];
  }
}

}  // namespace nefkern::cuda
