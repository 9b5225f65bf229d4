// Many steps of the training loop in one call: get_batch, embedding_cross_entropy, adamw_.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "adamw.h"
#include "get_batch.h"

namespace bigramx {

struct FitOptions {
    BatchShape shape;
    int64_t padding_idx;
    AdamWOptions adamw;  // its step is that of the first
    double max_seconds;  // after which no further step begins
};

// Trains `param`, (V, V), in place, a step for each element of losses, float64, which are those of the
// batches before their step; returns how many steps were taken, at least one. tensors.grad is scratch.
int64_t fit_cpu(const at::Tensor& tokens, const AdamWTensors& tensors, const FitOptions& options,
                const std::optional<at::Generator>& generator, const at::Tensor& losses);

}  // namespace bigramx
