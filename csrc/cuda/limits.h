// A block's shared memory, by what every GPU from compute capability 8.0 on has.
#pragma once

#include <cstddef>

namespace nefkern::cuda {

// Static and dynamic together, as long as a launch does not ask for more.
constexpr size_t kSharedWithoutAsking = 48 << 10;
// And where it does: 8.6 and 8.9 have the least.
constexpr size_t kMaxShared = 99 << 10;
constexpr size_t kMaxStaticShared = 17 << 10;
constexpr size_t kMaxDynamicShared = kMaxShared - kMaxStaticShared;

}  // namespace nefkern::cuda
