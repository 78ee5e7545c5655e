// Lays arrays out in one allocation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nefkern::cuda {

// Started from a null pointer it only adds up how much is needed.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    const size_t begin = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ ? reinterpret_cast<T*>(memory_ + begin) : nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace nefkern::cuda
