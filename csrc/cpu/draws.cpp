#include "draws.h"

#include "../philox.h"

#define BIGRAMX_KERNELS "draws_kernels.h"
#include "for_each_capability.h"

namespace bigramx {

void fill_draws(uint64_t seed, uint64_t sequence, uint64_t position, int64_t count, uint32_t* draws) {
    const auto kernel = BIGRAMX_DISPATCH(fill_draws_at_once);
    for (int64_t k = 0; k < count; k += kDrawsAtOnce) {
        kernel(seed, sequence, (position + k) / Philox::kWords, draws + k);
    }
}

}  // namespace bigramx
