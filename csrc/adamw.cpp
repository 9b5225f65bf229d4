#include "adamw.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
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

// Whether no dispatch mode, transform or tracer is active.
bool has_no_mode() {
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    return (c10::default_included_set | c10::autocast_dispatch_keyset).has_all(included);
}

// The addresses of a tensor's elements, from the first to behind the last.
struct Extent {
    explicit Extent(const at::Tensor& tensor) {
        if (tensor.numel() == 0) return;
        const auto size = static_cast<int64_t>(tensor.element_size());
        int64_t last = 0;
        for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
        begin = static_cast<const char*>(tensor.storage().data()) + tensor.storage_offset() * size;
        end = begin + (last + 1) * size;
    }

    bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }

    const char* begin = nullptr;
    const char* end = nullptr;
};

// Whether the tensor is no Python subclass and no wrapper of functorch, has no conj or neg bit and no other
// layout.
bool is_plain(const at::Tensor& tensor) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet kPlain({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                                          DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                                          DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
    return kPlain.has_all(tensor.key_set());
}

// Whether the tensor's storage has not been freed or shrunk, as FSDP does between its uses.
bool is_allocated(const at::Tensor& tensor, const Extent& extent) {
    const c10::Storage& storage = tensor.storage();
    return extent.end <= static_cast<const char*>(storage.data()) + storage.nbytes();
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
void count(const at::Tensor& step, int steps) {
    if (step.is_cpu()) {
        adamw_set_count_cpu(step, adamw_count_cpu(step) + steps);
    } else {
        step.add_(steps);
    }
}

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
        for (const Extent& other : extents) {
            if (extent.overlaps(other)) return false;
        }
        extents.push_back(extent);
        return is_allocated(tensor, extent);
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

void adamw_step(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
                const OptionalTensor& max_exp_avg_sq, at::Tensor step, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize) {
    RECORD_FUNCTION("bigramx::adamw_", {});  // as the dispatcher would
    count(step, 1);
    try {
        adamw(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay,
              maximize);
    } catch (...) {
        count(step, -1);  // a step that was not taken does not count
        throw;
    }
}

BIGRAMX_REGISTER(kAdamW, &adamw)

// Autograd records nothing: check_adamw ensures that param does not require grad.
TORCH_LIBRARY_IMPL(bigramx, Autograd, m) { m.impl(kAdamW, torch::CppFunction::makeFallthrough()); }

}  // namespace bigramx
