// The weights of a row, their cumulative sums and the fixed-point CDF. Compiled once for each CPU target
// (cpu/base/foreach_target.h). The loops over weights are plain loops, which the compiler vectorises: the
// arithmetic is that of sampling/fixed_point_cdf.h, the same on every machine.

namespace bigramx::cpu::BIGRAMX_TARGET {

// The largest of some elements, and whether all are allowed.
template <typename T>
class Largest {
  public:
    Largest() : largest_(broadcast(kLowest)), allowed_(largest_ == largest_) {}

    // allowed(vector): a mask of lanes.
    template <typename scalar_t, typename Allowed>
    void include(const scalar_t* elements, int64_t size, T fill, const Allowed& allowed) {
        for_each_vector<T>(size, [&](Lanes<T> lanes) {
            const Vector<T> values = lanes.load(elements, fill);
            largest_ = max(values, largest_);
            allowed_ &= allowed(values);
        });
    }

    T value() const { return horizontal_max<T>(largest_); }

    bool all_allowed() const {
        bool all = true;
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) all &= allowed_[lane] != 0;
        return all;
    }

  private:
    static constexpr T kLowest = -std::numeric_limits<T>::infinity();
    Vector<T> largest_;
    decltype(largest_ == largest_) allowed_;
};

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
        Largest<acc_t> largest;
        for (int64_t begin = 0; begin < vocab_size; begin += kWeightsAtOnce) {
            const int64_t count = std::min(kWeightsAtOnce, vocab_size - begin);
            acc_t buffer[kWeightsAtOnce];
            largest.include(weights.load(begin, count, buffer), count, -kInfinity,
                            [](Vector<acc_t> logits) { return logits < broadcast(kInfinity); });
        }
        row.max = largest.value();
        return largest.all_allowed() && row.max > -kInfinity;
    }

    // The weights of the `count` <= kWeightsAtOnce tokens from `begin` on.
    void weigh(int64_t begin, int64_t count, uint32_t* weights) const {
        acc_t buffer[kWeightsAtOnce];
        const acc_t* logits = load(begin, count, buffer);
        for (int64_t k = 0; k < count; ++k) {
            weights[k] = weight_of_logit(static_cast<float>(logits[k] - max_));
        }
    }

  private:
    // The filtered logits: in the table itself where nothing changes them, else in the buffer.
    const acc_t* load(int64_t begin, int64_t count, acc_t* buffer) const {
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
            if (row_.temperature == 1 && row_.kept == nullptr) return logits_ + begin;
        }
        for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<acc_t>(logits_[begin + k]);
        if (row_.temperature != 1) divide(count, buffer);
        if (row_.kept != nullptr) remove(begin, count, buffer);
        return buffer;
    }

    // Rounded to the table's dtype, as ATen's division is.
    void divide(int64_t count, acc_t* logits) const {
        const acc_t temperature = static_cast<acc_t>(row_.temperature);
        for (int64_t k = 0; k < count; ++k) {
            logits[k] = static_cast<acc_t>(static_cast<scalar_t>(logits[k] / temperature));
        }
    }

    void remove(int64_t begin, int64_t count, acc_t* logits) const {
        for (int64_t k = 0; k < count; ++k) {
            const int64_t token = begin + k;
            const bool kept = row_.kept[token / 64] >> (token % 64) & 1;
            logits[k] = kept ? logits[k] : -std::numeric_limits<acc_t>::infinity();
        }
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

    // Sets row.max. Returns false if an element is negative, infinite or NaN, or all are zero.
    static bool measure(ProbRow& row, int64_t vocab_size) {
        Largest<acc_t> largest;
        largest.include(static_cast<const scalar_t*>(row.probs), vocab_size, acc_t(0),
                        [](Vector<acc_t> probs) {
                            return (probs >= broadcast(acc_t(0))) &
                                   (probs < broadcast(std::numeric_limits<acc_t>::infinity()));
                        });
        row.max = largest.value();
        return largest.all_allowed() && row.max > 0;
    }

    void weigh(int64_t begin, int64_t count, uint32_t* weights) const {
        for (int64_t k = 0; k < count; ++k) {
            weights[k] = weight_of_prob(static_cast<acc_t>(probs_[begin + k]), scale_);
        }
    }

  private:
    const scalar_t* probs_;
    const ProbScale<acc_t> scale_;
};

inline uint64_t sum(const uint32_t* weights, int64_t count) {
    uint64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += weights[k];
    return total;
}

// ends: (blocks), the cumulative sums after each kWeightsAtOnce weights.
template <typename Weights>
void sum_blocks(const Weights& weights, int64_t size, uint64_t* ends) {
    uint64_t total = 0;
    for (int64_t begin = 0; begin < size; begin += kWeightsAtOnce) {
        const int64_t count = std::min(kWeightsAtOnce, size - begin);
        uint32_t block[kWeightsAtOnce];
        weights.weigh(begin, count, block);
        ends[begin / kWeightsAtOnce] = total += sum(block, count);
    }
}

// The first token of a block whose cumulative sum within the block reaches `target_sum`.
template <typename Weights>
int64_t find_in_block(const Weights& weights, int64_t size, int64_t block, uint64_t target_sum) {
    const int64_t begin = block * kWeightsAtOnce, count = std::min(kWeightsAtOnce, size - begin);
    uint32_t weights_of_block[kWeightsAtOnce];
    weights.weigh(begin, count, weights_of_block);
    int64_t token = 0;
    for (uint64_t sum = weights_of_block[0]; sum < target_sum; sum += weights_of_block[token]) ++token;
    return begin + token;
}

// cdf: (size), the fixed-point CDF.
template <typename Weights>
void fill_cdf(const Weights& weights, int64_t size, uint32_t* cdf) {
    uint64_t total = 0;
    for (int64_t begin = 0; begin < size; begin += kWeightsAtOnce) {
        const int64_t count = std::min(kWeightsAtOnce, size - begin);
        weights.weigh(begin, count, cdf + begin);
        total += sum(cdf + begin, count);
    }
    const CdfScale scale(total);
    uint64_t sums[kWeightsAtOnce];
    total = 0;
    for (int64_t begin = 0; begin < size; begin += kWeightsAtOnce) {
        const int64_t count = std::min(kWeightsAtOnce, size - begin);
        for (int64_t k = 0; k < count; ++k) sums[k] = total += cdf[begin + k];
        for (int64_t k = 0; k < count; ++k) cdf[begin + k] = scale.cdf(sums[k]);
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
