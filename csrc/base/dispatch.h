// Dispatch of an op to <op>_cpu or, for tensors on a GPU, <op>_cuda. This header alone asks whether the build
// has CUDA kernels (BIGRAMX_CUDA); without them nothing refers to an <op>_cuda.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <new>
#include <utility>

namespace bigramx {

// Registers, for each op with a CPU kernel, an error for each other device and for each layout without a
// kernel; and for ops that write to their arguments, that those with the conjugate or the negative bit are
// resolved first. Call it once all ops are registered.
void complete_registrations();

// The function of an op as the dispatcher calls it: where its own memory is short, the error is one of
// PyTorch's.
template <auto function>
struct Registered;

template <typename Return, typename... Arguments, Return (*function)(Arguments...)>
struct Registered<function> {
    static Return call(Arguments... arguments) {
        try {
            return function(std::forward<Arguments>(arguments)...);
        } catch (const std::bad_alloc&) {
            C10_THROW_ERROR(Error, "not enough memory: a kernel can't allocate memory for its own use");
        }
    }
};

}  // namespace bigramx

#if defined(BIGRAMX_CUDA)

namespace bigramx {

constexpr bool kHasCudaKernels = true;

// Whether ops on this tensor use the kernels in cuda/.
bool uses_cuda_kernels(const at::Tensor& tensor);

}  // namespace bigramx

#define BIGRAMX_DISPATCH_DEVICE(tensor, function, ...) \
    (::bigramx::uses_cuda_kernels(tensor) ? function##_cuda(__VA_ARGS__) : function##_cpu(__VA_ARGS__))

// Registers the function of an op, which dispatches by BIGRAMX_DISPATCH_DEVICE.
#define BIGRAMX_REGISTER(op, function)                                                          \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(op, &::bigramx::Registered<function>::call); } \
    TORCH_LIBRARY_IMPL(bigramx, CUDA, m) { m.impl(op, &::bigramx::Registered<function>::call); }

#else

namespace bigramx {

constexpr bool kHasCudaKernels = false;

inline bool uses_cuda_kernels(const at::Tensor&) { return false; }

}  // namespace bigramx

#define BIGRAMX_DISPATCH_DEVICE(tensor, function, ...) function##_cpu(__VA_ARGS__)
#define BIGRAMX_REGISTER(op, function) \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(op, &::bigramx::Registered<function>::call); }

#endif
