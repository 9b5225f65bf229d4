// Chains of tokens, parallel over time. The draw of a step is keyed by its position, so a step is a fixed map
// of tokens to tokens, and chains from different tokens coalesce. The segments of a chain therefore run at
// the same time, each after a warm-up; where a segment does not match the end of the one before it, the
// boundary is repaired (cpu/generate_chains.h).
#include "cuda/generate_kernels.h"

#include <algorithm>
#include <type_traits>

#include "base/op_names.h"
#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"
#include "cuda/sampling/filtered_row.cuh"
#include "cuda/sampling/weighted_row.cuh"
#include "sampling/distribution_errors.h"

namespace bigramx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChainThreads = 64;  // per block: few, so that even few chains are spread over the GPU

// Steps. The warm-up adds at most a quarter to the work of a segment.
constexpr int64_t kWarmUp = 128, kLeastSegment = 512;
static_assert(kWarmUp % Philox::kWords == 0 && kLeastSegment % Philox::kWords == 0,
              "a segment begins where an evaluation of Philox does");

__device__ int64_t thread_of_grid() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

__device__ int64_t* token_at(const ChainsParams& params, int64_t chain, int64_t step) {
    return params.tokens + chain * params.stride + step;
}

__device__ uint32_t token_before(const ChainsParams& params, int64_t chain, int64_t step) {
    return static_cast<uint32_t>(token_at(params, chain, step)[-1]);
}

// ------------------------------------------------------------------------------------------ kinds of rows
//
// rows.next(token, r): the token that the draw r draws from the row of `token`. Called by one thread, or by a
// block.

struct CdfRows {
    static constexpr Granularity kGranularity = Granularity::thread;

    const uint64_t* cdf;  // (V, V)
    uint32_t vocab_size;

    __device__ uint32_t next(uint32_t token, uint64_t r) const {
        return search_cdf(cdf + int64_t{token} * vocab_size, vocab_size, r);
    }
};

struct ArgmaxRows {
    static constexpr Granularity kGranularity = Granularity::thread;

    const int64_t* argmax;  // (V)

    __device__ uint32_t next(uint32_t token, uint64_t) const {
        return static_cast<uint32_t>(__ldg(argmax + token));
    }
};

// Row_: a WeightedRow of logits, or a FilteredRow.
template <typename Row_>
struct LogitRowsOfBlock {
    static constexpr Granularity kGranularity = Granularity::block;

    using Row = Row_;
    using scalar_t = typename Row::scalar_t;
    using acc_t = opmath_t<scalar_t>;

    LogitsParams params;
    bool keeps_row;

    __device__ uint32_t next(uint32_t token, uint64_t r) const {
        const Row row = read(token);
        if (row.is_distribution()) return static_cast<uint32_t>(row.find(r));
        if (threadIdx.x == 0) mark_invalid(token);
        return 0;
    }

    // cdf: (V).
    __device__ void write_cdf(uint32_t token, uint64_t* cdf) const {
        const Row row = read(token);
        if (row.is_distribution()) return row.write_cdf(cdf);
        if (threadIdx.x == 0) mark_invalid(token);
        for (int64_t j = threadIdx.x; j < params.vocab_size; j += blockDim.x) cdf[j] = 1;
    }

  private:
    __device__ Row read(uint32_t token) const {
        Row row({static_cast<acc_t>(params.temperature)},
                static_cast<const scalar_t*>(params.logits) + token * params.stride, params.vocab_size,
                RowMemory<scalar_t>(params.vocab_size, keeps_row));
        if constexpr (std::is_same_v<Row, FilteredRow<scalar_t>>) {
            static_assert(sizeof(KeptTokens<acc_t>) == FilteredRows::kKeptBytes, "as the host allocates it");
            const KeptOfRows<acc_t> known{static_cast<KeptTokens<acc_t>*>(params.filtered.kept),
                                          params.filtered.states};
            if (row.is_distribution()) row.filter(params.filter, known, token);
        }
        return row;
    }

    __device__ void mark_invalid(uint32_t token) const {
        atomicExch(params.invalid, 1u);
        atomicExch(params.invalid + 1 + token, 1u);
    }
};

template <typename Row>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    write_cdf_kernel(LogitRowsOfBlock<Row> rows, uint64_t* cdf) {
    const int64_t row = blockIdx.x;
    rows.write_cdf(blockIdx.x, cdf + row * rows.params.vocab_size);
}

// --------------------------------------------------------------------------------------- chains over time

template <typename Rows>
constexpr bool kByBlock = Rows::kGranularity == Granularity::block;

// The launch bounds of the kernels that follow chains: threads per block, and blocks per multiprocessor that
// its registers allow.
template <typename Rows>
constexpr int kMaxGroupThreads = kByBlock<Rows> ? kMaxRowThreads : kChainThreads;
template <typename Rows>
constexpr int kBlocksAtOnce = kByBlock<Rows> ? 1 : 1024 / kChainThreads;

// Whether this thread reads and writes the tokens, for the group of threads that follows the chain.
template <typename Rows>
__device__ bool is_leader() {
    return !kByBlock<Rows> || threadIdx.x == 0;
}

template <typename Rows>
__device__ bool any_of_group(bool condition) {
    if constexpr (kByBlock<Rows>) return __syncthreads_or(condition) != 0;
    return condition;
}

// A chain that a group of threads follows from some step on.
template <typename Rows>
class Chain {
  public:
    __device__ Chain(const Rows& rows, const ChainsParams& params, int64_t index)
        : rows_(rows), params_(params), index_(index), seed_(seed_of(params.seed)) {}

    // step: a multiple of Philox::kWords. token: the one before it.
    __device__ void start(int64_t step, uint32_t token) {
        step_ = step;
        token_ = token;
    }

    __device__ int64_t step() const { return step_; }
    __device__ uint32_t token() const { return token_; }

    // Runs up to `end`, and writes the tokens from the step `begin` on; returns the token before it.
    __device__ uint32_t run(int64_t begin, int64_t end) {
        uint32_t before = token_;
        follow(end, [&](const auto& tokens, int count) {
            if (step_ < begin) {
                before = tokens[Philox::kWords - 1];
            } else if (is_leader<Rows>()) {
                store_tokens(token_at(params_, index_, step_), tokens, count);
            }
            return false;
        });
        return before;
    }

    // Overwrites the tokens until it coalesces with what was written: the rest is then right already. Returns
    // whether it has coalesced.
    __device__ bool run_until_coalescence(int64_t end) {
        bool has_coalesced = false;
        follow(end, [&](const auto& tokens, int count) {
            bool coalesces = false;
            if (is_leader<Rows>()) {
                int64_t* const written = token_at(params_, index_, step_);
                for (int k = 0; k < count; ++k) coalesces |= written[k] == tokens[k];
                store_tokens(written, tokens, count);
            }
            return has_coalesced = any_of_group<Rows>(coalesces);
        });
        return has_coalesced;
    }

  private:
    // Runs up to the step `end`. visit(tokens, count) gets the tokens of the steps from step_ on that share
    // an evaluation of Philox, and returns whether to stop.
    template <typename Visit>
    __device__ void follow(int64_t end, const Visit& visit) {
        bool is_enough = false;
        while (step_ < end && !is_enough) {
            const int count = static_cast<int>(end - step_ < Philox::kWords ? end - step_ : Philox::kWords);
            const Draws draws(seed_, static_cast<uint64_t>(index_),
                              static_cast<uint64_t>(step_) / Philox::kWords);
            uint32_t tokens[Philox::kWords];
            for (int k = 0; k < Philox::kWords; ++k) {
                if (k < count) token_ = rows_.next(token_, draws.values[k]);
                tokens[k] = token_;
            }
            is_enough = visit(tokens, count);
            step_ += count;
        }
    }

    const Rows& rows_;
    const ChainsParams& params_;
    const int64_t index_;
    const uint64_t seed_;
    int64_t step_ = 0;
    uint32_t token_ = 0;  // before step_
};

// The segment that a thread, or a block, runs.
struct Segment {
    int64_t index;  // into (B, segments)
    int64_t chain, index_in_chain;
    int64_t begin, end;

    template <typename Rows>
    __device__ static Segment of_group(const Rows&, const ChainsParams& params) {
        Segment segment;
        segment.index = kByBlock<Rows> ? int64_t{blockIdx.x} : thread_of_grid();
        segment.chain = segment.index / params.num_segments;
        segment.index_in_chain = segment.index % params.num_segments;
        segment.begin = segment.index_in_chain * params.steps_a_segment;
        const int64_t end = segment.begin + params.steps_a_segment;
        segment.end = end < params.num_steps ? end : params.num_steps;
        return segment;
    }
};

// A segment warms up from the first token of its chain. That guess is right for the first segment alone; the
// others usually coalesce with the right chain during the warm-up.
template <typename Rows>
__global__ void __launch_bounds__(kMaxGroupThreads<Rows>, kBlocksAtOnce<Rows>)
    run_segments_kernel(Rows rows, ChainsParams params) {
    const Segment segment = Segment::of_group(rows, params);
    if (segment.chain >= params.num_chains) return;
    Chain<Rows> chain(rows, params, segment.chain);
    chain.start(segment.begin > kWarmUp ? segment.begin - kWarmUp : 0,
                token_before(params, segment.chain, 0));
    const uint32_t entry = chain.run(segment.begin, segment.end);
    if (params.num_segments > 1 && is_leader<Rows>()) {
        params.entries[segment.index] = entry;
        params.exits[segment.index] = chain.token();
    }
}

// Repairs, in parallel, the segments that did not begin with the last token of the segment before: runs them
// again from it. That suffices if each coalesces with what was written before it ends.
template <typename Rows>
__global__ void __launch_bounds__(kMaxGroupThreads<Rows>, kBlocksAtOnce<Rows>)
    repair_segments_kernel(Rows rows, ChainsParams params) {
    const Segment segment = Segment::of_group(rows, params);
    if (segment.chain >= params.num_chains || segment.index_in_chain == 0) return;
    const uint32_t entry = params.exits[segment.index - 1];
    if (params.entries[segment.index] == entry) return;
    Chain<Rows> chain(rows, params, segment.chain);
    chain.start(segment.begin, entry);
    const bool has_coalesced = chain.run_until_coalescence(segment.end);
    if (is_leader<Rows>()) {
        params.entries[segment.index] = entry;
        if (!has_coalesced) atomicExch(params.uncoalesced + segment.chain, 1u);
    }
}

// The first segment of a chain, from `segment` on, that did not begin with the last token of the segment
// before; num_segments if there is none. For a block.
__device__ int64_t next_wrong_segment(const ChainsParams& params, int64_t chain, int64_t segment,
                                      int64_t* scratch) {
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
    for (; segment < params.num_segments; segment += blockDim.x) {
        const int64_t mine = segment + threadIdx.x;
        const bool is_wrong =
            mine < params.num_segments && params.entries[chain * params.num_segments + mine] !=
                                              token_before(params, chain, mine * params.steps_a_segment);
        const int64_t first = block_reduce(is_wrong ? mine : params.num_segments, scratch, smaller);
        if (first < params.num_segments) return first;
    }
    return params.num_segments;
}

// Repairs the remaining chains, one segment after the other. One block per chain; where single threads follow
// chains, the first thread does.
template <typename Rows>
__global__ void __launch_bounds__(kByBlock<Rows> ? kMaxRowThreads : kThreads, 1)
    repair_chains_kernel(Rows rows, ChainsParams params) {
    if (params.uncoalesced[blockIdx.x] == 0) return;
    SharedMemory shared;  // shared with the rows, which use it within a step only
    int64_t* const scratch = shared.take<int64_t>(kMaxWarps);
    Chain<Rows> chain(rows, params, blockIdx.x);
    int64_t segment = next_wrong_segment(params, blockIdx.x, 1, scratch);
    while (segment < params.num_segments) {
        const int64_t begin = segment * params.steps_a_segment;
        chain.start(begin, token_before(params, blockIdx.x, begin));
        if (kByBlock<Rows> || threadIdx.x == 0) chain.run_until_coalescence(params.num_steps);
        const int64_t right = block_reduce(threadIdx.x == 0 ? chain.step() : 0, scratch, Larger());
        const int64_t next = (right + params.steps_a_segment - 1) / params.steps_a_segment;
        segment = next_wrong_segment(params, blockIdx.x, next, scratch);
    }
}

// visit(rows, plan): with the rows of the table, and how a block takes one.
template <typename Visit>
void with_rows(const LogitsParams& table, const Visit& visit) {
    with_type(table.type, [&](auto zero) {
        using scalar_t = decltype(zero);
        const RowPlan plan = plan_row<scalar_t>(kGenerate, table.vocab_size);
        if (table.is_filtered) {
            visit(LogitRowsOfBlock<FilteredRow<scalar_t>>{table, plan.keeps_row}, plan);
        } else {
            visit(LogitRowsOfBlock<WeightedRow<Logits<scalar_t>>>{table, plan.keeps_row}, plan);
        }
    });
}

constexpr size_t kScratchBytes = SharedMemory::bytes<int64_t>(kMaxWarps);

LaunchShape shape_of_threads(const ChainsParams& params, cudaStream_t stream) {
    const int64_t num_groups = params.num_chains * params.num_segments;
    return {kGenerate, stream, (num_groups + kChainThreads - 1) / kChainThreads, kChainThreads};
}

// shape: one thread, or one block, per segment.
template <typename Rows>
void launch_chains(const ChainsParams& params, const Rows& rows, const LaunchShape& shape) {
    launch(shape, run_segments_kernel<Rows>, rows, params);
    if (params.num_segments == 1) return;
    launch(shape, repair_segments_kernel<Rows>, rows, params);
    launch({kGenerate, shape.stream, params.num_chains, kByBlock<Rows> ? shape.threads : kThreads,
            std::max(shape.shared_bytes, kScratchBytes)},
           repair_chains_kernel<Rows>, rows, params);
}

// ---------------------------------------------------------------------------- before and after the chains

__global__ void __launch_bounds__(kThreads)
    copy_prompt_kernel(const int64_t* idx, int64_t size, int64_t prompt_length, int64_t vocab_size,
                       int64_t* tokens, int64_t stride) {
    const int64_t n = thread_of_grid();
    if (n >= size) return;
    device_assert(idx[n] >= 0 && idx[n] < vocab_size,
                  "generate: index out of range: expected 0 <= idx < the number of rows of weight");
    tokens[n / prompt_length * stride + n % prompt_length] = idx[n];
}

// visit(chain, step) for all steps of all chains, in a grid-stride loop.
template <typename Visit>
__device__ void for_each_step(const ChainsParams& params, const Visit& visit) {
    const int64_t size = params.num_chains * params.num_steps, threads = int64_t{gridDim.x} * blockDim.x;
    for (int64_t n = thread_of_grid(); n < size; n += threads)
        visit(n / params.num_steps, n % params.num_steps);
}

LaunchShape shape_of_steps(const ChainsParams& params, cudaStream_t stream) {
    constexpr int64_t kBlocksAMultiprocessor = 2048 / kThreads;
    const int64_t blocks = (params.num_chains * params.num_steps + kThreads - 1) / kThreads;
    return {kGenerate, stream, std::min(blocks, kBlocksAMultiprocessor * num_multiprocessors(kGenerate)),
            kThreads};
}

__global__ void __launch_bounds__(kThreads)
    find_stops_kernel(ChainsParams params, StopTokens stop, unsigned long long* lengths) {
    for_each_step(params, [&](int64_t chain, int64_t step) {
        if (stop.contains(*token_at(params, chain, step))) {
            atomicMin(lengths + chain, static_cast<unsigned long long>(step + 1));
        }
    });
}

__global__ void __launch_bounds__(kThreads) fill_chains_kernel(ChainsParams params, const int64_t* lengths) {
    for_each_step(params, [&](int64_t chain, int64_t step) {
        if (step >= lengths[chain]) {
            *token_at(params, chain, step) = *token_at(params, chain, lengths[chain] - 1);
        }
    });
}

__global__ void __launch_bounds__(kThreads)
    check_rows_kernel(ChainsParams params, const unsigned* invalid, const int64_t* lengths) {
    const bool any_is_invalid = invalid[0] != 0;
    if (!any_is_invalid) return;
    for_each_step(params, [&](int64_t chain, int64_t step) {
        const bool counts = lengths == nullptr || step < lengths[chain];
        device_assert(!counts || invalid[1 + token_before(params, chain, step)] == 0,
                      "generate: " BIGRAMX_INVALID_PROBS ": a row of weight, " BIGRAMX_INVALID_LOGITS);
    });
}

}  // namespace

void cut_chains(Granularity granularity, ChainsParams* params) {
    constexpr int64_t kThreadsAMultiprocessor = 1024, kBlocksAMultiprocessor = 1;
    const int64_t num_groups =
        num_multiprocessors(kGenerate) *
        (granularity == Granularity::thread ? kThreadsAMultiprocessor : kBlocksAMultiprocessor);
    const int64_t most = std::min(num_groups / params->num_chains, params->num_steps / kLeastSegment);
    const int64_t num_segments = std::max<int64_t>(most, 1);
    const int64_t steps = (params->num_steps + num_segments - 1) / num_segments;
    params->steps_a_segment = (steps + Philox::kWords - 1) / Philox::kWords * Philox::kWords;
    params->num_segments = (params->num_steps + params->steps_a_segment - 1) / params->steps_a_segment;
}

void launch_copy_prompt(const int64_t* idx, int64_t num_sequences, int64_t prompt_length, int64_t vocab_size,
                        int64_t* tokens, int64_t stride, cudaStream_t stream) {
    const int64_t size = num_sequences * prompt_length;
    launch({kGenerate, stream, (size + kThreads - 1) / kThreads, kThreads}, copy_prompt_kernel, idx, size,
           prompt_length, vocab_size, tokens, stride);
}

void launch_write_cdf(const LogitsParams& table, uint64_t* cdf, cudaStream_t stream) {
    with_rows(table, [&](const auto& rows, const RowPlan& plan) {
        using Row = typename std::decay_t<decltype(rows)>::Row;
        launch({kGenerate, stream, table.vocab_size, plan.threads, plan.shared_bytes}, write_cdf_kernel<Row>,
               rows, cdf);
    });
}

void launch_chains_by_cdf(const ChainsParams& params, const uint64_t* cdf, int64_t vocab_size,
                          cudaStream_t stream) {
    launch_chains(params, CdfRows{cdf, static_cast<uint32_t>(vocab_size)}, shape_of_threads(params, stream));
}

void launch_chains_by_argmax(const ChainsParams& params, const int64_t* argmax, cudaStream_t stream) {
    launch(shape_of_threads(params, stream), run_segments_kernel<ArgmaxRows>, ArgmaxRows{argmax}, params);
}

void launch_chains_by_logits(const ChainsParams& params, const LogitsParams& table, cudaStream_t stream) {
    with_rows(table, [&](const auto& rows, const RowPlan& plan) {
        launch_chains(
            params, rows,
            {kGenerate, stream, params.num_chains * params.num_segments, plan.threads, plan.shared_bytes});
    });
}

void launch_stop_chains(const ChainsParams& params, const StopTokens& stop, int64_t* lengths,
                        cudaStream_t stream) {
    const LaunchShape shape = shape_of_steps(params, stream);
    launch(shape, find_stops_kernel, params, stop, reinterpret_cast<unsigned long long*>(lengths));
    launch(shape, fill_chains_kernel, params, lengths);
}

void launch_check_rows(const ChainsParams& params, const unsigned* invalid, const int64_t* lengths,
                       cudaStream_t stream) {
    launch(shape_of_steps(params, stream), check_rows_kernel, params, invalid, lengths);
}

}  // namespace bigramx::cuda
