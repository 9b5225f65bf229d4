// The AdamW update of some elements. Compiled once for each CPU target (cpu/base/foreach_target.h), hence no
// include guard.

namespace bigramx::cpu::BIGRAMX_TARGET {

template <typename scalar_t>
inline __attribute__((always_inline)) void update_moments(const AdamWConstants<scalar_t>& step,
                                                          Vector<scalar_t> grad, Vector<scalar_t>& exp_avg,
                                                          Vector<scalar_t>& exp_avg_sq) {
    const Vector<scalar_t> difference = grad - exp_avg;
    exp_avg =
        step.from_exp_avg ? exp_avg + difference * step.one_minus_beta1 : grad - difference * step.beta1;
    exp_avg_sq = exp_avg_sq * step.beta2 + step.one_minus_beta2 * grad * grad;
}

template <typename scalar_t>
inline __attribute__((always_inline)) Vector<scalar_t> updated_param(const AdamWConstants<scalar_t>& step,
                                                                     Vector<scalar_t> param,
                                                                     Vector<scalar_t> exp_avg,
                                                                     Vector<scalar_t> exp_avg_sq) {
    const Vector<scalar_t> denominator = sqrt(exp_avg_sq) * step.inverse_root_correction2 + step.eps;
    return param * step.decay - step.step_size * exp_avg / denominator;
}

// A step of one vector, from some elements to others, or to the same.
template <typename scalar_t>
inline __attribute__((always_inline)) void update(const AdamWConstants<scalar_t>& step,
                                                  const AdamWElements<scalar_t>& from,
                                                  const AdamWElements<scalar_t>& to, Lanes<scalar_t> lanes,
                                                  Vector<scalar_t> grad) {
    const scalar_t none = 0;
    Vector<scalar_t> exp_avg = lanes.load(from.exp_avg, none);
    Vector<scalar_t> exp_avg_sq = lanes.load(from.exp_avg_sq, none);
    update_moments<scalar_t>(step, step.grad_sign * grad, exp_avg, exp_avg_sq);
    lanes.store(to.exp_avg, exp_avg);
    lanes.store(to.exp_avg_sq, exp_avg_sq);
    if (from.max_exp_avg_sq != nullptr) {
        const Vector<scalar_t> before = lanes.load(from.max_exp_avg_sq, none);
        const Vector<scalar_t> largest = before > exp_avg_sq ? before : exp_avg_sq;
        exp_avg_sq = before == before ? largest : before;  // a NaN stays, as in torch.maximum
        lanes.store(to.max_exp_avg_sq, exp_avg_sq);
    }
    lanes.store(to.param, updated_param<scalar_t>(step, lanes.load(from.param, none), exp_avg, exp_avg_sq));
}

// A step of some elements, whose gradient is gradient(lanes). Flattened, as in a function of their own the
// loop's steps would load all constants each time.
template <typename scalar_t, typename Gradient>
__attribute__((flatten)) void update_elements(const AdamWConstants<scalar_t>& step_params,
                                              const AdamWElements<scalar_t>& elements,
                                              const AdamWElements<scalar_t>& results, int64_t size,
                                              const Gradient& gradient) {
    const AdamWConstants<scalar_t> step = step_params;  // copies, for registers
    const AdamWElements<scalar_t> from = elements, to = results;
    for_each_vector<scalar_t>(
        size, [&](Lanes<scalar_t> lanes) { update<scalar_t>(step, from, to, lanes, gradient(lanes)); });
}

template <typename scalar_t>
void adamw_kernel(const AdamWConstants<scalar_t>& step, const AdamWElements<scalar_t>& elements,
                  const scalar_t* grads, int64_t size) {
    update_elements(step, elements, elements, size,
                    [grads](Lanes<scalar_t> lanes) { return lanes.load(grads, scalar_t(0)); });
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
