#include "adamw.h"

#include "base/dispatch.h"
#include "base/op_names.h"
#include "cuda/adamw_kernels.h"
#include "cuda/base/device.h"

namespace bigramx {

void adamw_cuda(const AdamWParams& params) {
    const cuda::StreamGuard guard(params.param);
    cuda::AdamWKernelParams kernel{};
    kernel.type = cuda::float_type(params.param);
    kernel.size = params.param.numel();
    kernel.param = params.param.data_ptr();
    kernel.grad = params.grad.const_data_ptr();
    kernel.exp_avg = params.exp_avg.data_ptr();
    kernel.exp_avg_sq = params.exp_avg_sq.data_ptr();
    if (params.max_exp_avg_sq.defined()) kernel.max_exp_avg_sq = params.max_exp_avg_sq.data_ptr();
    kernel.options = params.options;
    kernel.step_type = cuda::float_type(params.step);
    if (uses_cuda_kernels(params.step)) {
        kernel.step = params.step.data_ptr();
        kernel.counts_step = params.counts_step;
    } else {
        kernel.host_step = params.step.item<double>();
        TORCH_CHECK_VALUE(kernel.host_step >= 1, kAdamW, ": expected step >= 1, got ", kernel.host_step);
    }
    launch_adamw(kernel, guard.stream());
}

}  // namespace bigramx
