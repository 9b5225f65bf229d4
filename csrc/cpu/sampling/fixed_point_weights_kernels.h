// The weights of a row, and what is made of them. Compiled once for each CPU target
// (cpu/base/foreach_target.h). The loops over weights are plain, for the compiler to vectorise: the
// arithmetic is the one of cdf.h, the same for every machine.

namespace bigramx::cpu::BIGRAMX_TARGET {

// The largest of some elements, and whether all of them are allowed.
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
    using T = opmath_t<scalar_t>;

    explicit LogitWeights(const LogitRow& row)
        : row_(row), logits_(static_cast<const scalar_t*>(row.logits)), max_(static_cast<T>(row.max)) {}

    // Sets row.max. False where the row is not a distribution: a NaN, an infinity, or negative infinities
    // alone.
    static bool measure(LogitRow& row, int64_t vocab_size) {
        constexpr T kInfinity = std::numeric_limits<T>::infinity();
        const LogitWeights weights(row);
        Largest<T> largest;
        for (int64_t begin = 0; begin < vocab_size; begin += kWeightsAtOnce) {
            const int64_t count = std::min(kWeightsAtOnce, vocab_size - begin);
            T buffer[kWeightsAtOnce];
            largest.include(weights.load(begin, count, buffer), count, -kInfinity,
                            [](Vector<T> logits) { return logits < broadcast(kInfinity); });
        }
        row.max = largest.value();
        return largest.all_allowed() && row.max > -kInfinity;
    }

    // Of the `count` <= kWeightsAtOnce tokens from `begin` on.
    void weigh(int64_t begin, int64_t count, uint32_t* weights) const {
        T buffer[kWeightsAtOnce];
        const T* logits = load(begin, count, buffer);
        for (int64_t k = 0; k < count; ++k) {
            weights[k] = weight_of_logit(static_cast<float>(logits[k] - max_));
        }
    }

  private:
    // As the filters leave them: in the table itself where they leave them alone.
    const T* load(int64_t begin, int64_t count, T* buffer) const {
        if constexpr (std::is_same_v<scalar_t, T>) {
            if (row_.temperature == 1 && row_.kept == nullptr) return logits_ + begin;
        }
        for (int64_t k = 0; k < count; ++k) buffer[k] = static_cast<T>(logits_[begin + k]);
        if (row_.temperature != 1) divide(count, buffer);
        if (row_.kept != nullptr) remove(begin, count, buffer);
        return buffer;
    }

    // Rounded to the table's type, as ATen's division leaves it.
    void divide(int64_t count, T* logits) const {
        const T temperature = static_cast<T>(row_.temperature);
        for (int64_t k = 0; k < count; ++k) {
            logits[k] = static_cast<T>(static_cast<scalar_t>(logits[k] / temperature));
        }
    }

    void remove(int64_t begin, int64_t count, T* logits) const {
        for (int64_t k = 0; k < count; ++k) {
            const int64_t token = begin + k;
            const bool kept = row_.kept[token / 64] >> (token % 64) & 1;
            logits[k] = kept ? logits[k] : -std::numeric_limits<T>::infinity();
        }
    }

    const LogitRow& row_;
    const scalar_t* logits_;
    const T max_;
};

template <typename scalar_t>
class ProbWeights {
  public:
    using T = opmath_t<scalar_t>;

    explicit ProbWeights(const ProbRow& row)
        : probs_(static_cast<const scalar_t*>(row.probs)), scale_(static_cast<T>(row.max)) {}

    // Sets row.max. False where an element is negative, infinite or NaN, or all are zero.
    static bool measure(ProbRow& row, int64_t vocab_size) {
        Largest<T> largest;
        largest.include(static_cast<const scalar_t*>(row.probs), vocab_size, T(0), [](Vector<T> probs) {
            return (probs >= broadcast(T(0))) & (probs < broadcast(std::numeric_limits<T>::infinity()));
        });
        row.max = largest.value();
        return largest.all_allowed() && row.max > 0;
    }

    void weigh(int64_t begin, int64_t count, uint32_t* weights) const {
        for (int64_t k = 0; k < count; ++k) {
            weights[k] = weight_of_prob(static_cast<T>(probs_[begin + k]), scale_);
        }
    }

  private:
    const scalar_t* probs_;
    const ProbScale<T> scale_;
};

inline uint64_t sum(const uint32_t* weights, int64_t count) {
    uint64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += weights[k];
    return total;
}

// ends (blocks): the cumulative sums after each kWeightsAtOnce weights.
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

// The first token of a block whose cumulative sum within it reaches `target_sum`.
template <typename Weights>
int64_t find_in_block(const Weights& weights, int64_t size, int64_t block, uint64_t target_sum) {
    const int64_t begin = block * kWeightsAtOnce, count = std::min(kWeightsAtOnce, size - begin);
    uint32_t weights_of_block[kWeightsAtOnce];
    weights.weigh(begin, count, weights_of_block);
    int64_t token = 0;
    for (uint64_t sum = weights_of_block[0]; sum < target_sum; sum += weights_of_block[token]) ++token;
    return begin + token;
}

// cdf (size): the fixed-point CDF.
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
