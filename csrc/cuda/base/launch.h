// Kernel launches with error checks. No <<<...>>>: host compilers can read this header as well.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <set>
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

inline std::mutex kernels_mutex;
inline std::set<std::pair<const void*, int>> kernels_with_max_shared_bytes;  // kernel, device

// Opts a kernel in to max_shared_bytes on the current device, once: the limit is the kernel's, so threads
// that each set what their own launch takes would take it from one another.
inline void allow_max_shared_bytes(const char* op, const void* kernel) {
    int device = 0;
    check_cuda(op, cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(kernels_mutex);
    if (kernels_with_max_shared_bytes.count({kernel, device}) > 0) return;
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(max_shared_bytes(op))));
    kernels_with_max_shared_bytes.insert({kernel, device});
}

struct LaunchShape {
    const char* op;  // for messages
    cudaStream_t stream;
    int64_t blocks;
    int threads;              // of a block
    size_t shared_bytes = 0;  // dynamic shared memory of a block
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
    if (shape.shared_bytes > kAlwaysAllowed) {
        allow_max_shared_bytes(shape.op, reinterpret_cast<const void*>(kernel));
    }
    cudaLaunchConfig_t config{};
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
