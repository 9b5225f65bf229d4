// The tokens of a row that top-k and top-p keep, found by partitions of the row.
#pragma once

#include <cstdint>

#include "sampling/token_filter.h"

namespace bigramx::cpu {

// logits, weights: (size), of a distribution.
KeptTokens<double> select_tokens(const TokenFilter& filter, const double* logits, const uint64_t* weights,
                                 int64_t size);

}  // namespace bigramx::cpu
