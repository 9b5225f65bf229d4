#include "cuda/base/device.h"

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "base/dispatch.h"
#include "sampling/generator.h"

namespace bigramx {

bool uses_cuda_kernels(const at::Tensor& tensor) { return tensor.is_cuda(); }

namespace cuda {

StreamGuard::StreamGuard(const at::Tensor& tensor)
    : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}

void check_host_can_draw(const char* op) {
    TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None, op,
                BIGRAMX_FROZEN_DRAWS);
}

Seed draw_cuda_seed(const char* op, const std::optional<at::Generator>& generator) {
    constexpr uint64_t kIncrement = 4;  // offsets of a generator on the device are multiples of it
    if (generator.has_value() && generator->device().is_cpu()) {
        check_host_can_draw(op);
        return {draw_seed(generator), false, 0, nullptr, nullptr};
    }
    auto* impl = at::get_generator_or_default<at::CUDAGeneratorImpl>(
        generator, at::cuda::detail::getDefaultCUDAGenerator());
    const std::lock_guard<std::mutex> lock(impl->mutex_);
    const at::PhiloxCudaState state = impl->philox_cuda_state(kIncrement);
    if (!state.captured_) return {state.seed_.val, true, state.offset_.val, nullptr, nullptr};
    return {0, true, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
}

}  // namespace cuda
}  // namespace bigramx
