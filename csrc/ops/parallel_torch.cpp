// Kernels' threads are PyTorch's: torch.set_num_threads holds, and no second pool is started.
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

#if defined(__SANITIZE_THREAD__)
#include <algorithm>
#include <thread>
#include <vector>
#endif

namespace nefkern::cpu {

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer does not see who waits for whom in PyTorch's pool, which was built without it,
// and would take every result for a race: threads of the kernels' own, which begin and end here.
namespace {
thread_local bool inside = false;
}

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context) {
  const int64_t size = end - begin;
  const int64_t ranges = std::min(num_threads(), size / std::max<int64_t>(grain, 1));
  if (ranges <= 1) {
    if (size > 0) function(begin, end, context);
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < ranges; ++r)
    threads.emplace_back([=] {
      inside = true;
      function(begin + size * r / ranges, begin + size * (r + 1) / ranges, context);
    });
  for (std::thread& thread : threads) thread.join();
}

int64_t num_threads() { return inside ? 1 : torch::stable::get_num_threads(); }

#else

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t b, int64_t e) { function(b, e, context); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

#endif

}  // namespace nefkern::cpu
