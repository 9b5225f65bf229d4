// Chains of tokens: each step draws the next token from the row of the last one.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "sampler.h"

namespace bigramx {

struct SamplingOptions {
    double temperature;  // 0: the likeliest token
    std::optional<int64_t> top_k;
    std::optional<double> top_p;
    std::optional<double> min_p;
    std::optional<int64_t> stop;
    Sampler sampler;
};

// (..., V) logits -> logits with the temperature, which is not 0, applied, and -inf for the tokens that the
// filters remove. The filters depend on the previous token alone, so that this is done once for each row of
// the table, not for each step.
at::Tensor filter_logits(at::Tensor logits, const SamplingOptions& options);

// tokens (B, T + max_new_tokens) int64, none of them 0, of which the first T are given: fills the others.
// Returns how many of them it filled: fewer than there are where all sequences met `stop`.
int64_t generate_cpu(const at::Tensor& weight, const SamplingOptions& options,
                     const std::optional<at::Generator>& generator, int64_t num_given, at::Tensor& tokens);

}  // namespace bigramx
