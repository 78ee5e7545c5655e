// Kernels' threads are PyTorch's: torch.set_num_threads holds, and no second pool is started.
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace nefkern::cpu {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                     void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t b, int64_t e) { function(b, e, context); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace nefkern::cpu
