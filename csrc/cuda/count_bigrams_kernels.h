// Bigram counts on the GPU.
#pragma once

#include "cuda/base/types.h"

namespace bigramx::cuda {

struct CountBigramsKernelParams {
    const void* tokens;  // (num_tokens), fewer than 2^32
    TokenType type;
    int64_t num_tokens;
    int64_t vocab_size;
    int64_t* counts;  // (V, V)
};

// The scratch memory that the launch needs, in bytes.
int64_t count_bigrams_scratch_bytes(const CountBigramsKernelParams& params);

void launch_count_bigrams(const CountBigramsKernelParams& params, void* scratch, cudaStream_t stream);

}  // namespace bigramx::cuda
