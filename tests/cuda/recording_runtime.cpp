#include "recording_runtime.h"

#include <cstring>
#include <map>

namespace nefkern::recording {
namespace {

struct Kernel {
  std::string name;
  int asked = 0;
};

// By the address of the host's stub, which stands for the kernel in every call.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
Configuration pending;
cudaError_t last = cudaSuccess;

cudaError_t note(Event event) {
  const bool fails = static_cast<int64_t>(events().size()) == failing();
  events().push_back(std::move(event));
  if (!fails) return cudaSuccess;
  return last = cudaErrorLaunchFailure;
}

cudaError_t note_launch(const void* stub, dim3 grid, dim3 block, size_t shared,
                        cudaStream_t stream) {
  const Kernel& kernel = kernels().at(stub);
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return last = cudaErrorInvalidConfiguration;
  return note({"launch", kernel.name, grid, block, shared, kernel.asked, stream});
}

}  // namespace

std::vector<Event>& events() {
  static std::vector<Event> all;
  return all;
}
int64_t& failing() {
  static int64_t number = -1;
  return number;
}

}  // namespace nefkern::recording

using namespace nefkern::recording;

extern "C" {

// ---- what nvcc's code calls when a program starts, and around <<<>>> ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[stub].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

// ---- the runtime ----

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                               cudaStream_t stream) {
  return note_launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared,
                             cudaStream_t stream) {
  return note_launch(stub, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void**) {
  return note_launch(stub, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                     config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) kernels().at(stub).asked = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 80;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t stream) {
  return note({"memset", "", {0, 0, 0}, {0, 0, 0}, bytes, 0, stream});
}
cudaError_t cudaMemcpyAsync(void* to, const void*, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (kind == cudaMemcpyDeviceToHost) std::memset(to, 0, bytes);
  return note({"copy", "", {0, 0, 0}, {0, 0, 0}, bytes, 0, stream});
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return note({"synchronize", "", {0, 0, 0}, {0, 0, 0}, 0, 0, stream});
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
// An A100, as far as CUB asks.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 8, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 108, cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      return *value = 0x7fffffff, cudaSuccess;
    default:
      return *value = 0, cudaSuccess;
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  return *blocks = 4, cudaSuccess;
}

}  // extern "C"
