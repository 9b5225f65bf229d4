// Blocks of a text and what follows each of their tokens, gathered on the GPU.
#pragma once

#include <cstdint>

#include "cuda/base/types.h"

namespace bigramx::cuda {

struct GetBatchKernelParams {
    TokenType type;
    const void* tokens;
    int64_t stride;      // of the tokens, in elements
    int64_t batch_size;  // B
    int64_t block_size;  // T
    int64_t* idx;        // (B, T)
    int64_t* targets;    // (B, T)
};

// offsets: (B), on the host; free again on return. They travel in the arguments of the launches: nothing is
// copied, nothing waits.
void launch_get_batch(const GetBatchKernelParams& params, const int64_t* offsets, cudaStream_t stream);

// Block b begins where the draws of sequence b, scaled to num_offsets, say.
void launch_get_batch(const GetBatchKernelParams& params, const Seed& seed, int64_t num_offsets,
                      cudaStream_t stream);

}  // namespace bigramx::cuda
