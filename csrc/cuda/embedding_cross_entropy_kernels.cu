// Embedding lookup and cross entropy in one, and the gradient of the table.
//
// The pairs come first: counted, (R, C), for a small table, else grouped by row (cuda/base/pairs.cuh). Then
// each row is read once, and its gradient row is written in the same kernel
// (embedding_cross_entropy_rows.cuh), which overlaps the one before: where it knows its first rows, it reads
// them before it waits for their pairs. The smallest batches take one block and one launch. Sums of counts
// are exact in any order, all others are taken in a fixed order, so the reduced loss and its gradient have
// the same bits at every run. A last-block reduction sums over the blocks, which saves a launch.
#include "cuda/embedding_cross_entropy_kernels.h"

#include "base/op_names.h"
#include "cuda/embedding_cross_entropy_rows.cuh"

namespace bigramx::cuda {
namespace {

using KernelParams = EmbeddingCrossEntropyKernelParams;

// ------------------------------------------------------------------------------------------------ kernels

// What the kernel of the rows needs: the scales of the reduction, from counts, (num_rows, C), and its ticket,
// if not null, set to 0. For a block.
template <typename T>
struct PrepareRows {
    const uint32_t* counts;
    int64_t num_rows, num_classes;
    const T* class_weight;  // (C), or null: all ones
    bool is_mean;
    LossScales* scales;
    unsigned* ticket;

    __device__ void operator()(int64_t num_targets) const {
        const auto count = static_cast<double>(num_targets);
        double weighted = count, all = static_cast<double>(num_classes);
        if (class_weight != nullptr) sum_class_weights(&weighted, &all);
        if (threadIdx.x > 0) return;
        if (ticket != nullptr) *ticket = 0;
        *scales = is_mean ? LossScales{1 / weighted, 1 / count, all} : LossScales{1, 1, all};
    }

  private:
    __device__ void sum_class_weights(double* weighted, double* all) const {
        SharedMemory shared;
        auto* const scratch = shared.take<double>(kMaxWarps);
        *weighted = *all = 0;
        for (int64_t j = threadIdx.x; j < num_classes; j += blockDim.x) {
            uint64_t count = 0;
            for (int64_t row = 0; row < num_rows; ++row) count += counts[row * num_classes + j];
            if (count > 0) *weighted += static_cast<double>(count) * static_cast<double>(class_weight[j]);
            *all += static_cast<double>(class_weight[j]);
        }
        *weighted = block_sum(*weighted, scratch);
        *all = block_sum(*all, scratch);
    }
};

template <typename scalar_t>
__device__ void write_loss(const RowsParams<scalar_t>& rows, const LossSums& loss) {
    *rows.loss = static_cast<opmath_t<scalar_t>>(reduced_loss(loss, *rows.scales));
}

// A last-block reduction, over the blocks in a fixed order. scratch: (kMaxWarps).
template <typename scalar_t>
__device__ void reduce_losses(const RowsParams<scalar_t>& rows, const LossSums& loss_of_block,
                              LossSums* scratch, int* is_last) {
    if (threadIdx.x == 0) rows.losses_of_blocks[blockIdx.x] = loss_of_block;
    if (!is_last_block(rows.ticket, is_last)) return;
    LossSums own;
    for (int64_t block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
        own = own + rows.losses_of_blocks[block];
    }
    const LossSums total = block_sum(own, scratch);
    if (threadIdx.x == 0) write_loss(rows, total);
}

// The row index of a slot of a sparse gradient. A slot without a row, or with the padding row, holds zeros;
// it takes the index of another row that occurs.
template <typename scalar_t>
__device__ void name_row(const RowsParams<scalar_t>& rows, int64_t slot) {
    const int64_t num_slots = rows.num_slots();
    int64_t filler = rows.row_of_slot(num_slots - 1);
    if (filler == rows.padding_idx && num_slots > 1) filler = rows.row_of_slot(num_slots - 2);
    const int64_t row = rows.row_of_slot(slot);
    rows.grad_rows[slot] = row < 0 || row == rows.padding_idx ? filler : row;
}

constexpr int kWarpsOfBlock = 8;
constexpr int kFewestItems = 3, kFewItems = 4;  // per lane

__device__ inline int64_t slot_of_warp() { return int64_t{blockIdx.x} * kWarpsOfBlock + warp_of_thread(); }

template <typename scalar_t>
__device__ void clear_by_block(scalar_t* row, int64_t size) {
    const auto none = narrow<scalar_t>(0);
    AlignedVector<scalar_t> zeros;
    for (scalar_t& element : zeros.elements) element = none;
    const int64_t before = elements_before_vectors(row, size);
    const int64_t end = before + (size - before) / kVectorSize<scalar_t> * kVectorSize<scalar_t>;
    for (int64_t j = threadIdx.x; j < before; j += blockDim.x) row[j] = none;
    for (int64_t j = before + int64_t{threadIdx.x} * kVectorSize<scalar_t>; j < end;
         j += int64_t{blockDim.x} * kVectorSize<scalar_t>) {
        store_vector(row + j, zeros);
    }
    for (int64_t j = end + threadIdx.x; j < size; j += blockDim.x) row[j] = none;
}

// counts: (R, C), the pairs by row and class.
template <int kRows, int kItems, typename Params>
__device__ LossSums process_counted_rows(const Params& rows, const WarpRows<kRows, kItems, Params>& warp_rows,
                                         const uint32_t* counts) {
    PairsOfRow<uint32_t> pairs[kRows];
    for (int r = 0; r < kRows; ++r) {
        const uint32_t* const sums = counts + warp_rows.row(r) * rows.num_classes;
        bool any = false;
        for (int64_t j = lane_of_thread(); warp_rows.exists(r) && j < rows.num_classes; j += kWarp)
            any |= sums[j] != 0;
        pairs[r] = {__any_sync(kAllLanes, any) != 0, sums};
    }
    return warp_rows.process(pairs, [&](int r) {
        const int64_t row = warp_rows.exists(r) ? warp_rows.row(r) : -1;
        return rows.gradient_row(/*slot=*/row, row);
    });
}

// Counted pairs, one warp per row, at most kItems * kWarp classes.
template <int kItems, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) counted_rows_kernel(RowsParams<scalar_t> rows) {
    const WarpRows<1, kItems, RowsParams<scalar_t>> warp_rows(rows, slot_of_warp());
    wait_for_kernel_before();
    if (rows.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<LossSums>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    const LossSums loss = process_counted_rows(rows, warp_rows, rows.counts);
    if (rows.loss == nullptr) return;
    const LossSums of_block = block_sum(lane_of_thread() == 0 ? loss : LossSums{}, scratch);
    reduce_losses(rows, of_block, scratch, is_last);
}

// sums: (C) in shared memory. For a warp.
template <int kItems, typename sum_t, typename scalar_t>
__device__ LossSums process_grouped_row(const RowsParams<scalar_t>& rows, int64_t slot, sum_t* sums) {
    const int64_t row = rows.row_of_slot(slot);
    scalar_t* const gradient = rows.gradient_row(slot, row);
    if (!rows.has_pairs(row)) {
        clear_by_warp(gradient, rows.num_classes);
        return {};
    }
    const WarpRows<1, kItems, RowsParams<scalar_t>> warp_rows(rows, row);
    for (int64_t j = lane_of_thread(); j < rows.num_classes; j += kWarp) sums[j] = 0;
    __syncwarp();
    const int64_t end = rows.groups.row_begin[row + 1];
    for (int64_t k = rows.groups.row_begin[row] + lane_of_thread(); k < end; k += kWarp) {
        atomicAdd(sums + rows.groups.targets[k], rows.template value_of_pair<sum_t>(k));
    }
    __syncwarp();
    const PairsOfRow<sum_t> pairs[] = {{/*any=*/true, sums}};
    return warp_rows.process(pairs, [gradient](int) { return gradient; });
}

// Grouped pairs, one warp per slot, at most kItems * kWarp classes. sum_t: uint32_t, or acc_t where each pair
// has a gradient of its own.
template <int kItems, typename sum_t, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) grouped_rows_kernel(RowsParams<scalar_t> rows) {
    wait_for_kernel_before();
    if (rows.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<LossSums>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    auto* const sums = shared.take<sum_t>(kWarpsOfBlock * rows.num_classes);
    const int64_t slot = slot_of_warp();
    LossSums loss;
    if (slot < rows.max_slots) {
        loss = process_grouped_row<kItems>(rows, slot, sums + warp_of_thread() * rows.num_classes);
        if (rows.grad_rows != nullptr && lane_of_thread() == 0) name_row(rows, slot);
    }
    if (rows.loss == nullptr) return;
    const LossSums of_block = block_sum(lane_of_thread() == 0 ? loss : LossSums{}, scratch);
    reduce_losses(rows, of_block, scratch, is_last);
}

template <typename Params>
constexpr bool kNeedsManyRegisters = !Params::kIsPlain || sizeof(typename Params::acc_t) != sizeof(float);

// Per multiprocessor: more would not have enough registers. In whole warps also for two and three blocks.
template <typename Params>
constexpr int kRowThreads = kNeedsManyRegisters<Params> ? 576 : 768;

// The row that a block of a grid that stays takes next comes into the L2 cache, if shared memory will keep
// it: a longer one would drive the present one out.
template <typename Params>
__device__ void prefetch_next_row(const Params& rows, const BlockPlan& plan, int64_t slot) {
    const int64_t next = plan.caches_row ? rows.row_of_slot(slot + gridDim.x) : -1;
    if (rows.has_pairs(next)) prefetch_row(rows.weight_row(next), rows.num_classes);
}

// Grouped pairs; a block stays, and takes every gridDim.x-th slot. If the slots are the rows of the table, it
// measures its first row before the pairs are grouped.
template <typename sum_t, typename Params>
__global__ void __launch_bounds__(kRowThreads<Params>, 1) block_rows_kernel(Params rows, BlockPlan plan) {
    const bool is_done = rows.is_done();
    bool is_ahead = !is_done && !rows.has_slot_rows() && blockIdx.x < rows.max_slots;
    if (!is_ahead) wait_for_kernel_before();
    if (is_done) return;
    const BlockMemory<Params, sum_t> memory(plan, rows.num_classes);
    LossSums* const total = memory.losses;  // the first thread's: registers are scarce
    if (threadIdx.x == 0) *total = {};
    for (int64_t slot = blockIdx.x; slot < rows.max_slots; slot += gridDim.x) {
        const int64_t row = rows.row_of_slot(slot);
        auto* const gradient = rows.gradient_row(slot, row);
        BlockRow<Params, sum_t> block_row(rows, plan, memory, row);
        if (!is_ahead) prefetch_next_row(rows, plan, slot);
        if (is_ahead || rows.has_pairs(row)) block_row.measure();
        if (is_ahead) {
            wait_for_kernel_before();
            prefetch_next_row(rows, plan, slot);
            is_ahead = false;
        }
        if (rows.has_pairs(row)) {
            const LossSums loss = block_row.process(gradient);
            if (threadIdx.x == 0) *total = *total + loss;
        } else if (gradient != nullptr) {
            clear_by_block(gradient, rows.num_classes);
        }
        if (rows.grad_rows != nullptr && threadIdx.x == 0) name_row(rows, slot);
    }
    if (rows.loss == nullptr) return;
    reduce_losses(rows, threadIdx.x == 0 ? *total : LossSums{}, memory.losses, memory.is_last);
}

// logits = weight[idx], (N, C), of at most kItems * kWarp classes. For a block. A warp loads a whole row
// before it stores it.
template <int kItems, typename scalar_t>
__device__ void copy_logits(const RowsParams<scalar_t>& rows, const IndexedPairs& pairs, scalar_t* logits) {
    for (int64_t n = warp_of_thread(); n < pairs.num_pairs(); n += warps_of_block()) {
        const scalar_t* const row = rows.weight_row(pairs.idx[n]);
        scalar_t* const copy = logits + n * rows.num_classes;
        scalar_t items[kItems];
        for (int k = 0; k < kItems; ++k) {
            const int j = lane_of_thread() + k * kWarp;
            if (j < rows.num_classes) items[k] = row[j];
        }
        for (int k = 0; k < kItems; ++k) {
            const int j = lane_of_thread() + k * kWarp;
            if (j < rows.num_classes) copy[j] = items[k];
        }
    }
}

// A warp works on as many rows at once as there are registers for; 65 rows of 65 classes take one turn.
template <typename Params>
constexpr int kOneBlockThreads = kNeedsManyRegisters<Params> ? 512 : 704;
template <int kItems, typename Params>
constexpr int kRowsOfWarp = kNeedsManyRegisters<Params> ? 1
                            : kItems <= kFewestItems    ? 3
                                                        : 2;

// Counting, loss and gradient in one block; at most kItems * kWarp classes.
template <int kItems, typename Params>
__global__ void __launch_bounds__(kOneBlockThreads<Params>, 1)
    one_block_kernel(Params rows, IndexedPairs pairs, bool is_mean, typename Params::scalar_t* logits) {
    if (rows.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<LossSums>(kMaxWarps);
    auto* const scales = shared.take<LossScales>(1);
    const int64_t num_entries = rows.num_rows * rows.num_classes;
    auto* const counts = shared.take<uint32_t>(num_entries);
    constexpr int kRows = kRowsOfWarp<kItems, Params>;
    const int warp = warp_of_thread(), step = warps_of_block();
    WarpRows<kRows, kItems, Params> warp_rows(rows, warp, step);  // on their way while the pairs are counted
    for (int64_t k = threadIdx.x; k < num_entries; k += blockDim.x) counts[k] = 0;
    __syncthreads();
    count_in_table(pairs, BlockRange(pairs.num_pairs()), rows.num_classes, counts);
    __syncthreads();
    const int64_t num_targets = sum_counts(counts, num_entries, reinterpret_cast<double*>(scratch));
    const PrepareRows<typename Params::acc_t> prepare{
        counts, rows.num_rows, rows.num_classes, rows.class_weight, is_mean, scales, /*ticket=*/nullptr};
    prepare(num_targets);
    if (logits != nullptr) copy_logits<kItems, typename Params::scalar_t>(rows, pairs, logits);
    __syncthreads();
    rows.scales = scales;
    LossSums loss;
    for (int64_t first = warp; first < rows.num_rows; first += kRows * step) {
        if (first > warp) warp_rows.load(first);
        loss = loss + process_counted_rows(rows, warp_rows, counts);
    }
    if (rows.loss == nullptr) return;
    const LossSums total = block_sum(lane_of_thread() == 0 ? loss : LossSums{}, scratch);
    if (threadIdx.x == 0) write_loss(rows, total);
}

// The row statistics that the unreduced losses need, one warp per slot.
template <int kItems, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) warp_stats_kernel(RowsParams<scalar_t> rows) {
    wait_for_kernel_before();
    const int64_t slot = slot_of_warp(), row = slot < rows.max_slots ? rows.row_of_slot(slot) : -1;
    if (row < 0) return;
    const RowStats<opmath_t<scalar_t>> stats = WarpRows<1, kItems, RowsParams<scalar_t>>(rows, row).stats();
    if (lane_of_thread() == 0) rows.stats[row] = stats;
}

// The same, a slot of a block at a time.
template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads<RowsParams<scalar_t>>, 1)
    block_stats_kernel(RowsParams<scalar_t> rows, BlockPlan plan) {
    wait_for_kernel_before();
    const BlockMemory<RowsParams<scalar_t>, uint32_t> memory(plan, rows.num_classes);
    for (int64_t slot = blockIdx.x; slot < rows.num_slots(); slot += gridDim.x) {
        const int64_t row = rows.row_of_slot(slot);
        BlockRow<RowsParams<scalar_t>, uint32_t> block_row(rows, plan, memory, row);
        block_row.measure();
        const RowStats<opmath_t<scalar_t>> stats = block_row.stats();
        if (threadIdx.x == 0) rows.stats[row] = stats;
    }
}

// losses: (N).
template <typename scalar_t>
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_losses_kernel(RowsParams<scalar_t> rows, IndexedPairs pairs, opmath_t<scalar_t>* losses) {
    using acc_t = opmath_t<scalar_t>;
    const BlockRange range(pairs.num_pairs());
    pairs.for_each(range.begin, range.end, [&](const Pair& pair) {
        double loss = 0;
        if (pair.target != Pair::kIgnored) {
            const RowStats<acc_t> stats = rows.stats[pair.row];
            const acc_t logit = widen(rows.weight_row(pair.row)[pair.target]) - stats.max;
            const auto class_weight = static_cast<double>(rows.class_weight_of(pair.target));
            loss = loss_of_pair(rows.options(), static_cast<double>(stats.shared), class_weight,
                                static_cast<double>(stats.log_sum), static_cast<double>(logit));
        }
        losses[pair.index] = static_cast<acc_t>(loss);
    });
}

constexpr int kScaleThreads = 512;

template <typename scalar_t>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(scalar_t* gradient, int64_t size, const opmath_t<scalar_t>* grad_loss) {
    using acc_t = opmath_t<scalar_t>;
    constexpr int kInFlight = 4;
    const acc_t scale = *grad_loss;
    if (scale == 1) return;
    const BlockRange range(size);
    scalar_t* const part = gradient + range.begin;
    // Zeros stay zero: 0 times an infinity would be NaN in rows without pairs.
    const auto scaled = [scale](acc_t element) { return element != 0 ? element * scale : element; };
    const auto scale_vector = [&](int first, const AlignedVector<scalar_t>& vector) {
        acc_t elements[kVectorSize<scalar_t>];
        bool is_zero = true;
        for (int k = 0; k < kVectorSize<scalar_t>; ++k) {
            const acc_t element = widen(vector.elements[k]);
            is_zero &= element == 0;
            elements[k] = scaled(element);
        }
        if (!is_zero) store_vector(part + first, narrow_vector<scalar_t>(elements));
    };
    for_each_aligned_vector<kInFlight>(part, range.end - range.begin, scale_vector,
                                       [&](int k) { part[k] = narrow<scalar_t>(scaled(widen(part[k]))); });
}

// ----------------------------------------------------------------------------------------------- launches

enum class Strategy { one_block, counted, grouped };

template <typename T>
constexpr int kManyItems = kMaxWarpRow<T> / kWarp;

int64_t max_warp_row(FloatType type) {
    return type == FloatType::float64 ? kMaxWarpRow<double> : kMaxWarpRow<float>;
}

Strategy strategy_of(const KernelParams& params) {
    constexpr int64_t kMaxEntries = 1 << 14, kMaxPairs = 1 << 12;  // for one block
    const bool can_count =
        params.is_reduced && params.grad_rows == nullptr && params.num_classes <= max_warp_row(params.type);
    if (!can_count || !fits_table(kEmbeddingCrossEntropy, params.num_rows, params.num_classes))
        return Strategy::grouped;
    const bool is_small = params.num_classes <= kFewItems * kWarp && params.num_rows <= kMaxEntries &&
                          params.num_rows * params.num_classes <= kMaxEntries &&
                          params.num_pairs <= kMaxPairs;
    return is_small ? Strategy::one_block : Strategy::counted;
}

bool has_grad_losses(const KernelParams& params) { return !params.is_reduced && params.gradient != nullptr; }

// So few that to clear a dense gradient at once, and to write the rows that occur a second time, is less than
// a block or a warp for each empty row.
bool has_few_pairs(const KernelParams& params) {
    constexpr int64_t kRowsOfPair = 16;
    return params.num_pairs <= params.num_rows / kRowsOfPair;
}

// A dense gradient with many pairs needs all rows; otherwise those that occur suffice.
bool has_slot_rows(const KernelParams& params) {
    return params.grad_rows != nullptr || params.gradient == nullptr || has_few_pairs(params);
}

int64_t max_slots(const KernelParams& params, Strategy strategy) {
    return strategy == Strategy::grouped && has_slot_rows(params)
               ? std::min(params.num_pairs, params.num_rows)
               : params.num_rows;
}

struct Scratch {
    void* zeros;  // to be cleared
    size_t zero_bytes;
    bool groups_in_one_block;
    PairGroups groups{};
    uint32_t* counts = nullptr;
    unsigned* ticket = nullptr;
    LossScales* scales = nullptr;
    LossSums* losses_of_blocks = nullptr;
    void* stats = nullptr;
    uintptr_t end;

    Scratch(const KernelParams& params, void* memory)
        : zeros(memory),
          groups_in_one_block(
              can_group_in_one_block(kEmbeddingCrossEntropy, params.num_pairs, params.num_rows)) {
        const Strategy strategy = strategy_of(params);
        ScratchMemory scratch(memory);
        if (strategy == Strategy::counted) take_table(params, scratch);
        if (strategy == Strategy::grouped) take_zero_groups(params, scratch);
        zero_bytes = scratch.end() - reinterpret_cast<uintptr_t>(memory);
        if (strategy == Strategy::grouped) take_groups(params, scratch);
        if (strategy != Strategy::one_block) take_sums(params, max_slots(params, strategy), scratch);
        end = scratch.end();
    }

  private:
    void take_table(const KernelParams& params, ScratchMemory& scratch) {
        groups.ticket = scratch.take<unsigned>(1);
        counts = scratch.take<uint32_t>(params.num_rows * params.num_classes);
    }

    void take_zero_groups(const KernelParams& params, ScratchMemory& scratch) {
        if (params.class_weight != nullptr) groups.class_counts = scratch.take<uint32_t>(params.num_classes);
        if (groups_in_one_block) return;
        groups.ticket = scratch.take<unsigned>(1);
        groups.row_counts = scratch.take<uint32_t>(params.num_rows);
        if (has_slot_rows(params)) groups.row_occurs = scratch.take<uint32_t>(params.num_rows);
    }

    void take_groups(const KernelParams& params, ScratchMemory& scratch) {
        if (!groups_in_one_block) groups.cursors = scratch.take<uint32_t>(params.num_rows);
        groups.row_begin = scratch.take<int64_t>(params.num_rows + 1);
        groups.targets = scratch.take<int32_t>(params.num_pairs);
        if (has_grad_losses(params)) groups.pair_indices = scratch.take<int64_t>(params.num_pairs);
        if (!has_slot_rows(params)) return;
        groups.slot_rows = scratch.take<int64_t>(max_slots(params, Strategy::grouped));
        groups.num_slots = scratch.take<int64_t>(1);
    }

    void take_sums(const KernelParams& params, int64_t max_slots, ScratchMemory& scratch) {
        ticket = scratch.take<unsigned>(1);
        scales = scratch.take<LossScales>(1);
        losses_of_blocks = scratch.take<LossSums>(std::max<int64_t>(max_slots, 1));
        if (!params.is_reduced) stats = scratch.take<RowStats<double>>(params.num_rows);
    }
};

template <typename scalar_t>
class Launcher {
  public:
    using acc_t = opmath_t<scalar_t>;

    Launcher(const KernelParams& params, void* memory, cudaStream_t stream)
        : params_(params),
          stream_(stream),
          strategy_(strategy_of(params)),
          scratch_(params, memory),
          pairs_{params.idx,      params.targets,     params.num_pairs,
                 params.num_rows, params.num_classes, params.ignore_index},
          rows_(make_rows()) {}

    void run() const {
        if (strategy_ == Strategy::one_block) return run_in_one_block();
        clear(kEmbeddingCrossEntropy, stream_, scratch_.zeros, scratch_.zero_bytes);
        if (has_unvisited_rows()) clear_gradient();
        strategy_ == Strategy::counted ? count() : group();
        if (!params_.is_reduced && params_.loss != nullptr) launch_pair_losses();
        if (has_grad_losses(params_)) {
            launch_grouped_rows<acc_t>();
        } else if (params_.is_reduced) {
            strategy_ == Strategy::counted ? launch_counted_rows() : launch_grouped_rows<uint32_t>();
        }
    }

  private:
    RowsParams<scalar_t> make_rows() const {
        RowsParams<scalar_t> rows{};
        rows.weight = static_cast<const scalar_t*>(params_.weight);
        rows.row_stride = params_.row_stride;
        rows.num_rows = params_.num_rows;
        rows.num_classes = params_.num_classes;
        rows.class_weight = static_cast<const acc_t*>(params_.class_weight);
        rows.given_options = {params_.label_smoothing,
                              params_.label_smoothing / static_cast<double>(params_.num_classes),
                              params_.z_loss};
        rows.padding_idx = params_.padding_idx;
        rows.scales = scratch_.scales;
        rows.counts = scratch_.counts;
        rows.groups = scratch_.groups;
        rows.grad_loss = static_cast<const acc_t*>(params_.grad_loss);
        rows.has_grad_losses = has_grad_losses(params_);
        rows.unless_one = params_.unless_one;
        rows.max_slots = max_slots(params_, strategy_);
        rows.losses_of_blocks = scratch_.losses_of_blocks;
        rows.loss = params_.is_reduced ? static_cast<acc_t*>(params_.loss) : nullptr;
        rows.ticket = scratch_.ticket;
        rows.stats = static_cast<RowStats<acc_t>*>(scratch_.stats);
        rows.gradient = static_cast<scalar_t*>(params_.gradient);
        rows.grad_rows = params_.grad_rows;
        return rows;
    }

    // Where the gradient was computed before, with grad_loss = 1, their elements are zeros already.
    bool has_unvisited_rows() const {
        return strategy_ == Strategy::grouped && params_.gradient != nullptr &&
               params_.grad_rows == nullptr && has_slot_rows(params_) && !params_.unless_one;
    }

    void clear_gradient() const {
        clear(kEmbeddingCrossEntropy, stream_, params_.gradient,
              static_cast<size_t>(params_.num_rows * params_.num_classes) * sizeof(scalar_t));
    }

    // launch_rows(rows), with the plain rows where they suffice.
    template <typename LaunchRows>
    void with_plain_rows(const LaunchRows& launch_rows) const {
        const bool is_plain = params_.class_weight == nullptr && params_.label_smoothing == 0;
        is_plain ? launch_rows(PlainRowsParams<scalar_t>{rows_}) : launch_rows(rows_);
    }

    void run_in_one_block() const {
        const int64_t shared_bytes = SharedMemory::bytes<LossSums>(kMaxWarps) +
                                     SharedMemory::bytes<LossScales>(1) +
                                     SharedMemory::bytes<uint32_t>(params_.num_rows * params_.num_classes);
        with_plain_rows([&](const auto& rows) {
            using Params = std::decay_t<decltype(rows)>;
            launch({kEmbeddingCrossEntropy, stream_, 1, kOneBlockThreads<Params>,
                    static_cast<size_t>(shared_bytes)},
                   params_.num_classes <= kFewestItems * kWarp ? one_block_kernel<kFewestItems, Params>
                                                               : one_block_kernel<kFewItems, Params>,
                   rows, pairs_, params_.is_mean, static_cast<scalar_t*>(params_.logits));
        });
    }

    void count() const {
        count_table(kEmbeddingCrossEntropy, stream_, pairs_, params_.num_rows, params_.num_classes,
                    scratch_.counts, scratch_.groups.ticket, prepare(scratch_.counts, params_.num_rows));
    }

    void group() const {
        const auto group = scratch_.groups_in_one_block
                               ? group_pairs_in_one_block<IndexedPairs, PrepareRows<acc_t>>
                               : group_pairs<IndexedPairs, PrepareRows<acc_t>>;
        group(kEmbeddingCrossEntropy, stream_, pairs_, params_.num_rows, scratch_.groups,
              prepare(scratch_.groups.class_counts, /*num_rows=*/1));
    }

    PrepareRows<acc_t> prepare(const uint32_t* counts, int64_t num_rows) const {
        return {counts,          num_rows,        params_.num_classes, rows_.class_weight,
                params_.is_mean, scratch_.scales, scratch_.ticket};
    }

    bool is_for_warps() const { return params_.num_classes <= kMaxWarpRow<acc_t>; }
    bool has_few_items() const { return params_.num_classes <= kFewItems * kWarp; }

    LaunchShape shape_of_warps(int64_t shared_bytes) const {
        const int64_t blocks = (rows_.max_slots + kWarpsOfBlock - 1) / kWarpsOfBlock;
        // At least one, to write the loss of an empty batch.
        return {kEmbeddingCrossEntropy,
                stream_,
                std::max<int64_t>(blocks, 1),
                kWarpsOfBlock * kWarp,
                static_cast<size_t>(shared_bytes),
                /*overlaps=*/true};
    }

    static constexpr int64_t kReduceBytes =
        SharedMemory::bytes<LossSums>(kMaxWarps) + SharedMemory::bytes<int>(1);

    void launch_counted_rows() const {
        launch(shape_of_warps(kReduceBytes),
               has_few_items() ? counted_rows_kernel<kFewItems, scalar_t>
                               : counted_rows_kernel<kManyItems<acc_t>, scalar_t>,
               rows_);
    }

    template <typename sum_t>
    void launch_grouped_rows() const {
        if (is_for_warps()) {
            const int64_t sums_bytes = SharedMemory::bytes<sum_t>(kWarpsOfBlock * params_.num_classes);
            launch(shape_of_warps(kReduceBytes + sums_bytes),
                   has_few_items() ? grouped_rows_kernel<kFewItems, sum_t, scalar_t>
                                   : grouped_rows_kernel<kManyItems<acc_t>, sum_t, scalar_t>,
                   rows_);
        } else {
            launch_block_rows<sum_t>();
        }
    }

    template <typename sum_t>
    void launch_block_rows() const {
        const auto launch_rows = [&](const auto& rows) {
            using Params = std::decay_t<decltype(rows)>;
            const BlockPlan plan = plan_block<sum_t>(kRowThreads<Params>, /*sweeps=*/true);
            launch(shape_of_blocks<sum_t>(plan), block_rows_kernel<sum_t, Params>, rows, plan);
        };
        if constexpr (std::is_same_v<sum_t, uint32_t>) {
            with_plain_rows(launch_rows);
        } else {
            launch_rows(rows_);
        }
    }

    void launch_pair_losses() const {
        launch_stats();
        const int64_t blocks =
            blocks_for_pairs(kEmbeddingCrossEntropy, params_.num_pairs, /*blocks_a_multiprocessor=*/4);
        launch({kEmbeddingCrossEntropy, stream_, blocks, kPairThreads}, pair_losses_kernel<scalar_t>, rows_,
               pairs_, static_cast<acc_t*>(params_.loss));
    }

    void launch_stats() const {
        if (is_for_warps()) {
            launch(shape_of_warps(0),
                   has_few_items() ? warp_stats_kernel<kFewItems, scalar_t>
                                   : warp_stats_kernel<kManyItems<acc_t>, scalar_t>,
                   rows_);
        } else {
            const BlockPlan plan = plan_block<uint32_t>(kRowThreads<RowsParams<scalar_t>>, /*sweeps=*/false);
            launch(shape_of_blocks<uint32_t>(plan), block_stats_kernel<scalar_t>, rows_, plan);
        }
    }

    template <typename sum_t>
    LaunchShape shape_of_blocks(const BlockPlan& plan) const {
        const int64_t shared_bytes =
            BlockMemory<RowsParams<scalar_t>, sum_t>::bytes(plan, params_.num_classes);
        const int64_t resident = plan.blocks * num_multiprocessors(kEmbeddingCrossEntropy);
        return {kEmbeddingCrossEntropy,
                stream_,
                std::clamp<int64_t>(rows_.max_slots, 1, resident),
                plan.threads,
                static_cast<size_t>(shared_bytes),
                /*overlaps=*/true};
    }

    // Up to kMaxBlocks blocks per multiprocessor, as long as each has shared memory for its row and a tile of
    // a useful size: while one waits for memory, others compute. A row that does not fit is read from the
    // table again. sweeps: whether the row is read again, by tiles, each of which reads all its targets.
    template <typename sum_t>
    BlockPlan plan_block(int threads, bool sweeps) const {
        constexpr int kMaxBlocks = 3;
        constexpr int64_t kSmallestTile = 1 << 12;
        if (!sweeps) return {kMaxBlocks, threads / kMaxBlocks, /*tile=*/0, /*caches_row=*/false};
        for (int blocks = kMaxBlocks; blocks > 0; --blocks) {
            const BlockPlan plan = plan_tile<sum_t>(threads, blocks, /*caches_row=*/true);
            if (plan.tile >= std::min(params_.num_classes, kSmallestTile)) return plan;
        }
        return plan_tile<sum_t>(threads, /*blocks=*/1, /*caches_row=*/false);
    }

    // The largest tile with which so many blocks share a multiprocessor; not positive if there is no room.
    template <typename sum_t>
    BlockPlan plan_tile(int threads, int blocks, bool caches_row) const {
        constexpr int64_t kReserved = 1 << 10;  // bytes of a block
        BlockPlan plan{blocks, threads / blocks, /*tile=*/0, caches_row};
        const int64_t left = max_shared_bytes(kEmbeddingCrossEntropy) / blocks - kReserved -
                             BlockMemory<RowsParams<scalar_t>, sum_t>::bytes(plan, params_.num_classes);
        const int64_t all_classes = (params_.num_classes + kTileStep - 1) / kTileStep * kTileStep;
        plan.tile = std::min(all_classes, left / int64_t{sizeof(sum_t)} / kTileStep * kTileStep);
        return plan;
    }

    static constexpr int64_t kTileStep = 16;  // classes; whole vectors of any type

    const KernelParams& params_;
    const cudaStream_t stream_;
    const Strategy strategy_;
    const Scratch scratch_;
    const IndexedPairs pairs_;
    const RowsParams<scalar_t> rows_;
};

}  // namespace

bool can_copy_logits(const KernelParams& params) {
    constexpr int64_t kMaxLogits = 1 << 15;
    return strategy_of(params) == Strategy::one_block && params.num_pairs * params.num_classes <= kMaxLogits;
}

int64_t embedding_cross_entropy_scratch_bytes(const KernelParams& params) {
    return static_cast<int64_t>(Scratch(params, nullptr).end);
}

void launch_embedding_cross_entropy(const KernelParams& params, void* scratch, cudaStream_t stream) {
    with_type(params.type, [&](auto zero) { Launcher<decltype(zero)>(params, scratch, stream).run(); });
}

void launch_scale_gradient(FloatType type, void* gradient, int64_t size, const void* grad_loss,
                           cudaStream_t stream) {
    constexpr int64_t kElementsOfThread = 16, kBlocksOfMultiprocessor = 4;
    const int64_t most = kBlocksOfMultiprocessor * num_multiprocessors(kEmbeddingCrossEntropy);
    const int64_t blocks =
        std::min((size + kScaleThreads * kElementsOfThread - 1) / (kScaleThreads * kElementsOfThread), most);
    with_type(type, [&](auto zero) {
        using scalar_t = decltype(zero);
        launch({kEmbeddingCrossEntropy, stream, blocks, kScaleThreads}, scale_kernel<scalar_t>,
               static_cast<scalar_t*>(gradient), size, static_cast<const opmath_t<scalar_t>*>(grad_loss));
    });
}

}  // namespace bigramx::cuda
