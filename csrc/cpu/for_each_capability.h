// Compiles the file BIGRAMX_KERNELS once for each CPU capability, in a namespace of its own, so that one
// binary serves every x86-64 machine. BIGRAMX_DISPATCH(kernel) is the one for this machine, as ATen chose: it
// follows at::get_cpu_capability(), and so ATEN_CPU_CAPABILITY.
//
// The target is set for our kernels alone, by pragma: compiled with -mavx512f, a whole file would also emit
// the inline functions of the standard library with AVX-512 in them, and the linker may keep those for
// everyone.

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bigramx {

// In what the kernels compute for a table of this type.
template <typename scalar_t>
using Accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

enum class Capability { portable, avx2, avx512 };

inline Capability cpu_capability() {
    static const Capability capability = [] {
        const std::string name = at::get_cpu_capability();
        if (name.rfind("AVX512", 0) == 0) return Capability::avx512;
        return name.rfind("AVX2", 0) == 0 ? Capability::avx2 : Capability::portable;
    }();
    return capability;
}

}  // namespace bigramx

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define BIGRAMX_CAPABILITY portable
#define BIGRAMX_VECTOR_BYTES 16
#include "simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_CAPABILITY
#undef BIGRAMX_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define BIGRAMX_CAPABILITY avx2
#define BIGRAMX_VECTOR_BYTES 32
#include "simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_CAPABILITY
#undef BIGRAMX_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define BIGRAMX_CAPABILITY avx512
#define BIGRAMX_VECTOR_BYTES 64
#include "simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_CAPABILITY
#undef BIGRAMX_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define BIGRAMX_DISPATCH(...)                                                                       \
    (::bigramx::cpu_capability() == ::bigramx::Capability::avx512 ? &::bigramx::avx512::__VA_ARGS__ \
     : ::bigramx::cpu_capability() == ::bigramx::Capability::avx2 ? &::bigramx::avx2::__VA_ARGS__   \
                                                                  : &::bigramx::portable::__VA_ARGS__)
#else
#define BIGRAMX_DISPATCH(...) (&::bigramx::portable::__VA_ARGS__)
#endif

#pragma GCC diagnostic pop
