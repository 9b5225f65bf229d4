// The AdamW update of the elements from `begin` to `end`. Compiled once for each CPU target
// (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
void adamw_kernel(const AdamWKernelParams<scalar_t>& params, int64_t begin, int64_t end) {
    const scalar_t none = 0;
    scalar_t* const param_row = params.param + begin;
    scalar_t* const exp_avg_row = params.exp_avg + begin;
    scalar_t* const exp_avg_sq_row = params.exp_avg_sq + begin;
    scalar_t* const largest_row = params.max_exp_avg_sq != nullptr ? params.max_exp_avg_sq + begin : nullptr;
    for_each_vector<scalar_t>(end - begin, [&](Lanes<scalar_t> lanes) {
        const Vector<scalar_t> grad = params.grad_sign * lanes.load(params.grad + begin, none);
        Vector<scalar_t> exp_avg = lanes.load(exp_avg_row, none);
        const Vector<scalar_t> difference = grad - exp_avg;
        exp_avg = params.from_exp_avg ? exp_avg + difference * params.one_minus_beta1
                                      : grad - difference * params.beta1;
        const Vector<scalar_t> exp_avg_sq =
            lanes.load(exp_avg_sq_row, none) * params.beta2 + params.one_minus_beta2 * grad * grad;
        Vector<scalar_t> largest = exp_avg_sq;
        if (largest_row != nullptr) {
            const Vector<scalar_t> before = lanes.load(largest_row, none);
            largest = before > exp_avg_sq ? before : exp_avg_sq;
            largest = before == before ? largest : before;  // a NaN stays, as in torch.maximum
            lanes.store(largest_row, largest);
        }
        const Vector<scalar_t> denominator = sqrt(largest) * params.inverse_root_correction2 + params.eps;
        lanes.store(exp_avg_row, exp_avg);
        lanes.store(exp_avg_sq_row, exp_avg_sq);
        lanes.store(param_row,
                    lanes.load(param_row, none) * params.decay - params.step_size * exp_avg / denominator);
    });
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
