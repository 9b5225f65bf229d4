// One step of AdamW on the GPU.
#pragma once

#include <cstdint>

#include "adamw_step.h"
#include "cuda/base/types.h"

namespace bigramx::cuda {

// All arrays: (size) of `type`, float32 or float64, aligned to an element at least.
struct AdamWKernelParams {
    FloatType type;
    int64_t size;
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    void* max_exp_avg_sq;  // null: no AMSGrad
    AdamWOptions options;
    double host_step;  // from 1; used where `step` is null
    void* step;        // () on the device, in place of host_step; or null
    FloatType step_type;
    bool counts_step;  // adds 1 to *step first
};

void launch_adamw(const AdamWKernelParams& params, cudaStream_t stream);

}  // namespace bigramx::cuda
