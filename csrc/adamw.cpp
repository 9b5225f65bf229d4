#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {
namespace {

void check_like_param(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& param) {
    check_same_device(op, name, tensor, "param", param);
    check_dtype(op, name, tensor, {param.scalar_type()});
    TORCH_CHECK(tensor.sizes() == param.sizes(), op, ": expected ", name, " to have the shape of param, ",
                param.sizes(), ", got ", tensor.sizes());
    TORCH_CHECK(tensor.is_contiguous(), op, ": expected ", name, " to be contiguous, got strides ",
                tensor.strides());
}

void check_step(const char* op, const at::Tensor& step, const at::Tensor& param) {
    check_dtype(op, "step", step, {at::kFloat, at::kDouble});
    TORCH_CHECK(step.numel() == 1, op, ": expected step to be one number, got shape ", step.sizes());
    TORCH_CHECK(step.is_cpu() || step.device() == param.device(), op,
                ": expected step to be on the CPU or on the device of param, ", param.device(), ", got ",
                step.device());
}

}  // namespace

void check_adamw(const char* op, const AdamWParams& params) {
    const at::Tensor& param = params.param;
    check_dtype(op, "param", param, {at::kFloat, at::kDouble});
    check_like_param(op, "param", param, param);
    check_like_param(op, "grad", params.grad, param);
    check_like_param(op, "exp_avg", params.exp_avg, param);
    check_like_param(op, "exp_avg_sq", params.exp_avg_sq, param);
    if (params.max_exp_avg_sq.defined()) check_like_param(op, "max_exp_avg_sq", params.max_exp_avg_sq, param);
    check_step(op, params.step, param);
    TORCH_CHECK(
        !at::GradMode::is_enabled() || !param.requires_grad(), op,
        ": a leaf Variable that requires grad is being used in an in-place operation: param requires grad");
}

void bump_versions(const AdamWParams& params) {
    for (const at::Tensor* changed :
         {&params.param, &params.exp_avg, &params.exp_avg_sq, &params.max_exp_avg_sq}) {
        if (changed->defined() && !changed->is_inference()) changed->unsafeGetTensorImpl()->bump_version();
    }
}

void adamw(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
           const std::optional<at::Tensor>& max_exp_avg_sq, const at::Tensor& step, double lr, double beta1,
           double beta2, double eps, double weight_decay, bool maximize) {
    const AdamWParams params{param,
                             grad.contiguous(),
                             exp_avg,
                             exp_avg_sq,
                             max_exp_avg_sq.value_or(at::Tensor()),
                             step,
                             {lr, beta1, beta2, eps, weight_decay, maximize}};
    check_adamw(kAdamW, params);
    bump_versions(params);
    BIGRAMX_DISPATCH_DEVICE(param, adamw, params);
}

BIGRAMX_REGISTER(kAdamW, &adamw)

// Autograd records nothing: check_adamw ensures that param does not require grad.
TORCH_LIBRARY_IMPL(bigramx, Autograd, m) { m.impl(kAdamW, torch::CppFunction::makeFallthrough()); }

}  // namespace bigramx
