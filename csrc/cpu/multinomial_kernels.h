// Draws from rows of probabilities. Compiled once for each CPU target (cpu/base/foreach_target.h).

#include "cpu/sampling/fixed_point_weights_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

// Whether all probs, (V), are finite and not negative, and one is positive.
template <typename scalar_t>
bool is_distribution_kernel(const scalar_t* probs, int64_t vocab_size) {
    ProbRow row{probs, 0};
    return ProbWeights<scalar_t>::measure(row, vocab_size);
}

// One draw from each row from `begin` to `end`. Returns false if a row is not a distribution.
template <typename scalar_t>
bool draw_one_a_row_kernel(const MultinomialKernelParams& params, int64_t begin, int64_t end) {
    const int64_t vocab_size = params.vocab_size, num_blocks = num_weight_blocks(vocab_size);
    const Buffer<uint64_t> ends(num_blocks);
    for (int64_t b = begin; b < end; ++b) {
        ProbRow row = params.row<scalar_t>(b);
        if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
        const ProbWeights<scalar_t> weights(row);
        sum_blocks(weights, vocab_size, ends.begin());
        const uint64_t target_sum =
            CdfScale(ends[num_blocks - 1]).target_sum(draw(params.seed, b, /*position=*/0));
        const int64_t block = std::lower_bound(ends.begin(), ends.end(), target_sum) - ends.begin();
        params.samples[b] =
            find_in_block(weights, vocab_size, block, target_sum - (block > 0 ? ends[block - 1] : 0));
    }
    return true;
}

template <typename scalar_t>
bool cdf_kernel(const MultinomialKernelParams& params, int64_t b, uint32_t* cdf) {
    ProbRow row = params.row<scalar_t>(b);
    if (!ProbWeights<scalar_t>::measure(row, params.vocab_size)) return false;
    fill_cdf(ProbWeights<scalar_t>(row), params.vocab_size, cdf);
    return true;
}

// Each draw is from the weights that the draws before it have left; when none are left, tokens of probability
// zero follow in order.
template <typename scalar_t>
bool draw_without_replacement_kernel(const MultinomialKernelParams& params, int64_t b) {
    constexpr int64_t kBlocksAGroup = 128;
    const int64_t vocab_size = params.vocab_size, num_blocks = num_weight_blocks(vocab_size);
    ProbRow row = params.row<scalar_t>(b);
    if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
    const Buffer<uint32_t> weights(vocab_size);
    const Buffer<uint64_t> sums(num_blocks + num_blocks / kBlocksAGroup + 1);
    uint64_t *const block_sums = sums.begin(), *const group_sums = block_sums + num_blocks;
    std::fill(group_sums, sums.end(), 0);
    uint64_t total = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t begin = block * kWeightsAtOnce, count = std::min(kWeightsAtOnce, vocab_size - begin);
        ProbWeights<scalar_t>(row).weigh(begin, count, &weights[begin]);
        total += block_sums[block] = sum(&weights[begin], count);
        group_sums[block / kBlocksAGroup] += block_sums[block];
    }

    int64_t* samples = params.samples + b * params.num_samples;
    int64_t k = 0;
    uint32_t draws[kPhiloxFillBlock];
    for (; k < params.num_samples && total > 0; ++k) {
        if (k % kPhiloxFillBlock == 0) philox_fill(params.seed, b, k, kPhiloxFillBlock, draws);
        uint64_t target_sum = CdfScale(total).target_sum(draws[k % kPhiloxFillBlock]);
        int64_t group = 0;
        for (; group_sums[group] < target_sum; ++group) target_sum -= group_sums[group];
        int64_t block = group * kBlocksAGroup;
        for (; block_sums[block] < target_sum; ++block) target_sum -= block_sums[block];
        int64_t token = block * kWeightsAtOnce;
        for (; weights[token] < target_sum; ++token) target_sum -= weights[token];
        samples[k] = token;
        total -= weights[token];
        block_sums[block] -= weights[token];
        group_sums[group] -= weights[token];
        weights[token] = 0;
    }
    const scalar_t* probs = static_cast<const scalar_t*>(row.probs);
    for (int64_t token = 0; k < params.num_samples; ++token) {
        if (probs[token] == 0) samples[k++] = token;
    }
    return true;
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
