// Draws tokens from rows of probabilities: the samples, the errors and the stream of torch.multinomial.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace bigramx {

// probs (B, V), num_samples in range -> (B, num_samples) int64.
at::Tensor multinomial_cpu(const at::Tensor& probs, int64_t num_samples, bool replacement,
                           const std::optional<at::Generator>& generator);

}  // namespace bigramx
