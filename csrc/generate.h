// Chains of tokens: each step draws the next token from the row of the last one.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "sampling/sampler.h"
#include "sampling/token_filter.h"

namespace bigramx {

// The tokens at which a chain ends. One is compared with; several are looked up.
struct StopTokens {
    std::optional<int64_t> one;
    std::vector<int8_t> several;  // (V): whether it is one of them; or empty

    bool any() const { return one.has_value() || !several.empty(); }
    bool contains(int64_t token) const { return several.empty() ? token == one : several[token] != 0; }
};

struct GenerateParams {
    at::Tensor weight;      // (V, V) floating point
    int64_t prompt_length;  // T
    double temperature;     // 0: the argmax
    std::optional<int64_t> top_k;
    std::optional<double> top_p;
    std::optional<double> min_p;
    StopTokens stop;
    Sampler sampler;
    std::optional<at::Generator> generator;

    // Whether the filters may remove tokens.
    bool removes_tokens() const { return top_k.has_value() || top_p.has_value() || min_p.has_value(); }
};

// The dtype of filtered logits: that of the table, or where filters may remove tokens its accumulation dtype,
// as sums of probabilities in 16 bits are far off. Without filters a loop in plain PyTorch stays in 16 bits,
// and is replayed.
inline at::ScalarType filtered_dtype(const GenerateParams& params) {
    const at::ScalarType dtype = params.weight.scalar_type();
    return params.removes_tokens() ? at::toOpMathType(dtype) : dtype;
}

// The filters of the sampler "philox".
TokenFilter token_filter(const GenerateParams& params);

// Copies idx, (B, T) int64, contiguous, to the first T columns of tokens. Raises for a token out of range.
void copy_prompt_cpu(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens);
void copy_prompt_cuda(const at::Tensor& idx, int64_t vocab_size, const at::Tensor& tokens);

// Fills tokens, (B, T + max_new_tokens) int64, behind the prompts; B > 0 and max_new_tokens > 0. Returns the
// number of steps: fewer than max_new_tokens if all sequences meet a stop token. Those that meet one before
// the last are filled with it.
int64_t generate_cpu(const GenerateParams& params, const at::Tensor& tokens);
int64_t generate_cuda(const GenerateParams& params, const at::Tensor& tokens);

// One of the two, or that of an op that generates from something else than a table.
using FillTokens = std::function<int64_t(const GenerateParams& params, const at::Tensor& tokens)>;

// What ops that generate have in common: checks all but the weight, and lets `fill` continue the prompts idx.
// It is given no filters that keep all tokens of any row.
at::Tensor generate_by(const FillTokens& fill, GenerateParams params, const at::Tensor& idx,
                       int64_t vocab_size, int64_t max_new_tokens, std::optional<int64_t> stop,
                       at::IntArrayRef more_stop);

// The op.
at::Tensor generate(const at::Tensor& idx, const at::Tensor& weight, int64_t max_new_tokens,
                    double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                    std::optional<double> min_p, std::optional<int64_t> stop,
                    std::optional<std::string_view> sampler, const std::optional<at::Generator>& generator,
                    at::IntArrayRef more_stop);

}  // namespace bigramx
