// How tokens are drawn: as torch.multinomial draws them, or by a counter.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <optional>

namespace bigramx {

enum class Sampler { torch, philox };

// On the CPU the default is what torch.multinomial draws.
inline Sampler cpu_sampler(const char* op, std::optional<c10::string_view> sampler) {
    const c10::string_view name = sampler.value_or("torch");
    TORCH_CHECK_VALUE(name == "torch" || name == "philox", op,
                      ": expected sampler to be 'torch' or 'philox', got '", name, "'");
    return name == "torch" ? Sampler::torch : Sampler::philox;
}

}  // namespace bigramx
