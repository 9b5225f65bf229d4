// The steps of AdamW that a row has missed, and the next one. Compiled once for each CPU target
// (cpu/base/foreach_target.h), hence no include guard.

#include "cpu/adamw_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

// Whether a moment of some elements has a bit: of -0 the next step makes 0. The first vector tells nearly
// always.
template <typename scalar_t>
bool have_moments(const AdamWElements<scalar_t>& elements, int64_t size) {
    const int64_t first = std::min(size, kLanes<scalar_t>);
    for (const auto& [begin, end] : {std::pair(int64_t(0), first), std::pair(first, size)}) {
        Vector<scalar_t> bits{};
        const AdamWElements<scalar_t> part = elements.from(begin);
        for_each_vector<scalar_t>(end - begin, [&](Lanes<scalar_t> lanes) {
            for (const scalar_t* moment : {part.exp_avg, part.exp_avg_sq}) {
                bits = bits_of_either<scalar_t>(bits, lanes.load(moment, scalar_t(0)));
            }
        });
        if (has_bits<scalar_t>(bits)) return true;
    }
    return false;
}

template <typename scalar_t>
void decay(const AdamWConstants<scalar_t>& step, scalar_t* param, int64_t size) {
    for_each_vector<scalar_t>(size, [param, factor = broadcast(step.decay)](Lanes<scalar_t> lanes) {
        lanes.store(param, lanes.load(param, scalar_t(0)) * factor);
    });
}

// Elements that take their missed steps together.
template <typename scalar_t>
constexpr int64_t kElementsTogether = 1024 / sizeof(scalar_t);

// Consecutive steps of some elements whose gradient is zero. Between the steps they are in the L1 cache,
// whose loads and stores take less time than the square roots and the divisions: in one piece of memory, as
// the parameter and its moments may lie where they evict each other.
template <typename scalar_t>
void take_missed_steps(const AdamWSchedule<scalar_t>& schedule, int64_t first_step, int64_t num_steps,
                       const AdamWElements<scalar_t>& elements, int64_t size) {
    constexpr int64_t kTogether = kElementsTogether<scalar_t>;
    alignas(BIGRAMX_VECTOR_BYTES) scalar_t memory[3 * kTogether];
    const AdamWElements<scalar_t> between{memory, memory + kTogether, memory + 2 * kTogether};
    const bool only_decay = schedule.keeps_zeros() && !have_moments(elements, size);
    const AdamWConstants<scalar_t>* const steps = schedule.step(first_step);
    for (int64_t s = 0; s < num_steps; ++s) {
        if (only_decay) {
            decay(steps[s], elements.param, size);
        } else {
            update_elements(steps[s], s == 0 ? elements : between, s == num_steps - 1 ? elements : between,
                            size, [](Lanes<scalar_t>) { return Vector<scalar_t>{}; });
        }
    }
}

// The steps of a row up to last_step, whose gradient is zero. Another thread that writes to row_steps may
// make the result wrong, but not lead out of the schedule.
template <typename scalar_t>
void catch_up_kernel(const DeferredRows<scalar_t>& rows, int64_t row, int64_t last_step) {
    constexpr int64_t kTogether = kElementsTogether<scalar_t>;
    const int64_t first_step = std::max(rows.row_steps[row] + 1, rows.schedule->first_step());
    const int64_t num_steps = last_step + 1 - first_step;
    if (num_steps <= 0) return;
    for (int64_t begin = 0; begin < rows.num_columns; begin += kTogether) {
        take_missed_steps(*rows.schedule, first_step, num_steps,
                          rows.elements.from(row * rows.num_columns + begin),
                          std::min(kTogether, rows.num_columns - begin));
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
