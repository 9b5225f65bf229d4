// Finds the token that r draws from the thresholds of a row.
//
// A guide divides the range of r into 2^guide_bits buckets of equal size, and tells the token that each
// begins in, from which on the thresholds are searched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../philox.h"

namespace bigramx {

// The search compares kThresholdsAtOnce thresholds: so many more follow the last of a row.
constexpr int64_t kThresholdsAtOnce = 8;

inline int64_t padded_thresholds(int64_t vocab_size) { return vocab_size + kThresholdsAtOnce; }

inline void pad_thresholds(uint32_t* thresholds, int64_t vocab_size) {
    std::fill_n(thresholds + vocab_size, kThresholdsAtOnce, uint32_t{1} << kDrawBits);
}

// The first token from `token` on whose threshold lies above r.
inline int64_t search_thresholds(const uint32_t* thresholds, int64_t token, uint32_t r) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint64_t Two __attribute__((vector_size(16)));
    for (;;) {
        Four not_above{};
        for (int64_t k = 0; k < kThresholdsAtOnce; k += 4) {
            Four four;
            std::memcpy(&four, thresholds + token + k, sizeof(four));
            not_above += ~(r - four) >> 31;  // the sign of r - threshold: neither is above 2^31
        }
        const Two halves = reinterpret_cast<Two>(not_above);
        const uint64_t sums = halves[0] + halves[1];
        const int64_t count = static_cast<uint32_t>(sums + (sums >> 32));
        token += count;
        if (count < kThresholdsAtOnce) return token;
    }
}

inline int64_t guide_bucket(uint32_t r, int guide_bits) { return r >> (kDrawBits - guide_bits); }

// guide (2^guide_bits + 1), of which the last entry is scratch.
template <typename entry_t>
void make_guide(const uint32_t* thresholds, int64_t vocab_size, int guide_bits, entry_t* guide) {
    const int shift = kDrawBits - guide_bits;
    const int64_t num_buckets = int64_t{1} << guide_bits;
    std::fill_n(guide, num_buckets, entry_t(0));
    for (int64_t token = 0; token < vocab_size; ++token) {
        const int64_t first_after = (int64_t{thresholds[token]} + (int64_t{1} << shift) - 1) >> shift;
        guide[first_after] = static_cast<entry_t>(token + 1);
    }
    entry_t first = 0;
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
        guide[bucket] = first = std::max(first, guide[bucket]);
    }
}

}  // namespace bigramx
