#include "generate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.h"

namespace bigramx {

at::Tensor filter_logits(at::Tensor logits, const SamplingOptions& options) {
    constexpr double kRemoved = -std::numeric_limits<double>::infinity();
    if (options.temperature != 1) logits = logits / options.temperature;
    if (options.top_k.has_value()) {
        const int64_t k = std::min(*options.top_k, logits.size(-1));
        const at::Tensor smallest_kept = std::get<0>(logits.topk(k)).narrow(-1, k - 1, 1);
        logits = logits.masked_fill(logits < smallest_kept, kRemoved);
    }
    if (options.top_p.has_value()) {
        const auto [sorted, order] =
            logits.softmax(-1).sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
        const at::Tensor removed = sorted.cumsum(-1) - sorted >= *options.top_p;
        logits = logits.masked_fill(at::zeros_like(removed).scatter(-1, order, removed), kRemoved);
    }
    if (options.min_p.has_value()) {
        const at::Tensor probs = logits.softmax(-1);
        logits = logits.masked_fill(probs < probs.amax(-1, /*keepdim=*/true) * *options.min_p, kRemoved);
    }
    return logits;
}

namespace {

constexpr const char* kName = "generate";

void check_options(const SamplingOptions& options, int64_t vocab_size) {
    TORCH_CHECK_VALUE(options.temperature >= 0 && std::isfinite(options.temperature), kName,
                      ": expected temperature to be finite and >= 0, got ", options.temperature);
    TORCH_CHECK_VALUE(options.top_k.value_or(1) >= 1, kName, ": expected top_k >= 1, got ",
                      options.top_k.value_or(1));
    const double top_p = options.top_p.value_or(1), min_p = options.min_p.value_or(0),
                 stop = options.stop.value_or(0);
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, kName, ": expected 0 < top_p <= 1, got ", top_p);
    TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, kName, ": expected 0 <= min_p <= 1, got ", min_p);
    TORCH_CHECK_VALUE(stop >= 0 && stop < static_cast<double>(std::max<int64_t>(vocab_size, 1)), kName,
                      ": expected 0 <= stop < ", vocab_size, ", got ", stop);
}

void check_idx(const at::Tensor& idx, const at::Tensor& weight) {
    check_dtype(kName, "idx", idx, {at::kLong, at::kInt});
    check_same_device(kName, "idx", idx, "weight", weight);
    TORCH_CHECK(idx.dim() == 2, kName, ": expected idx to be 2-D, (B, T), got shape ", idx.sizes());
    TORCH_CHECK_INDEX(idx.size(1) > 0 || idx.size(0) == 0, kName,
                      ": expected idx to hold at least one token a sequence, got shape ", idx.sizes());
    const at::Tensor tokens = contiguous_int64(idx);
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < tokens.numel(); ++n) {
        TORCH_CHECK_INDEX(token[n] >= 0 && token[n] < weight.size(0), kName,
                          ": index out of range: idx holds ", token[n], " at position ", n,
                          ", expected 0 <= idx < ", weight.size(0));
    }
}

at::Tensor generate_op_cpu(const at::Tensor& idx, const at::Tensor& weight, int64_t max_new_tokens,
                           double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                           std::optional<double> min_p, std::optional<int64_t> stop,
                           std::optional<c10::string_view> sampler,
                           const std::optional<at::Generator>& generator) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // tokens have no gradient
    const SamplingOptions options{temperature, top_k, top_p, min_p, stop, cpu_sampler(kName, sampler)};
    check_defined(kName, "weight", weight);
    check_square(kName, "weight", weight);
    check_floating(kName, "weight", weight);
    check_options(options, weight.size(0));
    check_idx(idx, weight);
    TORCH_CHECK_VALUE(max_new_tokens >= 0, kName, ": expected max_new_tokens >= 0, got ", max_new_tokens);
    const int64_t num_given = idx.size(1);
    at::Tensor tokens = at::empty({idx.size(0), num_given + max_new_tokens}, idx.options().dtype(at::kLong));
    tokens.narrow(1, 0, num_given).copy_(idx);
    int64_t num_filled = stop.has_value() ? 0 : max_new_tokens;
    if (idx.size(0) > 0 && max_new_tokens > 0) {
        num_filled = generate_cpu(weight, options, generator, num_given, tokens);
    }
    const at::Tensor filled = tokens.narrow(1, 0, num_given + num_filled);
    return num_filled == max_new_tokens ? tokens : filled.clone(at::MemoryFormat::Contiguous);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("generate", &generate_op_cpu); }

}  // namespace
}  // namespace bigramx
