// Bulk draws of sampling/philox.h.
#pragma once

#include <cstdint>

#include "sampling/philox.h"

namespace bigramx::cpu {

constexpr int64_t kPhiloxFillBlock = 128;

// words[k] = the first `bits` bits of the word at position + k of a sequence, for k < count. position: a
// multiple of 4. Writes whole blocks: count is rounded up to a multiple of kPhiloxFillBlock.
void philox_fill(uint64_t seed, uint64_t sequence, uint64_t position, int64_t count, int bits,
                 uint32_t* words);

// Consecutive draws of a sequence, of which mostly the high bits suffice.
class DrawBlock {
  public:
    static constexpr int64_t kSize = 256;  // more would not stay in the cache

    alignas(64) uint32_t high[kSize];

    // position: a multiple of 4. count <= kSize.
    void fill_high(uint64_t seed, uint64_t sequence, uint64_t position, int64_t count) {
        seed_ = seed;
        sequence_ = sequence;
        position_ = position;
        philox_fill(seed, sequence, position, count, kHighDrawBits, high);
    }

    // For at(), which is for those who need all bits of all draws.
    void fill_low(int64_t count) {
        philox_fill(seed_, sequence_of_low_words(sequence_), position_, count, kLowDrawBits, low_);
    }

    uint64_t at(int64_t k) const { return join_draw(high[k], low_[k]); }

    // For second_high().
    void fill_second(int64_t count) {
        philox_fill(seed_, sequence_of_second_draws(sequence_), position_, count, kHighDrawBits,
                    second_high_);
    }

    uint32_t second_high(int64_t k) const { return second_high_[k]; }

    // For those who rarely need all bits.
    uint64_t complete(int64_t k) const { return complete(sequence_, high[k], k); }
    uint64_t complete_second(int64_t k) const {
        return complete(sequence_of_second_draws(sequence_), second_high_[k], k);
    }

    // Another draw at the same position, of all bits.
    uint64_t second(int64_t k) const {
        return second_draw(seed_, sequence_, position_ + static_cast<uint64_t>(k));
    }

  private:
    __attribute__((noinline, cold)) uint64_t complete(uint64_t sequence, uint32_t high_bits,
                                                      int64_t k) const {
        const uint64_t position = position_ + static_cast<uint64_t>(k);
        const Philox low(seed_, sequence_of_low_words(sequence), position / Philox::kWords);
        return join_draw(high_bits, low.words[position % Philox::kWords]);
    }

    uint64_t seed_, sequence_, position_;
    uint32_t low_[kSize];
    uint32_t second_high_[kSize];
};

}  // namespace bigramx::cpu
