// The one way kernels use threads. Kernels know no torch: the extension routes this to PyTorch's
// intra-op pool, a plain C++ program gets OpenMP or one thread.
#pragma once

#include <cstdint>

namespace nefkern::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function(begin, end, context) on disjoint ranges that cover [begin, end), at least `grain`
// items a thread. Exceptions must not leave the function.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context);
int64_t num_threads();

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_ranges(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace nefkern::cpu
