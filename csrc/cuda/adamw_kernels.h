// A step of AdamW on the GPU.
#pragma once

#include <cstdint>

#include "adamw_step.h"
#include "cuda/base/types.h"

namespace bigramx::cuda {

// Arrays of one type, float32 or float64, aligned to their elements alone.
struct AdamWKernelParams {
    FloatType type;
    int64_t size;  // elements of each
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    void* max_exp_avg_sq;  // null: no AMSGrad
    AdamWOptions options;
    double host_step;  // the number of this step, from 1, where the host knows it
    const void* step;  // on the device, in place of that; null: none
    FloatType step_type;
};

void launch_adamw(const AdamWKernelParams& params, cudaStream_t stream);

}  // namespace bigramx::cuda
