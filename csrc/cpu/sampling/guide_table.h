// Guide tables (Chen, Asau: "On generating random variates from an empirical distribution", 1974), which tell
// where to begin the search of a CDF.
//
// The range of the uniform number is divided into equal buckets. The guide table holds, for each bucket, the
// token that the first number of the bucket draws: the search goes on from there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/interrupt.h"
#include "sampling/philox.h"

namespace bigramx::cpu {

// The search compares kSearchWidth entries at a time, so a CDF is padded by as many.
constexpr int64_t kSearchWidth = 8;

inline int64_t padded_cdf(int64_t vocab_size) { return vocab_size + kSearchWidth; }

inline void pad_cdf(uint32_t* cdf, int64_t vocab_size) {
    std::fill_n(cdf + vocab_size, kSearchWidth, uint32_t{1} << kDrawBits);
}

// The first token, from `token` on, whose cdf is above r. A linear search: mostly one step from a guide
// table.
inline int64_t search_cdf(const uint32_t* cdf, int64_t token, uint32_t r) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint64_t Two __attribute__((vector_size(16)));
    for (;;) {
        Four not_above{};
        for (int64_t k = 0; k < kSearchWidth; k += 4) {
            Four four;
            std::memcpy(&four, cdf + token + k, sizeof(four));
            not_above += ~(r - four) >> 31;  // by the sign of r - cdf: neither exceeds 2^31
        }
        const Two halves = reinterpret_cast<Two>(not_above);
        const uint64_t sums = halves[0] + halves[1];
        const int64_t count = static_cast<uint32_t>(sums + (sums >> 32));
        token += count;
        if (count < kSearchWidth) return token;
    }
}

inline int64_t guide_bucket(uint32_t r, int guide_bits) { return r >> (kDrawBits - guide_bits); }

// guide: (num_buckets + 1); the last entry is scratch. first_bucket_after(token): the first bucket that
// begins beyond the numbers that draw `token`; monotonic.
template <typename entry_t, typename FirstBucketAfter>
void fill_guide_table(int64_t num_tokens, int64_t num_buckets, entry_t* guide,
                      const FirstBucketAfter& first_bucket_after) {
    constexpr int64_t kChunk = 1 << 20;
    for_each_chunk(num_buckets, kChunk,
                   [=](int64_t begin, int64_t end) { std::fill(guide + begin, guide + end, entry_t(0)); });
    for_each_chunk(num_tokens, kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            guide[std::min(first_bucket_after(token), num_buckets)] = static_cast<entry_t>(token + 1);
        }
    });
    entry_t first = 0;
    for_each_chunk(num_buckets, kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t bucket = begin; bucket < end; ++bucket) {
            guide[bucket] = first = std::max(first, guide[bucket]);
        }
    });
}

// The guide table of a fixed-point CDF, with 2^guide_bits buckets.
template <typename entry_t>
void fill_guide_table(const uint32_t* cdf, int64_t vocab_size, int guide_bits, entry_t* guide) {
    const int shift = kDrawBits - guide_bits;
    fill_guide_table(vocab_size, int64_t{1} << guide_bits, guide, [=](int64_t token) {
        return (int64_t{cdf[token]} + (int64_t{1} << shift) - 1) >> shift;
    });
}

}  // namespace bigramx::cpu
