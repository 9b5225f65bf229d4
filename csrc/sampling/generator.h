// The CPU generator that the caller passes, or ATen's default; and seeds drawn from it.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include <cstdint>
#include <mutex>
#include <optional>

namespace bigramx {

inline at::CPUGeneratorImpl* cpu_generator(const std::optional<at::Generator>& generator) {
    return at::get_generator_or_default<at::CPUGeneratorImpl>(generator,
                                                              at::detail::getDefaultCPUGenerator());
}

// Draws a seed for counter-based draws.
inline uint64_t draw_seed(const std::optional<at::Generator>& generator) {
    at::CPUGeneratorImpl* impl = cpu_generator(generator);
    const std::lock_guard<std::mutex> lock(impl->mutex_);
    return impl->random64();
}

}  // namespace bigramx
