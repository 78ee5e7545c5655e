// How work is dealt out to threads, whoever starts them.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"

namespace nefkern::cpu {

// Cuts [begin, end) into ranges of at least `grain` items, one a thread at most, and lets
// in_threads(count, run) call run(0) to run(count - 1), each in a thread.
template <class InThreads>
void cut_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context,
                const InThreads& in_threads) {
  const int64_t size = end - begin;
  const int64_t count = std::min(num_threads(), size / std::max<int64_t>(grain, 1));
  if (count <= 1) {
    if (size > 0) function(begin, end, context);
    return;
  }
  in_threads(count, [=](int64_t r) {
    function(begin + size * r / count, begin + size * (r + 1) / count, context);
  });
}

}  // namespace nefkern::cpu
