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
        : probs_(probs),
          weights_(vocab_size),
          block_sums_(num_weight_blocks(vocab_size)),
          group_sums_(block_sums_.size() / kBlocksAGroup + 1) {}

    // Scales the weights by the largest probability that is left. Returns false if there is none, or if the
    // row is not a distribution. drawn: (num_drawn), the tokens that are not left.
    bool scale(const int64_t* drawn, int64_t num_drawn) {
        const int64_t vocab_size = weights_.size();
        ProbRow row{probs_, 0};
        const Buffer<scalar_t> left(num_drawn > 0 ? vocab_size : 0);
        if (num_drawn > 0) {
            std::copy_n(probs_, vocab_size, left.begin());
            for (int64_t k = 0; k < num_drawn; ++k) left[drawn[k]] = 0;
            row.probs = left.begin();
        }
        if (!ProbWeights<scalar_t>::measure(row, vocab_size)) return false;
        std::fill(group_sums_.begin(), group_sums_.end(), 0);
        total_ = 0;
        const auto keep = [&](int64_t block, const WeightBlock& weights) {
            uint64_t* const to = &weights_[block * kWeightsAtOnce];
            for (int64_t k = 0; k < weights.size(); ++k) to[k] = weights[k];
            block_sums_[block] = weights.sum();
            group_sums_[block / kBlocksAGroup] += block_sums_[block];
            total_ += block_sums_[block];
        };
        for_each_block(ProbWeights<scalar_t>(row), vocab_size, keep);
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
        for (auto left = static_cast<uint64_t>(target_sum); weights_[token] < left; ++token) {
            left -= weights_[token];
        }
        total_ -= weights_[token];
        group_sums_[group] -= weights_[token];
        block_sums_[block] -= weights_[token];
        weights_[token] = 0;
        return token;
    }

  private:
    static constexpr int64_t kBlocksAGroup = 128;

    const scalar_t* const probs_;
    const Buffer<uint64_t> weights_;
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
    if (!left.scale(samples, 0)) return false;
    DrawBlock draws;
    int64_t k = 0;
    for (; k < params.num_samples; ++k) {
        if (left.are_small() && !left.scale(samples, k)) break;
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
