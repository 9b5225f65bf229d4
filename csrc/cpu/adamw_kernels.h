// The AdamW update of a run of elements. Compiled once for each CPU capability (for_each_capability.h).

namespace bigramx::BIGRAMX_CAPABILITY {

template <typename scalar_t>
void adamw_elements(const AdamWJob<scalar_t>& job, int64_t begin, int64_t end) {
    const scalar_t none = 0;
    scalar_t* const param_row = job.param + begin;
    scalar_t* const exp_avg_row = job.exp_avg + begin;
    scalar_t* const exp_avg_sq_row = job.exp_avg_sq + begin;
    scalar_t* const largest_row = job.max_exp_avg_sq != nullptr ? job.max_exp_avg_sq + begin : nullptr;
    for_each_vector<scalar_t>(end - begin, [&](Lanes<scalar_t> lanes) {
        const Vector<scalar_t> grad = job.grad_sign * lanes.load(job.grad + begin, none);
        Vector<scalar_t> exp_avg = lanes.load(exp_avg_row, none);
        exp_avg += (grad - exp_avg) * job.one_minus_beta1;
        const Vector<scalar_t> exp_avg_sq =
            lanes.load(exp_avg_sq_row, none) * job.beta2 + grad * grad * job.one_minus_beta2;
        Vector<scalar_t> largest = exp_avg_sq;
        if (largest_row != nullptr) {
            largest = max(lanes.load(largest_row, none), exp_avg_sq);
            lanes.store(largest_row, largest);
        }
        const Vector<scalar_t> denominator = sqrt(largest) * job.inverse_root_correction2 + job.eps;
        lanes.store(exp_avg_row, exp_avg);
        lanes.store(exp_avg_sq_row, exp_avg_sq);
        lanes.store(param_row,
                    lanes.load(param_row, none) * job.decay - job.step_size * exp_avg / denominator);
    });
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
