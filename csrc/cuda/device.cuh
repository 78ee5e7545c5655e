// What kernels need beyond plain CUDA C++, each a function of a line or two: shared memory,
// launches, asynchronous copies and tensor cores. tests/emulator/device_twins.h has a twin of each.
#pragma once

#include "cuda/runtime.h"

#if !defined(NEFKERN_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/limits.h"

namespace nefkern::cuda {

// The block's shared variable of type T: one a type, uninitialised, at most kMaxStaticShared in
// all.
template <class T>
__device__ __forceinline__ T& block_shared() {
  static_assert(sizeof(T) <= kMaxStaticShared);
  __shared__ T variable;
  return variable;
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char nefkern_dynamic_shared[];
  return reinterpret_cast<T*>(nefkern_dynamic_shared);
}

// Launches kernel(args...); an empty grid is no launch.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking - kMaxStaticShared) {
    // Always the same number: host threads that launch one kernel with different needs don't take
    // each other's permission away.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxDynamicShared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// ---- asynchronous copies of 16 aligned bytes from global to shared memory ----

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Writes zeros where the source is not in bounds; it is not read then.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global,
                                            bool in_bounds = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(in_bounds ? 16 : 0)
               : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits for all but the newest kPending groups of this thread; others' need a barrier besides.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- tensor cores: d = a b + c on a warp's fragments, laid out as the PTX manual says ----

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8
// of matrix l / 8, and receives two elements of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

}  // namespace nefkern::cuda
#endif
