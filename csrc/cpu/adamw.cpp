#include "../adamw.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>

namespace bigramx {

template <typename scalar_t>
struct AdamWJob {
    scalar_t* param;
    const scalar_t* grad;
    scalar_t* exp_avg;
    scalar_t* exp_avg_sq;
    scalar_t* max_exp_avg_sq;  // null: no AMSGrad
    scalar_t grad_sign;
    scalar_t decay;  // 1 - lr * weight_decay
    scalar_t one_minus_beta1, beta2, one_minus_beta2;
    scalar_t step_size;                 // lr / (1 - beta1^step)
    scalar_t inverse_root_correction2;  // 1 / sqrt(1 - beta2^step)
    scalar_t eps;
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "adamw_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

template <typename scalar_t>
AdamWJob<scalar_t> make_job(const AdamWTensors& tensors, const AdamWOptions& options) {
    AdamWJob<scalar_t> job{};
    job.param = tensors.param.data_ptr<scalar_t>();
    job.grad = tensors.grad.const_data_ptr<scalar_t>();
    job.exp_avg = tensors.exp_avg.data_ptr<scalar_t>();
    job.exp_avg_sq = tensors.exp_avg_sq.data_ptr<scalar_t>();
    job.max_exp_avg_sq =
        tensors.max_exp_avg_sq.defined() ? tensors.max_exp_avg_sq.data_ptr<scalar_t>() : nullptr;
    job.grad_sign = options.maximize ? -1 : 1;
    job.decay = static_cast<scalar_t>(1 - options.lr * options.weight_decay);
    job.one_minus_beta1 = static_cast<scalar_t>(1 - options.beta1);
    job.beta2 = static_cast<scalar_t>(options.beta2);
    job.one_minus_beta2 = static_cast<scalar_t>(1 - options.beta2);
    job.step_size = static_cast<scalar_t>(options.lr / (1 - std::pow(options.beta1, options.step)));
    job.inverse_root_correction2 =
        static_cast<scalar_t>(1 / std::sqrt(1 - std::pow(options.beta2, options.step)));
    job.eps = static_cast<scalar_t>(options.eps);
    return job;
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
