#include "cuda/get_batch_kernels.h"

#include <algorithm>

#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"

namespace bigramx {
namespace {

constexpr const char* kName = "get_batch";
constexpr int kThreads = 256;
constexpr int kMostStarts = 448;  // the arguments of a launch are 4096 bytes at most

template <typename token_t>
struct Blocks {
    const token_t* tokens;
    int64_t stride;
    int64_t block_size;  // T
    int64_t size;        // B T
    int64_t* idx;
    int64_t* targets;
};

struct GivenStarts {
    int64_t starts[kMostStarts];

    __device__ int64_t of_block(int64_t b) const { return starts[b]; }
};

struct DrawnStarts {
    Seed seed;
    uint64_t num_offsets;

    __device__ int64_t of_block(int64_t b) const {
        const Philox draw(seed_of(seed), static_cast<uint64_t>(b), 0);
        const uint64_t bits = uint64_t{draw.words[1]} << 32 | draw.words[0];
        return static_cast<int64_t>(__umul64hi(bits, num_offsets));
    }
};

// A thread for each token of the batch.
template <typename token_t, typename Starts>
__global__ void __launch_bounds__(kThreads) get_batch_kernel(Blocks<token_t> blocks, Starts starts) {
    const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (n >= blocks.size) return;
    const int64_t b = n / blocks.block_size, t = n % blocks.block_size;
    const token_t* const token = blocks.tokens + (starts.of_block(b) + t) * blocks.stride;
    blocks.idx[n] = static_cast<int64_t>(token[0]);
    blocks.targets[n] = static_cast<int64_t>(token[blocks.stride]);
}

// The blocks from `first` on.
template <typename Starts>
void launch_blocks(const BatchJob& job, const Starts& starts, int64_t first, int64_t num_blocks,
                   cudaStream_t stream) {
    const int64_t size = num_blocks * job.block_size, done = first * job.block_size;
    const LaunchShape shape{kName, stream, (size + kThreads - 1) / kThreads, kThreads};
    with_type(job.type, [&](auto zero) {
        using token_t = decltype(zero);
        const Blocks<token_t> blocks{static_cast<const token_t*>(job.tokens),
                                     job.stride,
                                     job.block_size,
                                     size,
                                     job.idx + done,
                                     job.targets + done};
        launch(shape, get_batch_kernel<token_t, Starts>, blocks, starts);
    });
}

}  // namespace

void launch_get_batch(const BatchJob& job, const int64_t* starts, cudaStream_t stream) {
    for (int64_t first = 0; first < job.batch_size; first += kMostStarts) {
        const int64_t num_blocks = std::min<int64_t>(kMostStarts, job.batch_size - first);
        GivenStarts given{};
        std::copy_n(starts + first, num_blocks, given.starts);
        launch_blocks(job, given, first, num_blocks, stream);
    }
}

void launch_get_batch(const BatchJob& job, const Seed& seed, int64_t num_offsets, cudaStream_t stream) {
    launch_blocks(job, DrawnStarts{seed, static_cast<uint64_t>(num_offsets)}, 0, job.batch_size, stream);
}

}  // namespace bigramx
