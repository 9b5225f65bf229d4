// Bulk draws of sampling/philox.h.
#pragma once

#include <cstdint>

namespace bigramx::cpu {

constexpr int64_t kPhiloxFillBlock = 128;

// draws[k] = draw(seed, sequence, position + k) for k < count. position: a multiple of 4. Writes whole
// blocks: count is rounded up to a multiple of kPhiloxFillBlock.
void philox_fill(uint64_t seed, uint64_t sequence, uint64_t position, int64_t count, uint32_t* draws);

}  // namespace bigramx::cpu
