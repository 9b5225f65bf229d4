#include "generate.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"
#include "sampling/fixed_point_cdf.h"

namespace bigramx {

TokenFilter token_filter(const GenerateParams& params) {
    TokenFilter filter;
    if (params.top_k.has_value()) filter.top_k = *params.top_k;
    if (params.top_p.has_value()) {
        filter.top_p = static_cast<uint64_t>(std::ceil(std::ldexp(*params.top_p, kDrawBits))) - 1;
    }
    if (params.min_p.has_value()) {
        filter.min_weight = std::ceil(static_cast<float>(std::ldexp(*params.min_p, kWeightBits)));
    }
    return filter;
}

namespace {

void check_options(const GenerateParams& params) {
    TORCH_CHECK_VALUE(params.temperature >= 0 && std::isfinite(params.temperature), kGenerate,
                      ": expected temperature to be finite and >= 0, got ", params.temperature);
    TORCH_CHECK_VALUE(params.top_k.value_or(1) >= 1, kGenerate, ": expected top_k >= 1, got ",
                      params.top_k.value_or(1));
    const double top_p = params.top_p.value_or(1), min_p = params.min_p.value_or(0);
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, kGenerate, ": expected 0 < top_p <= 1, got ", top_p);
    TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, kGenerate, ": expected 0 <= min_p <= 1, got ", min_p);
}

StopTokens stop_tokens(std::optional<int64_t> stop, at::IntArrayRef more_stop, int64_t vocab_size) {
    StopTokens tokens{stop, {}};
    const auto check = [&](int64_t token) {
        TORCH_CHECK_VALUE(token >= 0 && token < std::max<int64_t>(vocab_size, 1), kGenerate,
                          ": expected 0 <= stop < ", vocab_size, ", got ", token);
    };
    if (stop.has_value()) check(*stop);
    for (const int64_t token : more_stop) check(token);
    if (more_stop.empty()) return tokens;
    tokens.several.resize(std::max<int64_t>(vocab_size, 1));
    if (stop.has_value()) tokens.several[*stop] = 1;
    for (const int64_t token : more_stop) tokens.several[token] = 1;
    return tokens;
}

// Without the filters that keep all tokens of any row.
GenerateParams drop_idle_filters(GenerateParams params, int64_t vocab_size) {
    if (params.top_k.value_or(0) >= vocab_size) params.top_k.reset();
    if (params.top_p == 1) params.top_p.reset();
    if (params.min_p == 0) params.min_p.reset();
    return params;
}

void check_idx(const at::Tensor& idx) {
    check_dtype(kGenerate, "idx", idx, {at::kLong, at::kInt});
    TORCH_CHECK(idx.dim() == 2, kGenerate, ": expected idx to be 2-D, (B, T), got shape ", idx.sizes());
    TORCH_CHECK_INDEX(idx.size(1) > 0 || idx.size(0) == 0, kGenerate,
                      ": expected idx to hold at least one token a sequence, got shape ", idx.sizes());
}

}  // namespace

at::Tensor generate_by(const FillTokens& fill, GenerateParams params, const at::Tensor& idx,
                       int64_t vocab_size, int64_t max_new_tokens, std::optional<int64_t> stop,
                       at::IntArrayRef more_stop) {
    check_idx(idx);
    const int64_t batch_size = idx.size(0);
    params.prompt_length = idx.size(1);
    check_options(params);
    params.stop = stop_tokens(stop, more_stop, vocab_size);
    TORCH_CHECK_VALUE(max_new_tokens >= 0, kGenerate, ": expected max_new_tokens >= 0, got ", max_new_tokens);
    const int64_t length = checked_sum(kGenerate, "T + max_new_tokens", params.prompt_length, max_new_tokens);
    checked_product(kGenerate, "B * (T + max_new_tokens)", batch_size, length);
    const at::Tensor tokens = at::empty({batch_size, length}, idx.options().dtype(at::kLong));
    BIGRAMX_DISPATCH_DEVICE(idx, copy_prompt, contiguous_int64(idx), vocab_size, tokens);
    int64_t num_steps = params.stop.any() ? 0 : max_new_tokens;
    if (batch_size > 0 && max_new_tokens > 0) num_steps = fill(drop_idle_filters(params, vocab_size), tokens);
    if (num_steps == max_new_tokens) return tokens;
    return tokens.narrow(1, 0, params.prompt_length + num_steps).clone(at::MemoryFormat::Contiguous);
}

at::Tensor generate(const at::Tensor& idx, const at::Tensor& weight, int64_t max_new_tokens,
                    double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                    std::optional<double> min_p, std::optional<int64_t> stop,
                    std::optional<std::string_view> sampler, const std::optional<at::Generator>& generator,
                    at::IntArrayRef more_stop) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // tokens have no gradient
    check_tensor(kGenerate, "weight", weight);
    check_tensor(kGenerate, "idx", idx);
    const Sampler chosen = choose_sampler(kGenerate, sampler, /*on_gpu=*/uses_cuda_kernels(weight));
    check_square(kGenerate, "weight", weight);
    check_floating(kGenerate, "weight", weight);
    check_same_device(kGenerate, "idx", idx, "weight", weight);
    const auto fill = [](const GenerateParams& params, const at::Tensor& tokens) {
        return BIGRAMX_DISPATCH_DEVICE(params.weight, generate, params, tokens);
    };
    const GenerateParams params{weight, 0, temperature, top_k, top_p, min_p, {}, chosen, generator};
    return generate_by(fill, params, idx, weight.size(0), max_new_tokens, stop, more_stop);
}

BIGRAMX_REGISTER(kGenerate, &generate)

}  // namespace bigramx
