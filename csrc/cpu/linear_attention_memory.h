// Sizes, blocks of tokens and workspaces of linear attention.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/linear_attention.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// Tokens worked on at a time: their features and values stay in the first-level cache beside the
// [D, E] state.
constexpr int64_t kTile = 32;

// Channels as they lie in the workspace: rows padded to whole vectors.
struct Sizes {
  explicit Sizes(const LinearAttentionArgs& args)
      : d(args.channels),
        e(args.value_channels),
        d_pad(round_up(d)),
        e_pad(round_up(e)),
        state(d * e_pad) {}

  // What a thread needs at most, whichever pass it works on: states and tiles, each as floats and
  // as factors of products, and some rows.
  int64_t workspace() const {
    return 4 * round_up(d_pad * e_pad) + 4 * kTile * (d_pad + e_pad) + 4 * d_pad;
  }

  int64_t d, e, d_pad, e_pad;
  int64_t state;  // floats of a padded [D, E] state
};

// Tokens are summed in blocks whose bounds depend on their number only, never on the threads, and
// the blocks' sums are added in order.
struct Blocks {
  explicit Blocks(int64_t n) : tokens(n) {
    const int64_t size = n / 64 > 512 ? n / 64 : 512;
    count = n ? (n + size - 1) / size : 0;
  }
  int64_t begin(int64_t block) const { return part_begin(tokens, count, block); }
  int64_t tokens, count;
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 127) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  return Buffer(static_cast<float*>(memory));
}

// Hands out consecutive pieces of a buffer, each aligned as Vec.
class Carver {
 public:
  explicit Carver(float* memory) : next_(memory) {}
  template <class T = float>
  T* take(int64_t count) {
    static_assert(sizeof(T) == sizeof(float));
    float* piece = next_;
    next_ += round_up(count);
    return reinterpret_cast<T*>(piece);
  }

 private:
  float* next_;
};

// Calls f(piece, workspace of `floats`) for every piece, on all threads.
template <class F>
void with_workspace(int64_t pieces, int64_t floats, const F& f) {
  if (pieces <= 0) return;
  const int64_t threads = num_threads(), workers = threads < pieces ? threads : pieces;
  const Buffer memory = allocate(workers * floats);
  for_each_piece(pieces, workers,
                 [&](int64_t piece, int64_t worker) { f(piece, memory.get() + worker * floats); });
}

template <class T>
void fill(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

}  // namespace
}  // namespace nefkern::cpu::NEFKERN_ISA
