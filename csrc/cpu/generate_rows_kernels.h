// Rows of logits as fixed-point CDFs, and as cumulative sums of blocks. Compiled once for each CPU target
// (cpu/base/foreach_target.h).

#include "cpu/sampling/fixed_point_weights_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
bool logit_cdf_kernel(LogitRow& row, int64_t vocab_size, uint32_t* cdf) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    fill_cdf(LogitWeights<scalar_t>(row), vocab_size, cdf);
    return true;
}

template <typename scalar_t>
bool logit_block_sums_kernel(LogitRow& row, int64_t vocab_size, uint64_t* ends) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    sum_blocks(LogitWeights<scalar_t>(row), vocab_size, ends);
    return true;
}

template <typename scalar_t>
int64_t find_in_logit_block_kernel(const LogitRow& row, int64_t vocab_size, int64_t block,
                                   uint64_t target_sum) {
    return find_in_block(LogitWeights<scalar_t>(row), vocab_size, block, target_sum);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
