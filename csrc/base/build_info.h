// How this library was built: included once, by bindings.cpp.
#pragma once

#include <ATen/Version.h>
#include <torch/version.h>

#include <map>
#include <string>

#if defined(__clang__)
#define BIGRAMX_COMPILER "Clang " __clang_version__
#else
#define BIGRAMX_COMPILER "GCC " __VERSION__
#endif

#if defined(_OPENMP)
#define BIGRAMX_PARALLEL "OpenMP"
#else
#define BIGRAMX_PARALLEL "none"
#endif

// The architectures for which setup.py has the kernels in cuda/ compiled.
#if !defined(BIGRAMX_CUDA_ARCHITECTURES)
#define BIGRAMX_CUDA_ARCHITECTURES ""
#endif

namespace bigramx {

static_assert(sizeof(void*) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "bigramx needs a processor with 64-bit addresses and the least significant byte first");

inline std::map<std::string, std::string> build_info() {
    return {{"compiler", BIGRAMX_COMPILER},
            {"parallel", BIGRAMX_PARALLEL},
            {"cpu_capability", at::get_cpu_capability()},
            {"cuda_architectures", BIGRAMX_CUDA_ARCHITECTURES},
            {"torch_version", TORCH_VERSION}};
}

}  // namespace bigramx
