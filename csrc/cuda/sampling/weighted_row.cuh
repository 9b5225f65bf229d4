// Draws by the fixed-point CDF (sampling/fixed_point_cdf.h) from a row in the hands of a block. Shared by
// multinomial and generate.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"
#include "sampling/fixed_point_cdf.h"
#include "sampling/philox.h"
#include "sampling/token_filter.h"

namespace bigramx::cuda {

// ------------------------------------------------------------------------------- from elements to weights

template <typename scalar_t_>
struct Probs {
    using scalar_t = scalar_t_;
    using acc_t = opmath_t<scalar_t>;
    using Scale = ProbScale<acc_t>;
    static constexpr acc_t kWeightless = 0;

    __device__ static bool is_allowed(acc_t prob) { return prob >= 0 && prob < kInfinity<acc_t>; }
    __device__ acc_t scaled(acc_t prob) const { return prob; }
    __device__ uint64_t weight(acc_t prob, int64_t, const Scale& scale) const {
        return round_down(scale.scaled(prob));
    }
};

template <typename scalar_t_>
struct Logits {
    using scalar_t = scalar_t_;
    using acc_t = opmath_t<scalar_t>;
    using Scale = acc_t;  // the largest
    static constexpr acc_t kWeightless = -kInfinity<acc_t>;

    acc_t temperature;  // divides the logits

    __device__ static bool is_allowed(acc_t logit) { return logit < kInfinity<acc_t>; }
    // Monotonic. Rounded to the table's dtype, as ATen's division is.
    __device__ acc_t scaled(acc_t logit) const {
        return temperature == 1 ? logit : widen(narrow<scalar_t>(logit / temperature));
    }
    __device__ uint64_t weight(acc_t logit, int64_t, acc_t largest) const {
        return round_down(scaled_exponential(static_cast<float>(logit - largest)));
    }
};

// A running maximum, which becomes infinity at an element that no distribution may have.
template <typename Elements>
__device__ inline void include_element(typename Elements::acc_t element, typename Elements::acc_t* largest) {
    if (!Elements::is_allowed(element)) element = kInfinity<typename Elements::acc_t>;
    *largest = element > *largest ? element : *largest;
}

struct Larger {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

// --------------------------------------------------------------------------------------- a row in a block

// The shared memory of a block.
template <typename scalar_t>
struct RowMemory {
    struct Place {
        int64_t begin, end;  // the tokens among which the target sum is reached
        WeightSum sum_before;
    };

    opmath_t<scalar_t>* largest;           // (kMaxWarps)
    WeightSum* sums;                       // (kMaxWarps)
    WeightSum* target_sum;                 // ()
    Place* place;                          // ()
    KeptTokens<opmath_t<scalar_t>>* kept;  // ()
    scalar_t* row;                         // (V + a vector, for the alignment), or null: not kept

    __device__ RowMemory(int64_t vocab_size, bool keeps_row) {
        SharedMemory shared;
        largest = shared.take<opmath_t<scalar_t>>(kMaxWarps);
        sums = shared.take<WeightSum>(kMaxWarps);
        target_sum = shared.take<WeightSum>(1);
        place = shared.take<Place>(1);
        kept = shared.take<KeptTokens<opmath_t<scalar_t>>>(1);
        row = keeps_row ? shared.take<scalar_t>(vocab_size + kVectorSize<scalar_t>) : nullptr;
    }

    static int64_t bytes(int64_t vocab_size, bool keeps_row) {
        return SharedMemory::bytes<opmath_t<scalar_t>>(kMaxWarps) +
               SharedMemory::bytes<WeightSum>(kMaxWarps) + SharedMemory::bytes<WeightSum>(1) +
               SharedMemory::bytes<Place>(1) + SharedMemory::bytes<KeptTokens<opmath_t<scalar_t>>>(1) +
               (keeps_row ? SharedMemory::bytes<scalar_t>(vocab_size + kVectorSize<scalar_t>) : 0);
    }

    // Where to keep a row of the table: aligned as it is there. Null: nowhere.
    __device__ scalar_t* place_of(const scalar_t* table_row) const {
        if (row == nullptr) return nullptr;
        return row + elements_into_vector(table_row);
    }
};

constexpr int kMaxRowThreads = 512;  // more would not have enough registers

// How a block takes a row. The row is kept in shared memory where it fits, so that it is read once.
struct RowPlan {
    bool keeps_row;
    int threads;
    size_t shared_bytes;
};

template <typename scalar_t>
RowPlan plan_row(const char* op, int64_t vocab_size, bool may_keep_row = true) {
    constexpr int64_t kElementsAWarp = 4 * kWarp;
    const int64_t warps = (vocab_size + kElementsAWarp - 1) / kElementsAWarp;
    const bool keeps_row =
        may_keep_row && RowMemory<scalar_t>::bytes(vocab_size, true) <= max_shared_bytes(op);
    return {keeps_row, static_cast<int>(std::min<int64_t>(warps * kWarp, kMaxRowThreads)),
            static_cast<size_t>(RowMemory<scalar_t>::bytes(vocab_size, keeps_row))};
}

// The target sum of r, which thread 0 has: it computes it for the block.
template <typename scalar_t>
__device__ inline WeightSum block_target_sum(WeightSum total, uint64_t r, const RowMemory<scalar_t>& memory) {
    if (threadIdx.x == 0) *memory.target_sum = FixedPointCdf(total).target_sum(r);
    __syncthreads();
    return *memory.target_sum;
}

template <typename Elements>
class WeightedRow {
  public:
    using scalar_t = typename Elements::scalar_t;
    using acc_t = opmath_t<scalar_t>;
    using Scale = typename Elements::Scale;

    // Reads the row, for its largest element.
    __device__ WeightedRow(const Elements& elements, const scalar_t* row, int64_t vocab_size,
                           const RowMemory<scalar_t>& memory)
        : elements_(elements), vocab_size_(vocab_size), memory_(memory), row_(row) {
        constexpr int kInFlight = 4;
        scalar_t* const kept = memory.place_of(row);
        if (kept != nullptr) __syncthreads();  // other threads may still read the previous row
        acc_t largest = Elements::kWeightless;
        for_each_aligned_vector<kInFlight>(
            row, vocab_size,
            [&](int64_t k, const AlignedVector<scalar_t>& vector) {
                for (const scalar_t element : vector.elements) {
                    include_element<Elements>(widen(element), &largest);
                }
                if (kept != nullptr) store_vector(kept + k, vector);
            },
            [&](int64_t k) {
                include_element<Elements>(widen(row[k]), &largest);
                if (kept != nullptr) kept[k] = row[k];
            });
        largest_ = elements.scaled(block_reduce(largest, memory.largest, Larger()));
        if (kept != nullptr) row_ = kept;
    }

    // Infinity if an element is not allowed, kWeightless if no element has a weight: the row is then not a
    // distribution.
    __device__ acc_t largest() const { return largest_; }
    __device__ bool is_distribution() const {
        return largest_ > Elements::kWeightless && largest_ < kInfinity<acc_t>;
    }

    __device__ uint64_t weight(int64_t token, const Scale& scale) const {
        return elements_.weight(elements_.scaled(widen(row_[token])), token, scale);
    }

    // The token that r draws. Each warp sums a run of tokens; the run that reaches the target sum is divided
    // among the warps again, until it has at most one token per lane.
    __device__ int64_t find(uint64_t r) const {
        const Scale scale(largest_);
        int64_t begin = 0, end = vocab_size_;
        WeightSum target_sum = 0;
        do {
            const Run run = run_of_warp(begin, end);
            const WeightSum sum = sum_share(run, scale);
            WeightSum total;
            const WeightSum sum_before = block_exclusive_scan(sum, memory_.sums, &total);
            if (target_sum == 0) target_sum = block_target_sum(total, r, memory_);
            const WeightSum before_run = broadcast(sum_before, 0);
            const WeightSum after_run = broadcast(sum_before + sum, kWarp - 1);
            if (lane_of_thread() == 0 && before_run < target_sum && target_sum <= after_run) {
                *memory_.place = {run.begin, run.end, before_run};
            }
            __syncthreads();
            begin = memory_.place->begin;
            end = memory_.place->end;
            target_sum -= memory_.place->sum_before;
        } while (end - begin > kWarp);
        const int64_t token = begin + lane_of_thread();
        const uint64_t sum = warp_inclusive_scan<uint64_t>(token < end ? weight(token, scale) : 0);
        return begin + __ffs(static_cast<int>(__ballot_sync(kAllLanes, sum >= target_sum))) - 1;
    }

    // cdf: (V).
    __device__ void write_cdf(uint64_t* cdf) const {
        const Scale scale(largest_);
        const Run run = run_of_warp(0, vocab_size_);
        WeightSum total;
        const WeightSum sum_before = block_exclusive_scan(sum_share(run, scale), memory_.sums, &total);
        const FixedPointCdf fixed_point(total);
        WeightSum sum = broadcast(sum_before, 0);
        for (int64_t tile = run.begin; tile < run.end; tile += kWarp) {
            const int64_t token = tile + lane_of_thread();
            const uint64_t sum_of_lanes =
                warp_inclusive_scan<uint64_t>(token < run.end ? weight(token, scale) : 0);
            if (token < run.end) cdf[token] = fixed_point.cdf(sum + sum_of_lanes);
            sum += broadcast(sum_of_lanes, kWarp - 1);
        }
    }

  protected:
    struct Run {
        int64_t begin, end;
    };

    // Whole warps of tokens. With two warps or more a run is shorter than the range, so find() ends.
    __device__ static Run run_of_warp(int64_t begin, int64_t end) {
        const int64_t tokens_a_round = int64_t{warps_of_block()} * kWarp;
        const int64_t length = (end - begin + tokens_a_round - 1) / tokens_a_round * kWarp;
        const int64_t first = begin + warp_of_thread() * length;
        return {first < end ? first : end, first + length < end ? first + length : end};
    }

    // This lane's share of the sum over the run of its warp.
    __device__ WeightSum sum_share(const Run& run, const Scale& scale) const {
        WeightSum sum = 0;
        for (int64_t token = run.begin + lane_of_thread(); token < run.end; token += kWarp) {
            sum += weight(token, scale);
        }
        return sum;
    }

    Elements elements_;
    const int64_t vocab_size_;
    const RowMemory<scalar_t> memory_;
    const scalar_t* row_;  // in the table, or kept in shared memory
    acc_t largest_;
};

// -------------------------------------------------------------------------------------- draws by a stored
// CDF

// The token that r draws, by bisection. cdf: (size).
template <typename index_t>
__device__ inline index_t search_cdf(const uint64_t* cdf, index_t size, uint64_t r) {
    const uint64_t bound = share_of_total(r, __ldg(cdf + size - 1));
    const uint64_t* first = cdf;
    while (size > 1) {
        const index_t half = size / 2;
        const uint64_t* const middle = first + half;
        first = __ldg(middle - 1) > bound ? first : middle;
        size -= half;
    }
    return static_cast<index_t>(first - cdf);
}

// Stores the first `count` of the tokens that one evaluation of Philox draws.
__device__ inline void store_tokens(int64_t* to, const uint32_t (&tokens)[Philox::kWords], int count) {
    if (count == Philox::kWords && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
        store_vector(to, AlignedVector<int64_t>{{tokens[0], tokens[1]}});
        store_vector(to + 2, AlignedVector<int64_t>{{tokens[2], tokens[3]}});
        return;
    }
    for (int k = 0; k < Philox::kWords; ++k) {
        if (k < count) to[k] = tokens[k];
    }
}

}  // namespace bigramx::cuda
