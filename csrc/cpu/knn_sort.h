// The order of results: value descending, then index ascending, as one 64-bit key.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/knn_memory.h"

namespace nefkern::cpu::NEFKERN_ISA {

// A row's k best so far are sorted by this key: value descending, then index ascending.
inline uint64_t sort_key(float value, int32_t index) {
  const float positive_zero = value + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  const uint32_t ascending = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(index);
}

inline float key_value(uint64_t key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ascending ^ (ascending >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int32_t key_index(uint64_t key) { return static_cast<int32_t>(static_cast<uint32_t>(key)); }

// Sorts keys by ascending key: buckets of about one key by the value's place between the extremes,
// then an insertion sort that finds little left to do. Crowded buckets are sorted by themselves.
class KeySorter {
 public:
  explicit KeySorter(int64_t capacity) : scratch_(capacity), end_(capacity + 1) {}

  void sort(uint64_t* keys, int64_t count) {
    if (count > kCrowd) distribute(keys, count);
    for (int64_t c = 1; c < count; ++c) {
      const uint64_t key = keys[c];
      int64_t at = c;
      for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
      keys[at] = key;
    }
  }

 private:
  static constexpr int64_t kCrowd = 24;

  // Afterwards every key is at most kCrowd places from its own, or exactly there.
  void distribute(uint64_t* keys, int64_t count) {
    float low = key_value(keys[0]), high = low;
    for (int64_t c = 1; c < count; ++c) {
      low = std::min(low, key_value(keys[c]));
      high = std::max(high, key_value(keys[c]));
    }
    const float scale = static_cast<float>(count - 1) / (high - low);
    if (!std::isfinite(scale) || !std::isfinite(low)) return sort_all(keys, keys + count);
    const auto bucket = [&](uint64_t key) {  // rises as the value falls, whatever the rounding
      return std::min<int64_t>(static_cast<int64_t>((high - key_value(key)) * scale), count - 1);
    };
    std::fill(end_.data(), end_.data() + count + 1, 0);
    for (int64_t c = 0; c < count; ++c) ++end_[bucket(keys[c]) + 1];
    for (int64_t b = 0; b < count; ++b) end_[b + 1] += end_[b];
    for (int64_t c = 0; c < count; ++c) scratch_[end_[bucket(keys[c])]++] = keys[c];
    for (int64_t b = 0, begin = 0; b < count; begin = end_[b++])
      if (end_[b] - begin > kCrowd) sort_all(scratch_.data() + begin, scratch_.data() + end_[b]);
    std::copy(scratch_.data(), scratch_.data() + count, keys);
  }

  static void sort_all(uint64_t* begin, uint64_t* end) {
    std::sort(begin, end, [](uint64_t a, uint64_t b) { return a < b; });
  }

  Array<uint64_t> scratch_;
  Array<int32_t> end_;
};

}  // namespace nefkern::cpu::NEFKERN_ISA
