// Uninitialised arrays for the knn kernel's workspace.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa.h"

namespace nefkern::cpu::NEFKERN_ISA {

// Large arrays ask for huge pages: candidate buffers are touched all over, and with 4 KiB pages
// both the page faults and the TLB misses show in the profile.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    const int64_t alignment = bytes >= kHuge ? kHuge : 64;
    const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, rounded > 0 ? rounded : alignment));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= kHuge) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr int64_t kHuge = int64_t{1} << 21;
  T* data_;
};

}  // namespace nefkern::cpu::NEFKERN_ISA
