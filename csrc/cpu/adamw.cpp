#include "../adamw.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

namespace bigramx {

template <typename scalar_t>
struct AdamWJob : AdamWConstants<scalar_t> {
    scalar_t* param;
    const scalar_t* grad;
    scalar_t* exp_avg;
    scalar_t* exp_avg_sq;
    scalar_t* max_exp_avg_sq;  // null: no AMSGrad
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "adamw_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

template <typename scalar_t>
AdamWJob<scalar_t> make_job(const AdamWTensors& tensors, const AdamWOptions& options) {
    return {adamw_constants<scalar_t>(options),
            tensors.param.data_ptr<scalar_t>(),
            tensors.grad.const_data_ptr<scalar_t>(),
            tensors.exp_avg.data_ptr<scalar_t>(),
            tensors.exp_avg_sq.data_ptr<scalar_t>(),
            tensors.max_exp_avg_sq.defined() ? tensors.max_exp_avg_sq.data_ptr<scalar_t>() : nullptr};
}

}  // namespace

void adamw_cpu(const AdamWTensors& tensors, const AdamWOptions& options) {
    constexpr int64_t kGrain = 1 << 15;
    AT_DISPATCH_FLOATING_TYPES(tensors.param.scalar_type(), "adamw_", [&] {
        const auto job = make_job<scalar_t>(tensors, options);
        const auto kernel = BIGRAMX_DISPATCH(adamw_elements<scalar_t>);
        at::parallel_for(0, tensors.param.numel(), kGrain,
                         [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    });
}

}  // namespace bigramx
