#include "get_batch.h"

#include <ATen/Dispatch_v2.h>

#include <algorithm>

#include "base/interrupt.h"
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

// In chunks, as the generator is held while the offsets of one are drawn. These are drawn into the places
// of their blocks, and prefetched before the first block is read, as the blocks are far apart in memory.
template <typename token_t>
void copy_blocks(const GetBatchParams& params, int64_t* idx, int64_t* targets) {
    constexpr int64_t kElementsAChunk = 1 << 16;
    const int64_t block_size = params.block_size, stride = params.tokens.stride(0);
    const token_t* const tokens = params.tokens.const_data_ptr<token_t>();
    const int64_t blocks_a_chunk = std::max<int64_t>(kElementsAChunk / block_size, 1);
    SignalCheck signals;
    for (int64_t first = 0; first < params.batch_size; first += blocks_a_chunk) {
        const int64_t num_blocks = std::min(blocks_a_chunk, params.batch_size - first);
        draw_batch_offsets(params.generator, params.num_offsets(), num_blocks,
                           [&](int64_t b, int64_t offset) {
                               idx[b * block_size] = offset;
                               __builtin_prefetch(tokens + offset * stride);
                               __builtin_prefetch(tokens + (offset + block_size) * stride);
                           });
        for (int64_t b = 0; b < num_blocks; ++b) {
            const token_t* block = tokens + *idx * stride;
            for (int64_t t = 0; t < block_size; t += kElementsAChunk) {
                const int64_t count = std::min(kElementsAChunk, block_size - t);
                copy_block(block + t * stride, stride, count, idx + t);
                copy_block(block + (t + 1) * stride, stride, count, targets + t);
                signals.poll(count);
            }
            idx += block_size;
            targets += block_size;
        }
    }
}

}  // namespace

void get_batch_cpu(const GetBatchParams& params, const at::Tensor& idx, const at::Tensor& targets) {
    AT_DISPATCH_V2(params.tokens.scalar_type(), kGetBatch, AT_WRAP([&] {
                       copy_blocks<scalar_t>(params, idx.data_ptr<int64_t>(), targets.data_ptr<int64_t>());
                   }),
                   at::kByte, at::kUInt16, at::kUInt32, at::kInt, at::kLong);
}

}  // namespace bigramx
