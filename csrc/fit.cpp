#include "fit.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "embedding_cross_entropy.h"

namespace bigramx {
namespace {

constexpr const char* kName = "fit_";

int64_t fit_op_cpu(at::Tensor& weight, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, at::Tensor& losses,
                   const at::Tensor& tokens, int64_t batch_size, int64_t block_size, int64_t padding_idx,
                   double step, double lr, double beta1, double beta2, double eps, double weight_decay,
                   double max_seconds, const std::optional<at::Generator>& generator) {
    const FitOptions options{{batch_size, block_size},
                             padding_idx,
                             {step, lr, beta1, beta2, eps, weight_decay, /*maximize=*/false},
                             max_seconds};
    check_batch(kName, tokens, options.shape);
    check_square(kName, "weight", weight);
    check_same_device(kName, "tokens", tokens, "weight", weight);
    TORCH_CHECK(losses.dim() == 1 && losses.size(0) >= 1 && losses.is_contiguous(), kName,
                ": expected losses to be 1-D, contiguous and not empty, got shape ", losses.sizes());
    check_dtype(kName, "losses", losses, {at::kDouble});
    const AdamWTensors tensors{weight, at::empty_like(weight), exp_avg, exp_avg_sq, at::Tensor()};
    check_adamw(kName, tensors, options.adamw);
    bump_versions(tensors);
    return fit_cpu(tokens, tensors, options, generator, losses);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("fit_", &fit_op_cpu); }

}  // namespace
}  // namespace bigramx
