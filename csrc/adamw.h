// One step of AdamW (Loshchilov, Hutter: "Decoupled Weight Decay Regularization", 2019), as in
// torch.optim.AdamW.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

#include "adamw_step.h"

namespace bigramx {

struct AdamWParams {
    // Contiguous, of one shape and one dtype, float32 or float64.
    at::Tensor param;
    at::Tensor grad;  // undefined: another op computes it
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    at::Tensor max_exp_avg_sq;  // undefined: no AMSGrad
    // One element, float32 or float64: the count of this step, from 1. On the CPU or on the device of param.
    at::Tensor step;
    AdamWOptions options;
    bool counts_step = false;  // on a GPU: step has the count of the steps before, to which one is added
};

// Raises where the step of torch.optim.AdamW does, which divides by 1 - beta^step.
void check_adamw_options(const char* op, const AdamWOptions& options, at::ScalarType dtype);

// Raises if the parameters are not as above.
void check_adamw(const char* op, const AdamWParams& params);

// Bumps the versions of the tensors, where they are defined, that a step changes: backward then raises if
// autograd has saved one of them.
void bump_versions(std::initializer_list<at::Tensor> changed);

// The count in a step on the CPU, and another one in its place.
double adamw_count_cpu(const at::Tensor& step);
void adamw_set_count_cpu(const at::Tensor& step, double count);

void adamw_cpu(const AdamWParams& params);
void adamw_cuda(const AdamWParams& params);

// For Python's optimizer. A tensor that the state does not hold yet is absent.
using OptionalTensor = std::optional<at::Tensor>;

// Whether a kernel's step is torch.optim.AdamW's: of plain tensors, alike and apart in memory, under no mode
// that would see or change what is done to them.
bool adamw_fits(const at::Tensor& param, const at::Tensor& grad, const OptionalTensor& exp_avg,
                const OptionalTensor& exp_avg_sq, const OptionalTensor& max_exp_avg_sq,
                const OptionalTensor& step);

// The next step of tensors that fit. step: the count of the steps before it, to which one is added.
void adamw_step(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
                const OptionalTensor& max_exp_avg_sq, at::Tensor step, double lr, double beta1, double beta2,
                double eps, double weight_decay, bool maximize);

// The op.
void adamw(at::Tensor param, const at::Tensor& grad, at::Tensor exp_avg, at::Tensor exp_avg_sq,
           const std::optional<at::Tensor>& max_exp_avg_sq, const at::Tensor& step, double lr, double beta1,
           double beta2, double eps, double weight_decay, bool maximize);

}  // namespace bigramx
