// Threads of a program without PyTorch: OpenMP's where the compiler has it, else one.
#include <algorithm>

#include "cpu/parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nefkern::cpu {

#if defined(_OPENMP)

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context) {
  const int64_t size = end - begin;
  const int64_t ranges = std::min(num_threads(), size / std::max<int64_t>(grain, 1));
  if (ranges <= 1) {
    if (size > 0) function(begin, end, context);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(ranges)) schedule(static, 1)
  for (int64_t r = 0; r < ranges; ++r)
    function(begin + size * r / ranges, begin + size * (r + 1) / ranges, context);
}

// One inside of a parallel region: threads don't start threads.
int64_t num_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

#else

void parallel_ranges(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  if (begin < end) function(begin, end, context);
}

int64_t num_threads() { return 1; }

#endif

}  // namespace nefkern::cpu
