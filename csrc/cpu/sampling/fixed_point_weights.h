// Rows whose elements become weights by sampling/fixed_point_cdf.h, as fixed_point_weights_kernels.h takes
// them. The pointers are void, as the rows' dtype is a template parameter of the kernels.
#pragma once

#include <cstdint>

#include "sampling/token_filter.h"

namespace bigramx::cpu {

constexpr int64_t kWeightsAtOnce = 128;

inline int64_t num_weight_blocks(int64_t size) { return (size + kWeightsAtOnce - 1) / kWeightsAtOnce; }

struct LogitRow {
    const void* logits;  // (V)
    double temperature;  // divides the logits
    double max;          // the largest logit, divided

    // Filtered rows are divided in the accumulation dtype; the tokens that are removed weigh nothing.
    bool is_filtered = false;
    KeptTokens<double> kept = {};
    float min_weight = 0;
};

struct ProbRow {
    const void* probs;  // (V)
    double max;
};

}  // namespace bigramx::cpu
