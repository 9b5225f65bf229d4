// How tokens are drawn: as torch.multinomial draws them, or by a counter.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <optional>

#include "gpu.h"

namespace bigramx {

enum class Sampler { torch, philox };

// For draws from a tensor. The default is, on the CPU, what torch.multinomial draws there.
inline Sampler choose_sampler(const char* op, std::optional<c10::string_view> sampler,
                              const at::Tensor& tensor) {
    const bool on_gpu = is_on_gpu(tensor);
    const c10::string_view name = sampler.value_or(on_gpu ? "philox" : "torch");
    TORCH_CHECK_VALUE(name == "torch" || name == "philox", op,
                      ": expected sampler to be 'torch' or 'philox', got '", name, "'");
    TORCH_CHECK_VALUE(name == "philox" || !on_gpu, op,
                      ": the sampler 'torch' replays the generator of the CPU; expected sampler to be "
                      "'philox' on a GPU, got 'torch'");
    return name == "torch" ? Sampler::torch : Sampler::philox;
}

}  // namespace bigramx
