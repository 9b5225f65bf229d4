// counts[i, j] = how often token j follows token i.
//
// A small table is counted in the shared memory of each block. For a larger one the tokens are first grouped
// by the token before them with a counting sort; then a block counts each row in shared memory and writes
// each entry once. Atomic additions scattered over a large table in device memory would be slower.
#include "cuda/count_bigrams_kernels.h"

#include "base/op_names.h"
#include "cuda/base/pairs.cuh"

namespace bigramx::cuda {
namespace {

constexpr int kRowThreads = 512;
constexpr int64_t kTile = 8192;  // entries of a row in shared memory at once

// One block per row.
__global__ void __launch_bounds__(kRowThreads)
    count_rows_of_table_kernel(PairGroups groups, int64_t vocab_size, int64_t* counts) {
    SharedMemory shared;
    auto* const tile = shared.take<uint32_t>(kTile);
    const int64_t row = blockIdx.x, first = groups.row_begin[row], size = groups.row_begin[row + 1] - first;
    for (int64_t begin = 0; begin < vocab_size; begin += kTile) {
        const int64_t end = begin + kTile < vocab_size ? begin + kTile : vocab_size;
        for (int64_t k = threadIdx.x; k < end - begin; k += blockDim.x) tile[k] = 0;
        __syncthreads();
        add_targets(groups.targets + first, size, begin, end, tile, [](int64_t) { return 1u; });
        __syncthreads();
        for (int64_t k = threadIdx.x; k < end - begin; k += blockDim.x) {
            counts[row * vocab_size + begin + k] = tile[k];
        }
        __syncthreads();
    }
}

struct Scratch {
    PairGroups groups;
    void* zeros;
    uintptr_t zero_bytes;
    uintptr_t end;

    Scratch(const CountBigramsKernelParams& params, void* memory) : groups{}, zeros(memory) {
        ScratchMemory scratch(memory);
        groups.row_counts = scratch.take<uint32_t>(params.vocab_size);
        groups.ticket = scratch.take<unsigned>(1);
        zero_bytes = scratch.end() - reinterpret_cast<uintptr_t>(memory);
        groups.cursors = scratch.take<uint32_t>(params.vocab_size);
        groups.row_begin = scratch.take<int64_t>(params.vocab_size + 1);
        groups.targets = scratch.take<int32_t>(params.num_tokens);
        end = scratch.end();
    }
};

template <typename token_t>
void run(const CountBigramsKernelParams& params, void* memory, cudaStream_t stream) {
    const TokenPairs<token_t> pairs{static_cast<const token_t*>(params.tokens), params.num_tokens,
                                    params.vocab_size};
    if (fits_table(kCountBigrams, params.vocab_size, params.vocab_size)) {
        clear(kCountBigrams, stream, params.counts, params.vocab_size * params.vocab_size * sizeof(int64_t));
        return count_table(kCountBigrams, stream, pairs, params.vocab_size, params.vocab_size, params.counts);
    }
    const Scratch scratch(params, memory);
    clear(kCountBigrams, stream, scratch.zeros, scratch.zero_bytes);
    group_pairs(kCountBigrams, stream, pairs, params.vocab_size, scratch.groups);
    const auto shared_bytes = static_cast<size_t>(SharedMemory::bytes<uint32_t>(kTile));
    launch({kCountBigrams, stream, params.vocab_size, kRowThreads, shared_bytes}, count_rows_of_table_kernel,
           scratch.groups, params.vocab_size, params.counts);
}

}  // namespace

int64_t count_bigrams_scratch_bytes(const CountBigramsKernelParams& params) {
    if (fits_table(kCountBigrams, params.vocab_size, params.vocab_size)) return 0;
    return static_cast<int64_t>(Scratch(params, nullptr).end);
}

void launch_count_bigrams(const CountBigramsKernelParams& params, void* scratch, cudaStream_t stream) {
    with_type(params.type, [&](auto zero) { run<decltype(zero)>(params, scratch, stream); });
}

}  // namespace bigramx::cuda
