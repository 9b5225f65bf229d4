#include "get_batch.h"

#include <ATen/Dispatch_v2.h>

#include <algorithm>

#include "base/op_names.h"
#include "sampling/batch_offsets.h"

namespace bigramx {
namespace {

template <typename token_t>
void copy_block(const token_t* tokens, int64_t stride, int64_t block_size, int64_t* to) {
    if (stride == 1) {  // known to the compiler, which then vectorises
        std::copy(tokens, tokens + block_size, to);
    } else {
        for (int64_t t = 0; t < block_size; ++t) to[t] = static_cast<int64_t>(tokens[t * stride]);
    }
}

}  // namespace

void get_batch_cpu(const GetBatchParams& params, const at::Tensor& idx, const at::Tensor& targets) {
    const at::Tensor& tokens = params.tokens;
    const int64_t block_size = params.block_size, stride = tokens.stride(0);
    // Draws all offsets, into the places of their blocks, and prefetches before the first block is read, as
    // the blocks are far apart in memory.
    auto* idx_block = idx.data_ptr<int64_t>();
    auto* targets_block = targets.data_ptr<int64_t>();
    AT_DISPATCH_V2(tokens.scalar_type(), kGetBatch, AT_WRAP([&] {
                       const auto* first = tokens.const_data_ptr<scalar_t>();
                       draw_batch_offsets(params.generator, params.num_offsets(), params.batch_size,
                                          [&](int64_t b, int64_t offset) {
                                              idx_block[b * block_size] = offset;
                                              __builtin_prefetch(first + offset * stride);
                                              __builtin_prefetch(first + (offset + block_size) * stride);
                                          });
                       for (int64_t b = 0; b < params.batch_size; ++b) {
                           const scalar_t* block = first + *idx_block * stride;
                           copy_block(block, stride, block_size, idx_block);
                           copy_block(block + stride, stride, block_size, targets_block);
                           idx_block += block_size;
                           targets_block += block_size;
                       }
                   }),
                   at::kByte, at::kUInt16, at::kInt, at::kLong);
}

}  // namespace bigramx
