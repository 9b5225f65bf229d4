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
    const int64_t vocab_size = params.vocab_size;
    const Buffer<WeightSum> ends(num_weight_blocks(vocab_size));
    for (int64_t b = begin; b < end; ++b) {
        ProbRow row = params.row<scalar_t>(b);
        if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
        const ProbWeights<scalar_t> weights(row);
        sum_blocks(weights, vocab_size, ends.begin());
        params.samples[b] =
            find_token(weights, vocab_size, ends.begin(), draw(params.seed, b, /*position=*/0));
    }
    return true;
}

// Returns false if the row is not a distribution.
template <typename scalar_t>
bool cdf_kernel(ProbRow& row, int64_t vocab_size, WeightSum* ends, uint32_t* cdf) {
    if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
    fill_cdf(ProbWeights<scalar_t>(row), vocab_size, ends, cdf);
    return true;
}

template <typename scalar_t>
int64_t find_token_kernel(const ProbRow& row, int64_t vocab_size, const WeightSum* ends, uint64_t r) {
    return find_token(ProbWeights<scalar_t>(row), vocab_size, ends, r);
}

// The probabilities that the draws without replacement have left, as weights, with sums of blocks and of
// groups of blocks.
template <typename scalar_t>
class WeightsLeft {
  public:
    WeightsLeft(const scalar_t* probs, int64_t vocab_size)
        : probs_(vocab_size),
          high_(vocab_size),
          low_(vocab_size),
          block_sums_(num_weight_blocks(vocab_size)),
          group_sums_(block_sums_.size() / kBlocksAGroup + 1) {
        std::copy_n(probs, vocab_size, probs_.begin());
    }

    // Scales the weights by the largest probability that is left. Returns false if there is none, or if the
    // row is not a distribution.
    bool scale() {
        ProbRow row{probs_.begin(), 0};
        if (!ProbWeights<scalar_t>::measure(row, probs_.size())) return false;
        const ProbWeights<scalar_t> weights(row);
        std::fill(group_sums_.begin(), group_sums_.end(), 0);
        total_ = 0;
        for (int64_t block = 0; block < block_sums_.size(); ++block) {
            const int64_t begin = block * kWeightsAtOnce,
                          count = std::min(kWeightsAtOnce, probs_.size() - begin);
            weights.weigh(begin, count, &high_[begin], &low_[begin]);
            block_sums_[block] = sum(&high_[begin], &low_[begin], count);
            group_sums_[block / kBlocksAGroup] += block_sums_[block];
            total_ += block_sums_[block];
        }
        return true;
    }

    // Whether rounding might be felt, so that the weights should be scaled anew.
    bool are_small() const { return total_ < kLeastTotal; }

    // Takes the token that r draws.
    int64_t take(uint64_t r) {
        WeightSum target_sum = FixedPointCdf(total_).target_sum(r);
        int64_t group = 0;
        for (; group_sums_[group] < target_sum; ++group) target_sum -= group_sums_[group];
        int64_t block = group * kBlocksAGroup;
        for (; block_sums_[block] < target_sum; ++block) target_sum -= block_sums_[block];
        int64_t token = block * kWeightsAtOnce;
        for (auto left = static_cast<uint64_t>(target_sum); weight(token) < left; ++token)
            left -= weight(token);
        total_ -= weight(token);
        group_sums_[group] -= weight(token);
        block_sums_[block] -= weight(token);
        high_[token] = low_[token] = 0;
        probs_[token] = 0;
        return token;
    }

  private:
    static constexpr int64_t kBlocksAGroup = 128;

    uint64_t weight(int64_t token) const { return join_weight(high_[token], low_[token]); }

    const Buffer<scalar_t> probs_;
    const Buffer<uint32_t> high_, low_;
    const Buffer<uint64_t> block_sums_;
    const Buffer<WeightSum> group_sums_;
    WeightSum total_ = 0;
};

// Each draw is from the weights that the draws before it have left; when none are left, tokens of probability
// zero follow in order.
template <typename scalar_t>
bool draw_without_replacement_kernel(const MultinomialKernelParams& params, int64_t b) {
    const auto* const probs = static_cast<const scalar_t*>(params.row<scalar_t>(b).probs);
    int64_t* const samples = params.samples + b * params.num_samples;
    WeightsLeft<scalar_t> left(probs, params.vocab_size);
    if (!left.scale()) return false;
    DrawBlock draws;
    int64_t k = 0;
    for (; k < params.num_samples; ++k) {
        if (left.are_small() && !left.scale()) break;
        if (k % DrawBlock::kSize == 0) {
            const int64_t count = std::min(DrawBlock::kSize, params.num_samples - k);
            draws.fill_high(params.seed, b, k, count);
            draws.fill_low(count);
        }
        samples[k] = left.take(draws.at(k % DrawBlock::kSize));
    }
    for (int64_t token = 0; k < params.num_samples; ++token) {
        if (probs[token] == 0) samples[k++] = token;
    }
    return true;
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
