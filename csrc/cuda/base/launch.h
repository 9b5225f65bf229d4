// Kernel launches with error checks. No <<<...>>>: host compilers can read this header as well.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/base/types.h"

namespace bigramx::cuda {

inline void check_cuda(const char* op, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // forgets it: PyTorch's next check would take it for its own
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// An attribute of the current device.
inline int64_t device_attribute(const char* op, cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check_cuda(op, cudaGetDevice(&device));
    check_cuda(op, cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

inline int64_t num_multiprocessors(const char* op) {
    return device_attribute(op, cudaDevAttrMultiProcessorCount);
}

// The most dynamic shared memory that a block can opt in to, in bytes.
inline int64_t max_shared_bytes(const char* op) {
    return device_attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Whether launches of a kernel may overlap (LaunchShape). Its code must know how to wait, which code for
// earlier architectures does not, even where a later GPU compiles it anew; and CUDA graphs must take it.
inline bool can_overlap(const char* op, const void* kernel) {
    constexpr int kFirstArchitecture = 90, kFirstDriver = 12030;
    cudaFuncAttributes attributes{};
    int driver = 0;
    check_cuda(op, cudaFuncGetAttributes(&attributes, kernel));
    check_cuda(op, cudaDriverGetVersion(&driver));
    return attributes.ptxVersion >= kFirstArchitecture && driver >= kFirstDriver;
}

inline std::mutex kernels_mutex;
inline std::map<std::pair<const void*, int>, bool> prepared_kernels;  // by kernel and device: can_overlap

// Once for each kernel and device. Opts the kernel in to max_shared_bytes: the limit is the kernel's, so
// threads that each set what their own launch takes would take it from one another. Returns can_overlap.
inline bool prepare_kernel(const char* op, const void* kernel) {
    int device = 0;
    check_cuda(op, cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(kernels_mutex);
    const auto known = prepared_kernels.find({kernel, device});
    if (known != prepared_kernels.end()) return known->second;
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(max_shared_bytes(op))));
    return prepared_kernels.emplace(std::pair(kernel, device), can_overlap(op, kernel)).first->second;
}

struct LaunchShape {
    const char* op;  // for messages
    cudaStream_t stream;
    int64_t blocks;
    int threads;              // of a block
    size_t shared_bytes = 0;  // dynamic shared memory of a block
    // Where the GPU can, the kernel may begin before the one before it in the stream has ended, and waits for
    // it by wait_for_kernel_before(): a programmatic dependent launch.
    bool overlaps = false;
};

// Launches nothing for 0 blocks. Throws std::runtime_error where the launch fails.
template <typename... Parameters, typename... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
    constexpr size_t kAlwaysAllowed = 48 << 10;  // bytes
    constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
    if (shape.blocks == 0) return;
    if (shape.blocks > kMaxBlocks) {
        throw std::runtime_error(std::string(shape.op) +
                                 ": expected work for at most 2147483647 blocks, got " +
                                 std::to_string(shape.blocks));
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    if (shape.overlaps || shape.shared_bytes > kAlwaysAllowed) {
        const bool may_overlap = prepare_kernel(shape.op, reinterpret_cast<const void*>(kernel));
        config.attrs = &overlap;
        config.numAttrs = shape.overlaps && may_overlap ? 1 : 0;
    }
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = shape.stream;
    check_cuda(shape.op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Sets `bytes` of device memory to zero.
inline void clear(const char* op, cudaStream_t stream, void* memory, size_t bytes) {
    if (bytes > 0) check_cuda(op, cudaMemsetAsync(memory, 0, bytes, stream));
}

}  // namespace bigramx::cuda
