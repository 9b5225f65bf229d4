// The AdamW update of a run of elements. Compiled once for each CPU capability (for_each_capability.h).

namespace bigramx::BIGRAMX_CAPABILITY {

template <typename scalar_t>
void adamw_elements(const AdamWJob<scalar_t>& job, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
        const scalar_t grad = job.grad_sign * job.grad[k];
        const scalar_t exp_avg = job.exp_avg[k] + (grad - job.exp_avg[k]) * job.one_minus_beta1;
        const scalar_t exp_avg_sq = job.exp_avg_sq[k] * job.beta2 + grad * grad * job.one_minus_beta2;
        scalar_t largest = exp_avg_sq;
        if (job.max_exp_avg_sq != nullptr) {
            largest = job.max_exp_avg_sq[k] > exp_avg_sq ? job.max_exp_avg_sq[k] : exp_avg_sq;
            job.max_exp_avg_sq[k] = largest;
        }
        const scalar_t denominator = std::sqrt(largest) / job.root_correction2 + job.eps;
        job.exp_avg[k] = exp_avg;
        job.exp_avg_sq[k] = exp_avg_sq;
        job.param[k] = job.param[k] * job.decay - job.step_size * (exp_avg / denominator);
    }
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
