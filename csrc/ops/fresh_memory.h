// Large results are fresh memory, which the system maps page by page as it is first written. In 4 KiB
// pages that costs more than many a kernel's own work; asking for huge pages makes it several times
// cheaper. Only a hint: where the system has none to give, nothing changes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nefkern {

inline void prefer_huge_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel() * fresh.element_size());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace nefkern
