#include "count_bigrams.h"

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {

at::Tensor count_bigrams(const at::Tensor& tokens, int64_t vocab_size) {
    check_tokens(kCountBigrams, tokens);
    TORCH_CHECK_VALUE(vocab_size > 0, kCountBigrams, ": expected vocab_size > 0, got ", vocab_size);
    checked_product(kCountBigrams, "vocab_size^2", vocab_size, vocab_size);
    const CountBigramsParams params{tokens.contiguous(), vocab_size};
    return BIGRAMX_DISPATCH_DEVICE(tokens, count_bigrams, params);
}

BIGRAMX_REGISTER(kCountBigrams, &count_bigrams)

}  // namespace bigramx
