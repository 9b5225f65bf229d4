// One step of AdamW (Loshchilov, Hutter: "Decoupled Weight Decay Regularization"), as torch.optim.AdamW takes
// it.
#pragma once

#include <ATen/core/Tensor.h>

namespace bigramx {

struct AdamWOptions {
    double step;  // counts from 1
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    bool maximize;
};

// Contiguous tensors of one dtype, float32 or float64; max_exp_avg_sq undefined: no AMSGrad.
struct AdamWTensors {
    at::Tensor param;
    at::Tensor grad;
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    at::Tensor max_exp_avg_sq;
};

void adamw_cpu(const AdamWTensors& tensors, const AdamWOptions& options);

}  // namespace bigramx
