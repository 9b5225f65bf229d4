// Draws tokens from rows of probabilities, with the errors of torch.multinomial and, by the sampler "torch",
// with its samples and its use of the generator.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "sampling/sampler.h"

namespace bigramx {

struct MultinomialParams {
    at::Tensor probs;     // (B, V) floating point
    int64_t num_samples;  // >= 1; without replacement at most V
    bool replacement;
    Sampler sampler;
    std::optional<at::Generator> generator;
};

// samples: (B, num_samples) int64.
at::Tensor multinomial_cpu(const MultinomialParams& params);
at::Tensor multinomial_cuda(const MultinomialParams& params);

// The op.
at::Tensor multinomial(const at::Tensor& probs, int64_t num_samples, bool replacement,
                       std::optional<std::string_view> sampler,
                       const std::optional<at::Generator>& generator);

}  // namespace bigramx
