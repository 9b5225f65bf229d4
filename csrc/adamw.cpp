#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "checks.h"

namespace bigramx {
namespace {

constexpr const char* kName = "adamw_";

void check_like_param(const char* name, const at::Tensor& tensor, const at::Tensor& param) {
    check_same_device(kName, name, tensor, "param", param);
    check_dtype(kName, name, tensor, {param.scalar_type()});
    TORCH_CHECK(tensor.sizes() == param.sizes(), kName, ": expected ", name, " to have the shape of param, ",
                param.sizes(), ", got ", tensor.sizes());
}

void check_state(const char* name, const at::Tensor& tensor, const at::Tensor& param) {
    check_like_param(name, tensor, param);
    TORCH_CHECK(tensor.is_contiguous(), kName, ": expected ", name, " to be contiguous, got strides ",
                tensor.strides());
}

void adamw_op_cpu(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
                  const std::optional<at::Tensor>& max_exp_avg_sq, double step, double lr, double beta1,
                  double beta2, double eps, double weight_decay, bool maximize) {
    check_dtype(kName, "param", param, {at::kFloat, at::kDouble});
    check_like_param("grad", grad, param);
    check_state("param", param, param);
    check_state("exp_avg", exp_avg, param);
    check_state("exp_avg_sq", exp_avg_sq, param);
    if (max_exp_avg_sq.has_value()) check_state("max_exp_avg_sq", *max_exp_avg_sq, param);
    TORCH_CHECK_VALUE(step >= 1, kName, ": expected step >= 1, got ", step);
    TORCH_CHECK(
        !at::GradMode::is_enabled() || !param.requires_grad(), kName,
        ": a leaf Variable that requires grad is being used in an in-place operation: param requires grad");
    // What autograd has saved of these is not what backward will find.
    for (const at::Tensor& changed : {param, exp_avg, exp_avg_sq, max_exp_avg_sq.value_or(at::Tensor())}) {
        if (changed.defined() && !changed.is_inference()) changed.unsafeGetTensorImpl()->bump_version();
    }
    adamw_cpu({param, grad.contiguous(), exp_avg, exp_avg_sq, max_exp_avg_sq.value_or(at::Tensor())},
              {step, lr, beta1, beta2, eps, weight_decay, maximize});
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("adamw_", &adamw_op_cpu); }

}  // namespace
}  // namespace bigramx
