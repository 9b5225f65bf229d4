// The seed of counter-based draws.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "noise.h"

namespace bigramx {

inline uint64_t draw_seed(const std::optional<at::Generator>& generator) {
    at::CPUGeneratorImpl* impl = cpu_generator(generator);
    const std::lock_guard<std::mutex> lock(impl->mutex_);
    return impl->random64();
}

}  // namespace bigramx
