// Gathers the blocks of a batch, one thread per token. The batch offsets come with the launch arguments,
// which saves a copy; for a generator on the GPU each thread computes the draw of its block itself.
#include "cuda/get_batch_kernels.h"

#include <algorithm>

#include "base/op_names.h"
#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"

namespace bigramx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxOffsets = 448;  // launch arguments are limited to 4096 bytes

template <typename token_t>
struct Blocks {
    const token_t* tokens;
    int64_t stride;
    int64_t block_size;  // T
    int64_t size;        // B T
    int64_t* idx;
    int64_t* targets;
};

struct GivenOffsets {
    int64_t offsets[kMaxOffsets];

    __device__ int64_t of_block(int64_t b) const { return offsets[b]; }
};

struct DrawnOffsets {
    Seed seed;
    uint64_t num_offsets;

    __device__ int64_t of_block(int64_t b) const {
        const Philox draw(seed_of(seed), static_cast<uint64_t>(b), 0);
        const uint64_t bits = uint64_t{draw.words[1]} << 32 | draw.words[0];
        return static_cast<int64_t>(__umul64hi(bits, num_offsets));
    }
};

template <typename token_t, typename Offsets>
__global__ void __launch_bounds__(kThreads) get_batch_kernel(Blocks<token_t> blocks, Offsets offsets) {
    const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (n >= blocks.size) return;
    const int64_t b = n / blocks.block_size, t = n % blocks.block_size;
    const token_t* const token = blocks.tokens + (offsets.of_block(b) + t) * blocks.stride;
    blocks.idx[n] = static_cast<int64_t>(token[0]);
    blocks.targets[n] = static_cast<int64_t>(token[blocks.stride]);
}

// num_blocks blocks of the batch, from `first` on.
template <typename Offsets>
void launch_blocks(const GetBatchKernelParams& params, const Offsets& offsets, int64_t first,
                   int64_t num_blocks, cudaStream_t stream) {
    const int64_t size = num_blocks * params.block_size, done = first * params.block_size;
    const LaunchShape shape{kGetBatch, stream, (size + kThreads - 1) / kThreads, kThreads};
    with_type(params.type, [&](auto zero) {
        using token_t = decltype(zero);
        const Blocks<token_t> blocks{static_cast<const token_t*>(params.tokens),
                                     params.stride,
                                     params.block_size,
                                     size,
                                     params.idx + done,
                                     params.targets + done};
        launch(shape, get_batch_kernel<token_t, Offsets>, blocks, offsets);
    });
}

}  // namespace

void launch_get_batch(const GetBatchKernelParams& params, const int64_t* offsets, cudaStream_t stream) {
    for (int64_t first = 0; first < params.batch_size; first += kMaxOffsets) {
        const int64_t num_blocks = std::min<int64_t>(kMaxOffsets, params.batch_size - first);
        GivenOffsets given{};
        std::copy_n(offsets + first, num_blocks, given.offsets);
        launch_blocks(params, given, first, num_blocks, stream);
    }
}

void launch_get_batch(const GetBatchKernelParams& params, const Seed& seed, int64_t num_offsets,
                      cudaStream_t stream) {
    launch_blocks(params, DrawnOffsets{seed, static_cast<uint64_t>(num_offsets)}, 0, params.batch_size,
                  stream);
}

}  // namespace bigramx::cuda
