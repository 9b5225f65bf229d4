// multinomial with the sampler "philox".
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace bigramx {

// probs (B, V), contiguous -> samples (B, num_samples) int64: sample k of row b by the draw at (seed, b, k).
// False where a row is no distribution; samples then hold nothing.
bool multinomial_philox(const at::Tensor& probs, bool replacement, uint64_t seed, at::Tensor& samples);

}  // namespace bigramx
