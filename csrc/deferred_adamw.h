// AdamW for a table of which a batch meets few rows. A row that it does not meet has the gradient zero, and
// may miss the step for now: before its next use it takes the steps that it missed, one after another, in
// registers. As AdamW acts element by element, each element sees the same operations as in a step of all
// rows, and has the same bits.
//
// CPU only: a GPU reads a table faster than it replays steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "adamw.h"

namespace bigramx {

struct DeferredAdamWParams {
    // Contiguous, (R, C), of one dtype, float32 or float64.
    at::Tensor param;
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
    at::Tensor row_steps;  // (R) int64, contiguous: how many steps each row has taken
    at::Tensor schedule;   // (S, 5) float64: lr, beta1, beta2, eps, weight_decay of the last S steps
    int64_t step;          // the count of the last of these, from 1
    bool maximize;
    at::Tensor rows;  // (K) int64; undefined: all
    at::Tensor
        grad;  // (K, C), contiguous: the gradient of the rows at the last step; undefined: they miss it
};

// Raises unless there is a number for each row of `param`.
void check_row_steps(const char* op, const at::Tensor& row_steps, const at::Tensor& param);

// Takes all steps of the rows that they have yet to take.
void deferred_adamw_cpu(const DeferredAdamWParams& params);

// The op.
void deferred_adamw(at::Tensor param, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor row_steps,
                    const at::Tensor& schedule, int64_t step, const std::optional<at::Tensor>& rows,
                    const std::optional<at::Tensor>& grad, bool maximize);

}  // namespace bigramx
