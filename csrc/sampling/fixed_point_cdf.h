// The fixed-point CDF of a row, by which a draw r of kDrawBits bits (sampling/philox.h) becomes a token.
//
// The weights of the tokens are integers, so their sums are exact in any order. The largest weight of a row
// is from 2^54 to 2^55; the others are rounded down, to zero below 2^-55 of it. The cumulative sums S_j are
// shifted right until the last one has at most 63 bits, C_j = S_j >> shift, and r draws
//
//     the first token j with C_j > floor(r C_last / 2^63).
//
// A token of weight zero has the C_j of the one before it, and is never drawn. The distribution is within
// V 2^-54 of the weights before they were rounded, in total variation. Those are exact for probabilities; for
// logits they have the accuracy of float32.
//
// The bits are the same on host and device: all rounding is by single operations that IEEE 754 defines, and
// no rounded product is followed by an addition that a compiler could contract to an FMA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sampling/philox.h"

namespace bigramx {

constexpr int kWeightBits = 55;  // the largest weight of a row is at most 2^55
constexpr uint64_t kLeastTotal = uint64_t{1} << (kWeightBits - 1);  // of a row

template <typename T>
BIGRAMX_HOST_DEVICE uint64_t round_down(T scaled) {
    return static_cast<uint64_t>(static_cast<int64_t>(scaled));
}

// e^logit 2^kWeightBits: the weight before it is rounded down. logit: minus the largest of its row, thus <=
// 0; -inf gives less than 1.
//
// logit = n ln 2 + r with |r| <= ln(2) / 2; e^r by a polynomial (Cephes' expf), to whose exponent
// n + kWeightBits is added.
BIGRAMX_HOST_DEVICE float scaled_exponential(float logit) {
    constexpr float kVanishes = -39.0f;      // e^-39 < 2^-kWeightBits
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
    float scaled;
    memcpy(&scaled, &bits, sizeof(scaled));
    return scaled;
}

// Scales the largest probability of a row to [2^54, 2^55), without rounding.
template <typename T>
class ProbScale {
  public:
    BIGRAMX_HOST_DEVICE explicit ProbScale(T largest_prob) {
        int exponent;
        frexp(largest_prob, &exponent);
        const int shift = kWeightBits - exponent;
        first_ = static_cast<T>(ldexp(T(1), shift / 2));
        second_ = static_cast<T>(ldexp(T(1), shift - shift / 2));
    }

    // The weight before it is rounded down.
    BIGRAMX_HOST_DEVICE T scaled(T prob) const { return prob * first_ * second_; }

  private:
    T first_, second_;  // a single factor could overflow T
};

// A sum of the weights of up to 2^31 tokens.
using WeightSum = unsigned __int128;

// floor(r total / 2^kDrawBits).
BIGRAMX_HOST_DEVICE uint64_t share_of_total(uint64_t r, uint64_t total) {
    return static_cast<uint64_t>(static_cast<WeightSum>(r) * total >> kDrawBits);
}

// n > 0.
BIGRAMX_HOST_DEVICE int bit_length(uint64_t n) {
#if defined(__CUDA_ARCH__)
    return 64 - __clzll(static_cast<long long>(n));
#else
    return 64 - __builtin_clzll(n);
#endif
}

// From sums of weights to the CDF, and back.
class FixedPointCdf {
  public:
    BIGRAMX_HOST_DEVICE explicit FixedPointCdf(WeightSum total) {
        const auto excess = static_cast<uint64_t>(total >> kDrawBits);
        shift_ = excess == 0 ? 0 : bit_length(excess);
        last_ = cdf(total);
    }

    BIGRAMX_HOST_DEVICE uint64_t cdf(WeightSum sum) const { return static_cast<uint64_t>(sum >> shift_); }
    BIGRAMX_HOST_DEVICE WeightSum sum(uint64_t cdf) const { return static_cast<WeightSum>(cdf) << shift_; }

    // The least sum whose cdf is above the share of r: r draws the first token whose cumulative sum reaches
    // it.
    BIGRAMX_HOST_DEVICE WeightSum target_sum(uint64_t r) const { return sum(share_of_total(r, last_) + 1); }

    BIGRAMX_HOST_DEVICE uint64_t last() const { return last_; }
    BIGRAMX_HOST_DEVICE int shift() const { return shift_; }

  private:
    int shift_;
    uint64_t last_;
};

}  // namespace bigramx
