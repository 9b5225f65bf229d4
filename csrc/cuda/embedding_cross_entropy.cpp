#include "embedding_cross_entropy.h"

#include <ATen/Context.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <limits>

#include "base/checked.h"
#include "base/checks.h"
#include "base/op_names.h"
#include "cuda/base/device.h"
#include "cuda/embedding_cross_entropy_kernels.h"

namespace bigramx {
namespace {

using KernelParams = cuda::EmbeddingCrossEntropyKernelParams;

KernelParams kernel_params(const EmbeddingCrossEntropyParams& params) {
    const EmbeddingCrossEntropyOptions& options = params.options;
    const at::Tensor& weight = params.weight;
    const int64_t num_pairs = params.idx.numel();
    TORCH_CHECK(num_pairs <= std::numeric_limits<uint32_t>::max(), kEmbeddingCrossEntropy,
                ": expected fewer than 2^32 pairs on a GPU, got ", num_pairs);
    TORCH_CHECK(weight.size(1) <= std::numeric_limits<int32_t>::max(), kEmbeddingCrossEntropy,
                ": expected weight to have at most 2147483647 columns, got ", weight.size(1));
    checked_product(kEmbeddingCrossEntropy, "64 times the rows of weight", 64, weight.size(0));  // scratch
    KernelParams kernel{};
    kernel.type = cuda::float_type(weight);
    kernel.weight = weight.const_data_ptr();
    kernel.row_stride = params.row_stride();
    kernel.num_rows = weight.size(0);
    kernel.num_classes = weight.size(1);
    kernel.idx = params.idx.const_data_ptr<int64_t>();
    kernel.targets = params.targets.const_data_ptr<int64_t>();
    kernel.num_pairs = num_pairs;
    if (params.class_weight.defined()) kernel.class_weight = params.class_weight.const_data_ptr();
    kernel.ignore_index = options.ignore_index;
    kernel.is_mean = params.is_mean();
    kernel.is_reduced = params.is_reduced();
    kernel.label_smoothing = options.label_smoothing;
    kernel.z_loss = options.z_loss;
    kernel.padding_idx = options.padding_idx;
    return kernel;
}

void set_gradient(KernelParams& kernel, const WeightGradient& gradient, bool sparse) {
    kernel.gradient = gradient.values.data_ptr();
    if (sparse) kernel.grad_rows = gradient.rows.data_ptr<int64_t>();
}

// Allocates it, and has the kernels write it.
WeightGradient make_gradient(KernelParams& kernel, const at::Tensor& weight, bool sparse) {
    const int64_t num_slots = sparse ? std::min(kernel.num_pairs, kernel.num_rows) : kernel.num_rows;
    WeightGradient gradient{at::empty({sparse ? num_slots : 0}, weight.options().dtype(at::kLong)),
                            at::empty({num_slots, kernel.num_classes}, weight.options())};
    set_gradient(kernel, gradient, sparse);
    return gradient;
}

void launch(const KernelParams& kernel, const cuda::StreamGuard& guard, const at::Tensor& weight) {
    const at::Tensor scratch =
        at::empty({embedding_cross_entropy_scratch_bytes(kernel)}, weight.options().dtype(at::kByte));
    launch_embedding_cross_entropy(kernel, scratch.data_ptr(), guard.stream());
}

}  // namespace

EmbeddingCrossEntropyResult embedding_cross_entropy_cuda(const EmbeddingCrossEntropyParams& params) {
    const at::Tensor& weight = params.weight;
    const cuda::StreamGuard guard(weight);
    KernelParams kernel = kernel_params(params);
    const at::IntArrayRef shape = params.is_reduced() ? at::IntArrayRef() : params.targets.sizes();
    EmbeddingCrossEntropyResult result;
    result.loss = at::empty(shape, weight.options().dtype(at::toOpMathType(weight.scalar_type())));
    kernel.loss = result.loss.data_ptr();
    if (params.compute_grad) result.gradient = make_gradient(kernel, weight, params.options.sparse);
    if (params.return_logits && can_copy_logits(kernel)) {
        result.logits = at::empty({kernel.num_pairs, kernel.num_classes}, weight.options());
        kernel.logits = result.logits.data_ptr();
    }
    launch(kernel, guard, weight);
    if (params.return_logits && !result.logits.defined()) {
        result.logits = weight.index_select(0, params.idx.reshape(-1));
    }
    return result;
}

WeightGradient embedding_cross_entropy_backward_cuda(const at::Tensor& grad_loss,
                                                     const EmbeddingCrossEntropyParams& params) {
    const cuda::StreamGuard guard(params.weight);
    KernelParams kernel = kernel_params(params);
    if (!params.is_reduced()) {  // the pairs of a row are added up in no fixed order
        at::globalContext().alertNotDeterministic("embedding_cross_entropy_backward with reduction='none'");
    }
    const at::Tensor grad_losses = grad_loss.to(at::toOpMathType(params.weight.scalar_type())).contiguous();
    kernel.grad_loss = grad_losses.const_data_ptr();
    WeightGradient gradient = make_gradient(kernel, params.weight, params.options.sparse);
    launch(kernel, guard, params.weight);
    return gradient;
}

// Without the host knowing `grad_loss`. bfloat16 has the exponents of float32: scaling it loses nothing that
// a loss scale is there to save; float16 is computed anew, unless `grad_loss` is 1.
at::Tensor embedding_cross_entropy_scale_gradient_cuda(const at::Tensor& gradient,
                                                       const at::Tensor& grad_loss, SavedParams saved) {
    const cuda::StreamGuard guard(gradient);
    const bool sparse = gradient.is_sparse();
    const at::Tensor values = sparse ? gradient._values() : gradient;
    const at::Tensor scale = materialized(grad_loss).to(at::toOpMathType(values.scalar_type()));
    if (values.scalar_type() != at::kHalf) {
        cuda::launch_scale_gradient(cuda::float_type(values), values.data_ptr(), values.numel(),
                                    scale.const_data_ptr(), guard.stream());
        return gradient;
    }
    const EmbeddingCrossEntropyParams params = saved();
    KernelParams kernel = kernel_params(params);
    kernel.grad_loss = scale.const_data_ptr();
    kernel.unless_one = true;
    set_gradient(kernel, {sparse ? gradient._indices().select(0, 0) : at::Tensor(), values}, sparse);
    launch(kernel, guard, params.weight);
    return gradient;
}

}  // namespace bigramx
