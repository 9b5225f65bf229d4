#include "adamw.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "base/op_names.h"
#include "cpu/adamw_elements.h"

#define BIGRAMX_KERNELS "cpu/adamw_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

double adamw_count_cpu(const at::Tensor& step) {
    return step.scalar_type() == at::kFloat ? *step.const_data_ptr<float>() : *step.const_data_ptr<double>();
}

void adamw_set_count_cpu(const at::Tensor& step, double count) {
    if (step.scalar_type() == at::kFloat) {
        *step.data_ptr<float>() = static_cast<float>(count);
    } else {
        *step.data_ptr<double>() = count;
    }
}

void adamw_cpu(const AdamWParams& params) {
    constexpr int64_t kGrainSize = 1 << 15;
    const double step = adamw_count_cpu(params.step);
    TORCH_CHECK_VALUE(step >= 1, kAdamW, ": expected step >= 1, got ", step);
    AT_DISPATCH_FLOATING_TYPES(params.param.scalar_type(), kAdamW, [&] {
        const auto constants = adamw_constants<scalar_t>(params.options, step);
        const AdamWElements<scalar_t> elements{
            params.param.data_ptr<scalar_t>(), params.exp_avg.data_ptr<scalar_t>(),
            params.exp_avg_sq.data_ptr<scalar_t>(),
            params.max_exp_avg_sq.defined() ? params.max_exp_avg_sq.data_ptr<scalar_t>() : nullptr};
        const scalar_t* const grad = params.grad.const_data_ptr<scalar_t>();
        const auto kernel = BIGRAMX_DISPATCH_TARGET(adamw_kernel<scalar_t>);
        at::parallel_for(0, params.param.numel(), kGrainSize, [&](int64_t begin, int64_t end) {
            kernel(constants, elements.from(begin), grad + begin, end - begin);
        });
    });
}

}  // namespace bigramx
