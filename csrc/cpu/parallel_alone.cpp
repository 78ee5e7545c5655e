// Threads of a program without PyTorch: OpenMP's where the compiler has it, else one.
#include "cpu/parallel.h"

#if defined(_OPENMP)
#include <omp.h>

#include "cpu/ranges.h"
#endif

namespace nefkern::cpu {

#if defined(_OPENMP)

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context) {
  cut_ranges(begin, end, grain, function, context, [](int64_t count, const auto& run) {
#pragma omp parallel for num_threads(static_cast<int>(count)) schedule(static, 1)
    for (int64_t r = 0; r < count; ++r) run(r);
  });
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
