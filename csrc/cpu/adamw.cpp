#include "adamw.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "base/op_names.h"

namespace bigramx::cpu {

template <typename scalar_t>
struct AdamWKernelParams : AdamWConstants<scalar_t> {
    // (size) each.
    scalar_t* param;
    const scalar_t* grad;
    scalar_t* exp_avg;
    scalar_t* exp_avg_sq;
    scalar_t* max_exp_avg_sq;  // null: no AMSGrad
};

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "cpu/adamw_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

template <typename scalar_t>
AdamWKernelParams<scalar_t> kernel_params(const AdamWParams& params, double step) {
    return {adamw_constants<scalar_t>(params.options, step),
            params.param.data_ptr<scalar_t>(),
            params.grad.const_data_ptr<scalar_t>(),
            params.exp_avg.data_ptr<scalar_t>(),
            params.exp_avg_sq.data_ptr<scalar_t>(),
            params.max_exp_avg_sq.defined() ? params.max_exp_avg_sq.data_ptr<scalar_t>() : nullptr};
}

}  // namespace

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
        const auto kernel_args = kernel_params<scalar_t>(params, step);
        const auto kernel = BIGRAMX_DISPATCH_TARGET(adamw_kernel<scalar_t>);
        at::parallel_for(0, params.param.numel(), kGrainSize,
                         [&](int64_t begin, int64_t end) { kernel(kernel_args, begin, end); });
    });
}

}  // namespace bigramx
