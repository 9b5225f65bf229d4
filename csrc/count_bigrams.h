// counts[i, j] = how often token j follows token i.
#pragma once

#include <ATen/core/Tensor.h>

namespace bigramx {

struct CountBigramsParams {
    at::Tensor tokens;   // (N) uint8, uint16, uint32, int32 or int64, contiguous
    int64_t vocab_size;  // V
};

// counts: (V, V) int64.
at::Tensor count_bigrams_cpu(const CountBigramsParams& params);
at::Tensor count_bigrams_cuda(const CountBigramsParams& params);

// The op.
at::Tensor count_bigrams(const at::Tensor& tokens, int64_t vocab_size);

}  // namespace bigramx
