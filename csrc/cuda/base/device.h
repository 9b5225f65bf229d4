// What the host side of the ops asks ATen about the GPU: on which device and stream, of which types, from
// which seed.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "cuda/base/types.h"

namespace bigramx::cuda {

// Makes the device of a tensor the current one while it lives, and names its current stream.
class StreamGuard {
  public:
    explicit StreamGuard(const at::Tensor& tensor);
    cudaStream_t stream() const { return stream_; }

  private:
    const c10::DeviceGuard guard_;
    const cudaStream_t stream_;
};

// The seed of counter-based draws for the current device: from a generator on the CPU, a number; from one on
// the device, or none (its default), what a captured graph draws anew at each replay.
Seed draw_cuda_seed(const std::optional<at::Generator>& generator);

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

}  // namespace bigramx::cuda
