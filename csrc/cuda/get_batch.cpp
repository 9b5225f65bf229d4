#include "get_batch.h"

#include <vector>

#include "base/op_names.h"
#include "cuda/base/device.h"
#include "cuda/get_batch_kernels.h"
#include "sampling/batch_offsets.h"

namespace bigramx {

void get_batch_cuda(const GetBatchParams& params, const at::Tensor& idx, const at::Tensor& targets) {
    const at::Tensor& tokens = params.tokens;
    const cuda::StreamGuard guard(tokens);
    const cuda::GetBatchKernelParams kernel{
        cuda::token_type(tokens), tokens.const_data_ptr(), tokens.stride(0),           params.batch_size,
        params.block_size,        idx.data_ptr<int64_t>(), targets.data_ptr<int64_t>()};
    if (params.generator.has_value() && !params.generator->device().is_cpu()) {
        launch_get_batch(kernel, cuda::draw_cuda_seed(kGetBatch, params.generator), params.num_offsets(),
                         guard.stream());
        return;
    }
    cuda::check_host_can_draw(kGetBatch);
    std::vector<int64_t> offsets(static_cast<size_t>(params.batch_size));
    draw_batch_offsets(params.generator, params.num_offsets(), params.batch_size,
                       [&](int64_t b, int64_t offset) { offsets[static_cast<size_t>(b)] = offset; });
    launch_get_batch(kernel, offsets.data(), guard.stream());
}

}  // namespace bigramx
