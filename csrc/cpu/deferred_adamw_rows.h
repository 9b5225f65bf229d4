// Rows that take their steps of AdamW late, and the steps that they may have missed; also for fit.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "adamw_step.h"
#include "cpu/adamw_elements.h"

namespace bigramx::cpu {

// The constants of consecutive steps.
template <typename scalar_t>
class AdamWSchedule {
  public:
    // The first step to be added, from 1.
    explicit AdamWSchedule(int64_t first_step) : first_step_(first_step) {}

    void add(const AdamWOptions& options) {
        steps_.push_back(adamw_constants<scalar_t>(options, static_cast<double>(next_step())));
        const AdamWConstants<scalar_t>& step = steps_.back();
        keeps_zeros_ = keeps_zeros_ && step.eps > 0 && step.step_size >= 0 && std::isfinite(step.step_size) &&
                       std::isfinite(step.inverse_root_correction2);
    }

    int64_t first_step() const { return first_step_; }
    int64_t next_step() const { return first_step_ + static_cast<int64_t>(steps_.size()); }
    const AdamWConstants<scalar_t>* step(int64_t step) const { return steps_.data() + (step - first_step_); }

    // Whether all that a step with zero moments and a zero gradient does to a parameter is the weight decay:
    // 0 / eps is 0, and a parameter of -0 stays as it is when 0 is subtracted.
    bool keeps_zeros() const { return keeps_zeros_; }

  private:
    int64_t first_step_;
    std::vector<AdamWConstants<scalar_t>> steps_;
    bool keeps_zeros_ = true;
};

// A parameter whose rows take the steps that they miss, whose gradient is zero, only when they are needed.
template <typename scalar_t>
struct DeferredRows {
    AdamWElements<scalar_t> elements;  // (R, C)
    int64_t num_columns;
    int64_t* row_steps;  // (R): how many steps each row has taken
    const AdamWSchedule<scalar_t>* schedule;
};

// Takes the steps of these rows, or of the first `count` rows where `rows` is null, up to last_step.
template <typename scalar_t>
void catch_up(const DeferredRows<scalar_t>& deferred, const int64_t* rows, int64_t count, int64_t last_step);

}  // namespace bigramx::cpu
