#include "fit.h"

#include <torch/library.h>

#include <cmath>

#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"
#include "deferred_adamw.h"

namespace bigramx {

int64_t fit(at::Tensor weight, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step, at::Tensor losses,
            const at::Tensor& tokens, int64_t batch_size, int64_t block_size, int64_t padding_idx, double lr,
            double beta1, double beta2, double eps, double weight_decay, double max_seconds,
            const std::optional<at::Generator>& generator, std::optional<at::Tensor> row_steps) {
    const GetBatchParams batch{tokens, batch_size, block_size, generator};
    check_batch(kFit, batch);
    check_writable(kFit, "weight", weight);
    check_dtype(kFit, "weight", weight, {at::kFloat, at::kDouble});
    check_square(kFit, "weight", weight);
    TORCH_CHECK(weight.is_contiguous(), kFit, ": expected weight to be contiguous, got strides ",
                weight.strides());
    check_same_device(kFit, "tokens", tokens, "weight", weight);
    check_writable(kFit, "step", step);
    check_writable(kFit, "losses", losses);
    TORCH_CHECK(losses.dim() == 1 && losses.size(0) >= 1 && losses.is_contiguous(), kFit,
                ": expected losses to be 1-D, contiguous and not empty, got shape ", losses.sizes());
    check_dtype(kFit, "losses", losses, {at::kDouble});
    check_same_device(kFit, "losses", losses, "weight", weight);
    check_padding(kFit, padding_idx, weight.size(0));
    const AdamWParams adamw{weight,
                            /*grad=*/at::Tensor(),
                            exp_avg,
                            exp_avg_sq,
                            /*max_exp_avg_sq=*/at::Tensor(),
                            step,
                            {lr, beta1, beta2, eps, weight_decay, /*maximize=*/false}};
    check_adamw(kFit, adamw);
    const double steps_before = adamw_count_cpu(step);
    TORCH_CHECK_VALUE(steps_before >= 0 && steps_before < 0x1p53 && std::floor(steps_before) == steps_before,
                      kFit, ": expected step to be a whole number >= 0, got ", steps_before);
    const at::Tensor steps_of_rows = row_steps.value_or(at::Tensor());
    if (steps_of_rows.defined()) check_row_steps(kFit, steps_of_rows, weight);
    check_apart(kFit,
                {{"weight", weight},
                 {"exp_avg", exp_avg},
                 {"exp_avg_sq", exp_avg_sq},
                 {"step", step},
                 {"losses", losses},
                 {"row_steps", steps_of_rows},
                 {"tokens", tokens}},
                /*num_written=*/6);
    bump_versions({weight, exp_avg, exp_avg_sq, step, losses, steps_of_rows});
    try {
        return fit_cpu({batch, adamw, steps_of_rows, padding_idx, losses, max_seconds});
    } catch (const c10::IndexError& error) {
        C10_THROW_ERROR(IndexError, c10::str(kFit, ": expected tokens to be rows of weight; ",
                                             error.what_without_backtrace()));
    }
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl(kFit, &Registered<&fit>::call); }

}  // namespace bigramx
