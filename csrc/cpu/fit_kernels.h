// The rows of a batch: loss, gradient and AdamW's update, while they are in cache. Compiled once for each CPU
// target (cpu/base/foreach_target.h), hence no include guard.

#include "cpu/deferred_adamw_kernels.h"
#include "cpu/embedding_cross_entropy_kernels.h"

namespace bigramx::cpu::BIGRAMX_TARGET {

// Takes the gradient of the rows in registers, and with it AdamW's step: see GradientInMemory. Short rows are
// collected first: together they are whole vectors, aligned.
template <typename scalar_t>
class GradientForAdamW {
  public:
    explicit GradientForAdamW(const FitKernelParams<scalar_t>& params)
        : rows_(params.rows),
          slots_(params.loss->rows),
          number_(params.step),
          step_(*rows_.schedule->step(number_)),
          collects_(slots_ == nullptr && rows_.num_columns <= kLongestToCollect) {}

    void begin_group(int64_t first_slot) { first_slot_ = first_slot; }

    void end_group(int64_t end_slot) const {
        if (!collects_) return;
        const int64_t size = rows_.num_columns;
        adamw_kernel(step_, rows_.elements.from(first_slot_ * size), group_, (end_slot - first_slot_) * size);
    }

    bool is_wanted() const { return true; }

    void fill(int64_t slot, scalar_t value) {
        write(slot, [value = broadcast(value)](Lanes<scalar_t>) { return value; });
    }

    template <typename Gradient>
    void write(int64_t slot, const Gradient& gradient) {
        if (collects_) {
            scalar_t* const to = group_ + (slot - first_slot_) * rows_.num_columns;
            for_each_vector<scalar_t>(rows_.num_columns,
                                      [&](Lanes<scalar_t> lanes) { lanes.store(to, gradient(lanes)); });
        } else {
            update_row(slot, gradient);
        }
    }

    void write_numbers(int64_t slot, const scalar_t* exponentials, scalar_t scale) {
        write(slot, [exponentials, scale = broadcast(scale)](Lanes<scalar_t> lanes) {
            return load(exponentials + lanes.begin) * scale;
        });
    }

    struct Nothing {
        void step() const {}
    };
    Nothing outgoing() const { return {}; }
    void set_outgoing(Nothing) const {}

  private:
    static constexpr int64_t kLongestToCollect = 128;

    template <typename Gradient>
    void update_row(int64_t slot, const Gradient& gradient) const {
        const int64_t row = slots_ != nullptr ? slots_[slot] : slot;
        const AdamWElements<scalar_t> elements = rows_.elements.from(row * rows_.num_columns);
        update_elements(step_, elements, elements, rows_.num_columns, gradient);
        if (rows_.row_steps != nullptr) rows_.row_steps[row] = number_;
    }

    const DeferredRows<scalar_t>& rows_;
    const int64_t* const slots_;
    const int64_t number_;
    const AdamWConstants<scalar_t>& step_;
    const bool collects_;
    int64_t first_slot_ = 0;
    alignas(BIGRAMX_VECTOR_BYTES) scalar_t group_[kMaxRowsAtOnce * kLongestToCollect];
};

template <typename scalar_t>
LossSums fit_kernel(const FitKernelParams<scalar_t>& params, const LossScratch& scratch, int64_t begin,
                    int64_t end) {
    const EmbeddingCrossEntropyKernelParams& loss = *params.loss;
    const int64_t step = rows_at_once(loss.num_classes);
    GradientForAdamW<scalar_t> gradient(params);
    RowKernel<scalar_t, GradientForAdamW<scalar_t>> kernel(loss, scratch, gradient);
    LossSums sums;
    for (int64_t first = begin; first < end; first += step) {
        const int64_t last = std::min(end, first + step);
        for (int64_t slot = first; loss.rows != nullptr && slot < last; ++slot) {
            catch_up_kernel(params.rows, loss.rows[slot], params.step - 1);
        }
        gradient.begin_group(first);
        kernel.process(first, last, sums);
        gradient.end_group(last);
    }
    return sums;
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
