// Embedding lookup and cross entropy in one, and the gradient of the table.
//
// The pairs are counted first: for a small table as (R, C) counts, else grouped by row (pairs.cuh). Then each
// row is read once, and its gradient written right away (loss_rows.cuh). The smallest batches take one block,
// and one launch for all of that. Loss and gradient of the reduced loss are sums of integers and sums in a
// fixed order: the same bits at every run.
#include "cuda/embedding_cross_entropy_kernels.h"

#include "cuda/embedding_cross_entropy_rows.cuh"

namespace bigramx {
namespace {

constexpr const char* kName = "embedding_cross_entropy";

// ------------------------------------------------------------------------------------------------ kernels

// The totals, from counts (num_rows, C) of the pairs; class_weight null: all ones.
template <typename T>
struct SumTotals {
    const uint32_t* counts;
    int64_t num_rows, num_classes;
    const T* class_weight;
    bool is_mean;
    LossTotals* totals;

    __device__ void operator()(int64_t num_targets) const {
        const auto number = static_cast<double>(num_targets);
        double weighted = number, all = static_cast<double>(num_classes);
        if (class_weight != nullptr) sum_class_weights(&weighted, &all);
        if (threadIdx.x > 0) return;
        *totals = is_mean ? LossTotals{1 / weighted, 1 / number, all} : LossTotals{1, 1, all};
    }

  private:
    __device__ void sum_class_weights(double* weighted, double* all) const {
        SharedMemory shared;
        auto* const scratch = shared.take<double>(kMaxWarps);
        *weighted = *all = 0;
        for (int64_t j = threadIdx.x; j < num_classes; j += blockDim.x) {
            uint64_t count = 0;
            for (int64_t row = 0; row < num_rows; ++row) count += counts[row * num_classes + j];
            *weighted += static_cast<double>(count) * static_cast<double>(class_weight[j]);
            *all += static_cast<double>(class_weight[j]);
        }
        *weighted = block_sum(*weighted, scratch);
        *all = block_sum(*all, scratch);
    }
};

template <typename scalar_t>
__device__ void write_loss(const RowsJob<scalar_t>& job, const RowLoss& loss) {
    const double reduced =
        loss.cross_entropy * job.totals->loss_scale + loss.z_loss * job.totals->z_loss_scale;
    *job.loss = narrow<scalar_t>(static_cast<opmath_t<scalar_t>>(reduced));
}

// The last block sums what all blocks have found, in their order. scratch: kMaxWarps.
template <typename scalar_t>
__device__ void reduce_losses(const RowsJob<scalar_t>& job, const RowLoss& loss_of_block, RowLoss* scratch,
                              int* is_last) {
    if (threadIdx.x == 0) job.losses_of_blocks[blockIdx.x] = loss_of_block;
    if (!is_last_block(job.ticket, is_last)) return;
    RowLoss own;
    for (int64_t block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
        own = own + job.losses_of_blocks[block];
    }
    const RowLoss total = block_sum(own, scratch);
    if (threadIdx.x == 0) write_loss(job, total);
}

// Of a sparse gradient: the row that a slot stands for. Slots without a row, and that of the padding row,
// hold zeros for a row that occurs.
template <typename scalar_t>
__device__ void name_row(const RowsJob<scalar_t>& job, int64_t slot) {
    const int64_t num_slots = job.num_slots();
    int64_t filler = job.row_of_slot(num_slots - 1);
    if (filler == job.padding_idx && num_slots > 1) filler = job.row_of_slot(num_slots - 2);
    const int64_t row = job.row_of_slot(slot);
    job.grad_rows[slot] = row < 0 || row == job.padding_idx ? filler : row;
}

constexpr int kWarpsOfBlock = 8;

__device__ inline int64_t slot_of_warp() { return int64_t{blockIdx.x} * kWarpsOfBlock + warp_of_thread(); }

template <typename scalar_t>
__device__ void clear_by_warp(scalar_t* row, int64_t size) {
    for (int64_t j = lane_of_thread(); j < size; j += kWarp) row[j] = narrow<scalar_t>(0);
}

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

// counts (C): of the pairs of the row, by class.
template <int kItems, typename Job>
__device__ RowLoss process_counted_row(const Job& job, int64_t row, const uint32_t* counts) {
    bool any = false;
    for (int64_t j = lane_of_thread(); j < job.num_classes; j += kWarp) any |= counts[j] != 0;
    auto* const gradient = job.gradient_row(row);
    if (__any_sync(kAllLanes, any)) return WarpRow<kItems, Job>(job, row).process(counts, gradient);
    if (gradient != nullptr) clear_by_warp(gradient, job.num_classes);
    return {};
}

// A warp a row, at most kItems kWarp classes; the pairs are counted.
template <int kItems, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) counted_rows_kernel(RowsJob<scalar_t> job) {
    if (job.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<RowLoss>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    const int64_t row = slot_of_warp();
    RowLoss loss;
    if (row < job.num_rows) loss = process_counted_row<kItems>(job, row, job.counts + row * job.num_classes);
    if (job.loss == nullptr) return;
    const RowLoss of_block = block_sum(lane_of_thread() == 0 ? loss : RowLoss{}, scratch);
    reduce_losses(job, of_block, scratch, is_last);
}

// sums (C): shared memory of the warp.
template <int kItems, typename sum_t, typename scalar_t>
__device__ RowLoss process_grouped_row(const RowsJob<scalar_t>& job, int64_t slot, sum_t* sums) {
    const int64_t row = job.row_of_slot(slot);
    scalar_t* const gradient = job.gradient_row(slot);
    if (!job.has_pairs(row)) {
        if (gradient != nullptr) clear_by_warp(gradient, job.num_classes);
        return {};
    }
    for (int64_t j = lane_of_thread(); j < job.num_classes; j += kWarp) sums[j] = 0;
    __syncwarp();
    const int64_t end = job.groups.row_begin[row + 1];
    for (int64_t k = job.groups.row_begin[row] + lane_of_thread(); k < end; k += kWarp) {
        atomicAdd(sums + job.groups.targets[k], job.template value_of_pair<sum_t>(k));
    }
    __syncwarp();
    return WarpRow<kItems, RowsJob<scalar_t>>(job, row).process(sums, gradient);
}

// A warp a slot, at most kItems kWarp classes; the pairs are grouped. sum_t: uint32_t, or T where each pair
// has a gradient of its own.
template <int kItems, typename sum_t, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) grouped_rows_kernel(RowsJob<scalar_t> job) {
    if (job.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<RowLoss>(kMaxWarps);
    auto* const is_last = shared.take<int>(1);
    auto* const sums = shared.take<sum_t>(kWarpsOfBlock * job.num_classes);
    const int64_t slot = slot_of_warp();
    RowLoss loss;
    if (slot < job.max_slots) {
        loss = process_grouped_row<kItems>(job, slot, sums + warp_of_thread() * job.num_classes);
        if (job.grad_rows != nullptr && lane_of_thread() == 0) name_row(job, slot);
    }
    if (job.loss == nullptr) return;
    const RowLoss of_block = block_sum(lane_of_thread() == 0 ? loss : RowLoss{}, scratch);
    reduce_losses(job, of_block, scratch, is_last);
}

// So many threads of a multiprocessor have the registers that they need.
constexpr int kRowThreads = 768;

// A block a slot; the pairs are grouped.
template <typename sum_t, typename Job>
__global__ void __launch_bounds__(kRowThreads, 1) block_rows_kernel(Job job, BlockPlan plan) {
    if (job.is_done()) return;
    const BlockMemory<Job, sum_t> memory(plan, job.num_classes);
    const int64_t slot = blockIdx.x;
    RowLoss loss;
    if (slot < job.max_slots) {
        const int64_t row = job.row_of_slot(slot);
        auto* const gradient = job.gradient_row(slot);
        if (job.has_pairs(row)) {
            loss = BlockRow<Job, sum_t>(job, plan, memory, row).process(gradient);
        } else if (gradient != nullptr) {
            clear_by_block(gradient, job.num_classes);
        }
        if (job.grad_rows != nullptr && threadIdx.x == 0) name_row(job, slot);
    }
    if (job.loss != nullptr) reduce_losses(job, loss, memory.losses, memory.is_last);
}

// As many as have the registers.
template <typename Job>
constexpr int kOneBlockThreads = Job::kIsPlain && sizeof(typename Job::T) == sizeof(float) ? 1024 : 512;

// All at once, in one block: at most kItems kWarp classes.
template <int kItems, typename Job>
__global__ void __launch_bounds__(kOneBlockThreads<Job>, 1)
    one_block_kernel(Job job, IndexedPairs pairs, bool is_mean) {
    if (job.is_done()) return;
    SharedMemory shared;
    auto* const scratch = shared.take<RowLoss>(kMaxWarps);
    auto* const totals = shared.take<LossTotals>(1);
    const int64_t num_entries = job.num_rows * job.num_classes;
    auto* const counts = shared.take<uint32_t>(num_entries);
    for (int64_t k = threadIdx.x; k < num_entries; k += blockDim.x) counts[k] = 0;
    __syncthreads();
    count_in_table(pairs, Share(pairs.num_pairs()), job.num_classes, counts);
    __syncthreads();
    const int64_t num_targets = sum_counts(counts, num_entries, reinterpret_cast<double*>(scratch));
    const SumTotals<typename Job::T> sum_totals{counts,           job.num_rows, job.num_classes,
                                                job.class_weight, is_mean,      totals};
    sum_totals(num_targets);
    __syncthreads();
    job.totals = totals;
    RowLoss loss;
    for (int64_t row = warp_of_thread(); row < job.num_rows; row += warps_of_block()) {
        loss = loss + process_counted_row<kItems>(job, row, counts + row * job.num_classes);
    }
    if (job.loss == nullptr) return;
    const RowLoss total = block_sum(lane_of_thread() == 0 ? loss : RowLoss{}, scratch);
    if (threadIdx.x == 0) write_loss(job, total);
}

// What the losses of single pairs need of the rows that occur: a warp a slot.
template <int kItems, typename scalar_t>
__global__ void __launch_bounds__(kWarpsOfBlock* kWarp, 1) warp_stats_kernel(RowsJob<scalar_t> job) {
    const int64_t slot = slot_of_warp(), row = slot < job.max_slots ? job.row_of_slot(slot) : -1;
    if (row < 0) return;
    const RowStats<opmath_t<scalar_t>> stats = WarpRow<kItems, RowsJob<scalar_t>>(job, row).stats();
    if (lane_of_thread() == 0) job.stats[row] = stats;
}

// A block a slot.
template <typename scalar_t>
__global__ void __launch_bounds__(kRowThreads, 1) block_stats_kernel(RowsJob<scalar_t> job, BlockPlan plan) {
    const BlockMemory<RowsJob<scalar_t>, uint32_t> memory(plan, job.num_classes);
    const int64_t row = job.row_of_slot(blockIdx.x);
    if (row < 0) return;
    const RowStats<opmath_t<scalar_t>> stats =
        BlockRow<RowsJob<scalar_t>, uint32_t>(job, plan, memory, row).stats();
    if (threadIdx.x == 0) job.stats[row] = stats;
}

// losses (N)
template <typename scalar_t>
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_losses_kernel(RowsJob<scalar_t> job, IndexedPairs pairs, scalar_t* losses) {
    using T = opmath_t<scalar_t>;
    const double epsilon = job.label_smoothing;
    const Share share(pairs.num_pairs());
    pairs.for_each(share.begin, share.end, [&](const Pair& pair) {
        double loss = 0;
        if (pair.target != Pair::kIgnored) {
            const RowStats<T> stats = job.stats[pair.row];
            loss = static_cast<double>(stats.rest);
            if (epsilon < 1) {
                const T logit = widen(job.weight_row(pair.row)[pair.target]) - stats.max;
                loss += (1 - epsilon) * static_cast<double>(job.class_weight_of(pair.target)) *
                        (static_cast<double>(stats.log_sum) - static_cast<double>(logit));
            }
        }
        losses[pair.number] = narrow<scalar_t>(static_cast<T>(loss));
    });
}

constexpr int kScaleThreads = 512;

template <typename scalar_t>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(scalar_t* gradient, int64_t size, const scalar_t* grad_loss) {
    const opmath_t<scalar_t> scale = widen(*grad_loss);
    if (scale == 1) return;
    const int64_t threads = int64_t{gridDim.x} * blockDim.x;
    for (int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; k < size; k += threads) {
        const opmath_t<scalar_t> element = widen(gradient[k]);
        // Not zero times an infinity: rows without pairs stay zero.
        if (element != 0) gradient[k] = narrow<scalar_t>(element * scale);
    }
}

// ----------------------------------------------------------------------------------------------- launches

enum class Strategy { one_block, counted, grouped };

constexpr int kFewItems = 4;  // of a lane
template <typename T>
constexpr int kManyItems = kMaxWarpRow<T> / kWarp;

int64_t max_warp_row(FloatType type) {
    return type == FloatType::float64 ? kMaxWarpRow<double> : kMaxWarpRow<float>;
}

Strategy strategy_of(const LossCall& call) {
    constexpr int64_t kMaxEntries = 1 << 14, kMaxPairs = 1 << 12;  // of one block
    const bool can_count =
        call.is_reduced && call.grad_rows == nullptr && call.num_classes <= max_warp_row(call.type);
    if (!can_count || !fits_table(kName, call.num_rows, call.num_classes)) return Strategy::grouped;
    const bool is_small = call.num_classes <= kFewItems * kWarp && call.num_rows <= kMaxEntries &&
                          call.num_rows * call.num_classes <= kMaxEntries && call.num_pairs <= kMaxPairs;
    return is_small ? Strategy::one_block : Strategy::counted;
}

bool has_grad_losses(const LossCall& call) { return !call.is_reduced && call.gradient != nullptr; }

// A dense gradient has all rows; else those that occur suffice.
bool has_slot_rows(const LossCall& call) { return call.grad_rows != nullptr || call.gradient == nullptr; }

int64_t max_slots(const LossCall& call, Strategy strategy) {
    return strategy == Strategy::grouped && has_slot_rows(call) ? std::min(call.num_pairs, call.num_rows)
                                                                : call.num_rows;
}

struct Scratch {
    PairGroups groups{};
    uint32_t* counts = nullptr;
    unsigned* ticket;
    LossTotals* totals;
    RowLoss* losses_of_blocks;
    void* stats = nullptr;
    uintptr_t zero_bytes;  // from the beginning on, to be cleared
    uintptr_t end;

    Scratch(const LossCall& call, void* memory) {
        const Strategy strategy = strategy_of(call);
        ScratchMemory scratch(memory);
        ticket = scratch.take<unsigned>(2);
        groups.ticket = ticket + 1;
        if (strategy == Strategy::counted) counts = scratch.take<uint32_t>(call.num_rows * call.num_classes);
        if (strategy == Strategy::grouped) take_zero_groups(call, scratch);
        zero_bytes = scratch.end() - reinterpret_cast<uintptr_t>(memory);
        if (strategy == Strategy::grouped) take_groups(call, scratch);
        totals = scratch.take<LossTotals>(1);
        losses_of_blocks = scratch.take<RowLoss>(std::max<int64_t>(max_slots(call, strategy), 1));
        if (!call.is_reduced) stats = scratch.take<RowStats<double>>(call.num_rows);
        end = scratch.end();
    }

  private:
    void take_zero_groups(const LossCall& call, ScratchMemory& scratch) {
        groups.row_counts = scratch.take<uint32_t>(call.num_rows);
        if (has_slot_rows(call)) groups.row_occurs = scratch.take<uint32_t>(call.num_rows);
        if (call.class_weight != nullptr) groups.class_counts = scratch.take<uint32_t>(call.num_classes);
    }

    void take_groups(const LossCall& call, ScratchMemory& scratch) {
        groups.cursors = scratch.take<uint32_t>(call.num_rows);
        groups.row_begin = scratch.take<int64_t>(call.num_rows + 1);
        groups.targets = scratch.take<int32_t>(call.num_pairs);
        if (has_grad_losses(call)) groups.numbers = scratch.take<int64_t>(call.num_pairs);
        if (!has_slot_rows(call)) return;
        groups.slot_rows = scratch.take<int64_t>(max_slots(call, Strategy::grouped));
        groups.num_slots = scratch.take<int64_t>(1);
    }
};

template <typename scalar_t>
class Launcher {
  public:
    using T = opmath_t<scalar_t>;

    Launcher(const LossCall& call, void* memory, cudaStream_t stream)
        : call_(call),
          stream_(stream),
          strategy_(strategy_of(call)),
          scratch_(call, memory),
          pairs_{call.idx, call.targets, call.num_pairs, call.num_rows, call.num_classes, call.ignore_index},
          job_(make_job()) {}

    void run() const {
        if (strategy_ == Strategy::one_block) return run_in_one_block();
        clear(kName, stream_, scratch_.ticket, scratch_.zero_bytes);
        strategy_ == Strategy::counted ? count() : group();
        if (!call_.is_reduced && call_.loss != nullptr) launch_pair_losses();
        if (has_grad_losses(call_)) {
            launch_grouped_rows<T>();
        } else if (call_.is_reduced) {
            strategy_ == Strategy::counted ? launch_counted_rows() : launch_grouped_rows<uint32_t>();
        }
    }

  private:
    RowsJob<scalar_t> make_job() const {
        RowsJob<scalar_t> job{};
        job.weight = static_cast<const scalar_t*>(call_.weight);
        job.row_stride = call_.row_stride;
        job.num_rows = call_.num_rows;
        job.num_classes = call_.num_classes;
        job.class_weight = static_cast<const T*>(call_.class_weight);
        job.label_smoothing = call_.label_smoothing;
        job.smoothing_of_class = call_.label_smoothing / static_cast<double>(call_.num_classes);
        job.z_loss = call_.z_loss;
        job.padding_idx = call_.padding_idx;
        job.totals = scratch_.totals;
        job.counts = scratch_.counts;
        job.groups = scratch_.groups;
        job.grad_loss = static_cast<const scalar_t*>(call_.grad_loss);
        job.has_grad_losses = has_grad_losses(call_);
        job.unless_one = call_.unless_one;
        job.max_slots = max_slots(call_, strategy_);
        job.losses_of_blocks = scratch_.losses_of_blocks;
        job.loss = call_.is_reduced ? static_cast<scalar_t*>(call_.loss) : nullptr;
        job.ticket = scratch_.ticket;
        job.stats = static_cast<RowStats<T>*>(scratch_.stats);
        job.gradient = static_cast<scalar_t*>(call_.gradient);
        job.grad_rows = call_.grad_rows;
        return job;
    }

    // launch_job(job), as plain as it is.
    template <typename LaunchJob>
    void with_plain_job(const LaunchJob& launch_job) const {
        const bool is_plain = call_.class_weight == nullptr && call_.label_smoothing == 0;
        is_plain ? launch_job(PlainRowsJob<scalar_t>{job_}) : launch_job(job_);
    }

    void run_in_one_block() const {
        const int64_t shared_bytes = SharedMemory::bytes<RowLoss>(kMaxWarps) +
                                     SharedMemory::bytes<LossTotals>(1) +
                                     SharedMemory::bytes<uint32_t>(call_.num_rows * call_.num_classes);
        with_plain_job([&](const auto& job) {
            using Job = std::decay_t<decltype(job)>;
            launch({kName, stream_, 1, kOneBlockThreads<Job>, static_cast<size_t>(shared_bytes)},
                   one_block_kernel<kFewItems, Job>, job, pairs_, call_.is_mean);
        });
    }

    void count() const {
        const SumTotals<T> finish{scratch_.counts,   call_.num_rows, call_.num_classes,
                                  job_.class_weight, call_.is_mean,  scratch_.totals};
        count_table(kName, stream_, pairs_, call_.num_rows, call_.num_classes, scratch_.counts,
                    scratch_.groups.ticket, finish);
    }

    void group() const {
        const SumTotals<T> finish{scratch_.groups.class_counts,
                                  /*num_rows=*/1,
                                  call_.num_classes,
                                  job_.class_weight,
                                  call_.is_mean,
                                  scratch_.totals};
        group_pairs(kName, stream_, pairs_, call_.num_rows, scratch_.groups, finish);
    }

    bool is_for_warps() const { return call_.num_classes <= kMaxWarpRow<T>; }
    bool has_few_items() const { return call_.num_classes <= kFewItems * kWarp; }

    LaunchShape shape_of_warps(int64_t shared_bytes) const {
        const int64_t blocks = (job_.max_slots + kWarpsOfBlock - 1) / kWarpsOfBlock;
        // At least one, which writes the loss of no pairs.
        return {kName, stream_, std::max<int64_t>(blocks, 1), kWarpsOfBlock * kWarp,
                static_cast<size_t>(shared_bytes)};
    }

    static constexpr int64_t kReduceBytes =
        SharedMemory::bytes<RowLoss>(kMaxWarps) + SharedMemory::bytes<int>(1);

    void launch_counted_rows() const {
        launch(shape_of_warps(kReduceBytes),
               has_few_items() ? counted_rows_kernel<kFewItems, scalar_t>
                               : counted_rows_kernel<kManyItems<T>, scalar_t>,
               job_);
    }

    template <typename sum_t>
    void launch_grouped_rows() const {
        if (is_for_warps()) {
            const int64_t sums_bytes = SharedMemory::bytes<sum_t>(kWarpsOfBlock * call_.num_classes);
            launch(shape_of_warps(kReduceBytes + sums_bytes),
                   has_few_items() ? grouped_rows_kernel<kFewItems, sum_t, scalar_t>
                                   : grouped_rows_kernel<kManyItems<T>, sum_t, scalar_t>,
                   job_);
        } else {
            launch_block_rows<sum_t>();
        }
    }

    template <typename sum_t>
    void launch_block_rows() const {
        const BlockPlan plan = plan_block<sum_t>(/*sweeps=*/true);
        const auto launch_job = [&](const auto& job) {
            launch(shape_of_blocks<sum_t>(plan), block_rows_kernel<sum_t, std::decay_t<decltype(job)>>, job,
                   plan);
        };
        if constexpr (std::is_same_v<sum_t, uint32_t>) {
            with_plain_job(launch_job);
        } else {
            launch_job(job_);
        }
    }

    void launch_pair_losses() const {
        launch_stats();
        const int64_t blocks = blocks_for_pairs(kName, call_.num_pairs, /*blocks_a_multiprocessor=*/4);
        launch({kName, stream_, blocks, kPairThreads}, pair_losses_kernel<scalar_t>, job_, pairs_,
               static_cast<scalar_t*>(call_.loss));
    }

    void launch_stats() const {
        if (is_for_warps()) {
            launch(shape_of_warps(0),
                   has_few_items() ? warp_stats_kernel<kFewItems, scalar_t>
                                   : warp_stats_kernel<kManyItems<T>, scalar_t>,
                   job_);
        } else {
            const BlockPlan plan = plan_block<uint32_t>(/*sweeps=*/false);
            launch(shape_of_blocks<uint32_t>(plan), block_stats_kernel<scalar_t>, job_, plan);
        }
    }

    template <typename sum_t>
    LaunchShape shape_of_blocks(const BlockPlan& plan) const {
        const int64_t shared_bytes = BlockMemory<RowsJob<scalar_t>, sum_t>::bytes(plan, call_.num_classes);
        return {kName, stream_, std::max<int64_t>(job_.max_slots, 1), plan.threads,
                static_cast<size_t>(shared_bytes)};
    }

    // As many blocks on a multiprocessor as leave each a row and a tile of a useful size: while one waits for
    // memory, others compute. sweeps: over tiles, else a row is read once.
    template <typename sum_t>
    BlockPlan plan_block(bool sweeps) const {
        constexpr int64_t kMaxBlocks = 3, kSmallestTile = 1 << 12, kReserved = 1 << 10;
        if (!sweeps) return {kRowThreads / kMaxBlocks, /*tile=*/0, /*caches_row=*/false};
        const int64_t all_classes = (call_.num_classes + kTileStep - 1) / kTileStep * kTileStep;
        const int64_t least = std::min(all_classes, kSmallestTile), available = max_shared_bytes(kName);
        for (int64_t blocks = kMaxBlocks; blocks > 0; --blocks) {
            BlockPlan plan{static_cast<int>(kRowThreads / blocks), /*tile=*/0, /*caches_row=*/true};
            const int64_t left = available / blocks - kReserved -
                                 BlockMemory<RowsJob<scalar_t>, sum_t>::bytes(plan, call_.num_classes);
            plan.tile = std::min(all_classes, left / int64_t{sizeof(sum_t)} / kTileStep * kTileStep);
            if (plan.tile >= least) return plan;
        }
        return {kRowThreads, least, /*caches_row=*/false};  // a row is read from the table again
    }

    static constexpr int64_t kTileStep = 16;  // classes: whole vectors of any type

    const LossCall& call_;
    const cudaStream_t stream_;
    const Strategy strategy_;
    const Scratch scratch_;
    const IndexedPairs pairs_;
    const RowsJob<scalar_t> job_;
};

}  // namespace

int64_t embedding_cross_entropy_scratch_bytes(const LossCall& call) {
    return static_cast<int64_t>(Scratch(call, nullptr).end);
}

void launch_embedding_cross_entropy(const LossCall& call, void* scratch, cudaStream_t stream) {
    with_type(call.type, [&](auto zero) { Launcher<decltype(zero)>(call, scratch, stream).run(); });
}

void launch_scale_gradient(FloatType type, void* gradient, int64_t size, const void* grad_loss,
                           cudaStream_t stream) {
    constexpr int64_t kElementsOfThread = 16, kBlocksOfMultiprocessor = 4;
    const int64_t most = kBlocksOfMultiprocessor * num_multiprocessors(kName);
    const int64_t blocks =
        std::min((size + kScaleThreads * kElementsOfThread - 1) / (kScaleThreads * kElementsOfThread), most);
    with_type(type, [&](auto zero) {
        using scalar_t = decltype(zero);
        launch({kName, stream, blocks, kScaleThreads}, scale_kernel<scalar_t>,
               static_cast<scalar_t*>(gradient), size, static_cast<const scalar_t*>(grad_loss));
    });
}

}  // namespace bigramx
