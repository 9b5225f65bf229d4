// The rows of a batch: loss, gradient and AdamW's update, while they are in cache. Compiled once for each CPU
// target (cpu/base/foreach_target.h), hence no include guard.

#include "cpu/deferred_adamw_kernels.h"
#include "cpu/embedding_cross_entropy_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
LossSums fit_kernel(const FitKernelParams<scalar_t>& params, const LossScratch& scratch, int64_t begin,
                    int64_t end) {
    const EmbeddingCrossEntropyKernelParams& loss = *params.loss;
    const DeferredRows<scalar_t>& rows = params.rows;
    const bool is_deferred = rows.row_steps != nullptr;
    const int64_t num_classes = loss.num_classes, step = rows_at_once(num_classes);
    const scalar_t* const gradient = static_cast<const scalar_t*>(scratch.gradient);
    RowKernel<scalar_t> kernel(loss, scratch);
    LossSums sums;
    for (int64_t first = begin; first < end; first += step) {
        const int64_t last = std::min(end, first + step);
        for (int64_t slot = first; is_deferred && slot < last; ++slot) {
            catch_up_kernel(rows, loss.rows[slot], params.step - 1);
        }
        kernel.process(first, last, sums);
        for (int64_t slot = first; is_deferred && slot < last; ++slot) {
            step_row_kernel(rows, loss.rows[slot], gradient + (slot - first) * num_classes);
        }
        if (!is_deferred) {
            adamw_kernel(*rows.schedule->step(params.step), rows.elements.from(first * num_classes), gradient,
                         (last - first) * num_classes);
        }
    }
    return sums;
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
