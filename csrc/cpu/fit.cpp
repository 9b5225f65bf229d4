#include "../fit.h"

#include <ATen/ops/empty.h>

#include <chrono>

#include "../embedding_cross_entropy.h"
#include "loss_workspace.h"

namespace bigramx {

int64_t fit_cpu(const at::Tensor& tokens, const AdamWTensors& tensors, const FitOptions& options,
                const std::optional<at::Generator>& generator, const at::Tensor& losses) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const std::chrono::duration<double> limit(options.max_seconds);
    const int64_t num_pairs = options.shape.batch_size * options.shape.block_size;
    const LossInputs inputs{at::empty({num_pairs}, at::dtype(at::kLong)), tensors.param,
                            at::empty({num_pairs}, at::dtype(at::kLong)), at::Tensor()};
    const LossOptions loss_options{/*ignore_index=*/-100,   at::Reduction::Mean,
                                   /*label_smoothing=*/0.0,
                                   /*z_loss=*/0.0,          options.padding_idx,
                                   /*sparse=*/false};
    AdamWOptions adamw = options.adamw;
    LossWorkspace workspace;
    double* losses_of_steps = losses.data_ptr<double>();
    const bool single = tensors.param.scalar_type() == at::kFloat;
    for (int64_t step = 0; step < losses.size(0); ++step) {
        if (step > 0 && Clock::now() - start > limit) return step;
        get_batch_cpu(tokens, options.shape, generator, inputs.idx, inputs.targets);
        const double loss = embedding_cross_entropy_step_cpu(inputs, loss_options, tensors.grad, workspace);
        adamw_cpu(tensors, adamw);
        adamw.step += 1;
        losses_of_steps[step] = single ? static_cast<float>(loss) : loss;
    }
    return losses.size(0);
}

}  // namespace bigramx
