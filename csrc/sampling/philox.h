// Counter-based random numbers, for host and device: a pure function of (seed, sequence, position), without
// state.
//
// Philox4x32-10 of Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). The
// key is the seed; the 128-bit counter is (position / 4, sequence), low words first: four positions share one
// evaluation, one word each.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace bigramx {

struct Philox {
    static constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // what each round adds to the key
    static constexpr int kRounds = 10, kWords = 4;

    uint32_t words[kWords];

    BIGRAMX_HOST_DEVICE Philox(uint64_t seed, uint64_t sequence, uint64_t counter)
        : words{low(counter), high(counter), low(sequence), high(sequence)} {
        uint32_t key0 = low(seed), key1 = high(seed);
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t product0 = kMultiplier0 * words[0];
            const uint64_t product1 = kMultiplier1 * words[2];
            words[0] = high(product1) ^ words[1] ^ key0;
            words[1] = low(product1);
            words[2] = high(product0) ^ words[3] ^ key1;
            words[3] = low(product0);
            key0 += kWeyl0;
            key1 += kWeyl1;
        }
    }

  private:
    BIGRAMX_HOST_DEVICE static uint32_t low(uint64_t value) { return static_cast<uint32_t>(value); }
    BIGRAMX_HOST_DEVICE static uint32_t high(uint64_t value) { return static_cast<uint32_t>(value >> 32); }
};

// A draw is a uniform number of kDrawBits bits, at a position of a sequence. Its high bits are a word of that
// sequence. The low bits are the word at the same position of another one, which is computed only where the
// high bits do not decide.
constexpr int kLowDrawBits = 32, kHighDrawBits = 31, kDrawBits = kHighDrawBits + kLowDrawBits;

// sequence < 2^63.
BIGRAMX_HOST_DEVICE uint64_t sequence_of_low_words(uint64_t sequence) { return sequence | uint64_t{1} << 63; }

// Where a step takes two draws, the second is that of this sequence at the same position. sequence < 2^62.
BIGRAMX_HOST_DEVICE uint64_t sequence_of_second_draws(uint64_t sequence) {
    return sequence | uint64_t{1} << 62;
}

BIGRAMX_HOST_DEVICE uint64_t join_draw(uint32_t high, uint32_t low) {
    return uint64_t{high} << kLowDrawBits | low;
}

// The draws at the positions that share an evaluation of Philox.
struct Draws {
    uint64_t values[Philox::kWords];

    BIGRAMX_HOST_DEVICE Draws(uint64_t seed, uint64_t sequence, uint64_t counter) {
        const Philox high(seed, sequence, counter), low(seed, sequence_of_low_words(sequence), counter);
        for (int k = 0; k < Philox::kWords; ++k) {
            values[k] = join_draw(high.words[k] >> (32 - kHighDrawBits), low.words[k]);
        }
    }
};

// Another draw at a position of a sequence, independent of the first: two words of an evaluation of its own.
// sequence < 2^62.
BIGRAMX_HOST_DEVICE uint64_t second_draw(uint64_t seed, uint64_t sequence, uint64_t position) {
    const Philox philox(seed, sequence | uint64_t{1} << 62, position);
    return join_draw(philox.words[0] >> (32 - kHighDrawBits), philox.words[1]);
}

BIGRAMX_HOST_DEVICE uint64_t draw(uint64_t seed, uint64_t sequence, uint64_t position) {
    return Draws(seed, sequence, position / Philox::kWords).values[position % Philox::kWords];
}

}  // namespace bigramx
