#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <utility>

#include "checks.h"
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include "cuda/adamw.h"
#endif

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

#if defined(BIGRAMX_CUDA)

void adamw_cuda(const AdamWTensors& tensors, const AdamWOptions& options) {
    const GpuScope scope(tensors.param);
    AdamWCudaJob job{};
    job.type = float_type(tensors.param);
    job.size = tensors.param.numel();
    job.param = tensors.param.data_ptr();
    job.grad = tensors.grad.const_data_ptr();
    job.exp_avg = tensors.exp_avg.data_ptr();
    job.exp_avg_sq = tensors.exp_avg_sq.data_ptr();
    if (tensors.max_exp_avg_sq.defined()) job.max_exp_avg_sq = tensors.max_exp_avg_sq.data_ptr();
    job.options = options;
    if (tensors.step.defined()) {
        job.step = tensors.step.const_data_ptr();
        job.step_type = float_type(tensors.step);
    }
    launch_adamw(job, scope.stream());
}

#endif

namespace {

void take_step(const AdamWTensors& tensors, const AdamWOptions& options) {
    bump_versions(tensors);
    BIGRAMX_BY_DEVICE(tensors.param, adamw, tensors, options);
}

void adamw_op(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
              const std::optional<at::Tensor>& max_exp_avg_sq, double step, double lr, double beta1,
              double beta2, double eps, double weight_decay, bool maximize) {
    const AdamWTensors tensors{param, grad.contiguous(), exp_avg, exp_avg_sq,
                               max_exp_avg_sq.value_or(at::Tensor())};
    const AdamWOptions options{step, lr, beta1, beta2, eps, weight_decay, maximize};
    check_adamw(kName, tensors, options);
    take_step(tensors, options);
}

void register_ops(torch::Library& m) { m.impl("adamw_", &adamw_op); }
BIGRAMX_REGISTER(register_ops)

void count_and_step_cpu(AdamWTensors tensors, AdamWOptions options) {
    const at::Tensor step = std::exchange(tensors.step, at::Tensor());
    TORCH_CHECK(step.is_cpu(), kName, ": expected step to be on the CPU or, with param, on a GPU, got ",
                step.device());
    const bool single = step.scalar_type() == at::kFloat;
    options.step = 1 + (single ? step.const_data_ptr<float>()[0] : step.const_data_ptr<double>()[0]);
    check_adamw(kName, tensors, options);
    take_step(tensors, options);
    single ? step.data_ptr<float>()[0] = static_cast<float>(options.step)
           : step.data_ptr<double>()[0] = options.step;
}

#if defined(BIGRAMX_CUDA)

void count_and_step_cuda(const AdamWTensors& tensors, const AdamWOptions& options) {
    check_same_device(kName, "step", tensors.step, "param", tensors.param);
    check_adamw(kName, tensors, options);
    tensors.step.add_(1);
    take_step(tensors, options);
}

#endif

}  // namespace

void count_and_step_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                          const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
                          const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                          double weight_decay, bool maximize) {
    const at::NoGradGuard no_grad;
    check_dtype(kName, "step", step, {at::kFloat, at::kDouble});
    TORCH_CHECK(step.numel() == 1, kName, ": expected step to be one number, got shape ", step.sizes());
    const AdamWTensors tensors{
        param, grad.contiguous(), exp_avg, exp_avg_sq, max_exp_avg_sq.value_or(at::Tensor()), step};
    const AdamWOptions options{/*step=*/1, lr, beta1, beta2, eps, weight_decay, maximize};
    BIGRAMX_BY_DEVICE(step, count_and_step, tensors, options);
}

}  // namespace bigramx
