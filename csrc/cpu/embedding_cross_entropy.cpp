#include "embedding_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "base/op_names.h"
#include "cpu/base/huge_pages.h"
#include "cpu/embedding_cross_entropy_workspace.h"
#include "embedding_cross_entropy_row.h"

namespace bigramx::cpu {

// What one call computes for the rows. acc_t: the accumulation dtype. All offsets are in elements.
struct EmbeddingCrossEntropyKernelParams {
    const void* weight;  // (R, C)
    int64_t row_stride;
    int64_t num_classes;
    const Pairs* pairs;
    const void* class_weight;  // (C) of acc_t, or null: all ones
    int64_t padding_idx;
    RowLossOptions options;

    const int64_t* rows;  // (num_slots): the row of each slot; null: slot i is row i
    int64_t num_slots;
    bool want_loss;
    void* losses;               // (N) of acc_t, or null: only their sum
    void* gradient;             // (num_slots, C), or null
    bool nontemporal_gradient;  // whether it is written by non-temporal stores
    const void* grad_losses;    // (N) of acc_t, or null: all ones
    LossScales scales;          // multiplied by the gradient of the loss
};

constexpr int64_t kMaxRowsAtOnce = 16;

// The number of rows that a kernel processes together: as many as fit into the L1 cache.
inline int64_t rows_at_once(int64_t num_classes) {
    constexpr int64_t kElements = 2048;
    return std::clamp<int64_t>(kElements / std::max<int64_t>(num_classes, 1), 1, kMaxRowsAtOnce);
}

// One more for non-temporal stores: a row leaves its scratch while the next rows are computed.
inline int64_t rows_of_scratch(const EmbeddingCrossEntropyKernelParams& params) {
    return rows_at_once(params.num_classes) + (params.nontemporal_gradient ? 1 : 0);
}

struct LossScratch {
    void* exponentials;      // (rows_of_scratch, padded C) of acc_t
    int32_t* target_counts;  // (C), zero before and after
};

struct GatherParams {
    const int64_t* idx;  // (N)
    const char* table;
    int64_t stride_bytes;
    int64_t row_bytes;
    char* to;  // (N, row_bytes)
};

}  // namespace bigramx::cpu

#define BIGRAMX_KERNELS "cpu/embedding_cross_entropy_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

using KernelParams = EmbeddingCrossEntropyKernelParams;

// The distinct rows, ascending, except that the padding row is last: the gradient leaves it out.
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

KernelParams kernel_params(const EmbeddingCrossEntropyParams& params, const Pairs& pairs) {
    const EmbeddingCrossEntropyOptions& options = params.options;
    KernelParams result{};
    result.weight = params.weight.const_data_ptr();
    result.row_stride = params.row_stride();
    result.num_classes = params.weight.size(1);
    result.pairs = &pairs;
    result.padding_idx = options.padding_idx;
    const auto num_classes = static_cast<double>(result.num_classes);
    result.options = {options.label_smoothing, options.label_smoothing / num_classes, options.z_loss};
    result.scales = {1, 1, num_classes};
    if (params.is_mean()) {
        result.scales.loss = 1.0 / pairs.target_weight;
        result.scales.z_loss = 1.0 / static_cast<double>(pairs.num_targets);
    }
    if (params.class_weight.defined()) {
        result.class_weight = params.class_weight.const_data_ptr();
        result.scales.class_weight_sum = params.class_weight.sum().item<double>();
    }
    return result;
}

// How the slots are divided. Blocks of fixed size, whose sums are added in order, make the result independent
// of the number of threads. Runs of blocks, which threads take one after another, balance the load, as rows
// differ in cost.
struct Partition {
    Partition(int64_t num_slots, int64_t num_classes) {
        constexpr int64_t kBlockElements = 1 << 15;  // the grain size
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
void for_each_block(const Partition& partition, const Visit& visit) {
    std::atomic<int64_t> next = 0;
    at::parallel_for(0, partition.num_threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t thread = first; thread < last; ++thread) {
            for (int64_t begin; (begin = next.fetch_add(partition.run)) < partition.num_blocks;) {
                const int64_t end = std::min(begin + partition.run, partition.num_blocks);
                for (int64_t block = begin; block < end; ++block) visit(thread, block);
            }
        }
    });
}

LossSums run_slots(const KernelParams& params, at::ScalarType dtype, LossWorkspace& workspace) {
    if (params.num_slots == 0) return {};
    const Partition partition(params.num_slots, params.num_classes);
    workspace.target_counts.resize_zeros(partition.num_threads * params.num_classes);
    workspace.sums_of_block.resize(partition.num_blocks);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, kEmbeddingCrossEntropy, [&] {
        using acc_t = opmath_t<scalar_t>;
        const auto kernel = BIGRAMX_DISPATCH_TARGET(rows_kernel<scalar_t>);
        const int64_t scratch_bytes =
            rows_of_scratch(params) * padded(params.num_classes) * static_cast<int64_t>(sizeof(acc_t));
        workspace.exponentials.resize(partition.num_threads * scratch_bytes);
        for_each_block(partition, [&](int64_t thread, int64_t block) {
            const LossScratch scratch{workspace.exponentials.begin() + thread * scratch_bytes,
                                      workspace.target_counts.begin() + thread * params.num_classes};
            workspace.sums_of_block[block] =
                kernel(params, scratch, block * partition.block,
                       std::min(params.num_slots, (block + 1) * partition.block));
        });
    });
    LossSums total;
    for (const LossSums& sums : workspace.sums_of_block) total = total + sums;
    return total;
}

// Processes the rows that occur, or all rows for a dense gradient. Allocates gradient->values unless defined.
LossSums run(KernelParams& kernel_params, const EmbeddingCrossEntropyParams& params, WeightGradient* gradient,
             LossWorkspace& workspace) {
    constexpr int64_t kCached = int64_t{1} << 25;  // bytes: a larger gradient is evicted before it is read
    const bool sparse = params.options.sparse, all_rows = gradient != nullptr && !sparse;
    at::Tensor rows;
    int64_t num_slots = params.weight.size(0);
    if (!all_rows) {
        rows = occurring_rows(workspace.pairs, num_slots, params.options.padding_idx);
        num_slots = rows.numel();
        kernel_params.rows = rows.const_data_ptr<int64_t>();
    }
    kernel_params.num_slots = num_slots;
    if (gradient != nullptr) {
        if (!gradient->values.defined()) {
            gradient->rows = all_rows ? at::empty({0}, at::dtype(at::kLong)) : rows;
            gradient->values = at::empty({num_slots, kernel_params.num_classes}, params.weight.options());
            advise_huge_pages(gradient->values);
        }
        kernel_params.gradient = gradient->values.data_ptr();
        kernel_params.nontemporal_gradient = static_cast<int64_t>(gradient->values.nbytes()) > kCached;
    }
    const LossSums sums = run_slots(kernel_params, params.weight.scalar_type(), workspace);
    const bool ends_with_padding =
        !all_rows && num_slots > 0 && kernel_params.rows[num_slots - 1] == params.options.padding_idx;
    if (gradient != nullptr && ends_with_padding) {
        *gradient = {rows.narrow(0, 0, num_slots - 1), gradient->values.narrow(0, 0, num_slots - 1)};
    }
    return sums;
}

// (N, C): weight[idx]. idx has been checked.
at::Tensor gather_logits(const EmbeddingCrossEntropyParams& params) {
    const at::Tensor& weight = params.weight;
    const int64_t num_pairs = params.idx.numel(), element_size = static_cast<int64_t>(weight.element_size());
    at::Tensor logits = at::empty({num_pairs, weight.size(1)}, weight.options());
    if (logits.numel() == 0) return logits;
    const GatherParams rows{params.idx.const_data_ptr<int64_t>(),
                            static_cast<const char*>(weight.const_data_ptr()),
                            params.row_stride() * element_size, weight.size(1) * element_size,
                            static_cast<char*>(logits.data_ptr())};
    const auto kernel = BIGRAMX_DISPATCH_TARGET(gather_kernel);
    const int64_t grain_size = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, rows.row_bytes));
    at::parallel_for(0, num_pairs, grain_size, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
    return logits;
}

// As sums in a tensor of this dtype overflow: to an infinity, where a Scalar refuses to be converted.
at::Tensor scalar_tensor(double value, const at::TensorOptions& options) {
    const bool is_float = c10::typeMetaToScalarType(options.dtype()) == at::kFloat;
    return at::scalar_tensor(is_float ? static_cast<double>(static_cast<float>(value)) : value, options);
}

// Whether a finite number other than 0 is larger than `largest`, or smaller than 1 / largest.
template <typename T>
bool any_beyond(const at::Tensor& numbers, T largest) {
    const T* const first = numbers.const_data_ptr<T>();
    return std::any_of(first, first + numbers.numel(), [largest, smallest = 1 / largest](T number) {
        const T size = std::abs(number);
        return std::isfinite(size) && size != 0 && (size < smallest || size > largest);
    });
}

bool needs_float64(const EmbeddingCrossEntropyParams& params) {
    const at::Tensor& class_weight = params.class_weight;
    return class_weight.defined() && class_weight.scalar_type() == at::kFloat &&
           outgrows_dtype_cpu(class_weight);
}

// The same for the gradients of a row's pairs, which are summed before they are multiplied.
bool needs_float64(const at::Tensor& grad_loss, const EmbeddingCrossEntropyParams& params) {
    if (params.weight.scalar_type() == at::kDouble) return false;
    const auto is_large = [](double number) { return std::isfinite(number) && std::abs(number) > 0x1p60; };
    if (params.is_reduced()) return is_large(grad_loss.item<double>()) || needs_float64(params);
    const at::Tensor numbers = grad_loss.to(at::kFloat).contiguous();
    const float* const first = numbers.const_data_ptr<float>();
    return std::any_of(first, first + numbers.numel(), is_large) || needs_float64(params);
}

EmbeddingCrossEntropyParams in_float64(const EmbeddingCrossEntropyParams& params) {
    EmbeddingCrossEntropyParams wide = params;
    wide.weight = params.weight.to(at::kDouble).contiguous();
    if (params.class_weight.defined()) wide.class_weight = params.class_weight.to(at::kDouble);
    return wide;
}

}  // namespace

EmbeddingCrossEntropyResult embedding_cross_entropy_cpu(const EmbeddingCrossEntropyParams& params) {
    if (needs_float64(params)) {
        EmbeddingCrossEntropyResult result = embedding_cross_entropy_cpu(in_float64(params));
        const at::ScalarType dtype = params.weight.scalar_type();
        result.loss = result.loss.to(at::toOpMathType(dtype));
        for (at::Tensor* wide : {&result.logits, &result.gradient.values}) {
            if (wide->defined()) *wide = wide->to(dtype);
        }
        return result;
    }
    LossWorkspace workspace;
    workspace.pairs.group(params);
    KernelParams kernel = kernel_params(params, workspace.pairs);
    kernel.want_loss = true;
    EmbeddingCrossEntropyResult result;
    const auto loss_options = params.weight.options().dtype(at::toOpMathType(params.weight.scalar_type()));
    if (!params.is_reduced()) {
        result.loss = at::empty(params.targets.sizes(), loss_options);
        kernel.losses = result.loss.data_ptr();
    }
    if (params.return_logits) result.logits = gather_logits(params);
    const LossSums sums = run(kernel, params, params.compute_grad ? &result.gradient : nullptr, workspace);
    if (params.is_reduced()) {
        result.loss = scalar_tensor(reduced_loss(sums, kernel.scales), loss_options);
    }
    return result;
}

double cpu::embedding_cross_entropy_step(const EmbeddingCrossEntropyParams& params,
                                         const at::Tensor& grad_weight, LossWorkspace& workspace) {
    workspace.pairs.group(params);
    KernelParams kernel = kernel_params(params, workspace.pairs);
    kernel.want_loss = true;
    WeightGradient gradient{at::Tensor(), grad_weight};
    return reduced_loss(run(kernel, params, &gradient, workspace), kernel.scales);
}

WeightGradient embedding_cross_entropy_backward_cpu(const at::Tensor& grad_loss,
                                                    const EmbeddingCrossEntropyParams& params) {
    if (needs_float64(grad_loss, params)) {
        auto [rows, values] = embedding_cross_entropy_backward_cpu(grad_loss, in_float64(params));
        return {rows, values.to(params.weight.scalar_type())};
    }
    LossWorkspace workspace;
    workspace.pairs.group(params);
    KernelParams kernel = kernel_params(params, workspace.pairs);
    at::Tensor grad_losses;
    if (params.is_reduced()) {
        kernel.scales.loss *= grad_loss.item<double>();
        kernel.scales.z_loss *= grad_loss.item<double>();
    } else {
        grad_losses = grad_loss.reshape(-1).to(at::toOpMathType(params.weight.scalar_type())).contiguous();
        kernel.grad_losses = grad_losses.const_data_ptr();
    }
    WeightGradient gradient;
    run(kernel, params, &gradient, workspace);
    return gradient;
}

bool outgrows_dtype_cpu(const at::Tensor& class_weight) {
    const bool is_double = class_weight.scalar_type() == at::kDouble;
    return is_double ? any_beyond(class_weight, 0x1p900) : any_beyond(class_weight, 0x1p60f);
}

at::Tensor embedding_cross_entropy_scale_gradient_cpu(const at::Tensor& gradient, const at::Tensor& grad_loss,
                                                      SavedParams) {
    const double scale = grad_loss.item<double>();
    if (scale == 1.0) return gradient;
    // Not by an infinity: rows without pairs must stay zero, not NaN.
    return can_scale_gradient(gradient) && std::isfinite(scale) ? gradient.mul_(scale) : at::Tensor();
}

}  // namespace bigramx
