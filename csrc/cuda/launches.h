// What every launcher does on the host: kernels one after another on one stream, and an answer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.cuh"

namespace nefkern::cuda {

// How many tiles of `tile` cover `size`.
constexpr int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }
constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return tiles(size, multiple) * multiple;
}

// Enqueues work on a stream, up to the first error; none at all if `error` came before.
class Launches {
 public:
  explicit Launches(cudaStream_t stream, cudaError_t error = cudaSuccess)
      : stream_(stream), error_(error) {}

  // kernel<<<blocks, threads, shared_bytes>>>(args...); no blocks: no launch.
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
                  Args... args) {
    then([&](cudaStream_t stream) {
      return launch(kernel, dim3(grid_of(blocks)), dim3(threads), shared_bytes, stream, args...);
    });
  }
  void zero(void* memory, size_t bytes) {
    then([&](cudaStream_t stream) { return cudaMemsetAsync(memory, 0, bytes, stream); });
  }
  // step(stream) returns an error of its own.
  template <class Step>
  void then(const Step& step) {
    if (error_ == cudaSuccess) error_ = step(stream_);
  }
  cudaError_t error() const { return error_; }

 private:
  // More than 2^31 - 1 blocks are an error of the launch; cut to 32 bits they would be some others.
  static unsigned grid_of(int64_t blocks) {
    constexpr int64_t kTooMany = 0xffffffff;
    return static_cast<unsigned>(blocks < kTooMany ? blocks : kTooMany);
  }

  cudaStream_t stream_;
  cudaError_t error_;
};

}  // namespace nefkern::cuda
