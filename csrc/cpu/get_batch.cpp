#include "../get_batch.h"

#include <ATen/Dispatch_v2.h>

#include <algorithm>

#include "starts.h"

namespace bigramx {
namespace {

template <typename token_t>
void copy_block(const token_t* tokens, int64_t stride, int64_t block_size, int64_t* to) {
    if (stride == 1) {  // known to the compiler, it takes whole vectors
        std::copy(tokens, tokens + block_size, to);
    } else {
        for (int64_t t = 0; t < block_size; ++t) to[t] = static_cast<int64_t>(tokens[t * stride]);
    }
}

}  // namespace

void get_batch_cpu(const at::Tensor& tokens, const BatchShape& shape,
                   const std::optional<at::Generator>& generator, const at::Tensor& idx,
                   const at::Tensor& targets) {
    const int64_t num_starts = tokens.size(0) - shape.block_size, stride = tokens.stride(0);
    // All starts are drawn, each into the place of its block, before the first block is read: they lie far
    // apart.
    auto* idx_block = idx.data_ptr<int64_t>();
    auto* targets_block = targets.data_ptr<int64_t>();
    AT_DISPATCH_V2(tokens.scalar_type(), "get_batch", AT_WRAP([&] {
                       const auto* first = tokens.const_data_ptr<scalar_t>();
                       draw_starts(generator, num_starts, shape.batch_size, [&](int64_t b, int64_t start) {
                           idx_block[b * shape.block_size] = start;
                           __builtin_prefetch(first + start * stride);
                           __builtin_prefetch(first + (start + shape.block_size) * stride);
                       });
                       for (int64_t b = 0; b < shape.batch_size; ++b) {
                           const scalar_t* block = first + *idx_block * stride;
                           copy_block(block, stride, shape.block_size, idx_block);
                           copy_block(block + stride, stride, shape.block_size, targets_block);
                           idx_block += shape.block_size;
                           targets_block += shape.block_size;
                       }
                   }),
                   at::kByte, at::kUInt16, at::kInt, at::kLong);
}

}  // namespace bigramx
