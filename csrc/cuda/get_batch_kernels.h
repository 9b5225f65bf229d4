// Gathers the blocks of a batch, and the token after each of theirs, on the GPU.
#pragma once

#include <cstdint>

#include "cuda/base/types.h"

namespace bigramx::cuda {

struct GetBatchKernelParams {
    TokenType type;
    const void* tokens;
    int64_t stride;      // of tokens, in elements
    int64_t batch_size;  // B
    int64_t block_size;  // T
    int64_t* idx;        // (B, T)
    int64_t* targets;    // (B, T)
};

// offsets: (B) on the host, free on return. They are passed as launch arguments: no copy, no synchronisation.
void launch_get_batch(const GetBatchKernelParams& params, const int64_t* offsets, cudaStream_t stream);

// Draws the offset of block b, 0 <= offset < num_offsets, at (seed, b, 0).
void launch_get_batch(const GetBatchKernelParams& params, const Seed& seed, int64_t num_offsets,
                      cudaStream_t stream);

}  // namespace bigramx::cuda
