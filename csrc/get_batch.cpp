#include "get_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include "cpu/starts.h"
#include "cuda/get_batch.h"
#endif

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

#if defined(BIGRAMX_CUDA)

void get_batch_cuda(const at::Tensor& tokens, const BatchShape& shape,
                    const std::optional<at::Generator>& generator, const at::Tensor& idx,
                    const at::Tensor& targets) {
    const GpuScope scope(tokens);
    const BatchJob job{token_type(tokens),         tokens.const_data_ptr(), tokens.stride(0),
                       shape.batch_size,           shape.block_size,        idx.data_ptr<int64_t>(),
                       targets.data_ptr<int64_t>()};
    const int64_t num_starts = tokens.size(0) - shape.block_size;
    if (generator.has_value() && !generator->device().is_cpu()) {
        launch_get_batch(job, draw_gpu_seed(generator), num_starts, scope.stream());
        return;
    }
    std::vector<int64_t> starts(static_cast<size_t>(shape.batch_size));
    draw_starts(generator, num_starts, shape.batch_size,
                [&](int64_t b, int64_t start) { starts[static_cast<size_t>(b)] = start; });
    launch_get_batch(job, starts.data(), scope.stream());
}

#endif

namespace {

constexpr const char* kName = "get_batch";

std::tuple<at::Tensor, at::Tensor> get_batch_op(const at::Tensor& tokens, int64_t batch_size,
                                                int64_t block_size,
                                                const std::optional<at::Generator>& generator) {
    check_batch(kName, tokens, {batch_size, block_size});
    const at::TensorOptions options = at::dtype(at::kLong).device(tokens.device());
    const at::Tensor idx = at::empty({batch_size, block_size}, options);
    const at::Tensor targets = at::empty({batch_size, block_size}, options);
    const BatchShape shape{batch_size, block_size};
    BIGRAMX_BY_DEVICE(tokens, get_batch, tokens, shape, generator, idx, targets);
    return {idx, targets};
}

// On a device without a kernel the starts are drawn on the CPU, too, so that the batches are the same.
std::tuple<at::Tensor, at::Tensor> get_batch_elsewhere(const at::Tensor& tokens, int64_t batch_size,
                                                       int64_t block_size,
                                                       const std::optional<at::Generator>& generator) {
    check_batch(kName, tokens, {batch_size, block_size});
    const at::Tensor starts = at::randint(tokens.size(0) - block_size, {batch_size}, generator, at::kLong);
    const at::Tensor steps = at::arange(block_size, tokens.options().dtype(at::kLong));
    const at::Tensor positions = starts.to(tokens.device()).unsqueeze(1) + steps;
    return {tokens.index({positions}).to(at::kLong), tokens.index({positions + 1}).to(at::kLong)};
}

void register_ops(torch::Library& m) { m.impl("get_batch", &get_batch_op); }
BIGRAMX_REGISTER(register_ops)
TORCH_LIBRARY_IMPL(bigramx, CompositeExplicitAutograd, m) { m.impl("get_batch", &get_batch_elsewhere); }

}  // namespace
}  // namespace bigramx
