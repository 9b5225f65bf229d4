#include "noise.h"

#define BIGRAMX_KERNELS "noise_kernels.h"
#include "for_each_capability.h"

namespace bigramx {

void next_state(uint32_t* words) { BIGRAMX_DISPATCH(next_state)(words); }

void draw_uniforms(GeneratorStream& stream, int64_t count, double* draws) {
    BIGRAMX_DISPATCH(draw_uniforms)(stream.take(count), count, draws);
}

template <typename scalar_t>
int64_t sample_token(GeneratorStream& stream, const scalar_t* probs, int64_t vocab_size) {
    return BIGRAMX_DISPATCH(sample_token<scalar_t>)(stream, probs, vocab_size);
}

template int64_t sample_token(GeneratorStream&, const double*, int64_t);
template int64_t sample_token(GeneratorStream&, const float*, int64_t);
template int64_t sample_token(GeneratorStream&, const c10::BFloat16*, int64_t);
template int64_t sample_token(GeneratorStream&, const c10::Half*, int64_t);

}  // namespace bigramx
