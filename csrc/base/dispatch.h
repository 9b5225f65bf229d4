// Which kernels serve an op: <op>_cpu or, where its tensors lie on a GPU, <op>_cuda. This header alone asks
// whether the build has CUDA kernels (BIGRAMX_CUDA); without them nothing refers to an <op>_cuda.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace bigramx {

// Ops that have a kernel on the CPU raise an error on other devices that have none, which names the device.
// To be called once all ops are registered.
void refuse_devices_without_kernels();

}  // namespace bigramx

#if defined(BIGRAMX_CUDA)

namespace bigramx {

constexpr bool kHasCudaKernels = true;

// Whether the kernels in cuda/ serve this tensor.
bool uses_cuda_kernels(const at::Tensor& tensor);

}  // namespace bigramx

#define BIGRAMX_DISPATCH_DEVICE(tensor, function, ...) \
    (::bigramx::uses_cuda_kernels(tensor) ? function##_cuda(__VA_ARGS__) : function##_cpu(__VA_ARGS__))

// Registers the function of an op that dispatches so.
#define BIGRAMX_REGISTER(op, function)                            \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(op, function); } \
    TORCH_LIBRARY_IMPL(bigramx, CUDA, m) { m.impl(op, function); }

#else

namespace bigramx {

constexpr bool kHasCudaKernels = false;

inline bool uses_cuda_kernels(const at::Tensor&) { return false; }

}  // namespace bigramx

#define BIGRAMX_DISPATCH_DEVICE(tensor, function, ...) function##_cpu(__VA_ARGS__)
#define BIGRAMX_REGISTER(op, function) \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(op, function); }

#endif
