// Where the blocks of a batch begin, drawn as the lecture's get_batch draws them.
#pragma once

#include <ATen/core/DistributionsHelper.h>

#include <cstdint>
#include <mutex>
#include <optional>

#include "sampling/generator.h"

namespace bigramx {

// Calls visit(b, offset) for each of the blocks in order, 0 <= offset < num_offsets, with the generator held.
template <typename Visit>
void draw_batch_offsets(const std::optional<at::Generator>& generator, int64_t num_offsets,
                        int64_t batch_size, const Visit& visit) {
    at::CPUGeneratorImpl* stream = cpu_generator(generator);
    const std::lock_guard<std::mutex> lock(stream->mutex_);
    const at::uniform_int_from_to_distribution<int64_t> draw(static_cast<uint64_t>(num_offsets), 0);
    for (int64_t b = 0; b < batch_size; ++b) visit(b, draw(stream));
}

}  // namespace bigramx
