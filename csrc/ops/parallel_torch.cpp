// Kernels' threads are PyTorch's: torch.set_num_threads holds, and no second pool is started.
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>

#include "cpu/ranges.h"
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
  cut_ranges(begin, end, grain, function, context, [](int64_t count, const auto& run) {
    std::vector<std::thread> threads;
    for (int64_t r = 0; r < count; ++r)
      threads.emplace_back([=] {
        inside = true;
        run(r);
      });
    for (std::thread& thread : threads) thread.join();
  });
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
