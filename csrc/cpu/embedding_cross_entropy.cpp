#include "../embedding_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "huge_pages.h"

namespace bigramx {

// What one call does to every row; plain pointers, all offsets in elements. T is float, or double for
// float64.
struct LossJob {
    const void* weight;  // (R, C)
    int64_t row_stride;
    int64_t num_classes;
    const int64_t* row_begin;    // (R + 1): row i has the pairs from row_begin[i] to row_begin[i + 1]
    const int64_t* order;        // (N): their numbers; or null, where the counts say it all
    const int32_t* pair_counts;  // (R, padded C): how often row and target meet; or null
    const int64_t* targets;      // (N)
    const void* class_weight;    // (C) of T, or null: all ones
    double class_weight_sum;
    int64_t ignore_index;
    int64_t padding_idx;
    double label_smoothing;
    double z_loss;

    const int64_t* rows;  // (K), the row of each slot; null: slots are rows
    bool want_loss;
    void* losses;             // (N), or null: only their sum is wanted
    void* gradient;           // (slots, C), or null: not wanted
    const void* grad_losses;  // (N) of T, or null: all ones
    double loss_scale;        // that multiplies them
    double z_loss_scale;
};

// A row of scratch holds whole vectors: a partial store could not be forwarded to the load that follows it.
inline int64_t padded(int64_t num_classes) {
    constexpr int64_t kLongestVector = 16;
    return (num_classes + kLongestVector - 1) / kLongestVector * kLongestVector;
}

constexpr int64_t kMaxRowsAtOnce = 16;

// How many rows a kernel takes together: what fits into the first-level cache.
inline int64_t rows_at_once(int64_t num_classes) {
    constexpr int64_t kElements = 2048;
    return std::clamp<int64_t>(kElements / std::max<int64_t>(num_classes, 1), 1, kMaxRowsAtOnce);
}

struct LossScratch {
    void* exponentials;      // (rows_at_once, padded C) of T
    int32_t* target_counts;  // (C), zero
};

struct LossSums {
    double cross_entropy = 0, z_loss = 0;

    LossSums& operator+=(const LossSums& other) {
        cross_entropy += other.cross_entropy;
        z_loss += other.z_loss;
        return *this;
    }
};

}  // namespace bigramx

#define BIGRAMX_KERNELS "embedding_cross_entropy_kernels.h"
#include "for_each_capability.h"

namespace bigramx {
namespace {

constexpr const char* kName = "embedding_cross_entropy";

// The N pairs, grouped by row: counted, where a table of counts is small, else sorted by a stable counting
// sort.
struct Pairs {
    Buffer<int64_t> row_begin;    // (R + 1)
    Buffer<int32_t> pair_counts;  // (R, padded C): how often row and target meet; or (0)
    Buffer<int64_t> order;        // (N); or (0)
    int64_t num_targets = 0;      // those that are not ignored
    double target_weight = 0;     // the sum of their class weights
    int64_t num_rows = 0;         // distinct rows, ignored pairs included
};

void check_pairs(const LossInputs& inputs, const LossOptions& options) {
    const int64_t num_rows = inputs.weight.size(0), num_classes = inputs.weight.size(1);
    const int64_t* idx = inputs.idx.const_data_ptr<int64_t>();
    const int64_t* targets = inputs.targets.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < inputs.idx.numel(); ++n) {
        TORCH_CHECK_INDEX(idx[n] >= 0 && idx[n] < num_rows, kName, ": index out of range: idx holds ", idx[n],
                          " at position ", n, ", expected 0 <= idx < ", num_rows);
        TORCH_CHECK_INDEX((targets[n] >= 0 && targets[n] < num_classes) || targets[n] == options.ignore_index,
                          kName, ": Target ", targets[n], " is out of bounds: at position ", n,
                          ", expected 0 <= targets < ", num_classes,
                          " or ignore_index = ", options.ignore_index);
    }
}

double total_class_weight(const LossInputs& inputs, int64_t ignore_index) {
    const at::Tensor class_weight = inputs.class_weight.to(at::kDouble);
    const double* weights = class_weight.const_data_ptr<double>();
    const int64_t* targets = inputs.targets.const_data_ptr<int64_t>();
    double total = 0;
    for (int64_t n = 0; n < inputs.targets.numel(); ++n) {
        if (targets[n] != ignore_index) total += weights[targets[n]];
    }
    return total;
}

// A table of counts pays where it has few entries for each pair, or few enough to stay in a near cache.
// Pairs that each have a loss or a gradient of their own cannot be counted.
bool worth_counting(const LossInputs& inputs, const LossOptions& options) {
    constexpr int64_t kSmall = 1 << 14;
    const int64_t num_pairs = inputs.idx.numel();
    return options.reduction != at::Reduction::None && num_pairs <= std::numeric_limits<int32_t>::max() &&
           inputs.weight.size(0) * padded(inputs.weight.size(1)) <= std::max(kSmall, 4 * num_pairs);
}

Pairs group_pairs(const LossInputs& inputs, const LossOptions& options) {
    const int64_t num_pairs = inputs.idx.numel(), num_rows = inputs.weight.size(0);
    check_pairs(inputs, options);
    const int64_t* idx = inputs.idx.const_data_ptr<int64_t>();
    const int64_t* targets = inputs.targets.const_data_ptr<int64_t>();

    const bool counted = worth_counting(inputs, options);
    const int64_t stride = padded(inputs.weight.size(1));
    Pairs pairs{Buffer<int64_t>::zeros(num_rows + 1), Buffer<int32_t>::zeros(counted ? num_rows * stride : 0),
                Buffer<int64_t>(counted ? 0 : num_pairs)};
    int64_t* row_begin = pairs.row_begin.begin();
    for (int64_t n = 0; n < num_pairs; ++n) {
        ++row_begin[idx[n]];
        if (targets[n] == options.ignore_index) continue;
        ++pairs.num_targets;
        if (counted) ++pairs.pair_counts[idx[n] * stride + targets[n]];
    }
    // Each row's end; placing the pairs from the last to the first then moves it down to the row's begin.
    int64_t end = 0;
    for (int64_t row = 0; row <= num_rows; ++row) {
        pairs.num_rows += row_begin[row] > 0;
        end += row_begin[row];
        row_begin[row] = end;
    }
    for (int64_t n = num_pairs - 1; n >= 0; --n) {
        const int64_t place = --row_begin[idx[n]];
        if (!counted) pairs.order[place] = n;
    }

    pairs.target_weight = inputs.class_weight.defined() ? total_class_weight(inputs, options.ignore_index)
                                                        : static_cast<double>(pairs.num_targets);
    return pairs;
}

// The distinct rows, ascending, but the padding row last, where the gradient can do without it.
at::Tensor occurring_rows(const Pairs& pairs, int64_t padding_idx) {
    at::Tensor rows = at::empty({pairs.num_rows}, at::dtype(at::kLong));
    int64_t* begin = rows.data_ptr<int64_t>();
    int64_t* end = begin;
    for (int64_t row = 0; row + 1 < pairs.row_begin.size(); ++row) {
        if (pairs.row_begin[row] < pairs.row_begin[row + 1]) *end++ = row;
    }
    int64_t* padding = std::find(begin, end, padding_idx);
    if (padding != end) std::rotate(padding, padding + 1, end);
    return rows;
}

LossJob make_job(const LossInputs& inputs, const LossOptions& options, const Pairs& pairs) {
    LossJob job{};
    job.weight = inputs.weight.const_data_ptr();
    job.row_stride = inputs.weight.stride(0);
    job.num_classes = inputs.weight.size(1);
    job.row_begin = pairs.row_begin.begin();
    job.order = pairs.order.begin();
    job.pair_counts = pairs.pair_counts.size() > 0 ? pairs.pair_counts.begin() : nullptr;
    job.targets = inputs.targets.const_data_ptr<int64_t>();
    job.class_weight_sum = static_cast<double>(job.num_classes);
    if (inputs.class_weight.defined()) {
        job.class_weight = inputs.class_weight.const_data_ptr();
        job.class_weight_sum = inputs.class_weight.sum().item<double>();
    }
    job.ignore_index = options.ignore_index;
    job.padding_idx = options.padding_idx;
    job.label_smoothing = options.label_smoothing;
    job.z_loss = options.z_loss;
    job.loss_scale = options.reduction == at::Reduction::Mean ? 1.0 / pairs.target_weight : 1.0;
    job.z_loss_scale =
        options.reduction == at::Reduction::Mean ? 1.0 / static_cast<double>(pairs.num_targets) : 1.0;
    return job;
}

// Runs the job over its slots. The sums are taken over blocks of fixed size, then in order, so that the
// result does not depend on the number of threads.
LossSums run_slots(const LossJob& job, int64_t num_slots, at::ScalarType dtype) {
    if (num_slots == 0) return {};
    constexpr int64_t kBlockElements = 1 << 15;  // enough work to be worth waking a thread
    const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, job.num_classes));
    const int64_t num_blocks = (num_slots + block - 1) / block;
    const int64_t num_threads = num_blocks == 1 ? 1 : at::get_num_threads();
    const Buffer<int32_t> target_counts = Buffer<int32_t>::zeros(num_threads * job.num_classes);
    const Buffer<LossSums> sums_of_block(num_blocks);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, kName, [&] {
        using T = Accumulator<scalar_t>;
        const auto kernel = BIGRAMX_DISPATCH(process_rows<scalar_t>);
        const int64_t scratch_size = rows_at_once(job.num_classes) * padded(job.num_classes);
        const Buffer<T> exponentials(num_threads * scratch_size);
        at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
            const int64_t thread = num_threads == 1 ? 0 : at::get_thread_num();
            const LossScratch scratch{exponentials.begin() + thread * scratch_size,
                                      target_counts.begin() + thread * job.num_classes};
            for (int64_t k = first; k < last; ++k) {
                sums_of_block[k] = kernel(job, scratch, k * block, std::min(num_slots, (k + 1) * block));
            }
        });
    });
    LossSums total;
    for (const LossSums& sums : sums_of_block) total += sums;
    return total;
}

// Runs the job over the rows that occur, or over all where a dense gradient is wanted.
LossSums run(LossJob& job, const LossInputs& inputs, const LossOptions& options, const Pairs& pairs,
             WeightGradient* gradient) {
    const bool all_rows = gradient != nullptr && !options.sparse;
    const at::Tensor rows =
        all_rows ? at::empty({0}, at::dtype(at::kLong)) : occurring_rows(pairs, options.padding_idx);
    const int64_t num_slots = all_rows ? inputs.weight.size(0) : rows.numel();
    job.rows = all_rows ? nullptr : rows.const_data_ptr<int64_t>();
    if (gradient != nullptr) {
        *gradient = {rows, at::empty({num_slots, job.num_classes}, inputs.weight.options())};
        advise_huge_pages(gradient->values);
        job.gradient = gradient->values.data_ptr();
    }
    const LossSums sums = run_slots(job, num_slots, inputs.weight.scalar_type());
    if (gradient != nullptr && options.sparse && num_slots > 0 &&
        job.rows[num_slots - 1] == options.padding_idx) {
        *gradient = {rows.narrow(0, 0, num_slots - 1), gradient->values.narrow(0, 0, num_slots - 1)};
    }
    return sums;
}

// (N, C): weight[idx], for an idx that was checked.
at::Tensor gather_rows(const LossInputs& inputs) {
    const int64_t num_pairs = inputs.idx.numel(), num_classes = inputs.weight.size(1);
    at::Tensor rows = at::empty({num_pairs, num_classes}, inputs.weight.options());
    const int64_t row_bytes = num_classes * inputs.weight.element_size();
    const int64_t stride_bytes = inputs.weight.stride(0) * inputs.weight.element_size();
    const int64_t* idx = inputs.idx.const_data_ptr<int64_t>();
    const char* from = static_cast<const char*>(inputs.weight.const_data_ptr());
    char* to = static_cast<char*>(rows.data_ptr());
    const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, row_bytes));
    at::parallel_for(0, num_pairs, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            std::memcpy(to + n * row_bytes, from + idx[n] * stride_bytes, row_bytes);
    });
    return rows;
}

}  // namespace

at::Tensor embedding_cross_entropy_cpu(const LossInputs& inputs, const LossOptions& options,
                                       const LossExtras& extras) {
    const Pairs pairs = group_pairs(inputs, options);
    LossJob job = make_job(inputs, options, pairs);
    job.want_loss = true;
    at::Tensor losses;
    if (options.reduction == at::Reduction::None) {
        losses = at::empty(inputs.targets.sizes(), inputs.weight.options());
        job.losses = losses.data_ptr();
    }
    if (extras.logits != nullptr) *extras.logits = gather_rows(inputs);
    const LossSums sums = run(job, inputs, options, pairs, extras.gradient);
    if (losses.defined()) return losses;
    return at::scalar_tensor(sums.cross_entropy * job.loss_scale + sums.z_loss * job.z_loss_scale,
                             inputs.weight.options());
}

WeightGradient embedding_cross_entropy_backward_cpu(const at::Tensor& grad_loss, const LossInputs& inputs,
                                                    const LossOptions& options) {
    const Pairs pairs = group_pairs(inputs, options);
    LossJob job = make_job(inputs, options, pairs);
    at::Tensor grad_losses;
    if (options.reduction == at::Reduction::None) {
        grad_losses = grad_loss.reshape(-1).to(accumulator_of(inputs.weight.scalar_type())).contiguous();
        job.grad_losses = grad_losses.const_data_ptr();
    } else {
        job.loss_scale *= grad_loss.item<double>();
        job.z_loss_scale *= grad_loss.item<double>();
    }
    WeightGradient gradient;
    run(job, inputs, options, pairs, &gradient);
    return gradient;
}

}  // namespace bigramx
