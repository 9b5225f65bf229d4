#include "generate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {

at::Tensor filter_logits(at::Tensor logits, const GenerateParams& params) {
    constexpr double kRemoved = -std::numeric_limits<double>::infinity();
    logits = logits.to(filtered_dtype(params));
    if (params.temperature != 1) logits = logits / params.temperature;
    if (params.top_k.has_value()) {
        const int64_t k = std::min(*params.top_k, logits.size(-1));
        const at::Tensor smallest_kept = std::get<0>(logits.topk(k)).narrow(-1, k - 1, 1);
        logits = logits.masked_fill(logits < smallest_kept, kRemoved);
    }
    if (params.top_p.has_value()) {
        const auto [sorted, order] =
            logits.softmax(-1).sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
        const at::Tensor sums = sorted.cumsum(-1, at::kDouble);
        const at::Tensor total = sums.narrow(-1, -1, 1);  // of long rows not quite 1, as softmax rounds
        const at::Tensor removed = sums - sorted >= total * *params.top_p;
        logits = logits.masked_fill(at::zeros_like(removed).scatter(-1, order, removed), kRemoved);
    }
    if (params.min_p.has_value()) {
        const at::Tensor probs = logits.softmax(-1);
        logits = logits.masked_fill(probs < probs.amax(-1, /*keepdim=*/true) * *params.min_p, kRemoved);
    }
    return logits;
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
GenerateParams drop_idle_filters(GenerateParams params) {
    if (params.top_k.value_or(0) >= params.weight.size(0)) params.top_k.reset();
    if (params.top_p == 1) params.top_p.reset();
    if (params.min_p == 0) params.min_p.reset();
    return params;
}

void check_idx(const at::Tensor& idx, const at::Tensor& weight) {
    check_dtype(kGenerate, "idx", idx, {at::kLong, at::kInt});
    check_same_device(kGenerate, "idx", idx, "weight", weight);
    TORCH_CHECK(idx.dim() == 2, kGenerate, ": expected idx to be 2-D, (B, T), got shape ", idx.sizes());
    TORCH_CHECK_INDEX(idx.size(1) > 0 || idx.size(0) == 0, kGenerate,
                      ": expected idx to hold at least one token a sequence, got shape ", idx.sizes());
}

}  // namespace

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
    check_idx(idx, weight);
    const int64_t batch_size = idx.size(0), prompt_length = idx.size(1);
    GenerateParams params{weight, prompt_length, temperature, top_k, top_p, min_p, {}, chosen, generator};
    check_options(params);
    params.stop = stop_tokens(stop, more_stop, weight.size(0));
    TORCH_CHECK_VALUE(max_new_tokens >= 0, kGenerate, ": expected max_new_tokens >= 0, got ", max_new_tokens);
    const int64_t length = checked_sum(kGenerate, "T + max_new_tokens", prompt_length, max_new_tokens);
    checked_product(kGenerate, "B * (T + max_new_tokens)", batch_size, length);
    const at::Tensor tokens = at::empty({batch_size, length}, idx.options().dtype(at::kLong));
    BIGRAMX_DISPATCH_DEVICE(weight, copy_prompt, contiguous_int64(idx), weight.size(0), tokens);
    int64_t num_steps = params.stop.any() ? 0 : max_new_tokens;
    if (batch_size > 0 && max_new_tokens > 0) {
        num_steps = BIGRAMX_DISPATCH_DEVICE(weight, generate, drop_idle_filters(params), tokens);
    }
    if (num_steps == max_new_tokens) return tokens;
    return tokens.narrow(1, 0, prompt_length + num_steps).clone(at::MemoryFormat::Contiguous);
}

BIGRAMX_REGISTER(kGenerate, &generate)

}  // namespace bigramx
