#include "multinomial.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "checks.h"

namespace bigramx {
namespace {

at::Tensor multinomial_op_cpu(const at::Tensor& probs, int64_t num_samples, bool replacement,
                              std::optional<c10::string_view> sampler,
                              const std::optional<at::Generator>& generator) {
    constexpr const char* op = "multinomial";
    const Sampler chosen = cpu_sampler(op, sampler);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // tokens have no gradient
    check_defined(op, "probs", probs);
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
    const at::Tensor samples = multinomial_cpu(rows, num_samples, replacement, chosen, generator);
    return probs.dim() == 1 ? samples.squeeze(0) : samples;
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) { m.impl("multinomial", &multinomial_op_cpu); }

}  // namespace
}  // namespace bigramx
