// A CUDA runtime that records instead of running: the compiled launchers of csrc/cuda are linked to
// it in place of NVIDIA's, and what they ask of a GPU is seen without one. Device pointers may be
// made up, and sizes as large as can be: nothing is read.
//
// What is not here (allocation, device-wide synchronisation, events, ...) no launcher uses: linking
// would fail.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace nefkern::recording {

struct Event {
  std::string what;  // launch, memset, copy, synchronize
  std::string kernel;
  dim3 grid{0, 0, 0}, block{0, 0, 0};
  size_t bytes = 0;  // dynamic shared memory of a launch; of a memset or copy
  int asked = 0;     // the dynamic shared memory that this kernel may have by cudaFuncSetAttribute
  cudaStream_t stream = nullptr;
};

std::vector<Event>& events();
// The call with this number returns an error; -1: none does.
int64_t& failing();

}  // namespace nefkern::recording
