#include "get_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"

namespace bigramx {

void check_batch(const char* op, const at::Tensor& tokens, const BatchShape& shape) {
    check_tokens(op, tokens);
    TORCH_CHECK_VALUE(shape.batch_size >= 1 && shape.block_size >= 1, op,
                      ": expected batch_size and block_size >= 1, got ", shape.batch_size, " and ",
                      shape.block_size);
    TORCH_CHECK_VALUE(tokens.size(0) > shape.block_size, op,
                      ": expected more than block_size = ", shape.block_size, " tokens, got ",
                      tokens.size(0));
}

namespace {

constexpr const char* kName = "get_batch";

std::tuple<at::Tensor, at::Tensor> get_batch_op_cpu(const at::Tensor& tokens, int64_t batch_size,
                                                    int64_t block_size,
                                                    const std::optional<at::Generator>& generator) {
    check_batch(kName, tokens, {batch_size, block_size});
    const at::Tensor idx = at::empty({batch_size, block_size}, at::dtype(at::kLong));
    const at::Tensor targets = at::empty({batch_size, block_size}, at::dtype(at::kLong));
    get_batch_cpu(tokens, {batch_size, block_size}, generator, idx, targets);
    return {idx, targets};
}

// The starts are drawn on the CPU, so that the batches are the same wherever the tokens lie.
std::tuple<at::Tensor, at::Tensor> get_batch_op(const at::Tensor& tokens, int64_t batch_size,
                                                int64_t block_size,
                                                const std::optional<at::Generator>& generator) {
    check_batch(kName, tokens, {batch_size, block_size});
    const at::Tensor starts = at::randint(tokens.size(0) - block_size, {batch_size}, generator, at::kLong);
    const at::Tensor steps = at::arange(block_size, tokens.options().dtype(at::kLong));
    const at::Tensor positions = starts.to(tokens.device()).unsqueeze(1) + steps;
    return {tokens.index({positions}).to(at::kLong), tokens.index({positions + 1}).to(at::kLong)};
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("get_batch", &get_batch_op_cpu); }
TORCH_LIBRARY_IMPL(bigramx, CompositeExplicitAutograd, m) { m.impl("get_batch", &get_batch_op); }

}  // namespace
}  // namespace bigramx
