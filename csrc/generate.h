// Chains of tokens: each step draws the next token from the row of the last one.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace bigramx {

enum class Sampler { torch, philox };

struct SamplingOptions {
    double temperature;  // 0: the likeliest token
    std::optional<int64_t> top_k;
    std::optional<double> top_p;
    std::optional<double> min_p;
    std::optional<int64_t> stop;
    Sampler sampler;
};

// (..., V) logits -> logits with the temperature applied and -inf for the tokens that the filters remove. The
// filters depend on the previous token alone, so that this is done once for each row of the table, not for
// each step.
at::Tensor filter_logits(at::Tensor logits, const SamplingOptions& options);

// starts (B) int64, weight (V, V) -> (B, max_new_tokens) int64.
at::Tensor generate_cpu(const at::Tensor& starts, const at::Tensor& weight, int64_t max_new_tokens,
                        const SamplingOptions& options, const std::optional<at::Generator>& generator);

}  // namespace bigramx
