// Where the blocks of a batch begin, drawn as the lecture's get_batch draws them; for tokens anywhere.
#pragma once

#include <ATen/core/DistributionsHelper.h>

#include <cstdint>
#include <mutex>

#include "get_batch.h"
#include "sampling/generator.h"

namespace bigramx {

// Calls visit(b, offset) for each of the blocks in order, 0 <= offset < N - T, with the generator held.
template <typename Visit>
void draw_batch_offsets(const GetBatchParams& params, const Visit& visit) {
    at::CPUGeneratorImpl* stream = cpu_generator(params.generator);
    const std::lock_guard<std::mutex> lock(stream->mutex_);
    const auto num_offsets = static_cast<uint64_t>(params.tokens.size(0) - params.block_size);
    const at::uniform_int_from_to_distribution<int64_t> draw(num_offsets, 0);
    for (int64_t b = 0; b < params.batch_size; ++b) visit(b, draw(stream));
}

}  // namespace bigramx
