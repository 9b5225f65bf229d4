#include "get_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {

void check_batch(const char* op, const GetBatchParams& params) {
    check_tokens(op, params.tokens);
    TORCH_CHECK_VALUE(params.batch_size >= 1 && params.block_size >= 1, op,
                      ": expected batch_size and block_size >= 1, got ", params.batch_size, " and ",
                      params.block_size);
    checked_product(op, "batch_size * block_size", params.batch_size, params.block_size);
    TORCH_CHECK_VALUE(params.tokens.size(0) > params.block_size, op,
                      ": expected more than block_size = ", params.block_size, " tokens, got ",
                      params.tokens.size(0));
}

std::tuple<at::Tensor, at::Tensor> get_batch(const at::Tensor& tokens, int64_t batch_size, int64_t block_size,
                                             const std::optional<at::Generator>& generator) {
    const GetBatchParams params{tokens, batch_size, block_size, generator};
    check_batch(kGetBatch, params);
    const at::TensorOptions options = at::dtype(at::kLong).device(tokens.device());
    const at::Tensor idx = at::empty({batch_size, block_size}, options);
    const at::Tensor targets = at::empty({batch_size, block_size}, options);
    BIGRAMX_DISPATCH_DEVICE(tokens, get_batch, params, idx, targets);
    return {idx, targets};
}

namespace {

// On devices without a kernel the batch offsets are drawn on the CPU as well, so that the batches are the
// same.
std::tuple<at::Tensor, at::Tensor> get_batch_elsewhere(const at::Tensor& tokens, int64_t batch_size,
                                                       int64_t block_size,
                                                       const std::optional<at::Generator>& generator) {
    const GetBatchParams params{tokens, batch_size, block_size, generator};
    check_batch(kGetBatch, params);
    const at::Tensor offsets = at::randint(params.num_offsets(), {batch_size}, generator, at::kLong);
    const at::Tensor steps = at::arange(block_size, tokens.options().dtype(at::kLong));
    const at::Tensor positions = offsets.to(tokens.device()).unsqueeze(1) + steps;
    return {tokens.index({positions}).to(at::kLong), tokens.index({positions + 1}).to(at::kLong)};
}

TORCH_LIBRARY_IMPL(bigramx, CompositeExplicitAutograd, m) { m.impl(kGetBatch, &get_batch_elsewhere); }

}  // namespace

BIGRAMX_REGISTER(kGetBatch, &get_batch)

}  // namespace bigramx
