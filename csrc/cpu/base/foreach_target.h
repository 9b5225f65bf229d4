// Compiles the file BIGRAMX_KERNELS once for each CPU target (AVX-512, AVX2, portable), each in its own
// namespace, as foreach_target.h of Highway does: one binary serves every x86-64 machine.
// BIGRAMX_DISPATCH_TARGET(kernel) is the kernel for this machine. The choice is ATen's: it follows
// at::get_cpu_capability(), and thereby ATEN_CPU_CAPABILITY.
//
// A pragma sets the target for the kernels alone. With -mavx512f for a whole file, inline functions of the
// standard library would be compiled with AVX-512 too, and the linker might keep those copies for all
// machines.

#include <ATen/OpMathType.h>
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

namespace bigramx::cpu {

// The accumulation dtype of a table's dtype.
template <typename scalar_t>
using opmath_t = at::opmath_type<scalar_t>;

enum class Target { portable, avx2, avx512 };

inline Target cpu_target() {
    static const Target target = [] {
        const std::string name = at::get_cpu_capability();
        if (name.rfind("AVX512", 0) == 0) return Target::avx512;
        return name.rfind("AVX2", 0) == 0 ? Target::avx2 : Target::portable;
    }();
    return target;
}

}  // namespace bigramx::cpu

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define BIGRAMX_TARGET portable
#define BIGRAMX_VECTOR_BYTES 16
#include "cpu/base/simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_TARGET
#undef BIGRAMX_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define BIGRAMX_TARGET avx2
#define BIGRAMX_VECTOR_BYTES 32
#include "cpu/base/simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_TARGET
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
#define BIGRAMX_TARGET avx512
#define BIGRAMX_VECTOR_BYTES 64
#include "cpu/base/simd.h"
#include BIGRAMX_KERNELS
#undef BIGRAMX_TARGET
#undef BIGRAMX_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define BIGRAMX_DISPATCH_TARGET(...)                                                                       \
    (::bigramx::cpu::cpu_target() == ::bigramx::cpu::Target::avx512 ? &::bigramx::cpu::avx512::__VA_ARGS__ \
     : ::bigramx::cpu::cpu_target() == ::bigramx::cpu::Target::avx2                                        \
         ? &::bigramx::cpu::avx2::__VA_ARGS__                                                              \
         : &::bigramx::cpu::portable::__VA_ARGS__)
#else
#define BIGRAMX_DISPATCH_TARGET(...) (&::bigramx::cpu::portable::__VA_ARGS__)
#endif

#pragma GCC diagnostic pop
