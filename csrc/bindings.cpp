// The extension module: importing it registers the operators; to Python it tells how it was built.
// Nothing but Python's limited API of 3.10, so that one build serves every later version.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/isa.h"

#define NEFKERN_TEXT2(x) #x
#define NEFKERN_TEXT(x) NEFKERN_TEXT2(x)

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  using namespace nefkern::cpu;
#if defined(NEFKERN_CUDA_VERSION)
  return Py_BuildValue("{ss ss ss ss ss ss}",
#else
  return Py_BuildValue("{ss ss ss ss sO ss}",
#endif
                       "compiler", NEFKERN_TEXT(NEFKERN_COMPILER),    //
                       "torch", NEFKERN_TEXT(NEFKERN_TORCH_VERSION),  //
                       "version", NEFKERN_TEXT(NEFKERN_VERSION),      //
                       "isa", isa_name(best_isa()),                   //
#if defined(NEFKERN_CUDA_VERSION)
                       "cuda", NEFKERN_TEXT(NEFKERN_CUDA_VERSION),  //
                       "cuda_architectures", NEFKERN_CUDA_ARCHITECTURES);
#else
                       "cuda", Py_False,  //
                       "why_no_cuda", NEFKERN_WHY_NO_CUDA);
#endif
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "How the extension was built, as a dict."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "nefkern's compiled operators; see torch.ops.nefkern_native",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
