// A row of logits as integer thresholds: token j is drawn by the uniform 31-bit r with
// thresholds[j - 1] <= r < thresholds[j]. On host and device the same, bit for bit: the sums are integers,
// and what is rounded is rounded once, by operations that the standard fixes, fused or not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "philox.h"

namespace bigramx {

constexpr int kThresholdBits = 31;

// e^x for x <= 0 to 1 ulp; zero below e^-23, where the weights made of it are zero too.
BIGRAMX_HOST_DEVICE inline double exp_portable(double x) {
    if (!(x > -23.0)) return 0.0;
    const double n = floor(fma(x, 0x1.71547652b82fep0, 0.5));
    const double r = fma(-n, 0x1.abc9e3b39803fp-56, fma(-n, 0x1.62e42fefa39efp-1, x));
    constexpr int kDegree = 14;
    double series = 1.0;
    for (int k = kDegree; k > 0; --k) series = fma(series, r / k, 1.0);
    const uint64_t exponent = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
    double power_of_two;
    memcpy(&power_of_two, &exponent, sizeof(power_of_two));
    return series * power_of_two;
}

// False where the row is no distribution: a NaN, a positive infinity, or negative infinities alone.
template <typename scalar_t>
BIGRAMX_HOST_DEVICE bool make_thresholds(const scalar_t* logits, int64_t vocab_size, uint32_t* thresholds) {
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double logit = static_cast<double>(logits[j]);
        if (!(logit < std::numeric_limits<double>::infinity())) return false;
        largest = logit > largest ? logit : largest;
    }
    if (!(largest > -std::numeric_limits<double>::infinity())) return false;

    constexpr double kOne = 1ull << kThresholdBits;
    uint64_t total = 0;
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double share = exp_portable(static_cast<double>(logits[j]) - largest);
        thresholds[j] = static_cast<uint32_t>(share * kOne + 0.5);
        total += thresholds[j];
    }
    uint64_t sum = 0;
    for (int64_t j = 0; j < vocab_size; ++j) {
        sum += thresholds[j];
        thresholds[j] = static_cast<uint32_t>(static_cast<double>(sum) * kOne / static_cast<double>(total));
    }
    return true;
}

// The first token whose threshold lies above r.
BIGRAMX_HOST_DEVICE inline int64_t find_token(const uint32_t* thresholds, int64_t vocab_size, uint32_t r) {
    int64_t begin = 0, count = vocab_size;
    while (count > 0) {
        const int64_t half = count / 2;
        if (thresholds[begin + half] <= r) {
            begin += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return begin;
}

}  // namespace bigramx
