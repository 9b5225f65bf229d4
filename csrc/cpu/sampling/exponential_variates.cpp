#include "cpu/sampling/exponential_variates.h"

#include <thread>

#define BIGRAMX_KERNELS "cpu/sampling/exponential_variates_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx::cpu {

void GeneratorStream::acquire() {
    lock_.lock();
    twister_.emplace(generator_->engine());
}

void GeneratorStream::release() {
    if (!twister_.has_value()) return;
    generator_->set_engine(twister_->engine());
    twister_.reset();
    lock_.unlock();
}

void GeneratorStream::pause() {
    release();
    // A mutex is not fair: who waits for it needs some time to wake up.
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    signals_.handle();
}

void GeneratorStream::before_work(int64_t elements) {
    constexpr int64_t kLong = 1 << 16;
    if (elements >= kLong) release();
    if (signals_.is_due(elements)) pause();
}

void next_state(uint32_t* words) { BIGRAMX_DISPATCH_TARGET(next_state_kernel)(words); }

void draw_uniforms(GeneratorStream& stream, int64_t count, double* draws) {
    BIGRAMX_DISPATCH_TARGET(uniforms_kernel)(stream.take(count), count, draws);
}

template <typename scalar_t>
int64_t sample_token(GeneratorStream& stream, const scalar_t* probs, int64_t vocab_size) {
    return BIGRAMX_DISPATCH_TARGET(exponential_race_kernel<scalar_t>)(stream, probs, vocab_size);
}

template int64_t sample_token(GeneratorStream&, const double*, int64_t);
template int64_t sample_token(GeneratorStream&, const float*, int64_t);
template int64_t sample_token(GeneratorStream&, const c10::BFloat16*, int64_t);
template int64_t sample_token(GeneratorStream&, const c10::Half*, int64_t);

}  // namespace bigramx::cpu
