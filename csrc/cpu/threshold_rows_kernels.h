// Rows of logits as thresholds, and as sums of blocks. Compiled once for each CPU capability
// (for_each_capability.h).

#include "weights_kernels.h"

namespace bigramx::BIGRAMX_CAPABILITY {

template <typename scalar_t>
bool make_logit_thresholds(LogitRow& row, int64_t vocab_size, uint32_t* thresholds) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    make_thresholds(LogitWeights<scalar_t>(row), vocab_size, thresholds);
    return true;
}

template <typename scalar_t>
bool sum_logit_blocks(LogitRow& row, int64_t vocab_size, uint64_t* ends) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    sum_blocks(LogitWeights<scalar_t>(row), vocab_size, ends);
    return true;
}

template <typename scalar_t>
int64_t find_in_logit_block(const LogitRow& row, int64_t vocab_size, int64_t block, uint64_t sum_to_reach) {
    return find_in_block(LogitWeights<scalar_t>(row), vocab_size, block, sum_to_reach);
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
