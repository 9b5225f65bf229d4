// Draws by the fixed-point CDF of a row of weights (sampling/fixed_point_cdf.h). One draw per row takes a
// pass over the row, by a warp or a block, and stores no CDF. Many draws with replacement search a stored CDF
// by bisection. Draws without replacement are made one after the other, each from the weights that are left.
#include "cuda/multinomial_kernels.h"

#include "base/op_names.h"
#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"
#include "cuda/sampling/weighted_row.cuh"
#include "sampling/distribution_errors.h"

namespace bigramx::cuda {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
__device__ const scalar_t* row_of(const MultinomialKernelParams& params, int64_t b) {
    return static_cast<const scalar_t*>(params.probs) + b * params.vocab_size;
}

template <typename T>
__device__ void assert_distribution(T largest) {
    device_assert(largest < kInfinity<T>, "multinomial: " BIGRAMX_INVALID_PROBS);
    device_assert(largest > 0, "multinomial: " BIGRAMX_ZERO_PROBS);
}

template <typename scalar_t>
__device__ WeightedRow<Probs<scalar_t>> read_row(const MultinomialKernelParams& params, int64_t b,
                                                 const RowMemory<scalar_t>& memory) {
    const WeightedRow<Probs<scalar_t>> row({}, row_of<scalar_t>(params, b), params.vocab_size, memory);
    assert_distribution(row.largest());
    return row;
}

// --------------------------------------------------------------------------------------- one draw per row

// One warp per row of at most kItems * kWarp tokens, in registers; lane l takes the tokens l, l + 32, ...
template <typename scalar_t, int kItems>
__global__ void __launch_bounds__(kThreads) draw_one_by_warp_kernel(MultinomialKernelParams params) {
    using acc_t = opmath_t<scalar_t>;
    constexpr int kWarps = kThreads / kWarp;
    const int64_t b = int64_t{blockIdx.x} * kWarps + warp_of_thread();
    if (b >= params.num_rows) return;
    const scalar_t* const row = row_of<scalar_t>(params, b);
    acc_t probs[kItems], largest = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        const int token = k * kWarp + lane_of_thread();
        probs[k] = token < params.vocab_size ? widen(row[token]) : acc_t(0);
        include_element<Probs<scalar_t>>(probs[k], &largest);
    }
    largest = warp_reduce(largest, Larger());
    assert_distribution(largest);

    const ProbScale<acc_t> scale(largest);
    WeightSum sum = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) sum += round_down(scale.scaled(probs[k]));
    const uint64_t r = draw(seed_of(params.seed), static_cast<uint64_t>(b), /*position=*/0);
    WeightSum target_sum = FixedPointCdf(warp_sum(sum)).target_sum(r);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        const uint64_t sum_of_lanes = warp_inclusive_scan(round_down(scale.scaled(probs[k])));
        const unsigned reached = __ballot_sync(kAllLanes, sum_of_lanes >= target_sum);
        if (reached != 0) {
            if (lane_of_thread() == 0) params.samples[b] = k * kWarp + __ffs(static_cast<int>(reached)) - 1;
            return;
        }
        target_sum -= broadcast(sum_of_lanes, kWarp - 1);
    }
}

// One block per row.
template <typename scalar_t>
__global__ void __launch_bounds__(kMaxRowThreads)
    draw_one_by_block_kernel(MultinomialKernelParams params, bool keeps_row) {
    const int64_t b = blockIdx.x;
    const RowMemory<scalar_t> memory(params.vocab_size, keeps_row);
    const int64_t token = read_row(params, b, memory)
                              .find(draw(seed_of(params.seed), static_cast<uint64_t>(b), /*position=*/0));
    if (threadIdx.x == 0) params.samples[b] = token;
}

// By warps with as few items per lane as suffice, or by blocks.
template <typename scalar_t, int kItems = 4>
void launch_draw_one(const MultinomialKernelParams& params, cudaStream_t stream) {
    constexpr int kWarps = kThreads / kWarp, kMostItems = 32;
    if (params.vocab_size <= kItems * kWarp) {
        launch({kMultinomial, stream, (params.num_rows + kWarps - 1) / kWarps, kThreads},
               draw_one_by_warp_kernel<scalar_t, kItems>, params);
    } else if constexpr (kItems < kMostItems) {
        launch_draw_one<scalar_t, 2 * kItems>(params, stream);
    } else {
        const RowPlan plan = plan_row<scalar_t>(kMultinomial, params.vocab_size);
        launch({kMultinomial, stream, params.num_rows, plan.threads, plan.shared_bytes},
               draw_one_by_block_kernel<scalar_t>, params, plan.keeps_row);
    }
}

// --------------------------------------------------------------------------------------- with replacement

// cdf: (B, V). One block per row.
template <typename scalar_t>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    write_cdf_kernel(MultinomialKernelParams params, bool keeps_row, uint64_t* cdf) {
    const int64_t b = blockIdx.x;
    const RowMemory<scalar_t> memory(params.vocab_size, keeps_row);
    read_row(params, b, memory).write_cdf(cdf + b * params.vocab_size);
}

int64_t groups_a_row(const MultinomialKernelParams& params) {
    return (params.num_samples + Philox::kWords - 1) / Philox::kWords;
}

// One thread per group of samples that share an evaluation of Philox; `groups` per row.
__global__ void __launch_bounds__(kThreads)
    search_cdf_kernel(MultinomialKernelParams params, int64_t groups, const uint64_t* cdf) {
    const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (n >= params.num_rows * groups) return;
    const int64_t b = n / groups, group = n % groups, first = group * Philox::kWords;
    const Draws draws(seed_of(params.seed), static_cast<uint64_t>(b), static_cast<uint64_t>(group));
    uint32_t tokens[Philox::kWords];
    for (int k = 0; k < Philox::kWords; ++k) {
        tokens[k] = static_cast<uint32_t>(
            search_cdf(cdf + b * params.vocab_size, params.vocab_size, draws.values[k]));
    }
    const int64_t count = params.num_samples - first;
    store_tokens(params.samples + b * params.num_samples + first, tokens,
                 static_cast<int>(count < Philox::kWords ? count : Philox::kWords));
}

// ------------------------------------------------------------------------------------ without replacement

// One block per row. Each thread owns a run of tokens, so their probabilities need no atomics. left: (B, V),
// the probabilities, which become zero as they are drawn.
template <typename scalar_t>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    draw_without_replacement_kernel(MultinomialKernelParams params, void* left_probs) {
    using acc_t = opmath_t<scalar_t>;
    const int64_t b = blockIdx.x, run = (params.vocab_size + blockDim.x - 1) / blockDim.x;
    const int64_t begin = threadIdx.x * run;
    const int64_t end = begin + run < params.vocab_size ? begin + run : params.vocab_size;
    const RowMemory<scalar_t> memory(params.vocab_size, /*keeps_row=*/false);
    const scalar_t* const probs = row_of<scalar_t>(params, b);
    scalar_t* const left = static_cast<scalar_t*>(left_probs) + b * params.vocab_size;
    for (int64_t token = begin; token < end; ++token) left[token] = probs[token];

    acc_t largest = read_row(params, b, memory).largest();
    ProbScale<acc_t> scale(largest);
    const auto weight = [&](int64_t token) { return round_down(scale.scaled(widen(left[token]))); };
    WeightSum sum = 0, total;
    for (int64_t token = begin; token < end; ++token) sum += weight(token);

    const uint64_t seed = seed_of(params.seed);
    int64_t* const samples = params.samples + b * params.num_samples;
    int64_t k = 0;
    while (k < params.num_samples) {
        const WeightSum sum_before = block_exclusive_scan(sum, memory.sums, &total);
        if (total < kLeastTotal) {  // rounding might be felt: scales by the largest that is left
            largest = 0;
            for (int64_t token = begin; token < end; ++token) {
                largest = Larger()(widen(left[token]), largest);
            }
            largest = block_reduce(largest, memory.largest, Larger());
            if (largest == 0) break;
            scale = ProbScale<acc_t>(largest);
            sum = 0;
            for (int64_t token = begin; token < end; ++token) sum += weight(token);
            continue;
        }
        const uint64_t r = threadIdx.x == 0 ? draw(seed, static_cast<uint64_t>(b), k) : 0;
        const WeightSum target_sum = block_target_sum(total, r, memory);
        if (sum_before < target_sum && target_sum <= sum_before + sum) {
            int64_t token = begin;
            for (WeightSum so_far = sum_before + weight(token); so_far < target_sum;
                 so_far += weight(token)) {
                ++token;
            }
            samples[k] = token;
            sum -= weight(token);
            left[token] = narrow<scalar_t>(0);
        }
        ++k;
    }
    if (k == params.num_samples) return;

    // All positive weights are drawn: tokens of probability zero follow, in order.
    uint64_t num_zeros = 0, all_zeros;
    for (int64_t token = begin; token < end; ++token) num_zeros += widen(probs[token]) == 0 ? 1 : 0;
    k += static_cast<int64_t>(
        block_exclusive_scan(num_zeros, reinterpret_cast<uint64_t*>(memory.sums), &all_zeros));
    for (int64_t token = begin; token < end && k < params.num_samples; ++token) {
        if (widen(probs[token]) == 0) samples[k++] = token;
    }
}

}  // namespace

void launch_draw_one_a_row(const MultinomialKernelParams& params, cudaStream_t stream) {
    with_type(params.type, [&](auto zero) { launch_draw_one<decltype(zero)>(params, stream); });
}

void launch_draw_with_replacement(const MultinomialKernelParams& params, uint64_t* cdf, cudaStream_t stream) {
    with_type(params.type, [&](auto zero) {
        using scalar_t = decltype(zero);
        const RowPlan plan = plan_row<scalar_t>(kMultinomial, params.vocab_size);
        launch({kMultinomial, stream, params.num_rows, plan.threads, plan.shared_bytes},
               write_cdf_kernel<scalar_t>, params, plan.keeps_row, cdf);
    });
    const int64_t groups = groups_a_row(params);
    launch({kMultinomial, stream, (params.num_rows * groups + kThreads - 1) / kThreads, kThreads},
           search_cdf_kernel, params, groups, cdf);
}

void launch_draw_without_replacement(const MultinomialKernelParams& params, void* left, cudaStream_t stream) {
    with_type(params.type, [&](auto zero) {
        using scalar_t = decltype(zero);
        const RowPlan plan = plan_row<scalar_t>(kMultinomial, params.vocab_size, /*may_keep_row=*/false);
        launch({kMultinomial, stream, params.num_rows, plan.threads, plan.shared_bytes},
               draw_without_replacement_kernel<scalar_t>, params, left);
    });
}

}  // namespace bigramx::cuda
