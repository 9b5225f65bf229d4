// Embedding lookup and cross entropy in one: loss_n = lse[idx_n] - weight[idx_n, targets_n].
//
// There are only R distinct rows of logits, so the work is O(min(N, R) * C + N + R), not O(N * C), and no (N,
// C) tensor is materialised; a dense gradient adds the writes of its R * C elements. The forward pass writes
// each gradient row while its logits are in cache.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <tuple>
#include <utility>

namespace bigramx {

constexpr int64_t kNoPadding = -1;

struct EmbeddingCrossEntropyOptions {
    int64_t ignore_index;
    int64_t reduction;  // at::Reduction
    double label_smoothing;
    double z_loss;
    int64_t padding_idx;  // kNoPadding: none
    bool sparse;          // the gradient: only the rows that occur

    // All options, in the order of the schemas.
    template <typename Options>
    static auto fields(Options& options) {
        return std::tie(options.ignore_index, options.reduction, options.label_smoothing, options.z_loss,
                        options.padding_idx, options.sparse);
    }
};

struct EmbeddingCrossEntropyParams {
    // As the op takes them; in parentheses: as the kernels take them.
    at::Tensor idx;           // N elements, integers (int64, contiguous)
    at::Tensor weight;        // (R, C) floating point (unit stride along a row)
    at::Tensor targets;       // N elements, integers (int64, contiguous); on the plain path also (..., C)
    at::Tensor class_weight;  // (C) in the loss's dtype (accumulation dtype, contiguous); undefined: ones
    EmbeddingCrossEntropyOptions options;
    at::ScalarType loss_dtype = at::kFloat;  // of the op's result
    bool return_logits = false;
    bool compute_grad = false;

    // From a row of weight to the next, in elements. The stride of a single row is any number.
    int64_t row_stride() const { return weight.size(0) > 1 ? weight.stride(0) : 0; }
    bool is_reduced() const { return options.reduction != at::Reduction::None; }
    bool is_mean() const { return options.reduction == at::Reduction::Mean; }

    // Probabilities of the classes in place of classes.
    bool has_soft_targets() const { return targets.is_floating_point() && targets.dim() == idx.dim() + 1; }
};

// The gradient of `weight`: dense, values (R, C) and rows (0); or sparse, values (K, C) of the K rows that
// occur and their indices, rows (K). On a GPU the host does not know K and takes min(N, R) instead: the
// excess entries are zero, with the index of a row that occurs.
struct WeightGradient {
    at::Tensor rows;
    at::Tensor values;
};

struct EmbeddingCrossEntropyResult {
    at::Tensor loss;          // () or, unreduced, the shape of targets; in weight's accumulation dtype
    at::Tensor logits;        // (N, C): weight[idx]; undefined without return_logits
    WeightGradient gradient;  // of the reduced loss; undefined without compute_grad
};

EmbeddingCrossEntropyResult embedding_cross_entropy_cpu(const EmbeddingCrossEntropyParams& params);
EmbeddingCrossEntropyResult embedding_cross_entropy_cuda(const EmbeddingCrossEntropyParams& params);

// The gradient of `weight`, given grad_loss, the gradient of the loss: () or (N).
WeightGradient embedding_cross_entropy_backward_cpu(const at::Tensor& grad_loss,
                                                    const EmbeddingCrossEntropyParams& params);
WeightGradient embedding_cross_entropy_backward_cuda(const at::Tensor& grad_loss,
                                                     const EmbeddingCrossEntropyParams& params);

// The same from the gradient for grad_loss = 1, dense or sparse, which it may change in place. Undefined if
// the gradient must be computed again.
using SavedParams = c10::function_ref<EmbeddingCrossEntropyParams()>;  // unpacked only if needed
at::Tensor embedding_cross_entropy_scale_gradient_cpu(const at::Tensor& gradient, const at::Tensor& grad_loss,
                                                      SavedParams saved);
at::Tensor embedding_cross_entropy_scale_gradient_cuda(const at::Tensor& gradient,
                                                       const at::Tensor& grad_loss, SavedParams saved);

// Whether some class weights, float32 or float64 and contiguous, are so large or small that their dtype may
// not hold those of all pairs together, or the share that one has of them.
bool outgrows_dtype_cpu(const at::Tensor& class_weight);

// A 16-bit gradient has already lost the small values that a loss scale protects, so it must not be scaled.
inline bool can_scale_gradient(const at::Tensor& gradient) {
    return gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kDouble;
}

// The ops, as the schemas have them; Option...: the fields of the options.
template <typename... Option>
struct EmbeddingCrossEntropyOps {
    using Tensor = at::Tensor;

    // Loss and logits, (N, C), or (0) without return_logits.
    static std::tuple<Tensor, Tensor> differentiable(const Tensor& idx, const Tensor& weight,
                                                     const Tensor& targets,
                                                     const std::optional<Tensor>& class_weight,
                                                     Option... option, bool return_logits);

    // Loss, logits, and the gradient's rows and values.
    static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& idx, const Tensor& weight,
                                                              const Tensor& targets,
                                                              const std::optional<Tensor>& class_weight,
                                                              Option... option, bool return_logits,
                                                              bool compute_grad,
                                                              std::optional<at::ScalarType> loss_dtype);

    // The gradient's rows and values.
    static std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& idx,
                                               const Tensor& weight, const Tensor& targets,
                                               const std::optional<Tensor>& class_weight, Option... option);
};

template <typename... Option>
EmbeddingCrossEntropyOps<Option...> ops_with(std::tuple<const Option&...> fields);

using EmbeddingCrossEntropy = decltype(ops_with(
    EmbeddingCrossEntropyOptions::fields(std::declval<const EmbeddingCrossEntropyOptions&>())));

}  // namespace bigramx
