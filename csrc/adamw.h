// One step of AdamW (Loshchilov, Hutter: "Decoupled Weight Decay Regularization"), as torch.optim.AdamW takes
// it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "adamw_step.h"

namespace bigramx {

// Contiguous tensors of one dtype, float32 or float64, and one shape; max_exp_avg_sq undefined: no AMSGrad.
struct AdamWTensors {
    at::Tensor param;
    at::Tensor grad;
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    at::Tensor max_exp_avg_sq;
    at::Tensor step = {};  // where the GPU counts: one float32 or float64 number, in place of options.step
};

// Raises where a tensor is not as above, or the step is less than 1.
void check_adamw(const char* op, const AdamWTensors& tensors, const AdamWOptions& options);

// Tells autograd that what it has saved of these is not what backward will find.
void bump_versions(const AdamWTensors& tensors);

// What the optimizer does to a parameter: counts `step`, a tensor of one float32 or float64 number, up by
// one, and takes that step, unseen by autograd. A step that lies on the GPU is counted and read there: a
// captured graph goes on with each replay.
void count_and_step_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                          const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
                          const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                          double weight_decay, bool maximize);

void adamw_cpu(const AdamWTensors& tensors, const AdamWOptions& options);

#if defined(BIGRAMX_CUDA)
void adamw_cuda(const AdamWTensors& tensors, const AdamWOptions& options);
#endif

}  // namespace bigramx
