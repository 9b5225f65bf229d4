// The fixed-point CDF of a row of weights, by which a uniform number r of 31 bits draws a token. Weights are
// integers, so their sums are exact in any order. With the cumulative sums S_j of a row,
//
//     cdf_j = floor(2^31 S_j / S_last),
//
// and r draws the first token j with cdf_j > r. A token of weight zero has the cdf of the one before it, and
// is never drawn.
//
// The bits are the same on host and device: all rounding is by single operations that IEEE 754 defines, and
// no rounded product is followed by an addition that a compiler could contract to an FMA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sampling/philox.h"

namespace bigramx {

constexpr int kWeightBits = 30;  // the largest weight of a row is about 2^30

// e^logit 2^30, rounded. logit: minus the largest of its row, thus <= 0; -inf gives 0.
//
// logit = n ln 2 + r with |r| <= ln(2) / 2; e^r by a polynomial (Cephes' expf), to whose exponent n + 30 is
// added.
BIGRAMX_HOST_DEVICE uint32_t weight_of_logit(float logit) {
    constexpr float kVanishes = -25.0f;      // e^-25 2^30 < 1/2
    constexpr float kToInteger = 0x1.8p23f;  // adding it leaves no bits for a fraction
    const float bounded = logit > kVanishes ? logit : kVanishes;
    const float shifted = fmaf(bounded, 0x1.715476p0f, kToInteger);
    const float n = shifted - kToInteger;
    const float r = fmaf(n, -0x1.7f7d1cp-20f, fmaf(n, -0x1.62e400p-1f, bounded));

    float series = 1.9875691500e-4f;
    series = fmaf(series, r, 1.3981999507e-3f);
    series = fmaf(series, r, 8.3334519073e-3f);
    series = fmaf(series, r, 4.1665795894e-2f);
    series = fmaf(series, r, 1.6666665459e-1f);
    series = fmaf(series, r, 5.0000001201e-1f);
    series = fmaf(series, r, 1.0f);
    series = fmaf(series, r, 1.0f);

    uint32_t n_bits, bits;
    memcpy(&n_bits, &shifted, sizeof(n_bits));  // its low bits are n
    memcpy(&bits, &series, sizeof(bits));
    bits += (n_bits + kWeightBits) << 23;
    float weight;
    memcpy(&weight, &bits, sizeof(weight));
    return static_cast<uint32_t>(static_cast<int32_t>(weight + 0.5f));
}

// Scales the largest probability of a row to [2^29, 2^30), without rounding. In two factors, as a single one
// could overflow T.
template <typename T>
struct ProbScale {
    T first, second;

    BIGRAMX_HOST_DEVICE explicit ProbScale(T largest_prob) {
        int exponent;
        frexp(largest_prob, &exponent);
        const int shift = kWeightBits - exponent;
        first = static_cast<T>(ldexp(T(1), shift / 2));
        second = static_cast<T>(ldexp(T(1), shift - shift / 2));
    }
};

// prob >= 0, scaled and rounded; at least 1 unless it is 0.
template <typename T>
BIGRAMX_HOST_DEVICE uint32_t weight_of_prob(T prob, const ProbScale<T>& scale) {
    const float scaled = static_cast<float>(prob * scale.first * scale.second);
    const int32_t weight = static_cast<int32_t>(scaled + 0.5f);
    const int32_t smallest = prob > 0 ? 1 : 0;
    return static_cast<uint32_t>(weight > smallest ? weight : smallest);
}

// Scales the cumulative sums of a row to its CDF.
class CdfScale {
  public:
    BIGRAMX_HOST_DEVICE explicit CdfScale(uint64_t total) : total_(total), factor_(kEnd / to_double(total)) {}

    // sum 2^31 / total, rounded down; monotonic.
    BIGRAMX_HOST_DEVICE uint32_t cdf(uint64_t sum) const {
        const auto rounded = static_cast<uint32_t>(static_cast<int64_t>(to_double(sum) * factor_));
        return sum == total_ ? uint32_t{1} << kDrawBits : rounded;
    }

    // The least sum whose cdf is above r: r draws the first token whose cumulative sum reaches it.
    BIGRAMX_HOST_DEVICE uint64_t target_sum(uint32_t r) const {
        const double bound = (static_cast<double>(r) + 1) * (to_double(total_) / kEnd);
        auto sum = static_cast<uint64_t>(static_cast<int64_t>(bound));
        sum += to_double(sum) < bound ? 1 : 0;
        sum = sum < total_ ? sum : total_;
        while (cdf(sum) <= r) ++sum;  // rarely taken: corrects for the rounding of cdf()
        while (cdf(sum - 1) > r) --sum;
        return sum;
    }

  private:
    static constexpr double kEnd = 1ull << kDrawBits;

    BIGRAMX_HOST_DEVICE static double to_double(uint64_t sum) {
        return static_cast<double>(static_cast<int64_t>(sum));
    }

    uint64_t total_;
    double factor_;
};

}  // namespace bigramx
