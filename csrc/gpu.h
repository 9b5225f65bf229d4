// What the ops ask ATen about the GPU: whose kernels serve a tensor, on which stream, from which seed.
//
// BIGRAMX_CUDA: the build has CUDA kernels.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#if defined(BIGRAMX_CUDA)

#include <c10/core/DeviceGuard.h>

#include "cuda/types.h"

namespace bigramx {

// Whether the kernels in cuda/ serve this tensor.
bool is_on_gpu(const at::Tensor& tensor);

// Makes the device of a tensor the current one while it lives.
class GpuScope {
  public:
    explicit GpuScope(const at::Tensor& tensor);
    cudaStream_t stream() const { return stream_; }

  private:
    const c10::DeviceGuard guard_;
    const cudaStream_t stream_;
};

// The seed of counter-based draws for the current device: from a generator on the CPU, a number; from one on
// the device, or none (its default), what a captured graph draws anew at each replay.
Seed draw_gpu_seed(const std::optional<at::Generator>& generator);

inline FloatType float_type(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kDouble:
            return FloatType::float64;
        case at::kFloat:
            return FloatType::float32;
        case at::kBFloat16:
            return FloatType::bfloat16;
        case at::kHalf:
            return FloatType::float16;
        default:
            TORCH_CHECK(false, "no kernel for dtype ", tensor.scalar_type());
    }
}

inline TokenType token_type(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kByte:
            return TokenType::uint8;
        case at::kUInt16:
            return TokenType::uint16;
        case at::kInt:
            return TokenType::int32;
        case at::kLong:
            return TokenType::int64;
        default:
            TORCH_CHECK(false, "no kernel for dtype ", tensor.scalar_type());
    }
}

}  // namespace bigramx

// function_cuda or function_cpu, as the tensor lies.
#define BIGRAMX_BY_DEVICE(tensor, function, ...) \
    (::bigramx::is_on_gpu(tensor) ? function##_cuda(__VA_ARGS__) : function##_cpu(__VA_ARGS__))

// Registers the ops of a file, all of which dispatch so, by a function that takes a torch::Library&.
#define BIGRAMX_REGISTER(register_ops)                       \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { register_ops(m); } \
    TORCH_LIBRARY_IMPL(bigramx, CUDA, m) { register_ops(m); }

#else

namespace bigramx {

inline bool is_on_gpu(const at::Tensor&) { return false; }

}  // namespace bigramx

#define BIGRAMX_BY_DEVICE(tensor, function, ...) function##_cpu(__VA_ARGS__)
#define BIGRAMX_REGISTER(register_ops) \
    TORCH_LIBRARY_IMPL(bigramx, CPU, m) { register_ops(m); }

#endif
