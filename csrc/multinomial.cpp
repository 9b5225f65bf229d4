#include "multinomial.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "base/checked.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {

at::Tensor multinomial(const at::Tensor& probs, int64_t num_samples, bool replacement,
                       std::optional<std::string_view> sampler,
                       const std::optional<at::Generator>& generator) {
    constexpr const char* op = kMultinomial;
    check_tensor(op, "probs", probs);
    const Sampler chosen = choose_sampler(op, sampler, /*on_gpu=*/uses_cuda_kernels(probs));
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
    checked_product(op, "num_samples times the number of rows", num_samples,
                    probs.dim() == 1 ? 1 : probs.size(0));
    const MultinomialParams params{probs.dim() == 1 ? probs.unsqueeze(0) : probs, num_samples, replacement,
                                   chosen, generator};
    const at::Tensor samples = BIGRAMX_DISPATCH_DEVICE(probs, multinomial, params);
    return probs.dim() == 1 ? samples.squeeze(0) : samples;
}

BIGRAMX_REGISTER(kMultinomial, &multinomial)

}  // namespace bigramx
