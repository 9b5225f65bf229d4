#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <utility>

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
}

// Of the tensors that a step changes.
void check_changed(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& param) {
    check_writable(op, name, tensor);
    check_like_param(op, name, tensor, param);
    TORCH_CHECK(tensor.is_contiguous(), op, ": expected ", name, " to be contiguous, got strides ",
                tensor.strides());
}

void check_step(const char* op, const at::Tensor& step, const at::Tensor& param) {
    check_tensor(op, "step", step);
    check_dtype(op, "step", step, {at::kFloat, at::kDouble});
    TORCH_CHECK(step.numel() == 1, op, ": expected step to be one number, got shape ", step.sizes());
    TORCH_CHECK(step.is_cpu() || step.device() == param.device(), op,
                ": expected step to be on the CPU or on the device of param, ", param.device(), ", got ",
                step.device());
}

}  // namespace

void check_adamw_options(const char* op, const AdamWOptions& options, at::ScalarType dtype) {
    TORCH_CHECK(dtype == at::kDouble || !std::isfinite(options.lr) ||
                    std::abs(options.lr) <= std::numeric_limits<float>::max(),
                op, ": lr: value cannot be converted to type float without overflow, got ", options.lr);
    TORCH_CHECK_VALUE(options.beta1 >= 0 && options.beta1 < 1, op, ": expected 0 <= beta1 < 1, got ",
                      options.beta1);
    TORCH_CHECK_VALUE(options.beta2 >= 0 && options.beta2 < 1, op, ": expected 0 <= beta2 < 1, got ",
                      options.beta2);
}

namespace {

// Whether no dispatch mode, transform or tracer is active.
bool has_no_mode() {
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    return (c10::default_included_set | c10::autocast_dispatch_keyset).has_all(included);
}

// Whether the tensor is no Python subclass and no wrapper of functorch, has no conj or neg bit and no other
// layout.
bool is_plain(const at::Tensor& tensor) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet kPlain({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                                          DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                                          DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
    return kPlain.has_all(tensor.key_set());
}

bool may_change(const at::Tensor& tensor) {
    return tensor.is_contiguous() && (!tensor.is_inference() || c10::InferenceMode::is_enabled());
}

bool is_like(const at::Tensor& tensor, const at::Tensor& param) {
    return tensor.scalar_type() == param.scalar_type() && tensor.device() == param.device() &&
           tensor.sizes() == param.sizes();
}

bool may_count(const at::Tensor& step, const at::Tensor& param) {
    return (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble) && step.numel() == 1 &&
           (step.is_cpu() ? adamw_count_cpu(step) >= 0 : step.device() == param.device());
}

// at::add_ takes longer than a small kernel.
void count(const at::Tensor& step, int steps) { adamw_set_count_cpu(step, adamw_count_cpu(step) + steps); }

}  // namespace

bool adamw_fits(const at::Tensor& param, const at::Tensor& grad, const OptionalTensor& exp_avg,
                const OptionalTensor& exp_avg_sq, const OptionalTensor& max_exp_avg_sq,
                const OptionalTensor& step) {
    if (!has_no_mode() || !(param.scalar_type() == at::kFloat || param.scalar_type() == at::kDouble)) {
        return false;
    }
    c10::SmallVector<Extent, 6> extents;
    const auto is_apart = [&](const at::Tensor& tensor) {
        const Extent extent(tensor);
        if (!extent.is_allocated) return false;
        for (const Extent& other : extents) {
            if (extent.overlaps(other)) return false;
        }
        extents.push_back(extent);
        return true;
    };
    const auto fits = [&](const at::Tensor& tensor) {
        return is_plain(tensor) && may_change(tensor) && is_like(tensor, param) && is_apart(tensor);
    };
    const auto is_absent_or_fits = [&](const OptionalTensor& tensor) {
        return !tensor.has_value() || fits(*tensor);
    };
    return fits(param) && is_plain(grad) && is_like(grad, param) && is_apart(grad) &&
           is_absent_or_fits(exp_avg) && is_absent_or_fits(exp_avg_sq) && is_absent_or_fits(max_exp_avg_sq) &&
           (!step.has_value() ||
            (is_plain(*step) && may_change(*step) && is_apart(*step) && may_count(*step, param)));
}

void check_adamw(const char* op, const AdamWParams& params) {
    const at::Tensor& param = params.param;
    check_defined(op, "param", param);
    check_dtype(op, "param", param, {at::kFloat, at::kDouble});
    check_changed(op, "param", param, param);
    if (params.grad.defined()) {
        check_tensor(op, "grad", params.grad);
        check_like_param(op, "grad", params.grad, param);
    }
    check_changed(op, "exp_avg", params.exp_avg, param);
    check_changed(op, "exp_avg_sq", params.exp_avg_sq, param);
    if (params.max_exp_avg_sq.defined()) check_changed(op, "max_exp_avg_sq", params.max_exp_avg_sq, param);
    check_step(op, params.step, param);
    check_adamw_options(op, params.options, param.scalar_type());
    check_apart(op,
                {{"param", param},
                 {"exp_avg", params.exp_avg},
                 {"exp_avg_sq", params.exp_avg_sq},
                 {"max_exp_avg_sq", params.max_exp_avg_sq},
                 {"grad", params.grad},
                 {"step", params.step}},
                /*num_written=*/4);
}

void bump_versions(std::initializer_list<at::Tensor> changed) {
    for (const at::Tensor& tensor : changed) {
        if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
}

namespace {

// Of parameters that have been checked.
void take_step(AdamWParams&& params) {
    if (!params.grad.is_contiguous()) params.grad = params.grad.contiguous();
    bump_versions({params.param, params.exp_avg, params.exp_avg_sq, params.max_exp_avg_sq});
    if (params.counts_step) bump_versions({params.step});
    BIGRAMX_DISPATCH_DEVICE(params.param, adamw, params);
}

// This entry has no dispatcher before it, which would have sent the others elsewhere.
void check_plain(const AdamWParams& params) {
    for (const NamedTensor& named : {NamedTensor{"param", params.param},
                                     {"grad", params.grad},
                                     {"exp_avg", params.exp_avg},
                                     {"exp_avg_sq", params.exp_avg_sq},
                                     {"max_exp_avg_sq", params.max_exp_avg_sq},
                                     {"step", params.step}}) {
        TORCH_CHECK(!named.tensor.defined() || is_plain(named.tensor), kAdamW, ": expected ", named.name,
                    " to be a plain tensor, for which adamw_fits, got the keys ",
                    c10::toString(named.tensor.key_set()));
    }
}

AdamWParams params_of(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
                      const OptionalTensor& max_exp_avg_sq, const at::Tensor& step,
                      const AdamWOptions& options) {
    return {std::move(param),
            grad,
            std::move(exp_avg),
            std::move(exp_avg_sq),
            max_exp_avg_sq.value_or(at::Tensor()),
            step,
            options};
}

}  // namespace

void adamw(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
           const std::optional<at::Tensor>& max_exp_avg_sq, const at::Tensor& step, double lr, double beta1,
           double beta2, double eps, double weight_decay, bool maximize) {
    AdamWParams params = params_of(std::move(param), grad, std::move(exp_avg), std::move(exp_avg_sq),
                                   max_exp_avg_sq, step, {lr, beta1, beta2, eps, weight_decay, maximize});
    check_defined(kAdamW, "grad", grad);
    check_adamw(kAdamW, params);
    take_step(std::move(params));
}

void adamw_step(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
                const OptionalTensor& max_exp_avg_sq, at::Tensor step, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize) {
    RECORD_FUNCTION("bigramx::adamw_", {});  // as the dispatcher would
    AdamWParams params = params_of(std::move(param), grad, std::move(exp_avg), std::move(exp_avg_sq),
                                   max_exp_avg_sq, step, {lr, beta1, beta2, eps, weight_decay, maximize});
    check_plain(params);
    check_writable(kAdamW, "step", step);
    check_defined(kAdamW, "grad", grad);
    check_adamw(kAdamW, params);
    params.counts_step = uses_cuda_kernels(step);
    if (params.counts_step) return take_step(std::move(params));
    count(step, 1);
    try {
        take_step(std::move(params));
    } catch (...) {
        count(step, -1);  // a step that was not taken does not count
        throw;
    }
}

BIGRAMX_REGISTER(kAdamW, &adamw)

// Autograd records nothing: check_adamw ensures that param does not require grad.
TORCH_LIBRARY_IMPL(bigramx, Autograd, m) { m.impl(kAdamW, torch::CppFunction::makeFallthrough()); }

}  // namespace bigramx
