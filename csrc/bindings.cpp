// The extension module: importing it registers the operators; to Python it tells how it was built.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

#define NEFKERN_TEXT2(x) #x
#define NEFKERN_TEXT(x) NEFKERN_TEXT2(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "nefkern's compiled operators; see torch.ops.nefkern_native";
  m.def("build_info", [] {
    using namespace nefkern::cpu;
    py::dict info;
    info["compiler"] = NEFKERN_TEXT(NEFKERN_COMPILER);
    info["torch"] = NEFKERN_TEXT(NEFKERN_TORCH_VERSION);
    info["version"] = NEFKERN_TEXT(NEFKERN_VERSION);
    info["isa"] = isa_name(best_isa());
#if defined(NEFKERN_CUDA_VERSION)
    info["cuda"] = NEFKERN_TEXT(NEFKERN_CUDA_VERSION);
    info["cuda_architectures"] = NEFKERN_CUDA_ARCHITECTURES;
#else
    info["cuda"] = false;
    info["why_no_cuda"] = NEFKERN_WHY_NO_CUDA;
#endif
    return info;
  });
}
