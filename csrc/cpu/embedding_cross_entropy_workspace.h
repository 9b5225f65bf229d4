// The scratch memory of embedding_cross_entropy, and a call that reuses it.
#pragma once

#include <cstdint>

#include "cpu/base/buffer.h"
#include "cpu/embedding_cross_entropy_pairs.h"
#include "embedding_cross_entropy.h"
#include "embedding_cross_entropy_row.h"

namespace bigramx::cpu {

struct LossWorkspace {
    Pairs pairs;
    Buffer<char> exponentials;       // for each thread, of the rows that it works on
    Buffer<int32_t> target_counts;   // (threads, C), all zero between rows
    Buffer<LossSums> sums_of_block;  // (blocks of rows)
};

// Returns the reduced loss, and writes its gradient to grad_weight, (R, C) contiguous.
double embedding_cross_entropy_step(const EmbeddingCrossEntropyParams& params, const at::Tensor& grad_weight,
                                    LossWorkspace& workspace);

}  // namespace bigramx::cpu
