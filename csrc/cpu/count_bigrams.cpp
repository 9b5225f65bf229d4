#include "../count_bigrams.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/ops/zeros.h>

namespace bigramx {
namespace {

template <typename token_t>
void count_bigrams_kernel(const token_t* tokens, int64_t num_tokens, int64_t vocab_size, int64_t* counts) {
    int64_t previous = 0;
    for (int64_t n = 0; n < num_tokens; ++n) {
        const auto token = static_cast<int64_t>(tokens[n]);
        TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, "count_bigrams: tokens holds ", token,
                          " at position ", n, ", expected 0 <= token < ", vocab_size);
        if (n > 0) ++counts[previous * vocab_size + token];
        previous = token;
    }
}

}  // namespace

at::Tensor count_bigrams_cpu(const at::Tensor& tokens, int64_t vocab_size) {
    at::Tensor counts = at::zeros({vocab_size, vocab_size}, tokens.options().dtype(at::kLong));
    AT_DISPATCH_V2(tokens.scalar_type(), "count_bigrams", AT_WRAP([&] {
                       count_bigrams_kernel(tokens.const_data_ptr<scalar_t>(), tokens.numel(), vocab_size,
                                            counts.data_ptr<int64_t>());
                   }),
                   at::kByte, at::kUInt16, at::kInt, at::kLong);
    return counts;
}

}  // namespace bigramx
