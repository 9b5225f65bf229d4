// Top-k, top-p and min-p of the sampler "philox", for host and device. What they keep follows from
// comparisons of logits and from exact sums of integer weights (sampling/fixed_point_cdf.h), so it is the
// same on every machine, in whatever order the row is read.
#pragma once

#include <cstdint>
#include <limits>

#include "base/host_device.h"

namespace bigramx {

// In the order of the members, each on the tokens that the ones before it keep.
struct TokenFilter {
    static constexpr int64_t kAnyRank = std::numeric_limits<int64_t>::max();
    static constexpr uint64_t kAllMass = (uint64_t{1} << 63) - 1;

    // Keeps the k largest logits, and all that equal the k-th.
    int64_t top_k = kAnyRank;

    // A draw: keeps the tokens up to the one that it draws, in descending order of the logits, and of the
    // tokens among those that are equal. ceil(p 2^63) - 1, as the last token kept is the first by which the
    // sum reaches p of the total.
    uint64_t top_p = kAllMass;

    // Keeps the weights of at least so much. An integer.
    float min_weight = 0;
};

// What top-k and top-p keep of a row: logits from `least` on, and of the tokens whose logit equals it those
// up to `last`. A NaN is kept, for its row not to pass for a distribution.
template <typename acc_t>
struct KeptTokens {
    acc_t least = -std::numeric_limits<acc_t>::infinity();
    int64_t last = std::numeric_limits<int64_t>::max();

    BIGRAMX_HOST_DEVICE bool contains(acc_t logit, int64_t token) const {
        return !(logit < least || (logit == least && token > last));
    }
};

}  // namespace bigramx
