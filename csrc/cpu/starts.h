// The starts of a batch, as the lecture's get_batch draws them.
#pragma once

#include <ATen/core/DistributionsHelper.h>

#include <cstdint>
#include <mutex>
#include <optional>

#include "generator.h"

namespace bigramx {

// Calls visit(b, start) for each of the blocks in order, with 0 <= start < num_starts.
template <typename Visit>
void draw_starts(const std::optional<at::Generator>& generator, int64_t num_starts, int64_t batch_size,
                 const Visit& visit) {
    at::CPUGeneratorImpl* stream = cpu_generator(generator);
    const std::lock_guard<std::mutex> lock(stream->mutex_);
    const at::uniform_int_from_to_distribution<int64_t> draw(static_cast<uint64_t>(num_starts), 0);
    for (int64_t b = 0; b < batch_size; ++b) visit(b, draw(stream));
}

}  // namespace bigramx
