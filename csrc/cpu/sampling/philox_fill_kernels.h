// Philox4x32-10 for many counters at once. Compiled once for each CPU target (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

// One counter per 64-bit lane. A word is the low half of a lane; the high half is garbage, which products
// ignore.
struct PhiloxLanes {
    using Lanes64 = Vector<uint64_t>;

    Lanes64 words[Philox::kWords];

    void set(uint64_t sequence, uint64_t first_counter) {
        Lanes64 counters{};
        for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) counters[lane] = first_counter + lane;
        words[0] = counters;
        words[1] = counters >> 32;
        words[2] = broadcast(sequence);
        words[3] = words[2] >> 32;
    }

    void round(uint64_t key0, uint64_t key1) {
        const Lanes64 product0 = multiply_low_words(words[0], broadcast(Philox::kMultiplier0));
        const Lanes64 product1 = multiply_low_words(words[2], broadcast(Philox::kMultiplier1));
        words[0] = (product1 >> 32) ^ words[1] ^ key0;
        words[1] = product1;
        words[2] = (product0 >> 32) ^ words[3] ^ key1;
        words[3] = product0;
    }

    // Transposes: the words of a counter become adjacent.
    void store_words(int bits, uint32_t* to) const {
        const int dropped = 32 - bits;
        const uint64_t low_word = 0xFFFFFFFF >> dropped;
        const auto pair = [&](int low, int high) {
            return (words[low] >> dropped & low_word) | (words[high] >> dropped & low_word) << 32;
        };
        const Lanes64 pairs[2] = {pair(0, 1), pair(2, 3)};
        for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) {
            const uint64_t both[2] = {pairs[0][lane], pairs[1][lane]};
            std::memcpy(to + lane * Philox::kWords, both, sizeof(both));
        }
    }
};

// kPhiloxFillBlock words. The rounds of a counter depend on each other; those of kOverlap vectors overlap.
inline void philox_fill_kernel(uint64_t seed, uint64_t sequence, uint64_t first_counter, int bits,
                               uint32_t* words) {
    constexpr int64_t kCounters = kLanes<uint64_t>, kOverlap = 4, kStep = kOverlap * kCounters;
    for (int64_t begin = 0; begin < kPhiloxFillBlock / Philox::kWords; begin += kStep) {
        PhiloxLanes lanes[kOverlap];
        for (int64_t k = 0; k < kOverlap; ++k) lanes[k].set(sequence, first_counter + begin + k * kCounters);
        uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < Philox::kRounds; ++round) {
            for (PhiloxLanes& each : lanes) each.round(key0, key1);
            key0 += Philox::kWeyl0;
            key1 += Philox::kWeyl1;
        }
        for (int64_t k = 0; k < kOverlap; ++k) {
            lanes[k].store_words(bits, words + (begin + k * kCounters) * Philox::kWords);
        }
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
