#include "multinomial.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include "cuda/multinomial.h"
#endif

namespace bigramx {
namespace {

#if defined(BIGRAMX_CUDA)

at::Tensor multinomial_cuda(const at::Tensor& probs, int64_t num_samples, bool replacement, Sampler,
                            const std::optional<at::Generator>& generator) {
    const GpuScope scope(probs);
    const int64_t num_rows = probs.size(0), vocab_size = probs.size(1);
    TORCH_CHECK(vocab_size > 0 || num_rows == 0,
                "multinomial: invalid multinomial distribution (sum of probabilities <= 0) in row 0");
    const at::Tensor samples = at::empty({num_rows, num_samples}, probs.options().dtype(at::kLong));
    const at::Tensor rows = probs.contiguous();
    const DrawsJob job{
        float_type(rows),         rows.const_data_ptr(),      num_rows, vocab_size, num_samples,
        draw_gpu_seed(generator), samples.data_ptr<int64_t>()};
    if (num_samples == 1) {
        launch_draw_one_a_row(job, scope.stream());
        return samples;
    }
    const at::Tensor scratch = at::empty({num_rows, vocab_size}, probs.options().dtype(at::kInt));
    auto* const words = static_cast<uint32_t*>(scratch.data_ptr());
    if (replacement) {
        launch_draw_with_replacement(job, words, scope.stream());
    } else {
        launch_draw_without_replacement(job, words, scope.stream());
    }
    return samples;
}

#endif

at::Tensor multinomial_op(const at::Tensor& probs, int64_t num_samples, bool replacement,
                          std::optional<c10::string_view> sampler,
                          const std::optional<at::Generator>& generator) {
    constexpr const char* op = "multinomial";
    check_defined(op, "probs", probs);
    const Sampler chosen = choose_sampler(op, sampler, probs);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // tokens have no gradient
    TORCH_CHECK(probs.dim() == 1 || probs.dim() == 2, op, ": probs must be 1 or 2 dim, got shape ",
                probs.sizes());
    TORCH_CHECK(at::isFloatingType(probs.scalar_type()), op,
                " only supports floating-point dtypes for probs, got: ", probs.scalar_type());
    check_floating(op, "probs", probs);
    TORCH_CHECK(num_samples > 0, op, ": cannot sample num_samples <= 0 samples, got ", num_samples);
    const int64_t vocab_size = probs.size(-1);
    TORCH_CHECK(replacement || num_samples <= vocab_size, op,
                ": cannot sample num_samples > probs.size(-1) (", num_samples, " > ", vocab_size,
                ") samples without replacement");
    const at::Tensor rows = probs.dim() == 1 ? probs.unsqueeze(0) : probs;
    const at::Tensor samples =
        BIGRAMX_BY_DEVICE(rows, multinomial, rows, num_samples, replacement, chosen, generator);
    return probs.dim() == 1 ? samples.squeeze(0) : samples;
}

void register_ops(torch::Library& m) { m.impl("multinomial", &multinomial_op); }
BIGRAMX_REGISTER(register_ops)

}  // namespace
}  // namespace bigramx
