// Embedding lookup and cross entropy in one: loss_n = lse[idx_n] - weight[idx_n, targets_n].
//
// Only R distinct rows of logits exist, so the work is O(min(N, R) * C + N + R), not O(N * C), and
// no (N, C) tensor is made; a dense gradient adds the writing of its R * C elements. The gradient row is
// written while its logits are in cache, in the forward pass.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace bigramx {

constexpr int64_t kNoPadding = -1;

// In what the kernels compute for a table of this dtype.
inline at::ScalarType accumulator_of(at::ScalarType dtype) {
    return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

struct LossOptions {
    int64_t ignore_index;
    int64_t reduction;  // at::Reduction
    double label_smoothing;
    double z_loss;
    int64_t padding_idx;  // kNoPadding: none
    bool sparse;          // the gradient: only the rows that occur
};

struct LossInputs {
    at::Tensor idx;           // N elements, int64, contiguous
    at::Tensor weight;        // (R, C), unit stride along a row
    at::Tensor targets;       // N elements, int64, contiguous
    at::Tensor class_weight;  // (C) float32, or float64 as weight is, contiguous; undefined: all ones
};

// The gradient of `weight`: dense (R, C) with `rows` (0), or the rows that occur, (K, C), and their numbers
// (K). On a GPU, where K is not known to the host, there are min(N, R): the ones too many are zero, and have
// the number of a row that occurs.
struct WeightGradient {
    at::Tensor rows;
    at::Tensor values;
};

// What the forward pass shall make besides the loss, each where it is not null.
struct LossExtras {
    WeightGradient* gradient;  // of the loss
    at::Tensor* logits;        // (N, C): weight[idx]
};

// Scratch memory, which calls of one thread after another may share.
struct LossWorkspace;

// The loss, () or for no reduction of the shape of targets, in weight's dtype.
at::Tensor embedding_cross_entropy_cpu(const LossInputs& inputs, const LossOptions& options,
                                       const LossExtras& extras);

// The reduced loss alone, and its gradient into `grad_weight`, (R, C) contiguous: one step of many, which
// reuses what the last one allocated.
double embedding_cross_entropy_step_cpu(const LossInputs& inputs, const LossOptions& options,
                                        const at::Tensor& grad_weight, LossWorkspace& workspace);

// The gradient of `weight` for the gradient of the loss, () or (N).
WeightGradient embedding_cross_entropy_backward_cpu(const at::Tensor& grad_loss, const LossInputs& inputs,
                                                    const LossOptions& options);

}  // namespace bigramx
