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

// The CDF (sampling/fixed_point_cdf.h) in units of the range of a draw's high bits, rounded, for searches by
// these bits alone. Where they are less than an entry H_j, the draw is below C_j, and draws token j or one
// before it. Where they are H_j + 2 or more, it is not. In between they do not decide.
class HighCdf {
  public:
    // last: the CDF of the last token.
    BIGRAMX_HOST_DEVICE explicit HighCdf(uint64_t last) : last_(last), factor_(kEnd / to_double(last)) {}

    // At most the exact quotient, and less than it by less than 2: the margin exceeds the roundings' 2^-20.
    // Monotonic.
    BIGRAMX_HOST_DEVICE uint32_t cdf(uint64_t cdf) const {
        constexpr double kMargin = 0x1p-19;
        const auto rounded = static_cast<uint32_t>(static_cast<int64_t>(to_double(cdf) * factor_ - kMargin));
        return cdf == last_ ? uint32_t{1} << kHighDrawBits : rounded;
    }

  private:
    static constexpr double kEnd = 1ull << kHighDrawBits;

    BIGRAMX_HOST_DEVICE static double to_double(uint64_t cdf) {
        return static_cast<double>(static_cast<int64_t>(cdf));
    }

    uint64_t last_;
    double factor_;
};
// The search compares kSearchWidth entries at a time, and the entry before the one it finds, so a CDF is
// padded: its first entry is the second of padded_cdf(V).
constexpr int64_t kSearchWidth = 8;

inline int64_t padded_cdf(int64_t vocab_size) { return vocab_size + kSearchWidth; }

inline void pad_cdf(uint32_t* cdf, int64_t vocab_size) {
    constexpr uint32_t kAboveAllDraws = uint32_t{1} << kHighDrawBits;
    cdf[-1] = kAboveAllDraws;
    std::fill_n(cdf + vocab_size, kSearchWidth - 1, kAboveAllDraws);
}

// Whether the high bits r do not decide that the token which they were found to draw follows the one before.
inline bool is_undecided(const uint32_t* cdf, int64_t token, uint32_t r) { return r - cdf[token - 1] < 2; }

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

inline int64_t guide_bucket(uint32_t r, int guide_bits) { return r >> (kHighDrawBits - guide_bits); }

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
    const int shift = kHighDrawBits - guide_bits;
    fill_guide_table(vocab_size, int64_t{1} << guide_bits, guide, [=](int64_t token) {
        return (int64_t{cdf[token]} + (int64_t{1} << shift) - 1) >> shift;
    });
}

}  // namespace bigramx::cpu
