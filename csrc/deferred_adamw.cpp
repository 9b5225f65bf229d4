#include "deferred_adamw.h"

#include <torch/library.h>

#include <utility>

#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {
namespace {

// As check_adamw, whose step is a tensor.
void check_param(const DeferredAdamWParams& params) {
    const at::Tensor& param = params.param;
    check_writable(kDeferredAdamW, "param", param);
    check_dtype(kDeferredAdamW, "param", param, {at::kFloat, at::kDouble});
    check_matrix(kDeferredAdamW, "param", param);
    for (const auto& [name, tensor] :
         {NamedTensor{"param", param}, {"exp_avg", params.exp_avg}, {"exp_avg_sq", params.exp_avg_sq}}) {
        check_writable(kDeferredAdamW, name, tensor);
        check_same_device(kDeferredAdamW, name, tensor, "param", param);
        check_dtype(kDeferredAdamW, name, tensor, {param.scalar_type()});
        TORCH_CHECK(tensor.sizes() == param.sizes(), kDeferredAdamW, ": expected ", name,
                    " to have the shape of param, ", param.sizes(), ", got ", tensor.sizes());
        TORCH_CHECK(tensor.is_contiguous(), kDeferredAdamW, ": expected ", name,
                    " to be contiguous, got strides ", tensor.strides());
    }
}

void check_schedule(const DeferredAdamWParams& params) {
    const at::Tensor& schedule = params.schedule;
    check_tensor(kDeferredAdamW, "schedule", schedule);
    check_same_device(kDeferredAdamW, "schedule", schedule, "param", params.param);
    check_dtype(kDeferredAdamW, "schedule", schedule, {at::kDouble});
    TORCH_CHECK(schedule.dim() == 2 && schedule.size(1) == 5, kDeferredAdamW,
                ": expected schedule to have 5 columns, got shape ", schedule.sizes());
    TORCH_CHECK_VALUE(params.step >= schedule.size(0), kDeferredAdamW,
                      ": expected step to be at least the number of steps in schedule, ", schedule.size(0),
                      ", got ", params.step);
}

void check_rows(const DeferredAdamWParams& params) {
    const at::Tensor &rows = params.rows, &grad = params.grad, &param = params.param;
    if (rows.defined()) {
        check_tensor(kDeferredAdamW, "rows", rows);
        check_same_device(kDeferredAdamW, "rows", rows, "param", param);
        check_dtype(kDeferredAdamW, "rows", rows, {at::kLong});
        TORCH_CHECK(rows.dim() == 1, kDeferredAdamW, ": expected rows to be 1-D, got shape ", rows.sizes());
    }
    if (grad.defined()) {
        const int64_t num_rows = rows.defined() ? rows.size(0) : param.size(0);
        check_tensor(kDeferredAdamW, "grad", grad);
        check_same_device(kDeferredAdamW, "grad", grad, "param", param);
        check_dtype(kDeferredAdamW, "grad", grad, {param.scalar_type()});
        TORCH_CHECK(grad.dim() == 2 && grad.size(0) == num_rows && grad.size(1) == param.size(1),
                    kDeferredAdamW, ": expected grad to have the shape [", num_rows, ", ", param.size(1),
                    "], got ", grad.sizes());
        TORCH_CHECK_VALUE(params.schedule.size(0) > 0, kDeferredAdamW,
                          ": expected schedule to hold the step of grad, got shape ",
                          params.schedule.sizes());
    }
}

}  // namespace

void check_row_steps(const char* op, const at::Tensor& row_steps, const at::Tensor& param) {
    check_writable(op, "row_steps", row_steps);
    check_same_device(op, "row_steps", row_steps, "param", param);
    check_dtype(op, "row_steps", row_steps, {at::kLong});
    TORCH_CHECK(row_steps.dim() == 1 && row_steps.size(0) == param.size(0) && row_steps.is_contiguous(), op,
                ": expected row_steps to be contiguous and of shape [", param.size(0), "], got ",
                row_steps.sizes());
}

void deferred_adamw(at::Tensor param, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor row_steps,
                    const at::Tensor& schedule, int64_t step, const std::optional<at::Tensor>& rows,
                    const std::optional<at::Tensor>& grad, bool maximize) {
    DeferredAdamWParams params{std::move(param),
                               std::move(exp_avg),
                               std::move(exp_avg_sq),
                               std::move(row_steps),
                               schedule,
                               step,
                               maximize,
                               rows.value_or(at::Tensor()),
                               grad.value_or(at::Tensor())};
    check_param(params);
    check_schedule(params);
    check_rows(params);
    check_row_steps(kDeferredAdamW, params.row_steps, params.param);
    check_apart(kDeferredAdamW,
                {{"param", params.param},
                 {"exp_avg", params.exp_avg},
                 {"exp_avg_sq", params.exp_avg_sq},
                 {"row_steps", params.row_steps},
                 {"schedule", schedule},
                 {"rows", params.rows},
                 {"grad", params.grad}},
                /*num_written=*/4);
    params.schedule = params.schedule.contiguous();
    for (at::Tensor* tensor : {&params.rows, &params.grad}) {
        if (tensor->defined()) *tensor = tensor->contiguous();
    }
    deferred_adamw_cpu(params);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(kDeferredAdamW, &Registered<&deferred_adamw>::call); }

// Autograd records nothing: the checks ensure that param does not require grad.
TORCH_LIBRARY_IMPL(bigramx, Autograd, m) { m.impl(kDeferredAdamW, torch::CppFunction::makeFallthrough()); }

}  // namespace bigramx
