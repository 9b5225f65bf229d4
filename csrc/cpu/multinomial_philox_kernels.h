// Draws from rows of probabilities. Compiled once for each CPU capability (for_each_capability.h).

#include "weights_kernels.h"

namespace bigramx::BIGRAMX_CAPABILITY {

// One from each of the rows from `begin` to `end`.
template <typename scalar_t>
bool draw_one_a_row(const MultinomialJob& job, int64_t begin, int64_t end) {
    const int64_t vocab_size = job.vocab_size, num_blocks = num_weight_blocks(vocab_size);
    const Buffer<uint64_t> ends(num_blocks);
    for (int64_t b = begin; b < end; ++b) {
        ProbRow row = job.row<scalar_t>(b);
        if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
        const ProbWeights<scalar_t> weights(row);
        sum_blocks(weights, vocab_size, ends.begin());
        const uint64_t sum_to_reach =
            ThresholdScale(ends[num_blocks - 1]).sum_to_reach(draw(job.seed, b, /*position=*/0));
        const int64_t block = std::lower_bound(ends.begin(), ends.end(), sum_to_reach) - ends.begin();
        job.samples[b] =
            find_in_block(weights, vocab_size, block, sum_to_reach - (block > 0 ? ends[block - 1] : 0));
    }
    return true;
}

template <typename scalar_t>
bool make_prob_thresholds(const MultinomialJob& job, int64_t b, uint32_t* thresholds) {
    ProbRow row = job.row<scalar_t>(b);
    if (!ProbWeights<scalar_t>::measure(row, job.vocab_size)) return false;
    make_thresholds(ProbWeights<scalar_t>(row), job.vocab_size, thresholds);
    return true;
}

// Each is drawn from what those before it have left. Where only zeros are left: the first of them.
template <typename scalar_t>
bool draw_without_replacement(const MultinomialJob& job, int64_t b) {
    const int64_t vocab_size = job.vocab_size, num_blocks = num_weight_blocks(vocab_size);
    ProbRow row = job.row<scalar_t>(b);
    if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
    const Buffer<uint32_t> weights(vocab_size);
    const Buffer<uint64_t> block_sums(num_blocks);
    uint64_t total = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t begin = block * kWeightsAtOnce, count = std::min(kWeightsAtOnce, vocab_size - begin);
        ProbWeights<scalar_t>(row).weigh(begin, count, &weights[begin]);
        total += block_sums[block] = sum(&weights[begin], count);
    }

    int64_t* samples = job.samples + b * job.num_samples;
    int64_t k = 0;
    uint32_t draws[kDrawsAtOnce];
    for (; k < job.num_samples && total > 0; ++k) {
        if (k % kDrawsAtOnce == 0) fill_draws(job.seed, b, k, kDrawsAtOnce, draws);
        uint64_t sum_to_reach = ThresholdScale(total).sum_to_reach(draws[k % kDrawsAtOnce]);
        int64_t block = 0;
        for (; block_sums[block] < sum_to_reach; ++block) sum_to_reach -= block_sums[block];
        int64_t token = block * kWeightsAtOnce;
        for (; weights[token] < sum_to_reach; ++token) sum_to_reach -= weights[token];
        samples[k] = token;
        total -= weights[token];
        block_sums[block] -= weights[token];
        weights[token] = 0;
    }
    const scalar_t* probs = static_cast<const scalar_t*>(row.probs);
    for (int64_t token = 0; k < job.num_samples; ++token) {
        if (probs[token] == 0) samples[k++] = token;
    }
    return true;
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
