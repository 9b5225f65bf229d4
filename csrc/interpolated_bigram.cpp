#include "interpolated_bigram.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {
namespace {

struct Part {
    const char* name;
    const at::Tensor& tensor;
    int64_t size;  // -1: any
};

InterpolatedBigramParams checked_params(const char* op, const at::Tensor& crow_indices,
                                        const at::Tensor& col_indices, const at::Tensor& pair_probs,
                                        const at::Tensor& backoff, const at::Tensor& unigram,
                                        const at::Tensor& idx) {
    check_tensor(op, "unigram", unigram);
    check_dtype(op, "unigram", unigram, {at::kFloat, at::kDouble});
    const int64_t vocab_size = unigram.dim() == 1 ? unigram.size(0) : -1;
    const Part parts[] = {{"unigram", unigram, vocab_size},
                          {"crow_indices", crow_indices, vocab_size + 1},
                          {"col_indices", col_indices, -1},
                          {"pair_probs", pair_probs, col_indices.defined() ? col_indices.numel() : -1},
                          {"backoff", backoff, vocab_size}};
    for (const auto& [name, tensor, size] : parts) {
        check_tensor(op, name, tensor);
        TORCH_CHECK(tensor.dim() == 1 && (size < 0 || tensor.size(0) == size), op, ": expected ", name,
                    " to be 1-D", size < 0 ? "" : c10::str(" of size ", size), ", got shape ",
                    tensor.sizes());
        check_same_device(op, name, tensor, "idx", idx);
    }
    check_dtype(op, "crow_indices", crow_indices, {at::kLong});
    check_dtype(op, "col_indices", col_indices, {at::kInt});
    check_dtype(op, "pair_probs", pair_probs, {unigram.scalar_type()});
    check_dtype(op, "backoff", backoff, {unigram.scalar_type()});
    return {crow_indices.contiguous(), col_indices.contiguous(), pair_probs.contiguous(),
            backoff.contiguous(), unigram.contiguous()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> interpolated_bigram(const at::Tensor& idx, const at::Tensor& targets,
                                                       const at::Tensor& crow_indices,
                                                       const at::Tensor& col_indices,
                                                       const at::Tensor& pair_probs,
                                                       const at::Tensor& backoff, const at::Tensor& unigram) {
    constexpr const char* op = kInterpolatedBigram;
    for (const at::Tensor* part : {&pair_probs, &backoff, &unigram}) {
        TORCH_CHECK(!part->defined() || !part->requires_grad() || !at::GradMode::is_enabled(), op,
                    ": expected pair_probs, backoff and unigram not to require a gradient: the op is not "
                    "differentiable");
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    check_tensor(op, "idx", idx);
    check_tensor(op, "targets", targets);
    check_dtype(op, "idx", idx, {at::kLong, at::kInt});
    check_dtype(op, "targets", targets, {at::kLong, at::kInt});
    check_same_device(op, "targets", targets, "idx", idx);
    TORCH_CHECK_VALUE(idx.sizes() == targets.sizes(), op, ": expected targets to have the shape of idx, ",
                      idx.sizes(), ", got ", targets.sizes());
    const InterpolatedBigramParams params =
        checked_params(op, crow_indices, col_indices, pair_probs, backoff, unigram, idx);
    const at::Tensor probs = at::empty(idx.sizes(), idx.options().dtype(at::kDouble));
    const at::Tensor is_seen = at::empty(idx.sizes(), idx.options().dtype(at::kBool));
    interpolated_bigram_cpu(params, contiguous_int64(idx), contiguous_int64(targets), probs, is_seen);
    return {probs, is_seen};
}

at::Tensor interpolated_bigram_generate(const at::Tensor& idx, const at::Tensor& crow_indices,
                                        const at::Tensor& col_indices, const at::Tensor& pair_probs,
                                        const at::Tensor& backoff, const at::Tensor& unigram,
                                        int64_t max_new_tokens, double temperature,
                                        std::optional<int64_t> top_k, std::optional<double> top_p,
                                        std::optional<double> min_p, at::IntArrayRef stop,
                                        const std::optional<at::Generator>& generator) {
    constexpr const char* op = kInterpolatedBigramGenerate;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    check_tensor(op, "idx", idx);
    const InterpolatedBigramParams params =
        checked_params(op, crow_indices, col_indices, pair_probs, backoff, unigram, idx);
    const auto fill = [&](const GenerateParams& options, const at::Tensor& tokens) {
        return interpolated_bigram_generate_cpu(params, options, tokens);
    };
    const GenerateParams options{at::Tensor(), 0,  temperature,     top_k,    top_p,
                                 min_p,        {}, Sampler::philox, generator};
    return generate_by(fill, options, idx, params.vocab_size(), max_new_tokens, std::nullopt, stop);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) {
    m.impl(kInterpolatedBigram, &Registered<&interpolated_bigram>::call);
    m.impl(kInterpolatedBigramGenerate, &Registered<&interpolated_bigram_generate>::call);
}

}  // namespace bigramx
