#include "embedding_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/op_names.h"
#include "cpu/base/gradient_pool.h"
#include "cpu/embedding_cross_entropy_rows.h"

#define BIGRAMX_KERNELS "cpu/embedding_cross_entropy_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

using KernelParams = EmbeddingCrossEntropyKernelParams;

at::Tensor cpu::occurring_rows(const Pairs& pairs, int64_t num_rows, int64_t padding_idx) {
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

void cpu::divide_slots(const KernelParams& params, Buffer<int64_t>& block_begins) {
    const int64_t block = rows_of_block(params.num_classes);
    block_begins.resize(params.num_slots + 1);
    int64_t num_blocks = 0;
    for (int64_t slot = 0; slot < params.num_slots;) {
        block_begins[num_blocks++] = slot;
        if (params.rows == nullptr) {
            slot = std::min(slot + block, params.num_slots);
        } else {
            const int64_t number = params.rows[slot] / block;
            while (slot < params.num_slots && params.rows[slot] / block == number) ++slot;
        }
    }
    block_begins[num_blocks] = params.num_slots;
    block_begins.resize(num_blocks + 1);
}

KernelParams cpu::kernel_params(const EmbeddingCrossEntropyParams& params, const Pairs& pairs) {
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

namespace {

LossSums run_slots(const KernelParams& params, at::ScalarType dtype, LossWorkspace& workspace) {
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, kEmbeddingCrossEntropy, [&] {
        const auto kernel = BIGRAMX_DISPATCH_TARGET(rows_kernel<scalar_t>);
        return sum_over_slots<scalar_t>(params, workspace,
                                        [&](const LossScratch& scratch, int64_t begin, int64_t end) {
                                            return kernel(params, scratch, begin, end);
                                        });
    });
}

// Processes the rows that occur, or all rows for a dense gradient, which it allocates.
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
        gradient->rows = all_rows ? at::empty({0}, at::dtype(at::kLong)) : rows;
        gradient->values =
            empty_gradient({num_slots, kernel_params.num_classes}, params.weight.scalar_type());
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
