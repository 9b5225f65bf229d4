#include "multinomial.h"

#include <ATen/ops/empty.h>

#include "base/op_names.h"
#include "cuda/base/device.h"
#include "cuda/multinomial_kernels.h"
#include "sampling/distribution_errors.h"

namespace bigramx {

at::Tensor multinomial_cuda(const MultinomialParams& params) {
    const at::Tensor& probs = params.probs;
    const cuda::StreamGuard guard(probs);
    const int64_t num_rows = probs.size(0), vocab_size = probs.size(1), num_samples = params.num_samples;
    TORCH_CHECK(vocab_size > 0 || num_rows == 0, kMultinomial, ": " BIGRAMX_ZERO_PROBS " in row 0");
    const at::Tensor samples = at::empty({num_rows, num_samples}, probs.options().dtype(at::kLong));
    const at::Tensor rows = probs.contiguous();
    const cuda::MultinomialKernelParams kernel{cuda::float_type(rows),
                                               rows.const_data_ptr(),
                                               num_rows,
                                               vocab_size,
                                               num_samples,
                                               cuda::draw_cuda_seed(kMultinomial, params.generator),
                                               samples.data_ptr<int64_t>()};
    if (num_samples == 1) {
        launch_draw_one_a_row(kernel, guard.stream());
        return samples;
    }
    if (params.replacement) {
        const at::Tensor cdf = at::empty({num_rows, vocab_size}, samples.options());
        launch_draw_with_replacement(kernel, reinterpret_cast<uint64_t*>(cdf.data_ptr<int64_t>()),
                                     guard.stream());
    } else {
        const at::Tensor left = at::empty({num_rows, vocab_size}, probs.options());
        launch_draw_without_replacement(kernel, left.data_ptr(), guard.stream());
    }
    return samples;
}

}  // namespace bigramx
