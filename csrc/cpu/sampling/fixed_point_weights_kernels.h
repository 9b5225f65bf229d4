// The weights of a row, their cumulative sums and the fixed-point CDF. Compiled once for each CPU target
// (cpu/base/foreach_target.h). The loops over weights are plain loops, which the compiler vectorises: the
// arithmetic is that of sampling/fixed_point_cdf.h, the same on every machine.

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
class LogitWeights {
  public:
    using acc_t = opmath_t<scalar_t>;

    explicit LogitWeights(const LogitRow& row)
        : row_(row), logits_(static_cast<const scalar_t*>(row.logits)), max_(static_cast<acc_t>(row.max)) {}

    // Sets row.max. Returns false if the row is not a distribution: with a NaN or an infinity, or with
    // negative infinities alone.
    static bool measure(LogitRow& row, int64_t vocab_size) {
        constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
        const LogitWeights weights(row);
        Vector<acc_t> largest = broadcast(-kInfinity);
        auto allowed = largest == largest;  // by lane
        for (int64_t begin = 0; begin < vocab_size; begin += kWeightsAtOnce) {
            const int64_t count = std::min(kWeightsAtOnce, vocab_size - begin);
            acc_t buffer[kWeightsAtOnce];
            const acc_t* part = weights.load(begin, count, buffer);
            for_each_vector<acc_t>(count, [&](Lanes<acc_t> lanes) {
                const Vector<acc_t> logits = lanes.load(part, -kInfinity);
                largest = max(logits, largest);
                allowed &= logits < broadcast(kInfinity);
            });
        }
        row.max = horizontal_max<acc_t>(largest);
        bool all_allowed = true;
        for (int64_t lane = 0; lane < kLanes<acc_t>; ++lane) all_allowed &= allowed[lane] != 0;
        return all_allowed && row.max > -kInfinity;
    }

    // visit(k, scaled): the weights, before they are rounded down, of the `count` <= kWeightsAtOnce tokens
    // from `begin` on.
    template <typename Visit>
    void for_each(int64_t begin, int64_t count, const Visit& visit) const {
        acc_t buffer[kWeightsAtOnce];
        const acc_t* logits = load(begin, count, buffer);
        float scaled[kWeightsAtOnce];  // two loops are faster
        for (int64_t k = 0; k < count; ++k) scaled[k] = scaled_weight(logits[k]);
        if (row_.min_weight > 0) remove_below(row_.min_weight, count, scaled);
        for (int64_t k = 0; k < count; ++k) visit(k, scaled[k]);
    }

    // visit(token, logit, scaled) for all tokens that are kept, whatever their weight.
    template <typename Visit>
    void for_each_logit(int64_t vocab_size, const Visit& visit) const {
        for (int64_t begin = 0; begin < vocab_size; begin += kWeightsAtOnce) {
            const int64_t count = std::min(kWeightsAtOnce, vocab_size - begin);
            acc_t buffer[kWeightsAtOnce];
            const acc_t* logits = load(begin, count, buffer);
            for (int64_t k = 0; k < count; ++k) visit(begin + k, logits[k], scaled_weight(logits[k]));
        }
    }

  private:
    float scaled_weight(acc_t logit) const { return scaled_exponential(static_cast<float>(logit - max_)); }

    // The filtered logits: in the table itself where nothing changes them, else in the buffer.
    const acc_t* load(int64_t begin, int64_t count, acc_t* buffer) const {
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
            if (row_.temperature == 1 && !row_.is_filtered) return logits_ + begin;
        }
        for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<acc_t>(logits_[begin + k]);
        if (row_.temperature != 1) divide(count, buffer);
        if (row_.is_filtered) remove(begin, count, buffer);
        return buffer;
    }

    // Rounded to the table's dtype, as ATen's division is; not for filters, which compute in acc_t.
    void divide(int64_t count, acc_t* logits) const {
        const acc_t temperature = static_cast<acc_t>(row_.temperature);
        for (int64_t k = 0; k < count; ++k) logits[k] /= temperature;
        if (row_.is_filtered) return;
        for (int64_t k = 0; k < count; ++k) logits[k] = static_cast<acc_t>(static_cast<scalar_t>(logits[k]));
    }

    void remove(int64_t begin, int64_t count, acc_t* logits) const {
        const KeptTokens<acc_t> kept{static_cast<acc_t>(row_.kept.least), row_.kept.last - begin};
        for (int64_t k = 0; k < count; ++k) {
            logits[k] = kept.contains(logits[k], k) ? logits[k] : -std::numeric_limits<acc_t>::infinity();
        }
    }

    static void remove_below(float min_weight, int64_t count, float* scaled) {
        for (int64_t k = 0; k < count; ++k) scaled[k] = scaled[k] < min_weight ? 0 : scaled[k];
    }

    const LogitRow& row_;
    const scalar_t* logits_;
    const acc_t max_;
};

template <typename scalar_t>
class ProbWeights {
  public:
    using acc_t = opmath_t<scalar_t>;

    explicit ProbWeights(const ProbRow& row)
        : probs_(static_cast<const scalar_t*>(row.probs)), scale_(static_cast<acc_t>(row.max)) {}

    // Sets row.max. Returns false if an element is negative, infinite or NaN, or all are zero. Read as
    // integers, the bits of finite numbers that are not negative have their order, and those of all others
    // lie above them.
    static bool measure(ProbRow& row, int64_t vocab_size) {
        using Integer = std::conditional_t<sizeof(acc_t) == 4, uint32_t, uint64_t>;
        const auto larger = [](Vector<Integer> a, Vector<Integer> b) { return a > b ? a : b; };
        const auto* probs = static_cast<const scalar_t*>(row.probs);
        Vector<Integer> largest{};
        for_each_vector<acc_t>(vocab_size, [&](Lanes<acc_t> lanes) {
            const Vector<acc_t> prob = lanes.load(probs, acc_t(0)) + acc_t(0);  // -0 is 0
            largest = larger(largest, reinterpret_cast<Vector<Integer>>(prob));
        });
        const Integer bits = reduce<Integer>(largest, larger);
        acc_t max;
        std::memcpy(&max, &bits, sizeof(max));
        row.max = max;
        return max > 0 && max < std::numeric_limits<acc_t>::infinity();
    }

    template <typename Visit>
    void for_each(int64_t begin, int64_t count, const Visit& visit) const {
        for (int64_t k = 0; k < count; ++k) visit(k, scale_.scaled(static_cast<acc_t>(probs_[begin + k])));
    }

  private:
    const scalar_t* probs_;
    const ProbScale<acc_t> scale_;
};

// A block of at most kWeightsAtOnce weights.
class WeightBlock {
  public:
    template <typename Weights>
    WeightBlock(const Weights& weights, int64_t begin, int64_t count) : count_(count) {
        weights.for_each(begin, count, [&](int64_t k, auto scaled) { set(k, scaled); });
    }

    int64_t size() const { return count_; }

#if BIGRAMX_VECTOR_BYTES == 64
    uint64_t operator[](int64_t k) const { return weights_[k]; }

    uint64_t sum() const {
        uint64_t total = 0;
        for (int64_t k = 0; k < count_; ++k) total += weights_[k];
        return total;
    }

  private:
    template <typename T>
    void set(int64_t k, T scaled) {
        weights_[k] = round_down(scaled);
    }

    uint64_t weights_[kWeightsAtOnce];
#else
    // In two parts, as there are no vector instructions from floats to 64-bit integers. Sums of low parts fit
    // into 32 bits.
    uint64_t operator[](int64_t k) const { return (uint64_t{high_[k]} << kLowBits) + low_[k]; }

    uint64_t sum() const {
        uint64_t high = 0;
        uint32_t low = 0;
        for (int64_t k = 0; k < count_; ++k) high += high_[k];
        for (int64_t k = 0; k < count_; ++k) low += low_[k];
        return (high << kLowBits) + low;
    }

  private:
    static constexpr int kLowBits = 25;

    template <typename T>
    void set(int64_t k, T scaled) {
        constexpr T kUnit = uint32_t{1} << kLowBits;
        const auto high = static_cast<int32_t>(scaled * (1 / kUnit));
        high_[k] = static_cast<uint32_t>(high);
        low_[k] = static_cast<uint32_t>(static_cast<int32_t>(scaled - static_cast<T>(high) * kUnit));
    }

    uint32_t high_[kWeightsAtOnce], low_[kWeightsAtOnce];
#endif

    int64_t count_;
};

// Calls visit(block, weights) for the blocks of a row.
template <typename Weights, typename Visit>
void for_each_block(const Weights& weights, int64_t size, const Visit& visit) {
    for (int64_t begin = 0; begin < size; begin += kWeightsAtOnce) {
        visit(begin / kWeightsAtOnce, WeightBlock(weights, begin, std::min(kWeightsAtOnce, size - begin)));
    }
}

// ends: (blocks), the cumulative sums after each kWeightsAtOnce weights.
template <typename Weights>
void sum_blocks(const Weights& weights, int64_t size, WeightSum* ends) {
    WeightSum total = 0;
    for_each_block(weights, size, [&](int64_t block, const WeightBlock& weights_of_block) {
        ends[block] = total += weights_of_block.sum();
    });
}

// The first token of a block whose cumulative sum within the block reaches `target_sum`.
template <typename Weights>
int64_t find_in_block(const Weights& weights, int64_t size, int64_t block, uint64_t target_sum) {
    const int64_t begin = block * kWeightsAtOnce;
    const WeightBlock weights_of_block(weights, begin, std::min(kWeightsAtOnce, size - begin));
    int64_t token = 0;
    for (uint64_t sum = 0; (sum += weights_of_block[token]) < target_sum;) ++token;
    return begin + token;
}

// The token that r draws. ends: (blocks), the cumulative sums of the row.
template <typename Weights>
int64_t find_token(const Weights& weights, int64_t size, const WeightSum* ends, uint64_t r) {
    const int64_t num_blocks = num_weight_blocks(size);
    const WeightSum target_sum = FixedPointCdf(ends[num_blocks - 1]).target_sum(r);
    const int64_t block = std::lower_bound(ends, ends + num_blocks, target_sum) - ends;
    return find_in_block(weights, size, block,
                         static_cast<uint64_t>(target_sum - (block > 0 ? ends[block - 1] : 0)));
}

// cdf: (size), the CDF for searches by the high bits of a draw (cpu/sampling/guide_table.h). ends: as for
// sum_blocks.
template <typename Weights>
void fill_cdf(const Weights& weights, int64_t size, WeightSum* ends, uint32_t* cdf) {
    sum_blocks(weights, size, ends);
    const FixedPointCdf exact(ends[num_weight_blocks(size) - 1]);
    const HighCdf rounded(exact.last());
    for_each_block(weights, size, [&](int64_t block, const WeightBlock& weights_of_block) {
        const WeightSum sum_before = block > 0 ? ends[block - 1] : 0;
        const uint64_t cdf_before = exact.cdf(sum_before);
        uint64_t sum = static_cast<uint64_t>(sum_before - exact.sum(cdf_before)), sums[kWeightsAtOnce];
        const int64_t count = weights_of_block.size();
        for (int64_t k = 0; k < count; ++k) sums[k] = sum += weights_of_block[k];
        uint32_t* const to = cdf + block * kWeightsAtOnce;
        for (int64_t k = 0; k < count; ++k) to[k] = rounded.cdf(cdf_before + (sums[k] >> exact.shift()));
    });
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
