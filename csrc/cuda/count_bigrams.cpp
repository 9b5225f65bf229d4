#include "count_bigrams.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "base/op_names.h"
#include "cuda/base/device.h"
#include "cuda/count_bigrams_kernels.h"

namespace bigramx {

at::Tensor count_bigrams_cuda(const CountBigramsParams& params) {
    const at::Tensor& tokens = params.tokens;
    TORCH_CHECK(tokens.numel() <= std::numeric_limits<uint32_t>::max(), kCountBigrams,
                ": expected fewer than 2^32 tokens on a GPU, got ", tokens.numel());
    const cuda::StreamGuard guard(tokens);
    const at::Tensor counts =
        at::empty({params.vocab_size, params.vocab_size}, tokens.options().dtype(at::kLong));
    const cuda::CountBigramsKernelParams kernel{tokens.const_data_ptr(), cuda::token_type(tokens),
                                                tokens.numel(), params.vocab_size,
                                                counts.data_ptr<int64_t>()};
    const at::Tensor scratch =
        at::empty({count_bigrams_scratch_bytes(kernel)}, tokens.options().dtype(at::kByte));
    launch_count_bigrams(kernel, scratch.data_ptr(), guard.stream());
    return counts;
}

}  // namespace bigramx
