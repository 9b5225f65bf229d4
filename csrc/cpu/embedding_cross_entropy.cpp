#include "../embedding_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "huge_pages.h"
#include "loss_workspace.h"

namespace bigramx {

// What one call does to every row; plain pointers, all offsets in elements. T is float, or double for
// float64.
struct LossJob {
    const void* weight;  // (R, C)
    int64_t row_stride;
    int64_t num_classes;
    const Pairs* pairs;
    const void* class_weight;  // (C) of T, or null: all ones
    double class_weight_sum;
    int64_t padding_idx;
    double label_smoothing;
    double z_loss;

    const int64_t* rows;  // (num_slots), the row of each slot; null: slots are rows
    int64_t num_slots;
    bool want_loss;
    void* losses;             // (N), or null: only their sum is wanted
    void* gradient;           // (num_slots, C), or null: not wanted
    bool stream_gradient;     // past the caches
    const void* grad_losses;  // (N) of T, or null: all ones
    double loss_scale;        // that multiplies them
    double z_loss_scale;
};

constexpr int64_t kMaxRowsAtOnce = 16;

// How many rows a kernel takes together: what fits into the first-level cache.
inline int64_t rows_at_once(int64_t num_classes) {
    constexpr int64_t kElements = 2048;
    return std::clamp<int64_t>(kElements / std::max<int64_t>(num_classes, 1), 1, kMaxRowsAtOnce);
}

// A gradient row that is streamed out still needs its scratch while the next rows are computed.
inline int64_t rows_of_scratch(const LossJob& job) {
    return rows_at_once(job.num_classes) + (job.stream_gradient ? 1 : 0);
}

struct LossScratch {
    void* exponentials;      // (rows_of_scratch, padded C) of T
    int32_t* target_counts;  // (C), zero
};

struct RowsToGather {
    const int64_t* idx;  // (N)
    const char* table;
    int64_t stride_bytes;
    int64_t row_bytes;
    char* to;  // (N, row_bytes)
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "embedding_cross_entropy_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

constexpr const char* kName = "embedding_cross_entropy";

// The distinct rows, ascending, but the padding row last, where the gradient can do without it.
at::Tensor occurring_rows(const Pairs& pairs, int64_t num_rows, int64_t padding_idx) {
    std::vector<int64_t> found;
    bool padding_occurs = false;
    for (int64_t row = 0; row < num_rows; ++row) {
        if (!pairs.has_row(row)) continue;
        if (row == padding_idx) {
            padding_occurs = true;
        } else {
            found.push_back(row);
        }
    }
    if (padding_occurs) found.push_back(padding_idx);
    at::Tensor rows = at::empty({static_cast<int64_t>(found.size())}, at::dtype(at::kLong));
    std::copy(found.begin(), found.end(), rows.data_ptr<int64_t>());
    return rows;
}

LossJob make_job(const LossInputs& inputs, const LossOptions& options, const Pairs& pairs) {
    LossJob job{};
    job.weight = inputs.weight.const_data_ptr();
    job.row_stride = inputs.weight.stride(0);
    job.num_classes = inputs.weight.size(1);
    job.pairs = &pairs;
    job.class_weight_sum = static_cast<double>(job.num_classes);
    if (inputs.class_weight.defined()) {
        job.class_weight = inputs.class_weight.const_data_ptr();
        job.class_weight_sum = inputs.class_weight.sum().item<double>();
    }
    job.padding_idx = options.padding_idx;
    job.label_smoothing = options.label_smoothing;
    job.z_loss = options.z_loss;
    job.loss_scale = options.reduction == at::Reduction::Mean ? 1.0 / pairs.target_weight : 1.0;
    job.z_loss_scale =
        options.reduction == at::Reduction::Mean ? 1.0 / static_cast<double>(pairs.num_targets) : 1.0;
    return job;
}

// How the slots are shared out: blocks of fixed size, over whose sums the total is taken in order, so that
// the result does not depend on the number of threads; and runs of blocks, which threads take one after
// another, for rows differ in what they cost.
struct Shares {
    Shares(int64_t num_slots, int64_t num_classes) {
        constexpr int64_t kBlockElements = 1 << 15;  // enough work to be worth waking a thread
        constexpr int64_t kRunsOfThread = 8;
        block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, num_classes));
        num_blocks = (num_slots + block - 1) / block;
        num_threads = std::min<int64_t>(num_blocks, at::get_num_threads());
        run = std::max<int64_t>(1, num_blocks / (kRunsOfThread * num_threads));
    }

    int64_t block;  // in slots
    int64_t num_blocks;
    int64_t num_threads;
    int64_t run;  // in blocks
};

// Calls visit(thread, block) for all blocks.
template <typename Visit>
void share_out(const Shares& shares, const Visit& visit) {
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, shares.num_threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t thread = first; thread < last; ++thread) {
            for (int64_t begin; (begin = next.fetch_add(shares.run)) < shares.num_blocks;) {
                const int64_t end = std::min(begin + shares.run, shares.num_blocks);
                for (int64_t block = begin; block < end; ++block) visit(thread, block);
            }
        }
    });
}

LossSums run_slots(const LossJob& job, at::ScalarType dtype, LossWorkspace& workspace) {
    if (job.num_slots == 0) return {};
    const Shares shares(job.num_slots, job.num_classes);
    workspace.target_counts.resize_zeros(shares.num_threads * job.num_classes);
    workspace.sums_of_block.resize(shares.num_blocks);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, kName, [&] {
        using T = Accumulator<scalar_t>;
        const auto kernel = BIGRAMX_DISPATCH(process_rows<scalar_t>);
        const int64_t scratch_bytes =
            rows_of_scratch(job) * padded(job.num_classes) * static_cast<int64_t>(sizeof(T));
        workspace.exponentials.resize(shares.num_threads * scratch_bytes);
        share_out(shares, [&](int64_t thread, int64_t block) {
            const LossScratch scratch{workspace.exponentials.begin() + thread * scratch_bytes,
                                      workspace.target_counts.begin() + thread * job.num_classes};
            workspace.sums_of_block[block] = kernel(job, scratch, block * shares.block,
                                                    std::min(job.num_slots, (block + 1) * shares.block));
        });
    });
    LossSums total;
    for (const LossSums& sums : workspace.sums_of_block) total += sums;
    return total;
}

// Over the rows that occur, or over all where a dense gradient is wanted. A gradient whose values are
// allocated is written there.
LossSums run(LossJob& job, const LossInputs& inputs, const LossOptions& options, WeightGradient* gradient,
             LossWorkspace& workspace) {
    constexpr int64_t kCached = int64_t{1} << 25;  // bytes: a larger gradient leaves the caches unread
    const bool all_rows = gradient != nullptr && !options.sparse;
    at::Tensor rows;
    job.num_slots = inputs.weight.size(0);
    if (!all_rows) {
        rows = occurring_rows(workspace.pairs, job.num_slots, options.padding_idx);
        job.num_slots = rows.numel();
        job.rows = rows.const_data_ptr<int64_t>();
    }
    if (gradient != nullptr) {
        if (!gradient->values.defined()) {
            gradient->rows = all_rows ? at::empty({0}, at::dtype(at::kLong)) : rows;
            gradient->values = at::empty({job.num_slots, job.num_classes}, inputs.weight.options());
            advise_huge_pages(gradient->values);
        }
        job.gradient = gradient->values.data_ptr();
        job.stream_gradient = static_cast<int64_t>(gradient->values.nbytes()) > kCached;
    }
    const LossSums sums = run_slots(job, inputs.weight.scalar_type(), workspace);
    if (gradient != nullptr && options.sparse && job.num_slots > 0 &&
        job.rows[job.num_slots - 1] == options.padding_idx) {
        *gradient = {rows.narrow(0, 0, job.num_slots - 1), gradient->values.narrow(0, 0, job.num_slots - 1)};
    }
    return sums;
}

double reduced_loss(const LossJob& job, const LossSums& sums) {
    return sums.cross_entropy * job.loss_scale + sums.z_loss * job.z_loss_scale;
}

// (N, C): weight[idx], for an idx that was checked.
at::Tensor gather_logits(const LossInputs& inputs) {
    const at::Tensor& weight = inputs.weight;
    const int64_t num_pairs = inputs.idx.numel(), element_size = static_cast<int64_t>(weight.element_size());
    at::Tensor logits = at::empty({num_pairs, weight.size(1)}, weight.options());
    const RowsToGather rows{inputs.idx.const_data_ptr<int64_t>(),
                            static_cast<const char*>(weight.const_data_ptr()),
                            weight.stride(0) * element_size, weight.size(1) * element_size,
                            static_cast<char*>(logits.data_ptr())};
    const auto kernel = BIGRAMX_DISPATCH(gather_rows);
    const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, rows.row_bytes));
    at::parallel_for(0, num_pairs, grain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
    return logits;
}

}  // namespace

at::Tensor embedding_cross_entropy_cpu(const LossInputs& inputs, const LossOptions& options,
                                       const LossExtras& extras) {
    LossWorkspace workspace;
    workspace.pairs.group(inputs, options);
    LossJob job = make_job(inputs, options, workspace.pairs);
    job.want_loss = true;
    at::Tensor losses;
    if (options.reduction == at::Reduction::None) {
        losses = at::empty(inputs.targets.sizes(), inputs.weight.options());
        job.losses = losses.data_ptr();
    }
    if (extras.logits != nullptr) *extras.logits = gather_logits(inputs);
    const LossSums sums = run(job, inputs, options, extras.gradient, workspace);
    return losses.defined() ? losses : at::scalar_tensor(reduced_loss(job, sums), inputs.weight.options());
}

double embedding_cross_entropy_step_cpu(const LossInputs& inputs, const LossOptions& options,
                                        const at::Tensor& grad_weight, LossWorkspace& workspace) {
    workspace.pairs.group(inputs, options);
    LossJob job = make_job(inputs, options, workspace.pairs);
    job.want_loss = true;
    WeightGradient gradient{at::Tensor(), grad_weight};
    return reduced_loss(job, run(job, inputs, options, &gradient, workspace));
}

WeightGradient embedding_cross_entropy_backward_cpu(const at::Tensor& grad_loss, const LossInputs& inputs,
                                                    const LossOptions& options) {
    LossWorkspace workspace;
    workspace.pairs.group(inputs, options);
    LossJob job = make_job(inputs, options, workspace.pairs);
    at::Tensor grad_losses;
    if (options.reduction == at::Reduction::None) {
        grad_losses = grad_loss.reshape(-1).to(accumulator_of(inputs.weight.scalar_type())).contiguous();
        job.grad_losses = grad_losses.const_data_ptr();
    } else {
        job.loss_scale *= grad_loss.item<double>();
        job.z_loss_scale *= grad_loss.item<double>();
    }
    WeightGradient gradient;
    run(job, inputs, options, &gradient, workspace);
    return gradient;
}

}  // namespace bigramx
