// What the host code of the ops asks ATen for: the device and its stream, the types of tensors, the seed.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "cuda/base/types.h"

// Completes the name of an op.
#define BIGRAMX_FROZEN_DRAWS                                                                                 \
    ": expected a generator on the GPU while a CUDA graph captures its stream, as each replay would repeat " \
    "what the host draws, but the generator is on the CPU"

namespace bigramx::cuda {

// Makes the tensor's device the current one for its lifetime; holds that device's current stream.
class StreamGuard {
  public:
    explicit StreamGuard(const at::Tensor& tensor);
    cudaStream_t stream() const { return stream_; }

  private:
    const c10::DeviceGuard guard_;
    const cudaStream_t stream_;
};

// Raises where a CUDA graph captures the current stream: it would replay what the host draws now for ever.
void check_host_can_draw(const char* op);

// The seed of counter-based draws on the current device. A CPU generator gives a number, but not to a graph.
// A generator of the device, or none (its default), gives its Philox state, which advances at each replay.
Seed draw_cuda_seed(const char* op, const std::optional<at::Generator>& generator);

inline FloatType float_type(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kDouble: return FloatType::float64;
        case at::kFloat: return FloatType::float32;
        case at::kBFloat16: return FloatType::bfloat16;
        case at::kHalf: return FloatType::float16;
        default: TORCH_CHECK(false, "no kernel for dtype ", tensor.scalar_type());
    }
}

inline TokenType token_type(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kByte: return TokenType::uint8;
        case at::kUInt16: return TokenType::uint16;
        case at::kUInt32: return TokenType::uint32;
        case at::kInt: return TokenType::int32;
        case at::kLong: return TokenType::int64;
        default: TORCH_CHECK(false, "no kernel for dtype ", tensor.scalar_type());
    }
}

}  // namespace bigramx::cuda
