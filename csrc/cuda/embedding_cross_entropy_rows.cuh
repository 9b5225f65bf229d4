// A row of the table: its logsumexp, the losses of the pairs that start in it, and its gradient, by the
// formulas of embedding_cross_entropy_row.h. A warp takes a row of at most kMaxWarpRow elements and keeps it
// in registers. A block takes a longer row, reads it once with an online softmax (Milakov, Gimelshein:
// "Online normalizer calculation for softmax", 2018), and keeps it in shared memory where it fits.
//
// s_j: the sum over the pairs of row i with target j, of ones or, where each pair has its own gradient, of
// these gradients.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/base/block.cuh"
#include "cuda/base/pairs.cuh"
#include "cuda/base/vector_access.cuh"
#include "embedding_cross_entropy_row.h"

namespace bigramx::cuda {

// What the unreduced losses need of their row.
template <typename T>
struct RowStats {
    T max, log_sum;
    T shared;  // what all pairs of the row have in common: label smoothing, z-loss
};

template <typename scalar>
struct RowsParams {
    using scalar_t = scalar;
    using acc_t = opmath_t<scalar_t>;
    static constexpr bool kIsPlain = false;

    const scalar_t* weight;  // (R, C)
    int64_t row_stride, num_rows, num_classes;
    const acc_t* class_weight;  // (C), or null: all ones
    RowLossOptions given_options;
    int64_t padding_idx;
    const LossScales* scales;

    // The pairs: counted, (R, C), or grouped.
    const uint32_t* counts;  // null: grouped
    PairGroups groups;

    // () or, unreduced, (N); null: ones.
    const acc_t* grad_loss;
    bool has_grad_losses;  // (N)
    bool unless_one;       // there is nothing to do where *grad_loss is 1

    // A slot is a row to work on: the rows of the table or, if not null, groups.slot_rows. The last slots may
    // have no row, as the host knows only max_slots.
    int64_t max_slots;

    // Outputs, each null where it is not wanted.
    LossSums* losses_of_blocks;  // (blocks), reduced by the last block
    acc_t* loss;                 // ()
    unsigned* ticket;            // (), 0 before
    RowStats<acc_t>* stats;      // (R)
    scalar_t* gradient;          // (R, C); with grad_rows (max_slots, C)
    int64_t* grad_rows;          // (max_slots)

    __device__ bool has_slot_rows() const { return groups.slot_rows != nullptr; }
    __device__ int64_t num_slots() const { return has_slot_rows() ? *groups.num_slots : max_slots; }
    // -1: no row.
    __device__ int64_t row_of_slot(int64_t slot) const {
        if (slot >= num_slots()) return -1;
        return has_slot_rows() ? groups.slot_rows[slot] : slot;
    }
    // With grouped pairs.
    __device__ bool has_pairs(int64_t row) const {
        return row >= 0 && groups.row_begin[row] < groups.row_begin[row + 1];
    }
    __device__ const scalar_t* weight_row(int64_t row) const { return weight + row * row_stride; }
    // Null: nothing to write.
    __device__ scalar_t* gradient_row(int64_t slot, int64_t row) const {
        const int64_t place = grad_rows != nullptr ? slot : row;
        return gradient != nullptr && place >= 0 ? gradient + place * num_classes : nullptr;
    }

    __device__ acc_t class_weight_of(int64_t j) const {
        return class_weight != nullptr ? class_weight[j] : acc_t(1);
    }
    __device__ RowLossOptions options() const { return given_options; }
    // What grouped pair k adds to s_j of its target j.
    template <typename sum_t>
    __device__ sum_t value_of_pair(int64_t k) const {
        if constexpr (std::is_same_v<sum_t, uint32_t>) {
            return 1;
        } else {
            return grad_loss != nullptr ? grad_loss[groups.pair_indices[k]] : acc_t(1);
        }
    }
    __device__ double grad_of_all() const {
        return grad_loss != nullptr && !has_grad_losses ? static_cast<double>(*grad_loss) : 1.0;
    }
    __device__ bool is_done() const { return unless_one && grad_of_all() == 1.0; }
};

// Without class weights and label smoothing: constants, so the compiler drops them from the loops.
template <typename scalar>
struct PlainRowsParams : RowsParams<scalar> {
    using typename RowsParams<scalar>::acc_t;
    static constexpr bool kIsPlain = true;

    __device__ acc_t class_weight_of(int64_t) const { return 1; }
    __device__ RowLossOptions options() const { return {0, 0, this->given_options.z_loss}; }
};

constexpr float kLog2E = 0x1.715476p0f;  // log2(e)

// 2^x in one instruction, by the unit for special functions: 2 units in the last place, 0 below 2^-126.
__device__ inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}

// e^(logit - max) for logit <= max. For floats as a power of two, whose exponent is one rounded product: a
// relative error of (max - logit) 2^-24, that of the difference itself.
template <typename scalar_t>
__device__ inline opmath_t<scalar_t> exponential(opmath_t<scalar_t> logit, opmath_t<scalar_t> max) {
    if constexpr (std::is_same_v<scalar_t, double>) {
        return std::exp(logit - max);
    } else {
        return power_of_two((logit - max) * kLog2E);
    }
}

// What to subtract from logits with this maximum. Not -inf, as -inf - -inf is NaN: logits of -inf add 0.
template <typename T>
__device__ inline T shift_of(T max) {
    return max > -kInfinity<T> ? max : T(0);
}

// Online softmax: the running maximum of the logits, and the sum of e^(logit - max).
template <typename T>
struct OnlineSum {
    T max = -kInfinity<T>;
    T sum = 0;

    // Vectors of logits.
    template <typename scalar_t, int count>
    __device__ void include(const AlignedVector<scalar_t> (&vectors)[count]) {
        constexpr int kSize = kVectorSize<scalar_t>;
        raise_max<scalar_t>(largest_element(vectors));
        for (int k = 0; k < count * kSize; ++k) {
            sum += exponential<scalar_t>(widen(vectors[k / kSize].elements[k % kSize]), shift());
        }
    }

    template <typename scalar_t>
    __device__ void include(T logit) {
        raise_max<scalar_t>(logit);
        sum += exponential<scalar_t>(logit, shift());
    }

    template <typename scalar_t>
    __device__ void raise_max(T logit) {
        if (!(logit > max)) return;
        sum *= exponential<scalar_t>(max, logit);
        max = logit;
    }

    __device__ T shift() const { return shift_of(max); }
};

// Adds the pairs of a class, whose gradients sum to s.
template <typename T, typename sum_t>
__device__ void add_pairs(PairSums& sums, T class_weight, sum_t s) {
    sums.gradients += static_cast<double>(s);
    sums.weighted += static_cast<double>(class_weight) * static_cast<double>(s);
}

// The sums over the classes that the losses need. In double: class weights may be of any size.
struct ClassSums {
    double target_losses = 0;  // of class_weight_j s_j (lse - W[i, j])
    double class_losses = 0;   // of class_weight_j (lse - W[i, j]), for label smoothing

    __device__ friend ClassSums operator+(const ClassSums& a, const ClassSums& b) {
        ClassSums both;
        both.target_losses = a.target_losses + b.target_losses;
        both.class_losses = a.class_losses + b.class_losses;
        return both;
    }
};

// A row with its maximum and its sum of exponentials.
template <typename Params>
struct MeasuredRow {
    using acc_t = typename Params::acc_t;

    const Params& params;
    const acc_t max, sum, log_sum;

    // sum: of e^(logit - max).
    __device__ MeasuredRow(const Params& params, acc_t max, acc_t sum)
        : params(params), max(max), sum(sum), log_sum(std::log(sum)) {}

    __device__ bool smooths() const { return params.options().label_smoothing > 0; }
    __device__ double lse() const { return static_cast<double>(max) + static_cast<double>(log_sum); }

    // Adds class j, with s = s_j.
    template <typename sum_t>
    __device__ void add_losses(ClassSums& sums, acc_t logit, acc_t class_weight, sum_t s) const {
        const auto wide_weight = static_cast<double>(class_weight);
        if (s != sum_t(0)) {  // 0 times an infinity would be NaN
            const auto loss = static_cast<double>(log_sum - (logit - max));
            sums.target_losses += wide_weight * static_cast<double>(s) * loss;
        }
        if (smooths()) sums.class_losses += wide_weight * static_cast<double>(max + log_sum - logit);
    }

    __device__ double smoothing_loss(const ClassSums& sums) const {
        return smooths() ? smoothing_loss_of_row(params.options(), sums.class_losses) : 0.0;
    }

    __device__ double z_loss() const { return z_loss_of_row(params.options(), lse()); }

    __device__ RowStats<acc_t> stats(const ClassSums& sums) const {
        return {max, log_sum, static_cast<acc_t>(smoothing_loss(sums) + z_loss())};
    }

    __device__ LossSums loss(const PairSums& pairs, const ClassSums& sums) const {
        return loss_of_row(params.options(), pairs, sums.target_losses, smoothing_loss(sums), z_loss());
    }
};

// Computes the elements of a gradient row: in double with class weights, whose products with the numbers of
// pairs, or shares of their sum, acc_t may not hold.
template <typename Params>
struct GradientTerms {
    using acc_t = typename Params::acc_t;
    static constexpr bool kMayBeWide = !Params::kIsPlain && sizeof(acc_t) < sizeof(double);

    acc_t max, unit, ratio, smoothing, target;
    double wide_scale = 0, wide_smoothing = 0, wide_target = 0;
    bool is_wide = false;

    __device__ GradientTerms(const MeasuredRow<Params>& row, const PairSums& pairs) : max(row.max) {
        const Params& params = row.params;
        const double grad = params.grad_of_all();
        const LossScales scales{params.scales->loss * grad, params.scales->z_loss * grad,
                                params.scales->class_weight_sum};
        const RowGradient terms = gradient_of_row(params.options(), scales, pairs, row.lse());
        unit = static_cast<acc_t>(terms.unit);
        ratio = static_cast<acc_t>(terms.mass) / row.sum;
        smoothing = Params::kIsPlain ? acc_t(0) : static_cast<acc_t>(terms.smoothing);
        target = static_cast<acc_t>(terms.target);
        if constexpr (kMayBeWide) {
            is_wide = params.class_weight != nullptr;
            if (!is_wide) return;
            wide_scale = terms.unit * terms.mass / static_cast<double>(row.sum);
            wide_smoothing = terms.unit * terms.smoothing;
            wide_target = terms.unit * terms.target;
        }
    }

    // Of classes without pairs.
    __device__ acc_t scale() const { return unit * ratio; }

    template <typename sum_t>
    __device__ acc_t element(acc_t logit, acc_t class_weight, sum_t s) const {
        const acc_t e = exponential<typename Params::scalar_t>(logit, max);
        if constexpr (kMayBeWide) {
            if (is_wide)
                return static_cast<acc_t>(difference(static_cast<double>(e), wide_scale, wide_smoothing,
                                                     wide_target, class_weight, s));
        }
        return unit * difference(e, ratio, smoothing, target, class_weight, s);
    }

  private:
    template <typename T, typename sum_t>
    __device__ static T difference(T e, T scale, T smoothing, T target, acc_t class_weight, sum_t s) {
        const T spread = scale * e;
        // A class without a share may have an infinite weight: 0 times that would be NaN.
        if (smoothing == 0 && s == sum_t(0)) return spread;
        return spread - static_cast<T>(class_weight) * (smoothing + target * static_cast<T>(s));
    }
};

// --------------------------------------------------------------------------------------- one warp per row

// The longest row that fits into the registers of a warp, next to everything else.
template <typename T>
constexpr int64_t kMaxWarpRow = sizeof(T) == sizeof(double) ? 512 : 1024;

// row: (size), or null.
template <typename scalar_t>
__device__ void clear_by_warp(scalar_t* row, int64_t size) {
    for (int64_t j = lane_of_thread(); row != nullptr && j < size; j += kWarp) row[j] = narrow<scalar_t>(0);
}

// The pairs of a row.
template <typename sum_t>
struct PairsOfRow {
    bool any;
    const sum_t* sums;  // (C), s_j
};

// Some rows at once, as most of the time of each is latency. Lane l takes the columns l, l + 32, ..., kItems
// of them.
template <int kRows, int kItems, typename Params>
class WarpRows {
  public:
    using scalar_t = typename Params::scalar_t;
    using acc_t = typename Params::acc_t;

    // The rows first, first + step, ..., as far as the table has them.
    __device__ WarpRows(const Params& params, int64_t first, int64_t step = 0)
        : params_(params), step_(step) {
        load(first);
    }

    // What pairs the rows have need not be known yet.
    __device__ void load(int64_t first) {
        first_ = first;
        for (int r = 0; r < kRows; ++r) {
            const scalar_t* const weight = params_.weight_row(row(r));
            for (int k = 0; k < kItems; ++k)
                logits_[r][k] = exists(r) && has(k) ? widen(weight[column(k)]) : -kInfinity<acc_t>;
        }
    }

    __device__ int64_t row(int r) const { return first_ + r * step_; }
    __device__ bool exists(int r) const { return row(r) < params_.num_rows; }

    // gradient_of(r): (C), or null; of zeros where a row has no pairs. It is called late, as pointers take
    // registers. All lanes get the sum over the rows.
    template <typename sum_t, typename GradientOf>
    __device__ LossSums process(const PairsOfRow<sum_t> (&pairs)[kRows],
                                const GradientOf& gradient_of) const {
        bool any = false;
        for (const auto& of_row : pairs) any |= of_row.any;
        if (any) return process_pairs(pairs, gradient_of);
        for (int r = 0; r < kRows; ++r) clear_by_warp(gradient_of(r), params_.num_classes);
        return {};
    }

    // Of the first row.
    __device__ RowStats<acc_t> stats() const {
        Sums sums;
        measure(sums);
        warp_sum_each(sums.exponentials);
        const MeasuredRow<Params> measured(params_, sums.max[0], sums.exponentials[0]);
        ClassSums own;
        for (int k = 0; k < kItems; ++k) {
            if (has(k)) measured.add_losses(own, logits_[0][k], params_.class_weight_of(column(k)), 0);
        }
        return measured.stats(warp_sum(own));
    }

  private:
    // Over the classes of each row.
    struct Sums {
        acc_t max[kRows], exponentials[kRows];
        PairSums pairs[kRows];
        ClassSums losses[kRows];
    };

    // Whether the losses are summed relative to the maximum, so that nothing waits for the sum of the
    // exponentials: what its logarithm adds to each comes at the end. Not with class weights: where they are
    // infinite, a loss may be so though the logarithm is 0.
    static constexpr bool kAddsLogLast = Params::kIsPlain;

    __device__ static int column(int k) { return lane_of_thread() + k * kWarp; }
    __device__ bool has(int k) const { return column(k) < params_.num_classes; }

    // Of the exponentials, the lane's part.
    __device__ void measure(Sums& sums) const {
        for (int r = 0; r < kRows; ++r) {
            sums.max[r] = logits_[r][0];
            for (int k = 1; k < kItems; ++k) sums.max[r] = std::fmax(sums.max[r], logits_[r][k]);
        }
        warp_reduce_each(sums.max, [](acc_t a, acc_t b) { return std::fmax(a, b); });
        for (int r = 0; r < kRows; ++r) {
            sums.exponentials[r] = 0;
            for (int k = 0; k < kItems; ++k)
                sums.exponentials[r] += exponential<scalar_t>(logits_[r][k], shift_of(sums.max[r]));
        }
    }

    template <typename sum_t, typename GradientOf>
    __device__ LossSums process_pairs(const PairsOfRow<sum_t> (&pairs)[kRows],
                                      const GradientOf& gradient_of) const {
        Sums sums;
        measure(sums);
        if constexpr (kAddsLogLast) {
            sum_from_max(pairs, sums);
        } else {
            sum_losses(pairs, sums);
        }
        LossSums total;
        for (int r = 0; r < kRows; ++r) {
            scalar_t* const gradient = gradient_of(r);
            if (!pairs[r].any) {
                clear_by_warp(gradient, params_.num_classes);
                continue;
            }
            const MeasuredRow<Params> measured(params_, sums.max[r], sums.exponentials[r]);
            if (gradient != nullptr) write_gradient(r, {measured, sums.pairs[r]}, pairs[r].sums, gradient);
            if constexpr (kAddsLogLast)
                sums.losses[r].target_losses +=
                    sums.pairs[r].weighted * static_cast<double>(measured.log_sum);
            total = total + measured.loss(sums.pairs[r], sums.losses[r]);
        }
        return total;
    }

    template <typename sum_t>
    __device__ void sum_losses(const PairsOfRow<sum_t> (&pairs)[kRows], Sums& sums) const {
        warp_sum_each(sums.exponentials);
        for (int r = 0; r < kRows; ++r) {
            const MeasuredRow<Params> measured(params_, sums.max[r], sums.exponentials[r]);
            for (int k = 0; pairs[r].any && k < kItems; ++k) {
                if (!has(k)) continue;
                const sum_t s = pairs[r].sums[column(k)];
                const acc_t class_weight = params_.class_weight_of(column(k));
                if (s != sum_t(0)) add_pairs(sums.pairs[r], class_weight, s);
                measured.add_losses(sums.losses[r], logits_[r][k], class_weight, s);
            }
        }
        warp_sum_each(sums.pairs);
        warp_sum_each(sums.losses);
    }

    __device__ void sum_from_max(const PairsOfRow<uint32_t> (&pairs)[kRows], Sums& sums) const {
        uint32_t num_pairs[kRows] = {};
        double losses[kRows] = {};
        for (int r = 0; r < kRows; ++r) {
            for (int k = 0; pairs[r].any && k < kItems; ++k) {
                const uint32_t s = has(k) ? pairs[r].sums[column(k)] : 0;
                if (s == 0) continue;  // 0 times an infinity would be NaN
                num_pairs[r] += s;
                losses[r] += static_cast<double>(s) * static_cast<double>(sums.max[r] - logits_[r][k]);
            }
        }
        warp_sum_each(sums.exponentials);
        warp_sum_each(num_pairs);
        warp_sum_each(losses);
        for (int r = 0; r < kRows; ++r) {
            sums.pairs[r].gradients = sums.pairs[r].weighted = num_pairs[r];
            sums.losses[r].target_losses = losses[r];  // without the logarithms
        }
    }

    template <typename sum_t>
    __device__ void write_gradient(int r, const GradientTerms<Params>& terms, const sum_t* sums,
                                   scalar_t* gradient) const {
        const bool is_padding = row(r) == params_.padding_idx;
        for (int k = 0; k < kItems; ++k) {
            if (!has(k)) continue;
            const int j = column(k);
            const acc_t element = terms.element(logits_[r][k], params_.class_weight_of(j), sums[j]);
            gradient[j] = narrow<scalar_t>(is_padding ? acc_t(0) : element);
        }
    }

    const Params& params_;
    const int64_t step_;
    int64_t first_;
    acc_t logits_[kRows][kItems];
};

// -------------------------------------------------------------------------------------- one block per row

// How a block processes its row.
struct BlockPlan {
    int blocks;  // of a multiprocessor
    int threads;
    int64_t tile;  // classes whose s_j are in shared memory at once; whole vectors
    bool caches_row;
};

// The shared memory of a block. The row and the tile are aligned as the row of the table is, so that all
// three are accessed by the same vectors.
template <typename Params, typename sum_t>
struct BlockMemory {
    using scalar_t = typename Params::scalar_t;

    typename Params::acc_t* sums;  // (kMaxWarps)
    PairSums* pair_sums;           // (kMaxWarps)
    ClassSums* class_sums;         // (kMaxWarps)
    LossSums* losses;              // (kMaxWarps)
    int* is_last;                  // ()
    sum_t* tile;                   // (tile)
    scalar_t* row;                 // (C), or null

    __device__ BlockMemory(const BlockPlan& plan, int64_t num_classes) {
        SharedMemory shared;
        sums = shared.take<typename Params::acc_t>(kMaxWarps);
        pair_sums = shared.take<PairSums>(kMaxWarps);
        class_sums = shared.take<ClassSums>(kMaxWarps);
        losses = shared.take<LossSums>(kMaxWarps);
        is_last = shared.take<int>(1);
        tile = shared.take<sum_t>(plan.tile + kVectorSize<scalar_t>);
        row = plan.caches_row ? shared.take<scalar_t>(num_classes + kVectorSize<scalar_t>) : nullptr;
    }

    static int64_t bytes(const BlockPlan& plan, int64_t num_classes) {
        return SharedMemory::bytes<typename Params::acc_t>(kMaxWarps) +
               SharedMemory::bytes<PairSums>(kMaxWarps) + SharedMemory::bytes<ClassSums>(kMaxWarps) +
               SharedMemory::bytes<LossSums>(kMaxWarps) + SharedMemory::bytes<int>(1) +
               SharedMemory::bytes<sum_t>(plan.tile + kVectorSize<scalar_t>) +
               (plan.caches_row ? SharedMemory::bytes<scalar_t>(num_classes + kVectorSize<scalar_t>) : 0);
    }
};

template <typename Params, typename sum_t>
class BlockRow {
  public:
    using scalar_t = typename Params::scalar_t;
    using acc_t = typename Params::acc_t;

    __device__ BlockRow(const Params& params, const BlockPlan& plan, const BlockMemory<Params, sum_t>& memory,
                        int64_t row)
        : params_(params),
          plan_(plan),
          memory_(memory),
          row_(row),
          source_(params.weight_row(row)),
          tile_(memory.tile + elements_into_vector(source_)) {}

    // Comes first. Reads the row, and keeps it in shared memory where that is planned; its pairs need not be
    // known yet.
    __device__ void measure() {
        constexpr int kBatch = kVectorsAtOnce;
        const scalar_t* const weight = source_;
        scalar_t* const kept = kept_row();
        const auto keep = [kept](int first, const AlignedVector<scalar_t>& vector) {
            if (kept != nullptr) store_vector(kept + first, vector);
        };
        OnlineSum<acc_t> own;
        for_each_batch_of_vectors<kBatch>(
            weight, params_.num_classes,
            [&](int first, int stride, const AlignedVector<scalar_t>(&batch)[kBatch]) {
                own.include(batch);
                for (int k = 0; k < kBatch; ++k) keep(first + k * stride, batch[k]);
            },
            [&](int first, const AlignedVector<scalar_t>& vector) {
                const AlignedVector<scalar_t> alone[1] = {vector};
                own.include(alone);
                keep(first, vector);
            },
            [&](int j) {
                own.template include<scalar_t>(widen(weight[j]));
                if (kept != nullptr) kept[j] = weight[j];
            });
        if (kept != nullptr) source_ = kept;
        // The maximum first: to merge online sums, warp after warp, takes two exponentials each.
        max_ = block_reduce(own.max, memory_.sums, [](acc_t a, acc_t b) { return std::fmax(a, b); });
        sum_ = block_sum(own.sum * exponential<scalar_t>(own.max, shift_of(max_)), memory_.sums);
    }

    // gradient: (C), or null. All threads get the result.
    __device__ LossSums process(scalar_t* gradient) {
        first_pair_ = params_.groups.row_begin[row_];
        num_pairs_ = static_cast<uint32_t>(params_.groups.row_begin[row_ + 1] - first_pair_);
        const MeasuredRow<Params> row(params_, max_, sum_);
        const PairSums pairs = sum_pairs();
        const GradientTerms<Params> terms(row, pairs);
        return row.loss(pairs, block_sum(visit_classes(row, terms, gradient), memory_.class_sums));
    }

    __device__ RowStats<acc_t> stats() const {
        const MeasuredRow<Params> row(params_, max_, sum_);
        ClassSums own;
        for (int64_t j = threadIdx.x; row.smooths() && j < params_.num_classes; j += blockDim.x) {
            row.add_losses(own, widen(source_[j]), params_.class_weight_of(j), 0);
        }
        return row.stats(block_sum(own, memory_.class_sums));
    }

  private:
    __device__ bool is_padding() const { return row_ == params_.padding_idx; }

    // As many as there are registers for.
    static constexpr int kVectorsAtOnce = std::is_same_v<scalar_t, float> ? 4 : 2;

    // Most rows of a large table have few: the targets are then no concern of the other classes.
    static constexpr uint32_t kFewPairs =
        Params::kIsPlain && std::is_same_v<sum_t, uint32_t> && sizeof(acc_t) == sizeof(float) ? 64 : 0;

    // Then the product with log2(e) is exact enough to be subtracted from those of the logits: see spread().
    __device__ bool has_moderate_max() const { return sizeof(scalar_t) != 2 || std::fabs(max_) <= 256; }

    // Writes the gradient; returns the thread's part of the losses.
    __device__ ClassSums visit_classes(const MeasuredRow<Params>& row, const GradientTerms<Params>& terms,
                                       scalar_t* gradient) const {
        if constexpr (kFewPairs > 0) {
            if (num_pairs_ <= kFewPairs && has_moderate_max()) return patch_targets(row, terms, gradient);
        }
        return sweep_classes(row, terms, gradient);
    }

    // The gradient as if there were no targets, then the elements of the targets anew. Each target is seen to
    // by its first pair; the losses are put in the order of the targets, as that of the pairs is not fixed.
    __device__ ClassSums patch_targets(const MeasuredRow<Params>& row, const GradientTerms<Params>& terms,
                                       scalar_t* gradient) const {
        if (gradient != nullptr) spread(terms, gradient);
        auto* const losses = reinterpret_cast<ClassSums*>(memory_.tile);  // (num_pairs)
        const int32_t* const targets = params_.groups.targets + first_pair_;
        __syncthreads();
        if (threadIdx.x < num_pairs_) {
            const unsigned own = threadIdx.x;
            const int32_t target = targets[own];
            sum_t s = 0;
            bool is_first = true;
            int rank = 0;
            for (unsigned k = 0; k < num_pairs_; ++k) {
                const bool is_same = targets[k] == target;
                s += is_same;
                is_first = is_first && !(is_same && k < own);
                rank += targets[k] < target || (is_same && k < own);
            }
            ClassSums of_target;
            if (is_first) {
                const acc_t logit = widen(source_[target]);
                row.add_losses(of_target, logit, acc_t(1), s);
                if (gradient != nullptr && !is_padding())
                    gradient[target] = narrow<scalar_t>(terms.element(logit, acc_t(1), s));
            }
            losses[rank] = of_target;
        }
        __syncthreads();
        return threadIdx.x < num_pairs_ ? losses[threadIdx.x] : ClassSums{};
    }

    // gradient = the elements of classes without pairs; or zeros.
    __device__ void spread(const GradientTerms<Params>& terms, scalar_t* gradient) const {
        const auto map = [scale = terms.scale(), max = terms.max](acc_t logit) {
            if constexpr (sizeof(scalar_t) == 2) {
                // An error of |max| 2^-24, far below the rounding of a gradient.
                return scale * power_of_two(fmaf(logit, kLog2E, -max * kLog2E));
            } else {
                return scale * exponential<scalar_t>(logit, max);
            }
        };
        const scalar_t* const kept = kept_row();
        if (is_padding()) {
            map_row(source_, gradient, params_.num_classes, [](acc_t) { return acc_t(0); });
        } else if (kept != nullptr) {
            // A branch of its own: the compiler then knows that the memory is shared.
            map_row(kept, gradient, params_.num_classes, map);
        } else {
            map_row(source_, gradient, params_.num_classes, map);
        }
    }

    __device__ ClassSums sweep_classes(const MeasuredRow<Params>& row, const GradientTerms<Params>& terms,
                                       scalar_t* gradient) const {
        const bool is_zero = gradient == nullptr || is_padding();
        ClassSums own;
        sweep(gradient, [&](int64_t j, acc_t logit, sum_t s) {
            const acc_t class_weight = params_.class_weight_of(j);
            row.add_losses(own, logit, class_weight, s);
            return is_zero ? acc_t(0) : terms.element(logit, class_weight, s);
        });
        return own;
    }

    // to[j] = map(from[j]).
    template <typename Map>
    __device__ static void map_row(const scalar_t* from, scalar_t* to, int64_t size, const Map& map) {
        constexpr int kSize = kVectorSize<scalar_t>, kBatch = kVectorsAtOnce;
        const auto map_element = [&](int j) { to[j] = narrow<scalar_t>(map(widen(from[j]))); };
        if (elements_into_vector(to) != elements_into_vector(from)) {
            for (int j = static_cast<int>(threadIdx.x); j < size; j += blockDim.x) map_element(j);
            return;
        }
        const auto map_vector = [&](int first, const AlignedVector<scalar_t>& vector) {
            acc_t mapped[kSize];
            for (int k = 0; k < kSize; ++k) mapped[k] = map(widen(vector.elements[k]));
            store_vector(to + first, narrow_vector<scalar_t>(mapped));
        };
        for_each_batch_of_vectors<kBatch>(
            from, size,
            [&](int first, int stride, const AlignedVector<scalar_t>(&batch)[kBatch]) {
                for (int k = 0; k < kBatch; ++k) map_vector(first + k * stride, batch[k]);
            },
            map_vector, map_element);
    }

    // Where the row is kept in shared memory; null where there is no room.
    __device__ scalar_t* kept_row() const {
        return memory_.row != nullptr ? memory_.row + (tile_ - memory_.tile) : nullptr;
    }

    // Without class weights and gradients of the pairs, the number of pairs suffices.
    __device__ PairSums sum_pairs() const {
        PairSums own;
        if (params_.class_weight == nullptr && !params_.has_grad_losses) {
            own.gradients = own.weighted = static_cast<double>(num_pairs_);
            return own;
        }
        for (int64_t begin = 0; begin < params_.num_classes; begin += plan_.tile) {
            const int64_t end = end_of_tile(begin);
            sum_tile(begin, end);
            for (int64_t k = threadIdx.x; k < end - begin; k += blockDim.x) {
                if (tile_[k] != sum_t(0)) add_pairs(own, params_.class_weight_of(begin + k), tile_[k]);
            }
            __syncthreads();  // before the next tile overwrites this one
        }
        return block_sum(own, memory_.pair_sums);
    }

    // visit(j, W[i, j], s_j) for each class; its results go to out, (C), if not null.
    template <typename Visit>
    __device__ void sweep(scalar_t* out, const Visit& visit) const {
        for (int64_t begin = 0; begin < params_.num_classes; begin += plan_.tile) {
            const int64_t end = end_of_tile(begin);
            sum_tile(begin, end);
            const scalar_t* const part = source_ + begin;
            scalar_t* const part_out = out != nullptr ? out + begin : nullptr;
            const auto visit_element = [&](int k) {
                const acc_t element = visit(begin + k, widen(part[k]), tile_[k]);
                if (out != nullptr) part_out[k] = narrow<scalar_t>(element);
            };
            if (out == nullptr || elements_into_vector(out) == elements_into_vector(source_)) {
                for_each_aligned_vector(
                    part, end - begin,
                    [&](int first, const AlignedVector<scalar_t>& vector) {
                        sum_t sums[kVectorSize<scalar_t>];
                        load_sums(tile_ + first, sums);
                        acc_t elements[kVectorSize<scalar_t>];
                        for (int k = 0; k < kVectorSize<scalar_t>; ++k) {
                            elements[k] = visit(begin + first + k, widen(vector.elements[k]), sums[k]);
                        }
                        if (out != nullptr) store_vector(part_out + first, narrow_vector<scalar_t>(elements));
                    },
                    visit_element);
            } else {
                for (int k = static_cast<int>(threadIdx.x); k < end - begin; k += blockDim.x)
                    visit_element(k);
            }
            __syncthreads();  // before the next tile overwrites this one
        }
    }

    __device__ int64_t end_of_tile(int64_t begin) const {
        return begin + plan_.tile < params_.num_classes ? begin + plan_.tile : params_.num_classes;
    }

    // tile_ = s_j of the columns from `begin` to `end`.
    __device__ void sum_tile(int64_t begin, int64_t end) const {
        for (int64_t k = threadIdx.x; k < end - begin; k += blockDim.x) tile_[k] = 0;
        __syncthreads();
        add_targets(params_.groups.targets + first_pair_, num_pairs_, begin, end, tile_,
                    [&](int64_t k) { return params_.template value_of_pair<sum_t>(first_pair_ + k); });
        __syncthreads();
    }

    // One for each element of a vector of the row.
    __device__ static void load_sums(const sum_t* from, sum_t (&sums)[kVectorSize<scalar_t>]) {
        if constexpr (kVectorSize<scalar_t> % kVectorSize<sum_t> == 0) {
            for (int k = 0; k < kVectorSize<scalar_t>; k += kVectorSize<sum_t>) {
                const AlignedVector<sum_t> vector = load_vector(from + k);
                for (int i = 0; i < kVectorSize<sum_t>; ++i) sums[k + i] = vector.elements[i];
            }
        } else {
            for (int k = 0; k < kVectorSize<scalar_t>; ++k) sums[k] = from[k];
        }
    }

    const Params& params_;
    const BlockPlan& plan_;
    const BlockMemory<Params, sum_t>& memory_;
    const int64_t row_;
    const scalar_t* source_;  // (C): the row in the table, or its copy in shared memory
    sum_t* const tile_;       // (tile)
    acc_t max_, sum_;         // of the logits; of e^(logit - max)
    int64_t first_pair_;
    uint32_t num_pairs_;
};

}  // namespace bigramx::cuda
