// The samplers: the draws of torch.multinomial, or counter-based draws.
#pragma once

#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

namespace bigramx {

enum class Sampler { torch, philox };

// The sampler that the caller names. The default is torch on the CPU, philox on a GPU.
inline Sampler choose_sampler(const char* op, std::optional<std::string_view> sampler, bool on_gpu) {
    const std::string_view name = sampler.value_or(on_gpu ? "philox" : "torch");
    TORCH_CHECK_VALUE(name == "torch" || name == "philox", op,
                      ": expected sampler to be 'torch' or 'philox', got '", name, "'");
    TORCH_CHECK_VALUE(name == "philox" || !on_gpu, op,
                      ": the sampler 'torch' replays the generator of the CPU; expected sampler to be "
                      "'philox' on a GPU, got 'torch'");
    return name == "torch" ? Sampler::torch : Sampler::philox;
}

}  // namespace bigramx
