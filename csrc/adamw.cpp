#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "checks.h"

namespace bigramx {
namespace {

constexpr const char* kName = "adamw_";

void check_like_param(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& param) {
    check_same_device(op, name, tensor, "param", param);
    check_dtype(op, name, tensor, {param.scalar_type()});
    TORCH_CHECK(tensor.sizes() == param.sizes(), op, ": expected ", name, " to have the shape of param, ",
                param.sizes(), ", got ", tensor.sizes());
    TORCH_CHECK(tensor.is_contiguous(), op, ": expected ", name, " to be contiguous, got strides ",
                tensor.strides());
}

}  // namespace

void check_adamw(const char* op, const AdamWTensors& tensors, const AdamWOptions& options) {
    const at::Tensor& param = tensors.param;
    check_dtype(op, "param", param, {at::kFloat, at::kDouble});
    check_like_param(op, "param", param, param);
    check_like_param(op, "grad", tensors.grad, param);
    check_like_param(op, "exp_avg", tensors.exp_avg, param);
    check_like_param(op, "exp_avg_sq", tensors.exp_avg_sq, param);
    if (tensors.max_exp_avg_sq.defined())
        check_like_param(op, "max_exp_avg_sq", tensors.max_exp_avg_sq, param);
    TORCH_CHECK_VALUE(options.step >= 1, op, ": expected step >= 1, got ", options.step);
    TORCH_CHECK(
        !at::GradMode::is_enabled() || !param.requires_grad(), op,
        ": a leaf Variable that requires grad is being used in an in-place operation: param requires grad");
}

void bump_versions(const AdamWTensors& tensors) {
    for (const at::Tensor* changed :
         {&tensors.param, &tensors.exp_avg, &tensors.exp_avg_sq, &tensors.max_exp_avg_sq}) {
        if (changed->defined() && !changed->is_inference()) changed->unsafeGetTensorImpl()->bump_version();
    }
}

namespace {

void checked_step(const AdamWTensors& tensors, const AdamWOptions& options) {
    check_adamw(kName, tensors, options);
    bump_versions(tensors);
    adamw_cpu(tensors, options);
}

void adamw_op_cpu(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
                  const std::optional<at::Tensor>& max_exp_avg_sq, double step, double lr, double beta1,
                  double beta2, double eps, double weight_decay, bool maximize) {
    checked_step({param, grad.contiguous(), exp_avg, exp_avg_sq, max_exp_avg_sq.value_or(at::Tensor())},
                 {step, lr, beta1, beta2, eps, weight_decay, maximize});
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("adamw_", &adamw_op_cpu); }

}  // namespace

void count_and_step_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                          const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
                          const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                          double weight_decay, bool maximize) {
    const at::NoGradGuard no_grad;
    check_dtype(kName, "step", step, {at::kFloat, at::kDouble});
    TORCH_CHECK(step.is_cpu() && step.numel() == 1, kName,
                ": expected step to be one number on the CPU, got shape ", step.sizes(), " on ",
                step.device());
    const double next = 1 + (step.scalar_type() == at::kFloat ? step.const_data_ptr<float>()[0]
                                                              : step.const_data_ptr<double>()[0]);
    checked_step({param, grad.contiguous(), exp_avg, exp_avg_sq, max_exp_avg_sq.value_or(at::Tensor())},
                 {next, lr, beta1, beta2, eps, weight_decay, maximize});
    step.scalar_type() == at::kFloat ? step.data_ptr<float>()[0] = static_cast<float>(next)
                                     : step.data_ptr<double>()[0] = next;
}

}  // namespace bigramx
