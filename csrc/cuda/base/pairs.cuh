// The pairs (row, target) of a batch: counted in a table where the table is small, else grouped by row with a
// counting sort.
//
// A source of pairs has num_pairs() and for_each(begin, end, visit). The threads of a block share the range
// and call visit(Pair) for each pair in it; an index out of range fails an assertion. Counts are integers, so
// atomic additions give the same result in any order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"

namespace bigramx::cuda {

struct Pair {
    static constexpr int32_t kIgnored = -1;

    int64_t row;
    int32_t target;  // kIgnored: the pair does not count
    int64_t index;   // in the batch
};

// Each token and the one that follows it.
template <typename token_t>
struct TokenPairs {
    const token_t* tokens;  // (num_tokens)
    int64_t num_tokens;
    int64_t vocab_size;

    __host__ __device__ int64_t num_pairs() const { return num_tokens > 0 ? num_tokens - 1 : 0; }

    template <typename Visit>
    __device__ void for_each(int64_t begin, int64_t end, const Visit& visit) const {
        constexpr int kInFlight = 2, kLast = kVectorSize<token_t> - 1;
        if (num_tokens == 1 && threadIdx.x == 0) checked(tokens[0]);  // a single token is in no pair
        for_each_aligned_vector<kInFlight>(
            tokens + begin, end - begin,
            [&](int first, const AlignedVector<token_t>& vector) {
                const int64_t n = begin + first;
                const token_t next = tokens[n + kVectorSize<token_t>];
                for (int k = 0; k < kLast; ++k)
                    visit(pair(n + k, vector.elements[k], vector.elements[k + 1]));
                visit(pair(n + kLast, vector.elements[kLast], next));
            },
            [&](int k) { visit(pair(begin + k, tokens[begin + k], tokens[begin + k + 1])); });
    }

  private:
    __device__ Pair pair(int64_t n, token_t token, token_t next) const {
        return {checked(token), static_cast<int32_t>(checked(next)), n};
    }

    __device__ int64_t checked(token_t token) const {
        const auto value = static_cast<int64_t>(token);
        device_assert(value >= 0 && value < vocab_size, "count_bigrams: expected 0 <= token < vocab_size");
        return value;
    }
};

// idx[n] and targets[n].
struct IndexedPairs {
    const int64_t* idx;      // (N)
    const int64_t* targets;  // (N)
    int64_t size;            // N
    int64_t num_rows, num_classes;
    int64_t ignore_index;

    __host__ __device__ int64_t num_pairs() const { return size; }

    template <typename Visit>
    __device__ void for_each(int64_t begin, int64_t end, const Visit& visit) const {
        constexpr int kInFlight = 4;
        for (int64_t first = begin + threadIdx.x; first < end; first += int64_t{kInFlight} * blockDim.x) {
            int64_t rows[kInFlight], classes[kInFlight];
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) {
                const int64_t n = first + k * blockDim.x;
                if (n >= end) continue;
                rows[k] = idx[n];
                classes[k] = targets[n];
            }
#pragma unroll
            for (int k = 0; k < kInFlight; ++k) {
                const int64_t n = first + k * blockDim.x;
                if (n < end) visit(pair(n, rows[k], classes[k]));
            }
        }
    }

  private:
    __device__ Pair pair(int64_t n, int64_t row, int64_t target) const {
        const bool is_ignored = target == ignore_index;
        device_assert(row >= 0 && row < num_rows,
                      "embedding_cross_entropy: index out of range: expected 0 <= idx < the rows of weight");
        device_assert(is_ignored || (target >= 0 && target < num_classes),
                      "embedding_cross_entropy: target out of bounds: expected 0 <= targets < the columns of "
                      "weight, or ignore_index");
        return {row, is_ignored ? Pair::kIgnored : static_cast<int32_t>(target), n};
    }
};

// The contiguous share of pairs, or of elements, that a block takes.
struct BlockRange {
    int64_t begin, end;

    __device__ explicit BlockRange(int64_t size)
        : begin(size / gridDim.x * blockIdx.x + min_with_rest(size, blockIdx.x)),
          end(size / gridDim.x * (blockIdx.x + 1) + min_with_rest(size, blockIdx.x + 1)) {}

  private:
    // The first size % gridDim.x blocks take one more.
    __device__ static int64_t min_with_rest(int64_t size, int64_t block) {
        const int64_t rest = size % gridDim.x;
        return block < rest ? block : rest;
    }
};

constexpr int kPairThreads = 512;

// As many as run at once, but no more than leave each grain_size pairs.
inline int64_t blocks_for_pairs(const char* op, int64_t num_pairs, int64_t blocks_a_multiprocessor,
                                int64_t grain_size = 4 * kPairThreads) {
    return std::clamp<int64_t>(num_pairs / grain_size, 1, blocks_a_multiprocessor * num_multiprocessors(op));
}

// -------------------------------------------------------------------------------------- a table of counts

// Whether a table of 32-bit counters and some scratch fit into the shared memory of a block; on GPUs with
// much of it, of two blocks per multiprocessor.
inline bool fits_table(const char* op, int64_t num_rows, int64_t num_targets) {
    constexpr int64_t kMost = 96 << 10, kScratch = 1 << 10;  // bytes
    const int64_t most = std::min(kMost, max_shared_bytes(op) - kScratch);
    return num_rows <= most && num_rows * num_targets * 4 <= most;
}

// table: (rows, num_targets), zero before. Ignored pairs do not count.
template <typename Source>
__device__ void count_in_table(const Source& source, const BlockRange& range, int64_t num_targets,
                               uint32_t* table) {
    source.for_each(range.begin, range.end, [&](const Pair& pair) {
        if (pair.target != Pair::kIgnored) atomicAdd(table + pair.row * num_targets + pair.target, 1u);
    });
}

__device__ inline void add_atomically(uint32_t* to, uint32_t count) { atomicAdd(to, count); }
__device__ inline void add_atomically(int64_t* to, uint32_t count) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(count));
}

// finish(number of pairs that are not ignored) runs in the last block, which sees the counts of all blocks,
// by all its threads. It may use the first kMaxWarps doubles of shared memory.
struct NothingToFinish {
    __device__ void operator()(int64_t) const {}
};

constexpr int64_t kFinishBytes =
    SharedMemory::bytes<double>(kMaxWarps) + SharedMemory::bytes<int>(1);  // and the flag of is_last_block

template <typename count_t>
__device__ int64_t sum_counts(const count_t* counts, int64_t size, double* scratch) {
    double sum = 0;
    for (int64_t k = threadIdx.x; k < size; k += blockDim.x) sum += static_cast<double>(counts[k]);
    return static_cast<int64_t>(block_sum(sum, scratch));
}

// counts: (rows, num_targets), zero before. Each block counts in shared memory first: global atomics are
// slow. The kernel that follows may overlap.
template <typename Source, typename count_t, typename Finish>
__global__ void __launch_bounds__(kPairThreads, 1)
    count_table_kernel(Source source, int64_t num_rows, int64_t num_targets, count_t* counts,
                       unsigned* ticket, Finish finish) {
    let_next_kernel_begin();
    const int64_t num_entries = num_rows * num_targets;
    SharedMemory shared;
    auto* const scratch = shared.take<double>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    auto* const table = shared.take<uint32_t>(num_entries);
    for (int64_t k = threadIdx.x; k < num_entries; k += blockDim.x) table[k] = 0;
    __syncthreads();
    count_in_table(source, BlockRange(source.num_pairs()), num_targets, table);
    __syncthreads();
    for (int64_t k = threadIdx.x; k < num_entries; k += blockDim.x) {
        if (table[k] > 0) add_atomically(counts + k, table[k]);
    }
    if (ticket != nullptr && is_last_block(ticket, is_last)) finish(sum_counts(counts, num_entries, scratch));
}

// ticket: () zero before, or null without a finish.
template <typename Source, typename count_t, typename Finish = NothingToFinish>
void count_table(const char* op, cudaStream_t stream, const Source& source, int64_t num_rows,
                 int64_t num_targets, count_t* counts, unsigned* ticket = nullptr,
                 const Finish& finish = {}) {
    constexpr int64_t kBlocksAMultiprocessor = 2;
    const int64_t blocks = blocks_for_pairs(op, source.num_pairs(), kBlocksAMultiprocessor);
    const auto shared_bytes = kFinishBytes + SharedMemory::bytes<uint32_t>(num_rows * num_targets);
    launch({op, stream, blocks, kPairThreads, static_cast<size_t>(shared_bytes)},
           count_table_kernel<Source, count_t, Finish>, source, num_rows, num_targets, counts, ticket,
           finish);
}

// ------------------------------------------------------------------------------------------ groups by row

// The targets of row i are targets[row_begin[i] : row_begin[i + 1]], without those of ignored pairs. Their
// order within a row may differ from run to run.
struct PairGroups {
    int64_t* row_begin;     // (R + 1)
    int32_t* targets;       // (num_pairs)
    int64_t* pair_indices;  // (num_pairs) in the batch; or null
    // The rows that occur, in ignored pairs too, ascending; or null.
    int64_t* slot_rows;  // (min(num_pairs, R))
    int64_t* num_slots;  // ()

    // Scratch, zero before. In one block only class_counts.
    uint32_t* row_counts;    // (R): the pairs that are not ignored
    uint32_t* row_occurs;    // (R): whether a row occurs; or null, without slot_rows
    uint32_t* class_counts;  // (num_targets): how often a target occurs; or null
    unsigned* ticket;        // ()
    // Scratch.
    uint32_t* cursors;  // (R): where the next pair of a row goes
};

// A counter for each row: in shared memory where they fit and pay, else `global` itself. A constant says
// which, as atomic additions at an address of either kind are slow.
template <bool kAreShared>
__device__ inline uint32_t* row_counters(uint32_t* global, int64_t num_rows) {
    if constexpr (!kAreShared) {
        return global;
    } else {
        SharedMemory shared;
        auto* const counters = shared.take<uint32_t>(num_rows);
        for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x) counters[row] = 0;
        __syncthreads();
        return counters;
    }
}

// Each block clears all counters and adds them up.
inline bool can_share_counters(const char* op, int64_t num_rows, int64_t pairs_of_block) {
    return num_rows <= pairs_of_block && SharedMemory::bytes<uint32_t>(num_rows) <= max_shared_bytes(op);
}

// Once all blocks have counted: the prefix sums of the counts, and the list of the rows that occur. For one
// block. Returns the number of pairs that are not ignored.
__device__ inline int64_t scan_rows(const PairGroups& groups, int64_t num_rows, unsigned long long* scratch) {
    constexpr int kRows = 8;       // of a thread, per turn
    constexpr int kSlotBits = 24;  // the low bits of a sum count rows that occur, the high bits pairs
    int64_t pairs_before = 0, slots_before = 0;
    for (int64_t turn = 0; turn < num_rows; turn += int64_t{kRows} * blockDim.x) {
        const int64_t first = turn + int64_t{kRows} * threadIdx.x;
        uint32_t counts[kRows], occurs[kRows];
        unsigned long long sum = 0;
        for (int k = 0; k < kRows; ++k) {
            const int64_t row = first + k;
            counts[k] = row < num_rows ? groups.row_counts[row] : 0;
            occurs[k] = groups.row_occurs != nullptr && row < num_rows ? groups.row_occurs[row] : 0;
            sum += static_cast<unsigned long long>(counts[k]) << kSlotBits | occurs[k];
        }
        unsigned long long total;
        const unsigned long long before = block_exclusive_scan(sum, scratch, &total);
        int64_t begin = pairs_before + static_cast<int64_t>(before >> kSlotBits);
        int64_t slot = slots_before + static_cast<int64_t>(before & ((1u << kSlotBits) - 1));
        for (int k = 0; k < kRows && first + k < num_rows; ++k) {
            groups.row_begin[first + k] = begin;
            groups.cursors[first + k] = static_cast<uint32_t>(begin);
            begin += counts[k];
            if (occurs[k] != 0) groups.slot_rows[slot++] = first + k;
        }
        pairs_before += static_cast<int64_t>(total >> kSlotBits);
        slots_before += static_cast<int64_t>(total & ((1u << kSlotBits) - 1));
    }
    if (threadIdx.x == 0) {
        groups.row_begin[num_rows] = pairs_before;
        if (groups.num_slots != nullptr) *groups.num_slots = slots_before;
    }
    return pairs_before;
}

// counters: (R), of the pairs that are not ignored.
template <typename Source>
__device__ void count_pairs(const Source& source, const PairGroups& groups, uint32_t* counters) {
    const BlockRange range(source.num_pairs());
    source.for_each(range.begin, range.end, [&](const Pair& pair) {
        if (groups.row_occurs != nullptr) atomicOr(groups.row_occurs + pair.row, 1u);
        if (pair.target == Pair::kIgnored) return;
        atomicAdd(counters + pair.row, 1u);
        if (groups.class_counts != nullptr) atomicAdd(groups.class_counts + pair.target, 1u);
    });
}

template <bool kAreShared, typename Source>
__device__ void count_rows(const Source& source, const PairGroups& groups, int64_t num_rows) {
    uint32_t* const counters = row_counters<kAreShared>(groups.row_counts, num_rows);
    count_pairs(source, groups, counters);
    if constexpr (kAreShared) {
        __syncthreads();
        for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x) {
            if (counters[row] > 0) atomicAdd(groups.row_counts + row, counters[row]);
        }
    }
}

template <bool kAreShared, typename Source, typename Finish>
__global__ void __launch_bounds__(kPairThreads, 1)
    count_rows_kernel(Source source, PairGroups groups, int64_t num_rows, Finish finish) {
    let_next_kernel_begin();
    count_rows<kAreShared>(source, groups, num_rows);
    __syncthreads();
    SharedMemory shared;  // from its beginning again: the counters are no longer needed
    auto* const scratch = shared.take<unsigned long long>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    if (!is_last_block(groups.ticket, is_last)) return;
    finish(scan_rows(groups, num_rows, scratch));
}

// Puts each pair into its group. cursors: (R), where the next pair of a row goes.
template <typename Source>
__device__ void place_pairs(const Source& source, const PairGroups& groups, uint32_t* cursors) {
    const BlockRange range(source.num_pairs());
    source.for_each(range.begin, range.end, [&](const Pair& pair) {
        if (pair.target == Pair::kIgnored) return;
        const uint32_t place = atomicAdd(cursors + pair.row, 1u);
        groups.targets[place] = pair.target;
        if (groups.pair_indices != nullptr) groups.pair_indices[place] = pair.index;
    });
}

template <bool kAreShared, typename Source>
__global__ void __launch_bounds__(kPairThreads, 1)
    scatter_pairs_kernel(Source source, PairGroups groups, int64_t num_rows) {
    let_next_kernel_begin();
    uint32_t* const counters = row_counters<kAreShared>(groups.cursors, num_rows);
    if constexpr (kAreShared) {  // the block reserves its part of each row
        const BlockRange range(source.num_pairs());
        source.for_each(range.begin, range.end, [&](const Pair& pair) {
            if (pair.target != Pair::kIgnored) atomicAdd(counters + pair.row, 1u);
        });
        __syncthreads();
    }
    wait_for_kernel_before();
    if constexpr (kAreShared) {
        for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x) {
            const uint32_t count = counters[row];
            if (count > 0) counters[row] = atomicAdd(groups.cursors + row, count);
        }
        __syncthreads();
    }
    place_pairs(source, groups, counters);
}

template <bool kAreShared, typename Source, typename Finish>
void launch_group_pairs(LaunchShape shape, const Source& source, int64_t num_rows, const PairGroups& groups,
                        const Finish& finish) {
    const int64_t counter_bytes = kAreShared ? SharedMemory::bytes<uint32_t>(num_rows) : 0;
    shape.shared_bytes = static_cast<size_t>(std::max(counter_bytes, kFinishBytes));
    launch(shape, count_rows_kernel<kAreShared, Source, Finish>, source, groups, num_rows, finish);
    shape.shared_bytes = static_cast<size_t>(counter_bytes);
    shape.overlaps = true;
    launch(shape, scatter_pairs_kernel<kAreShared, Source>, source, groups, num_rows);
}

// A counting sort in two kernels: count and scan, then scatter. Fewer than 2^32 pairs. The kernel that
// follows may overlap.
template <typename Source, typename Finish = NothingToFinish>
void group_pairs(const char* op, cudaStream_t stream, const Source& source, int64_t num_rows,
                 const PairGroups& groups, const Finish& finish = {}) {
    constexpr int64_t kBlocksAMultiprocessor = 2;
    LaunchShape shape{op, stream, blocks_for_pairs(op, source.num_pairs(), kBlocksAMultiprocessor),
                      kPairThreads};
    if (can_share_counters(op, num_rows, source.num_pairs() / shape.blocks)) {
        launch_group_pairs</*kAreShared=*/true>(shape, source, num_rows, groups, finish);
    } else {  // a pair for each thread: to wait for global memory takes most of the time
        shape.blocks = blocks_for_pairs(op, source.num_pairs(), kBlocksAMultiprocessor, kPairThreads);
        launch_group_pairs</*kAreShared=*/false>(shape, source, num_rows, groups, finish);
    }
}

// The same in one kernel and one block, for so few pairs that a second launch and the fences of a grid would
// take longer. Of the scratch only class_counts, where there are any, must be zero before.
template <typename Source, typename Finish>
__global__ void __launch_bounds__(kPairThreads, 1)
    group_in_one_block_kernel(Source source, PairGroups groups, int64_t num_rows, Finish finish) {
    let_next_kernel_begin();
    SharedMemory shared;
    auto* const scratch = shared.take<unsigned long long>(kMaxWarps);
    auto* const counters = shared.take<uint32_t>(num_rows);
    auto* const occurs = shared.take<uint32_t>(num_rows);
    for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x) counters[row] = occurs[row] = 0;
    __syncthreads();
    groups.row_counts = groups.cursors = counters;  // a row's count is read before its cursor is written
    groups.row_occurs = groups.slot_rows != nullptr ? occurs : nullptr;
    count_pairs(source, groups, counters);
    __syncthreads();
    const int64_t num_pairs = scan_rows(groups, num_rows, scratch);
    __syncthreads();
    place_pairs(source, groups, counters);
    finish(num_pairs);
}

inline size_t bytes_of_one_block(int64_t num_rows) {
    return static_cast<size_t>(SharedMemory::bytes<unsigned long long>(kMaxWarps) +
                               2 * SharedMemory::bytes<uint32_t>(num_rows));
}

inline bool can_group_in_one_block(const char* op, int64_t num_pairs, int64_t num_rows) {
    constexpr int64_t kMaxPairs = 1 << 13;
    return num_pairs <= kMaxPairs &&
           bytes_of_one_block(num_rows) <= static_cast<size_t>(max_shared_bytes(op));
}

template <typename Source, typename Finish>
void group_pairs_in_one_block(const char* op, cudaStream_t stream, const Source& source, int64_t num_rows,
                              const PairGroups& groups, const Finish& finish) {
    launch({op, stream, 1, kPairThreads, bytes_of_one_block(num_rows)},
           group_in_one_block_kernel<Source, Finish>, source, groups, num_rows, finish);
}

// sums[target - begin] += value(k) for each target = targets[k] from `begin` to `end`. For a block, whose
// threads load several targets before they add the first, to hide latency.
// sums: (end - begin).
template <typename sum_t, typename Value>
__device__ void add_targets(const int32_t* targets, int64_t size, int64_t begin, int64_t end, sum_t* sums,
                            const Value& value) {
    constexpr int kInFlight = 4;
    const auto num_sums = static_cast<uint32_t>(end - begin);
    for (int64_t first = threadIdx.x; first < size; first += int64_t{kInFlight} * blockDim.x) {
        int32_t loaded[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int64_t n = first + k * blockDim.x;
            loaded[k] = n < size ? targets[n] : Pair::kIgnored;
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            // What lies before `begin` wraps around, and is beyond `end`.
            const uint32_t place = static_cast<uint32_t>(loaded[k]) - static_cast<uint32_t>(begin);
            if (place < num_sums) atomicAdd(sums + place, value(first + k * blockDim.x));
        }
    }
}

// A bump allocator over one scratch allocation; each part is aligned to 256 bytes, as an allocation is. On a
// null pointer it measures: end() is then the size.
class ScratchMemory {
  public:
    explicit ScratchMemory(void* memory) : next_(reinterpret_cast<uintptr_t>(memory)) {}

    template <typename T>
    T* take(int64_t count) {
        constexpr uintptr_t kAlignment = 256;
        const uintptr_t part = next_;
        next_ += (static_cast<uintptr_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return reinterpret_cast<T*>(part);
    }

    uintptr_t end() const { return next_; }

  private:
    uintptr_t next_;
};

}  // namespace bigramx::cuda
