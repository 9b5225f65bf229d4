// Draws tokens from rows of probabilities on the GPU. A row that is not a distribution fails an assertion.
#pragma once

#include <cstdint>

#include "cuda/base/types.h"

namespace bigramx::cuda {

struct MultinomialKernelParams {
    FloatType type;
    const void* probs;  // (B, V)
    int64_t num_rows, vocab_size, num_samples;
    Seed seed;
    int64_t* samples;  // (B, num_samples)
};

// num_samples: 1.
void launch_draw_one_a_row(const MultinomialKernelParams& params, cudaStream_t stream);

// cdf: (B, V), scratch.
void launch_draw_with_replacement(const MultinomialKernelParams& params, uint64_t* cdf, cudaStream_t stream);

// left: (B, V) of the type of probs, scratch.
void launch_draw_without_replacement(const MultinomialKernelParams& params, void* left, cudaStream_t stream);

}  // namespace bigramx::cuda
