// Elements of a parameter and of its state, as the kernels of AdamW are given them.
#pragma once

#include <cstdint>

namespace bigramx::cpu {

// Of one parameter, from some element on.
template <typename scalar_t>
struct AdamWElements {
    scalar_t* param;
    scalar_t* exp_avg;
    scalar_t* exp_avg_sq;
    scalar_t* max_exp_avg_sq = nullptr;  // null: no AMSGrad

    AdamWElements from(int64_t begin) const {
        return {param + begin, exp_avg + begin, exp_avg_sq + begin,
                max_exp_avg_sq != nullptr ? max_exp_avg_sq + begin : nullptr};
    }
};

}  // namespace bigramx::cpu
