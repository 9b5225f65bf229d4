#include "cpu/sampling/philox_fill.h"

#define BIGRAMX_KERNELS "cpu/sampling/philox_fill_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx::cpu {

void philox_fill(uint64_t seed, uint64_t sequence, uint64_t position, int64_t count, int bits,
                 uint32_t* words) {
    const auto kernel = BIGRAMX_DISPATCH_TARGET(philox_fill_kernel);
    for (int64_t k = 0; k < count; k += kPhiloxFillBlock) {
        kernel(seed, sequence, (position + k) / Philox::kWords, bits, words + k);
    }
}

}  // namespace bigramx::cpu
