#include "count_bigrams.h"

#include <torch/library.h>

#include "checks.h"

namespace bigramx {
namespace {

at::Tensor count_bigrams_op_cpu(const at::Tensor& tokens, int64_t vocab_size) {
    constexpr const char* op = "count_bigrams";
    check_defined(op, "tokens", tokens);
    check_dtype(op, "tokens", tokens, {at::kByte, at::kUInt16, at::kInt, at::kLong});
    TORCH_CHECK(tokens.dim() == 1, op, ": expected tokens to be 1-D, got shape ", tokens.sizes());
    TORCH_CHECK_VALUE(vocab_size > 0, op, ": expected vocab_size > 0, got ", vocab_size);
    return count_bigrams_cpu(tokens.contiguous(), vocab_size);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("count_bigrams", &count_bigrams_op_cpu); }

}  // namespace
}  // namespace bigramx
