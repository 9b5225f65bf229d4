// The steps of AdamW that a row has missed, and the next one. Compiled once for each CPU target
// (cpu/base/foreach_target.h), hence no include guard.

#include "cpu/adamw_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

// Some vectors of a parameter and of its moments, in registers. They go together, as a step of one of them
// waits for its step before.
template <typename scalar_t, int64_t size>
struct MissedSteps {
    using Values = Vector<scalar_t>[size];

    // Steps whose gradient is zero, of the vectors at these places.
    static void take(const AdamWSchedule<scalar_t>& schedule, int64_t first_step, int64_t num_steps,
                     const AdamWElements<scalar_t>& elements, const Lanes<scalar_t>* places) {
        Values param, exp_avg, exp_avg_sq;
        Vector<scalar_t> none{}, moments{};
        for (int64_t k = 0; k < size; ++k) {
            param[k] = places[k].load(elements.param, none[0]);
            exp_avg[k] = places[k].load(elements.exp_avg, none[0]);
            exp_avg_sq[k] = places[k].load(elements.exp_avg_sq, none[0]);
            moments = bits_of_either<scalar_t>(moments, bits_of_either<scalar_t>(exp_avg[k], exp_avg_sq[k]));
        }
        const AdamWConstants<scalar_t>* const steps = schedule.step(first_step);
        // Of all bits: a moment of -0 becomes 0 at the next step.
        if (schedule.keeps_zeros() && !has_bits<scalar_t>(moments)) {
            decay(steps, num_steps, param);
        } else {
            update(steps, num_steps, param, exp_avg, exp_avg_sq);
            for (int64_t k = 0; k < size; ++k) {
                places[k].store(elements.exp_avg, exp_avg[k]);
                places[k].store(elements.exp_avg_sq, exp_avg_sq[k]);
            }
        }
        for (int64_t k = 0; k < size; ++k) places[k].store(elements.param, param[k]);
    }

  private:
    static inline __attribute__((always_inline)) void decay(const AdamWConstants<scalar_t>* steps,
                                                            int64_t num_steps, Values& param) {
        for (int64_t s = 0; s < num_steps; ++s) {
            for (int64_t k = 0; k < size; ++k) param[k] = param[k] * steps[s].decay;
        }
    }

    static inline __attribute__((always_inline)) void update(const AdamWConstants<scalar_t>* steps,
                                                             int64_t num_steps, Values& param,
                                                             Values& exp_avg, Values& exp_avg_sq) {
        for (int64_t s = 0; s < num_steps; ++s) {
            const Vector<scalar_t> grad = broadcast(steps[s].grad_sign * scalar_t(0));
            for (int64_t k = 0; k < size; ++k) {
                update_moments<scalar_t>(steps[s], grad, exp_avg[k], exp_avg_sq[k]);
                param[k] = updated_param<scalar_t>(steps[s], param[k], exp_avg[k], exp_avg_sq[k]);
            }
        }
    }
};

// The steps of a row up to last_step, whose gradient is zero. Another thread that writes to row_steps may
// make the result wrong, but not lead out of the schedule.
template <typename scalar_t>
void catch_up_kernel(const DeferredRows<scalar_t>& rows, int64_t row, int64_t last_step) {
    constexpr int64_t kTogether = 4;
    const int64_t first_step = std::max(rows.row_steps[row] + 1, rows.schedule->first_step());
    const int64_t num_steps = last_step + 1 - first_step;
    if (num_steps <= 0) return;
    const AdamWElements<scalar_t> elements = rows.elements.from(row * rows.num_columns);
    Lanes<scalar_t> places[kTogether];
    int64_t count = 0;
    for_each_vector<scalar_t>(rows.num_columns, [&](Lanes<scalar_t> lanes) {
        places[count++] = lanes;
        if (count < kTogether) return;
        MissedSteps<scalar_t, kTogether>::take(*rows.schedule, first_step, num_steps, elements, places);
        count = 0;
    });
    for (int64_t k = 0; k < count; ++k) {
        MissedSteps<scalar_t, 1>::take(*rows.schedule, first_step, num_steps, elements, places + k);
    }
    rows.row_steps[row] = last_step;
}

// The step of a row that has missed none.
template <typename scalar_t>
void step_row_kernel(const DeferredRows<scalar_t>& rows, int64_t row, int64_t step, const scalar_t* grad) {
    rows.row_steps[row] = step;
    adamw_kernel(*rows.schedule->step(step), rows.elements.from(row * rows.num_columns), grad,
                 rows.num_columns);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
