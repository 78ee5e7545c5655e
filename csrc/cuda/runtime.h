// The CUDA runtime's types, or the emulator's (tests/emulator), which runs kernels on the
// processor.
#pragma once

#if defined(NEFKERN_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_runtime_api.h>
#endif
