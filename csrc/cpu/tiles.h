// Work in numbered pieces. Internal to kernel files: everything lives in the namespace of the
// instruction set being compiled, so that no copy can stand in for another one's.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// Calls f(piece, worker) once for every piece in [0, pieces); `worker` < workers names the thread's
// private workspace. Threads take the next piece when they finish one, so that neither a heavy
// piece nor a busy core keeps the others waiting. f's result must not depend on `worker`.
template <class F>
void for_each_piece(int64_t pieces, int64_t workers, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
      f(piece, begin);
  });
}

// Bounds of equal parts of [0, size): part p is [part_begin(p), part_begin(p + 1)).
inline int64_t part_begin(int64_t size, int64_t parts, int64_t p) {
  return size / parts * p + (p < size % parts ? p : size % parts);
}

}  // namespace
}  // namespace nefkern::cpu::NEFKERN_ISA
