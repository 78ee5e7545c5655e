# Decides whether the CUDA kernels are built, and says why not in one line.
#
# In:  NEFKERN_CUDA                auto: where it can be; 0: never; require: fail where it cannot be
#      TORCH_CUDA_ARCH_LIST        as PyTorch's: "8.0;9.0a;10.0+PTX"; the environment's where it is
#                                  set, and remembered; unset: this machine's GPUs, or all
#      NEFKERN_TORCH_DIR           the torch that the extension is for (unset: none)
# Out: NEFKERN_HAS_CUDA, NEFKERN_WHY_NO_CUDA, NEFKERN_CUDA_ARCHITECTURES, NEFKERN_NVCC_VERSION, the
#      language CUDA
set(NEFKERN_CUDA "auto" CACHE STRING "Build the CUDA kernels: auto, 0 or require")
set(NEFKERN_HAS_CUDA OFF)

# NEFKERN_NVCC and NEFKERN_NVCC_VERSION, if a compiler is there.
macro(nefkern_find_nvcc)
  find_program(NEFKERN_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(NEFKERN_NVCC)
    execute_process(COMMAND ${NEFKERN_NVCC} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" ignored "${nvcc_says}")
    set(NEFKERN_NVCC_VERSION "${CMAKE_MATCH_1}")
  endif()
endmacro()

# The CUDA version that torch was built with; empty for a CPU build.
macro(nefkern_torch_cuda_version result)
  file(STRINGS ${NEFKERN_TORCH_DIR}/version.py torch_cuda_line REGEX "^cuda")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" ${result} "${torch_cuda_line}")
endmacro()

# The architectures of this machine's GPUs that the kernels and nvcc know, as PyTorch's list; empty
# without any, or where NVIDIA's driver is not installed.
macro(nefkern_gpus_present result)
  set(${result} "")
  find_program(NEFKERN_NVIDIA_SMI nvidia-smi)
  if(NEFKERN_NVIDIA_SMI)
    execute_process(COMMAND ${NEFKERN_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE smi_says RESULT_VARIABLE smi_failed ERROR_QUIET TIMEOUT 60)
    execute_process(COMMAND ${NEFKERN_NVCC} --list-gpu-code OUTPUT_VARIABLE nvcc_knows ERROR_QUIET)
    if(NOT smi_failed)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" ${result} "${smi_says}")
      list(REMOVE_DUPLICATES ${result})
    endif()
    foreach(one IN LISTS ${result})
      string(REPLACE "." "" number "${one}")
      if(number LESS 80 OR NOT "${nvcc_knows}" MATCHES "sm_${number}[^0-9]")
        list(REMOVE_ITEM ${result} ${one})
      endif()
    endforeach()
    string(REPLACE "9.0" "9.0a" ${result} "${${result}}")
  endif()
endmacro()

# PyTorch's list of compute capabilities as CMake's list of architectures.
macro(nefkern_cuda_architectures result)
  if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    set(TORCH_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}" CACHE STRING "" FORCE)
  endif()
  set(TORCH_CUDA_ARCH_LIST "" CACHE STRING "Architectures of the CUDA kernels: 8.0;9.0a;10.0+PTX")
  set(wanted "${TORCH_CUDA_ARCH_LIST}")
  if(wanted STREQUAL "")
    nefkern_gpus_present(wanted)
  endif()
  if(NOT wanted STREQUAL "")  # asked for, or here
  elseif(NEFKERN_NVCC_VERSION VERSION_LESS 12.8)  # knows no Blackwell
    set(wanted "8.0;8.6;8.9;9.0a;9.0+PTX")
  else()
    set(wanted "8.0;8.6;8.9;9.0a;10.0+PTX")
  endif()
  # The generations that PyTorch has names for; what older ones need is left out below.
  foreach(named IN ITEMS "Turing=7.5" "Ampere+Tegra=8.7" "Ampere=8.0,8.6+PTX" "Ada=8.9+PTX"
                         "Hopper=9.0+PTX" "Blackwell=10.0,12.0+PTX")
    string(REGEX MATCH "^([^=]+)=(.+)$" ignored "${named}")
    string(REPLACE "${CMAKE_MATCH_1}" "${CMAKE_MATCH_2}" wanted "${wanted}")
  endforeach()
  string(REGEX REPLACE "[ ,]+" ";" wanted "${wanted}")
  set(${result})
  foreach(one IN LISTS wanted)
    if(NOT one MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries such as 9.0a or 10.0+PTX, got "
                          "${one}")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    if(CMAKE_MATCH_1 LESS 8)
      message(STATUS "nefkern: no CUDA kernels for compute capability ${one}: they need 8.0")
      continue()
    endif()
    set(with_ptx "${CMAKE_MATCH_4}")
    list(APPEND ${result} ${number}-real)
    if(with_ptx)
      list(APPEND ${result} ${number}-virtual)
    endif()
  endforeach()
endmacro()

# ---- why the CUDA kernels cannot be built; empty where they can be ----
set(NEFKERN_WHY_NO_CUDA "")
if(NEFKERN_CUDA)
  nefkern_find_nvcc()
  if(NEFKERN_TORCH_DIR)
    nefkern_torch_cuda_version(torch_cuda)
  endif()
endif()
string(REGEX MATCH "^[0-9]+" nvcc_major "${NEFKERN_NVCC_VERSION}")
if(NOT NEFKERN_CUDA)
  set(NEFKERN_WHY_NO_CUDA "NEFKERN_CUDA=${NEFKERN_CUDA}")
elseif(NEFKERN_SANITIZE)
  set(NEFKERN_WHY_NO_CUDA "sanitizers are for the processor's code")
elseif(NOT NEFKERN_NVCC_VERSION)
  set(NEFKERN_WHY_NO_CUDA "no nvcc found (CUDA_HOME, PATH, /usr/local/cuda)")
elseif(NEFKERN_NVCC_VERSION VERSION_LESS 12.0)
  set(NEFKERN_WHY_NO_CUDA "nvcc ${NEFKERN_NVCC_VERSION} is older than 12.0")
elseif(NEFKERN_TORCH_DIR AND NOT torch_cuda)
  set(NEFKERN_WHY_NO_CUDA "the PyTorch in ${NEFKERN_TORCH_DIR} is a CPU build")
elseif(NEFKERN_TORCH_DIR AND NOT torch_cuda MATCHES "^${nvcc_major}\\.")
  set(NEFKERN_WHY_NO_CUDA "nvcc is of CUDA ${NEFKERN_NVCC_VERSION}, PyTorch of CUDA ${torch_cuda}: install a \
CUDA toolkit ${torch_cuda} and set CUDA_HOME")
else()
  nefkern_cuda_architectures(NEFKERN_CUDA_ARCHITECTURES)
  if(NOT NEFKERN_CUDA_ARCHITECTURES)
    set(NEFKERN_WHY_NO_CUDA "TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST} names nothing from 8.0 on")
  else()
    include(CheckLanguage)
    set(ENV{CUDACXX} ${NEFKERN_NVCC})
    set(CMAKE_CUDA_ARCHITECTURES ${NEFKERN_CUDA_ARCHITECTURES})
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(NEFKERN_WHY_NO_CUDA "nvcc ${NEFKERN_NVCC_VERSION} does not compile a first program: cmake's log says why")
    endif()
  endif()
endif()

if(NOT NEFKERN_WHY_NO_CUDA)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(NEFKERN_HAS_CUDA ON)
  message(STATUS "nefkern: CUDA kernels by nvcc ${NEFKERN_NVCC_VERSION} for "
                 "${NEFKERN_CUDA_ARCHITECTURES}")
elseif(NEFKERN_CUDA AND NOT NEFKERN_CUDA STREQUAL "auto")
  message(FATAL_ERROR "nefkern: NEFKERN_CUDA=${NEFKERN_CUDA}, but CUDA kernels cannot be built: "
                      "${NEFKERN_WHY_NO_CUDA}")
else()
  message(STATUS "nefkern: without CUDA kernels: ${NEFKERN_WHY_NO_CUDA}")
endif()
