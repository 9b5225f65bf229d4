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
                                               cuda::draw_cuda_seed(params.generator),
                                               samples.data_ptr<int64_t>()};
    if (num_samples == 1) {
        launch_draw_one_a_row(kernel, guard.stream());
        return samples;
    }
    const at::Tensor scratch = at::empty({num_rows, vocab_size}, probs.options().dtype(at::kInt));
    auto* const words = static_cast<uint32_t*>(scratch.data_ptr());
    if (params.replacement) {
        launch_draw_with_replacement(kernel, words, guard.stream());
    } else {
        launch_draw_without_replacement(kernel, words, guard.stream());
    }
    return samples;
}

}  // namespace bigramx
