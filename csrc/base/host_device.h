// Marks functions that the CPU and GPU kernels share.
#pragma once

#if defined(__CUDACC__)
#define BIGRAMX_HOST_DEVICE __host__ __device__ inline
#else
// Always inlined: a function compiled on its own would belong to no CPU target (cpu/base/foreach_target.h),
// and its results would depend on whether the compiler inlined it.
#define BIGRAMX_HOST_DEVICE inline __attribute__((always_inline))
#endif
