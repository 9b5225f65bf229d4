#include "count_bigrams.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "checks.h"
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include "cuda/count_bigrams.h"
#endif

namespace bigramx {
namespace {

constexpr const char* kName = "count_bigrams";

#if defined(BIGRAMX_CUDA)

at::Tensor count_bigrams_cuda(const at::Tensor& tokens, int64_t vocab_size) {
    TORCH_CHECK(tokens.numel() <= std::numeric_limits<uint32_t>::max(), kName,
                ": expected fewer than 2^32 tokens on a GPU, got ", tokens.numel());
    const GpuScope scope(tokens);
    at::Tensor counts = at::empty({vocab_size, vocab_size}, tokens.options().dtype(at::kLong));
    const CountBigramsJob job{tokens.const_data_ptr(), token_type(tokens), tokens.numel(), vocab_size,
                              counts.data_ptr<int64_t>()};
    const at::Tensor scratch =
        at::empty({count_bigrams_scratch_bytes(job)}, tokens.options().dtype(at::kByte));
    launch_count_bigrams(job, scratch.data_ptr(), scope.stream());
    return counts;
}

#endif

at::Tensor count_bigrams_op(const at::Tensor& tokens, int64_t vocab_size) {
    check_defined(kName, "tokens", tokens);
    check_dtype(kName, "tokens", tokens, {at::kByte, at::kUInt16, at::kInt, at::kLong});
    TORCH_CHECK(tokens.dim() == 1, kName, ": expected tokens to be 1-D, got shape ", tokens.sizes());
    TORCH_CHECK_VALUE(vocab_size > 0, kName, ": expected vocab_size > 0, got ", vocab_size);
    return BIGRAMX_BY_DEVICE(tokens, count_bigrams, tokens.contiguous(), vocab_size);
}

void register_ops(torch::Library& m) { m.impl("count_bigrams", &count_bigrams_op); }

BIGRAMX_REGISTER(register_ops)

}  // namespace
}  // namespace bigramx
