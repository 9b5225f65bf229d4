// Draws tokens from rows of probabilities: the errors of torch.multinomial and, by the sampler "torch", its
// samples and its stream.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "sampler.h"

namespace bigramx {

// probs (B, V), num_samples in range -> (B, num_samples) int64.
at::Tensor multinomial_cpu(const at::Tensor& probs, int64_t num_samples, bool replacement, Sampler sampler,
                           const std::optional<at::Generator>& generator);

}  // namespace bigramx
