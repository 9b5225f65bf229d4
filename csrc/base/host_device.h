// Marks functions that the kernels of the CPU and of a GPU share.
#pragma once

#if defined(__CUDACC__)
#define BIGRAMX_HOST_DEVICE __host__ __device__ inline
#else
// Always inlined: compiled by itself a function would belong to no CPU target (cpu/base/foreach_target.h),
// and what it computes would depend on whether the compiler inlined it there.
#define BIGRAMX_HOST_DEVICE inline __attribute__((always_inline))
#endif
