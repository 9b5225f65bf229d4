// The options of AdamW and the constants of a step, for host and device.
#pragma once

#include <cmath>

#include "base/host_device.h"

namespace bigramx {

struct AdamWOptions {
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    bool maximize;
};

template <typename scalar_t>
struct AdamWConstants {
    scalar_t grad_sign;
    scalar_t decay;     // 1 - lr * weight_decay
    bool from_exp_avg;  // lerp starts from the nearer end, as torch's does, and so is exact for beta1 = 0
    scalar_t beta1, one_minus_beta1, beta2, one_minus_beta2;
    scalar_t step_size;                 // lr / (1 - beta1^step)
    scalar_t inverse_root_correction2;  // 1 / sqrt(1 - beta2^step)
    scalar_t eps;
};

// Each constant is computed in double and rounded once. step: from 1.
template <typename scalar_t>
BIGRAMX_HOST_DEVICE AdamWConstants<scalar_t> adamw_constants(const AdamWOptions& options, double step) {
    const double correction1 = 1 - std::pow(options.beta1, step);
    const double correction2 = 1 - std::pow(options.beta2, step);
    AdamWConstants<scalar_t> constants{};
    constants.grad_sign = options.maximize ? -1 : 1;
    constants.decay =
        options.weight_decay == 0 ? 1 : static_cast<scalar_t>(1 - options.lr * options.weight_decay);
    constants.from_exp_avg = 1 - options.beta1 < 0.5;
    constants.beta1 = static_cast<scalar_t>(options.beta1);
    constants.one_minus_beta1 = static_cast<scalar_t>(1 - options.beta1);
    constants.beta2 = static_cast<scalar_t>(options.beta2);
    constants.one_minus_beta2 = static_cast<scalar_t>(1 - options.beta2);
    constants.step_size = static_cast<scalar_t>(options.lr / correction1);
    constants.inverse_root_correction2 = static_cast<scalar_t>(1 / std::sqrt(correction2));
    constants.eps = static_cast<scalar_t>(options.eps);
    return constants;
}

}  // namespace bigramx
