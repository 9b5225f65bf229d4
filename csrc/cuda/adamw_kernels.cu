// One step of AdamW. Bound by memory bandwidth: up to seven streams over the arrays, so each thread moves
// 16-byte vectors where the arrays are aligned. A step count on the GPU is read by the kernel, so that a CUDA
// graph can be replayed; the constants that depend on it are computed once per block. A small table takes one
// block, which counts the step as well and so saves a launch.
#include "cuda/adamw_kernels.h"

#include <algorithm>

#include "base/op_names.h"
#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"

namespace bigramx::cuda {
namespace {

constexpr int kManyBlocksThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;  // what its registers hold
template <typename scalar_t>
constexpr int kOneBlockThreads = sizeof(scalar_t) == sizeof(float) ? 1024 : 512;  // the same

template <typename scalar_t>
struct Arrays {
    int64_t size;
    scalar_t* param;
    const scalar_t* grad;
    scalar_t* exp_avg;
    scalar_t* exp_avg_sq;
    scalar_t* max_exp_avg_sq;  // null: no AMSGrad
};

// A step count that may lie on the device.
struct CountedStep {
    AdamWOptions options;
    void* step;  // null: the host has it
    FloatType type;
    bool counts;  // adds 1 to it first; for one thread

    __device__ double operator()() const {
        return type == FloatType::float64 ? count_in<double>() : count_in<float>();
    }

  private:
    template <typename T>
    __device__ double count_in() const {
        const T count = *static_cast<const T*>(step) + (counts ? 1 : 0);
        if (counts) *static_cast<T*>(step) = count;
        return count;
    }
};

__global__ void __launch_bounds__(1) count_step_kernel(CountedStep counted) { counted(); }

// The host's constants, or those of the step count on the device, computed once per block.
template <typename scalar_t>
__device__ AdamWConstants<scalar_t> constants_of(const AdamWConstants<scalar_t>& hosts, CountedStep counted) {
    if (counted.step == nullptr) return hosts;
    SharedMemory shared;
    auto* const constants = shared.take<AdamWConstants<scalar_t>>(1);
    if (threadIdx.x == 0) *constants = adamw_constants<scalar_t>(counted.options, counted());
    __syncthreads();
    return *constants;
}

// Whether one access moves these elements.
template <typename scalar_t>
__device__ bool is_vector(const scalar_t* row, int count) {
    return count == kVectorSize<scalar_t> && elements_before_vectors(row, count) == 0;
}

template <typename scalar_t>
__device__ AlignedVector<scalar_t> load_elements(const scalar_t* from, int count) {
    if (is_vector(from, count)) return load_vector(from);
    AlignedVector<scalar_t> vector{};
    for (int k = 0; k < kVectorSize<scalar_t>; ++k) {
        if (k < count) vector.elements[k] = from[k];
    }
    return vector;
}

template <typename scalar_t>
__device__ void store_elements(scalar_t* to, const AlignedVector<scalar_t>& vector, int count) {
    if (is_vector(to, count)) return store_vector(to, vector);
    for (int k = 0; k < kVectorSize<scalar_t>; ++k) {
        if (k < count) to[k] = vector.elements[k];
    }
}

// The update of cpu/adamw_kernels.h for `count` elements from `begin` on.
template <typename scalar_t>
__device__ void step_elements(const Arrays<scalar_t>& arrays, const AdamWConstants<scalar_t>& constants,
                              int64_t begin, int count) {
    const bool amsgrad = arrays.max_exp_avg_sq != nullptr;
    AlignedVector<scalar_t> param = load_elements(arrays.param + begin, count);
    const AlignedVector<scalar_t> grads = load_elements(arrays.grad + begin, count);
    AlignedVector<scalar_t> exp_avg = load_elements(arrays.exp_avg + begin, count);
    AlignedVector<scalar_t> exp_avg_sq = load_elements(arrays.exp_avg_sq + begin, count);
    AlignedVector<scalar_t> largest{};
    if (amsgrad) largest = load_elements(arrays.max_exp_avg_sq + begin, count);
    for (int k = 0; k < kVectorSize<scalar_t>; ++k) {
        const scalar_t grad = constants.grad_sign * grads.elements[k];
        scalar_t& mean = exp_avg.elements[k];
        scalar_t& mean_sq = exp_avg_sq.elements[k];
        scalar_t& largest_sq = largest.elements[k];
        const scalar_t difference = grad - mean;
        mean = constants.from_exp_avg ? mean + difference * constants.one_minus_beta1
                                      : grad - difference * constants.beta1;
        mean_sq = mean_sq * constants.beta2 + constants.one_minus_beta2 * grad * grad;
        // A NaN stays, as in torch.maximum.
        if (!amsgrad || largest_sq <= mean_sq || mean_sq != mean_sq) largest_sq = mean_sq;
        const scalar_t denominator =
            std::sqrt(largest_sq) * constants.inverse_root_correction2 + constants.eps;
        param.elements[k] = param.elements[k] * constants.decay - constants.step_size * mean / denominator;
    }
    store_elements(arrays.param + begin, param, count);
    store_elements(arrays.exp_avg + begin, exp_avg, count);
    store_elements(arrays.exp_avg_sq + begin, exp_avg_sq, count);
    if (amsgrad) store_elements(arrays.max_exp_avg_sq + begin, largest, count);
}

template <typename scalar_t, int kThreads>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(Arrays<scalar_t> arrays, AdamWConstants<scalar_t> of_host, CountedStep counted) {
    const AdamWConstants<scalar_t> constants = constants_of(of_host, counted);
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const int64_t stride = int64_t{gridDim.x} * kThreads * kVectorSize<scalar_t>;
    for (int64_t begin = thread * kVectorSize<scalar_t>; begin < arrays.size; begin += stride) {
        const int64_t left = arrays.size - begin;
        step_elements(arrays, constants, begin,
                      left < kVectorSize<scalar_t> ? static_cast<int>(left) : kVectorSize<scalar_t>);
    }
}

template <typename scalar_t, int kThreads>
void launch_blocks(int64_t blocks, const AdamWKernelParams& params, const CountedStep& counted,
                   cudaStream_t stream) {
    const Arrays<scalar_t> arrays{params.size,
                                  static_cast<scalar_t*>(params.param),
                                  static_cast<const scalar_t*>(params.grad),
                                  static_cast<scalar_t*>(params.exp_avg),
                                  static_cast<scalar_t*>(params.exp_avg_sq),
                                  static_cast<scalar_t*>(params.max_exp_avg_sq)};
    launch({kAdamW, stream, blocks, kThreads, SharedMemory::bytes<AdamWConstants<scalar_t>>(1)},
           adamw_kernel<scalar_t, kThreads>, arrays,
           adamw_constants<scalar_t>(params.options, params.host_step), counted);
}

template <typename scalar_t>
void launch_typed(const AdamWKernelParams& params, cudaStream_t stream) {
    constexpr int64_t kMaxOneBlock = 2 * kOneBlockThreads<scalar_t> * kVectorSize<scalar_t>;
    constexpr int64_t kPerBlock = kManyBlocksThreads * kVectorSize<scalar_t>;
    CountedStep counted{params.options, params.step, params.step_type, params.counts_step};
    if (params.counts_step && params.size <= kMaxOneBlock)
        return launch_blocks<scalar_t, kOneBlockThreads<scalar_t>>(1, params, counted, stream);
    if (params.counts_step) launch({kAdamW, stream, 1, 1}, count_step_kernel, counted);
    counted.counts = false;
    const int64_t blocks = std::min((params.size + kPerBlock - 1) / kPerBlock,
                                    kBlocksPerMultiprocessor * num_multiprocessors(kAdamW));
    launch_blocks<scalar_t, kManyBlocksThreads>(blocks, params, counted, stream);
}

}  // namespace

void launch_adamw(const AdamWKernelParams& params, cudaStream_t stream) {
    params.type == FloatType::float64 ? launch_typed<double>(params, stream)
                                      : launch_typed<float>(params, stream);
}

}  // namespace bigramx::cuda
