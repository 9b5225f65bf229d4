// counts[i, j] = how often token j follows token i.
//
// A small table is counted in the shared memory of each block. For a larger one the tokens are first grouped
// by the token before them with a counting sort; then a block counts each row in shared memory and writes
// each entry once. Atomic additions scattered over a large table in device memory would be slower. A row of
// many pairs is cut into pieces: the first is written like a whole row; then a block counts each of the
// others, and adds it.
#include "cuda/count_bigrams_kernels.h"

#include "base/op_names.h"
#include "cuda/base/pairs.cuh"

namespace bigramx::cuda {
namespace {

constexpr int kRowThreads = 512;
constexpr int64_t kTile = 8192;         // entries of a row in shared memory at once
constexpr int64_t kPiecePairs = 32768;  // the most that a block counts

// The pairs of a row in the list of all pairs, which is cut at the multiples of kPiecePairs. The cuts within
// a row make pieces of it, if it has more pairs than that.
struct RowOfPairs {
    int64_t row, begin, end;

    __device__ RowOfPairs(const PairGroups& groups, int64_t row)
        : row(row), begin(groups.row_begin[row]), end(groups.row_begin[row + 1]) {}

    __device__ bool is_cut() const { return end - begin > kPiecePairs; }

    __device__ int64_t end_of_piece(int64_t from) const {
        const int64_t cut = (from / kPiecePairs + 1) * kPiecePairs;
        return is_cut() && cut < end ? cut : end;
    }
};

// The row that has pair n.
__device__ int64_t row_of_pair(const PairGroups& groups, int64_t num_rows, int64_t n) {
    int64_t row = 0;
    for (int64_t rows = num_rows; rows > 1;) {  // it is one of so many, from `row` on
        const int64_t half = rows / 2;
        if (groups.row_begin[row + half] <= n) row += half;
        rows -= half;
    }
    return row;
}

// Calls visit(entry, count) for each entry of the row, with the count of the piece from pair `from` on. For a
// block. counts: (V, V).
template <typename Visit>
__device__ void count_piece(const PairGroups& groups, const RowOfPairs& row, int64_t from, int64_t vocab_size,
                            int64_t* counts, const Visit& visit) {
    SharedMemory shared;
    auto* const tile = shared.take<uint32_t>(kTile);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int64_t num_pairs = row.end_of_piece(from) - from;
    for (int64_t begin = 0; begin < vocab_size; begin += kTile) {
        const auto size = static_cast<int>(begin + kTile < vocab_size ? kTile : vocab_size - begin);
        int64_t* const entries = counts + row.row * vocab_size + begin;
        for (int k = thread; k < size; k += threads) tile[k] = 0;
        __syncthreads();
        add_targets(groups.targets + from, num_pairs, begin, begin + size, tile, [](int64_t) { return 1u; });
        __syncthreads();
        for (int k = thread; k < size; k += threads) visit(entries[k], tile[k]);
        __syncthreads();
    }
}

// One block per row writes the counts of its first piece.
__global__ void __launch_bounds__(kRowThreads)
    count_rows_of_table_kernel(PairGroups groups, int64_t vocab_size, int64_t* counts) {
    const RowOfPairs row(groups, blockIdx.x);
    count_piece(groups, row, row.begin, vocab_size, counts,
                [](int64_t& entry, uint32_t count) { entry = count; });
}

// One block per cut adds the counts of the piece that begins there, if there is one, after the first pieces
// are written.
__global__ void __launch_bounds__(kRowThreads)
    add_pieces_of_rows_kernel(PairGroups groups, int64_t vocab_size, int64_t* counts) {
    const int64_t cut = (int64_t{blockIdx.x} + 1) * kPiecePairs;
    const RowOfPairs row(groups, row_of_pair(groups, vocab_size, cut));
    if (!row.is_cut() || row.begin == cut) return;
    count_piece(groups, row, cut, vocab_size, counts, [](int64_t& entry, uint32_t count) {
        if (count > 0) add_atomically(&entry, count);
    });
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
    const auto tile_bytes = static_cast<size_t>(SharedMemory::bytes<uint32_t>(kTile));
    launch({kCountBigrams, stream, params.vocab_size, kRowThreads, tile_bytes}, count_rows_of_table_kernel,
           scratch.groups, params.vocab_size, params.counts);
    const int64_t num_cuts = pairs.num_pairs() > 0 ? (pairs.num_pairs() - 1) / kPiecePairs : 0;
    launch({kCountBigrams, stream, num_cuts, kRowThreads, tile_bytes}, add_pieces_of_rows_kernel,
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
