// Rows of logits as fixed-point CDFs, and as cumulative sums of blocks. Compiled once for each CPU target
// (cpu/base/foreach_target.h).

#include "cpu/sampling/fixed_point_weights_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
bool logit_cdf_kernel(LogitRow& row, int64_t vocab_size, uint32_t* cdf) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    const Buffer<WeightSum> ends(num_weight_blocks(vocab_size));
    fill_cdf(LogitWeights<scalar_t>(row), vocab_size, ends.begin(), cdf);
    return true;
}

template <typename scalar_t>
bool logit_block_sums_kernel(LogitRow& row, int64_t vocab_size, WeightSum* ends) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    sum_blocks(LogitWeights<scalar_t>(row), vocab_size, ends);
    return true;
}

// The logits, divided, and their weights. Returns false if the row is not a distribution.
template <typename scalar_t>
bool logit_weights_kernel(LogitRow& row, int64_t vocab_size, double* logits, uint64_t* weights) {
    if (!LogitWeights<scalar_t>::measure(row, vocab_size)) return false;
    LogitWeights<scalar_t>(row).for_each_logit(vocab_size, [&](int64_t token, auto logit, float scaled) {
        logits[token] = logit;
        weights[token] = round_down(scaled);
    });
    return true;
}

template <typename scalar_t>
int64_t find_in_logit_block_kernel(const LogitRow& row, int64_t vocab_size, int64_t block,
                                   uint64_t target_sum) {
    return find_in_block(LogitWeights<scalar_t>(row), vocab_size, block, target_sum);
}

// row: a distribution.
template <typename scalar_t>
int64_t find_in_logit_row_kernel(LogitRow& row, int64_t vocab_size, uint64_t r) {
    const Buffer<WeightSum> ends(num_weight_blocks(vocab_size));
    logit_block_sums_kernel<scalar_t>(row, vocab_size, ends.begin());
    return find_token(LogitWeights<scalar_t>(row), vocab_size, ends.begin(), r);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
