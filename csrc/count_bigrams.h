// counts[i, j] = how often token j follows token i.
#pragma once

#include <ATen/core/Tensor.h>

namespace bigramx {

// (N) tokens of uint8, uint16, int32 or int64, contiguous -> (V, V) int64.
at::Tensor count_bigrams_cpu(const at::Tensor& tokens, int64_t vocab_size);

}  // namespace bigramx
