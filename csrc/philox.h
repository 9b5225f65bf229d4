// Counter-based random numbers: a pure function of (seed, sequence, position), on host and device. No state.
//
// Philox4x32-10 of Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
// The key is the seed; the counter is (position, sequence), low words first.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BIGRAMX_HOST_DEVICE __host__ __device__
#else
#define BIGRAMX_HOST_DEVICE
#endif

namespace bigramx {

// The first of the four 32-bit words that philox gives for this counter.
BIGRAMX_HOST_DEVICE inline uint32_t philox(uint64_t seed, uint64_t sequence, uint64_t position) {
    constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    constexpr int kRounds = 10;

    uint32_t counter0 = static_cast<uint32_t>(position), counter1 = static_cast<uint32_t>(position >> 32);
    uint32_t counter2 = static_cast<uint32_t>(sequence), counter3 = static_cast<uint32_t>(sequence >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t product0 = kMultiplier0 * counter0;
        const uint64_t product1 = kMultiplier1 * counter2;
        counter0 = static_cast<uint32_t>(product1 >> 32) ^ counter1 ^ key0;
        counter1 = static_cast<uint32_t>(product1);
        counter2 = static_cast<uint32_t>(product0 >> 32) ^ counter3 ^ key1;
        counter3 = static_cast<uint32_t>(product0);
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter0;
}

}  // namespace bigramx
