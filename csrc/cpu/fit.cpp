#include "fit.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>

#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/deferred_adamw_rows.h"
#include "cpu/embedding_cross_entropy_rows.h"
#include "sampling/generator.h"

namespace bigramx::cpu {

template <typename scalar_t>
struct FitKernelParams {
    const EmbeddingCrossEntropyKernelParams* loss;  // its slots are the rows to be updated
    DeferredRows<scalar_t> rows;                    // row_steps null: all rows take each step
    int64_t step;                                   // the count of this one, from 1
};

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "cpu/fit_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

// Puts the generator back where a step raises before it changes anything, as its batch is still to be drawn;
// not where another thread has drawn since, which would draw the same again.
class DrawsOfStep {
  public:
    explicit DrawsOfStep(at::CPUGeneratorImpl* generator) : generator_(generator), before_(engine()) {}

    ~DrawsOfStep() {
        if (is_taken_ || !after_.has_value()) return;
        const std::lock_guard<std::mutex> lock(generator_->mutex_);
        if (are_equal(generator_->engine().data(), after_->data())) generator_->set_engine(before_);
    }

    void are_drawn() { after_ = engine(); }
    void take() { is_taken_ = true; }

  private:
    at::mt19937 engine() const {
        const std::lock_guard<std::mutex> lock(generator_->mutex_);
        return generator_->engine();
    }

    static bool are_equal(const at::mt19937_data_pod& a, const at::mt19937_data_pod& b) {
        return a.next_ == b.next_ && a.left_ == b.left_ && a.state_ == b.state_;
    }

    at::CPUGeneratorImpl* const generator_;
    const at::mt19937 before_;
    std::optional<at::mt19937> after_;
    bool is_taken_ = false;
};

// The steps, of batches that are given.
template <typename scalar_t>
class FitSteps {
  public:
    explicit FitSteps(const FitParams& params)
        : params_(params),
          steps_taken_(static_cast<int64_t>(adamw_count_cpu(params.adamw.step))),
          oldest_step_(oldest_step()),
          schedule_(oldest_step_ + 1),
          rows_{{params.adamw.param.data_ptr<scalar_t>(), params.adamw.exp_avg.data_ptr<scalar_t>(),
                 params.adamw.exp_avg_sq.data_ptr<scalar_t>()},
                params.adamw.param.size(1),
                params.row_steps.defined() ? params.row_steps.data_ptr<int64_t>() : nullptr,
                &schedule_} {
        while (schedule_.next_step() <= steps_taken_) schedule_.add(params.adamw.options);
    }

    // Returns the loss before the step.
    double take(const EmbeddingCrossEntropyParams& batch) {
        workspace_.pairs.group(batch);
        EmbeddingCrossEntropyKernelParams loss = kernel_params(batch, workspace_.pairs);
        loss.want_loss = true;
        loss.num_slots = rows_.num_columns;
        at::Tensor rows;
        if (rows_.row_steps != nullptr) {
            rows = occurring_rows(workspace_.pairs, rows_.num_columns, kNoPadding);
            loss.rows = rows.const_data_ptr<int64_t>();
            loss.num_slots = rows.numel();
        }
        if (schedule_.next_step() == steps_taken_ + 1) schedule_.add(params_.adamw.options);
        const FitKernelParams<scalar_t> kernel_args{&loss, rows_, steps_taken_ + 1};
        const auto kernel = BIGRAMX_DISPATCH_TARGET(fit_kernel<scalar_t>);
        const LossSums sums = sum_over_slots<scalar_t>(
            loss, workspace_, [&](const LossScratch& scratch, int64_t begin, int64_t end) {
                return kernel(kernel_args, scratch, begin, end);
            });
        adamw_set_count_cpu(params_.adamw.step, static_cast<double>(++steps_taken_));
        limit_missed_steps();
        return static_cast<scalar_t>(reduced_loss(sums, loss.scales));
    }

  private:
    // How many steps the row has taken that has taken the fewest.
    int64_t oldest_step() const {
        if (!params_.row_steps.defined() || params_.row_steps.numel() == 0) return steps_taken_;
        const at::Tensor& row_steps = params_.row_steps;
        const int64_t* const first = row_steps.const_data_ptr<int64_t>();
        const auto [least, most] = std::minmax_element(first, first + row_steps.numel());
        TORCH_CHECK_VALUE(*least >= 0 && *most <= steps_taken_, kFit,
                          ": expected 0 <= row_steps <= ", steps_taken_, ", the number of steps, got ",
                          *least, " to ", *most);
        return *least;
    }

    // The constants of the missed steps stay in the L1 cache.
    void limit_missed_steps() {
        constexpr int64_t kMost = 1 << 10;
        if (schedule_.next_step() - oldest_step_ <= kMost) return;
        oldest_step_ = steps_taken_;
        if (rows_.row_steps != nullptr) catch_up(rows_, nullptr, rows_.num_columns, oldest_step_);
        schedule_ = AdamWSchedule<scalar_t>(oldest_step_ + 1);
    }

    const FitParams& params_;
    int64_t steps_taken_;  // counted here: another thread may write to the tensor
    int64_t oldest_step_;
    AdamWSchedule<scalar_t> schedule_;
    const DeferredRows<scalar_t> rows_;
    LossWorkspace workspace_;
};

// Calls take(batch) for one step after the other, which returns its loss.
template <typename Take>
int64_t take_steps(const FitParams& params, const Take& take) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const std::chrono::duration<double> limit(params.max_seconds);
    const int64_t num_pairs = params.batch.batch_size * params.batch.block_size;
    const EmbeddingCrossEntropyParams batch{
        at::empty({num_pairs}, at::dtype(at::kLong)),
        params.adamw.param,
        at::empty({num_pairs}, at::dtype(at::kLong)),
        /*class_weight=*/at::Tensor(),
        {/*ignore_index=*/-100, at::Reduction::Mean, /*label_smoothing=*/0.0, /*z_loss=*/0.0,
         params.padding_idx, /*sparse=*/false}};
    const at::Tensor& losses = params.losses;
    double* const losses_of_steps = losses.data_ptr<double>();
    SignalCheck signals;
    for (int64_t k = 0; k < losses.size(0); ++k) {
        if (k > 0 && Clock::now() - start > limit) return k;
        signals.poll();  // here all agree
        DrawsOfStep draws(cpu_generator(params.batch.generator));
        get_batch_cpu(params.batch, batch.idx, batch.targets);
        draws.are_drawn();
        losses_of_steps[k] = take(batch);
        draws.take();
    }
    return losses.size(0);
}

}  // namespace

int64_t fit_cpu(const FitParams& params) {
    return AT_DISPATCH_FLOATING_TYPES(params.adamw.param.scalar_type(), kFit, [&] {
        FitSteps<scalar_t> steps(params);
        return take_steps(params,
                          [&](const EmbeddingCrossEntropyParams& batch) { return steps.take(batch); });
    });
}

}  // namespace bigramx
