// Rows whose elements are weighed by cdf.h, as the kernels in weights_kernels.h take them: the
// pointers are of the type that a kernel is made for.
#pragma once

#include <cstdint>

namespace bigramx::cpu {

constexpr int64_t kWeightsAtOnce = 128;

inline int64_t num_weight_blocks(int64_t size) { return (size + kWeightsAtOnce - 1) / kWeightsAtOnce; }

struct LogitRow {
    const void* logits;    // (V)
    const uint64_t* kept;  // (V / 64, rounded up): a bit a token, or null: the logits of the others are -inf
    double temperature;    // divides the logits
    double max;            // what the largest of them is then
};

struct ProbRow {
    const void* probs;  // (V)
    double max;
};

}  // namespace bigramx::cpu
