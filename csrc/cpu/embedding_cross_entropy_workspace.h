// The scratch memory of embedding_cross_entropy, and one step of many that share it.
#pragma once

#include <cstdint>

#include "cpu/base/buffer.h"
#include "cpu/embedding_cross_entropy_pairs.h"
#include "embedding_cross_entropy.h"
#include "embedding_cross_entropy_row.h"

namespace bigramx::cpu {

struct LossWorkspace {
    Pairs pairs;
    Buffer<char> exponentials;       // of the rows that each thread works on
    Buffer<int32_t> target_counts;   // (threads, C), all zero between rows
    Buffer<LossSums> sums_of_block;  // (blocks of rows)
};

// The reduced loss, and its gradient into `grad_weight`, (R, C) contiguous; reuses what the step before
// allocated.
double embedding_cross_entropy_step(const EmbeddingCrossEntropyParams& params, const at::Tensor& grad_weight,
                                    LossWorkspace& workspace);

}  // namespace bigramx::cpu
