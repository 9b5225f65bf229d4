#include "fit.h"

#include <ATen/ops/empty.h>

#include <chrono>
#include <mutex>

#include "base/interrupt.h"
#include "cpu/embedding_cross_entropy_workspace.h"
#include "sampling/generator.h"

namespace bigramx {
namespace {

// step: float32 or float64.
void increment(const at::Tensor& step) {
    if (step.scalar_type() == at::kFloat) {
        ++*step.data_ptr<float>();
    } else {
        ++*step.data_ptr<double>();
    }
}

// Puts the generator back where a step raises before it changes anything: its batch is still to be drawn.
class DrawsOfStep {
  public:
    explicit DrawsOfStep(at::CPUGeneratorImpl* generator) : generator_(generator), engine_(engine()) {}

    ~DrawsOfStep() {
        if (is_taken_) return;
        const std::lock_guard<std::mutex> lock(generator_->mutex_);
        generator_->set_engine(engine_);
    }

    void take() { is_taken_ = true; }

  private:
    at::mt19937 engine() const {
        const std::lock_guard<std::mutex> lock(generator_->mutex_);
        return generator_->engine();
    }

    at::CPUGeneratorImpl* const generator_;
    const at::mt19937 engine_;
    bool is_taken_ = false;
};

}  // namespace

int64_t fit_cpu(const FitParams& params) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const std::chrono::duration<double> limit(params.max_seconds);
    const int64_t num_pairs = params.batch.batch_size * params.batch.block_size;
    const EmbeddingCrossEntropyParams loss_params{
        at::empty({num_pairs}, at::dtype(at::kLong)),
        params.adamw.param,
        at::empty({num_pairs}, at::dtype(at::kLong)),
        /*class_weight=*/at::Tensor(),
        {/*ignore_index=*/-100, at::Reduction::Mean, /*label_smoothing=*/0.0, /*z_loss=*/0.0,
         params.padding_idx, /*sparse=*/false}};
    cpu::LossWorkspace workspace;
    const at::Tensor& losses = params.losses;
    double* const losses_of_steps = losses.data_ptr<double>();
    const bool single = params.adamw.param.scalar_type() == at::kFloat;
    SignalCheck signals;
    for (int64_t k = 0; k < losses.size(0); ++k) {
        if (k > 0 && Clock::now() - start > limit) return k;
        signals.poll();  // here all agree
        DrawsOfStep draws(cpu_generator(params.batch.generator));
        get_batch_cpu(params.batch, loss_params.idx, loss_params.targets);
        const double loss = cpu::embedding_cross_entropy_step(loss_params, params.adamw.grad, workspace);
        draws.take();
        increment(params.adamw.step);
        adamw_cpu(params.adamw);
        losses_of_steps[k] = single ? static_cast<float>(loss) : loss;
    }
    return losses.size(0);
}

}  // namespace bigramx
