// Many steps of the training loop in one call: get_batch, embedding_cross_entropy, adamw_. Each row is
// updated while its gradient is in cache; no gradient of the table exists.
//
// CPU only: there the calls between the kernels cost more than the kernels. On a GPU a CUDA graph replays the
// kernels of many steps (bigramx/graph_steps.py).
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "adamw.h"
#include "get_batch.h"

namespace bigramx {

struct FitParams {
    GetBatchParams batch;
    AdamWParams adamw;     // param: (V, V); step: the count of the steps before
    at::Tensor row_steps;  // (V) int64: how many of these each row has taken; undefined: all
    int64_t padding_idx;   // -1: none
    at::Tensor losses;     // (steps) float64, contiguous
    double max_seconds;    // no step begins after that
};

// Takes a step for each element of losses, the loss of its batch before the step, and counts it in
// adamw.step. Returns the number of steps, at least one. An exception, of a signal handler for example, comes
// between two steps, and finds the generator where the last one left it. With row_steps the rows that a batch
// does not meet miss its step, whose gradient is zero for them, until a batch meets them: see
// deferred_adamw.h.
int64_t fit_cpu(const FitParams& params);

// The op.
int64_t fit(at::Tensor weight, at::Tensor exp_avg, at::Tensor exp_avg_sq, at::Tensor step, at::Tensor losses,
            const at::Tensor& tokens, int64_t batch_size, int64_t block_size, int64_t padding_idx, double lr,
            double beta1, double beta2, double eps, double weight_decay, double max_seconds,
            const std::optional<at::Generator>& generator, std::optional<at::Tensor> row_steps);

}  // namespace bigramx
