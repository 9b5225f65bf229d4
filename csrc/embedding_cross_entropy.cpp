#include "embedding_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"

namespace bigramx {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kName = "embedding_cross_entropy";

// ---------------------------------------------------------------------------------------------- checks

void check_options(const LossOptions& options, int64_t num_rows) {
    TORCH_CHECK_VALUE(options.reduction >= 0 && options.reduction < at::Reduction::END, kName, ": ",
                      options.reduction, " is not a valid value for reduction");
    TORCH_CHECK(options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0, kName,
                ": label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
    TORCH_CHECK_VALUE(options.z_loss >= 0.0 && std::isfinite(options.z_loss), kName,
                      ": z_loss must be finite and >= 0, got ", options.z_loss);
    TORCH_CHECK_VALUE(options.padding_idx >= kNoPadding && options.padding_idx < num_rows, kName,
                      ": padding_idx must be within the ", num_rows, " rows of weight, got ",
                      options.padding_idx);
}

void check_devices(const at::Tensor& idx, const at::Tensor& weight, const at::Tensor& targets,
                   const std::optional<at::Tensor>& class_weight) {
    check_defined(kName, "idx", idx);
    check_defined(kName, "weight", weight);
    check_defined(kName, "targets", targets);
    check_same_device(kName, "idx", idx, "weight", weight);
    check_same_device(kName, "targets", targets, "weight", weight);
    if (class_weight.has_value()) check_same_device(kName, "class_weight", *class_weight, "weight", weight);
}

void check_class_weight(const at::Tensor& class_weight, const at::Tensor& weight) {
    check_dtype(kName, "class_weight", class_weight, {weight.scalar_type()});
    TORCH_CHECK(class_weight.dim() == 1 && class_weight.size(0) == weight.size(1), kName,
                ": class_weight should be defined either for all ", weight.size(1),
                " classes or no classes but got class_weight of shape: ", class_weight.sizes());
    TORCH_CHECK(!class_weight.requires_grad(), kName,
                ": not differentiable with respect to class_weight; it cannot have requires_grad True");
}

void check_tensors(const at::Tensor& idx, const at::Tensor& weight, const at::Tensor& targets,
                   const std::optional<at::Tensor>& class_weight) {
    check_matrix(kName, "weight", weight);
    check_floating(kName, "weight", weight);
    check_dtype(kName, "idx", idx, {at::kLong, at::kInt});
    check_dtype(kName, "targets", targets, {at::kLong, at::kInt, at::kByte});
    check_devices(idx, weight, targets, class_weight);
    TORCH_CHECK_VALUE(idx.sym_sizes() == targets.sym_sizes(), kName,
                      ": expected targets to have the shape of idx, ", idx.sym_sizes(), ", got ",
                      targets.sym_sizes());
    if (class_weight.has_value()) check_class_weight(*class_weight, weight);
}

// ---------------------------------------------------------------------------------------------- kernels

LossInputs prepare(const at::Tensor& idx, const at::Tensor& weight, const at::Tensor& targets,
                   const std::optional<at::Tensor>& class_weight) {
    const bool unit_stride = weight.size(1) <= 1 || weight.stride(1) == 1;
    return {contiguous_int64(idx), unit_stride ? weight : weight.contiguous(), contiguous_int64(targets),
            class_weight.has_value() ? class_weight->to(accumulator_of(weight.scalar_type())).contiguous()
                                     : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_op_cpu(
    const at::Tensor& idx, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_weight, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double z_loss, int64_t padding_idx, bool sparse, bool return_logits,
    bool compute_grad) {
    const LossOptions options{ignore_index, reduction, label_smoothing, z_loss, padding_idx, sparse};
    check_tensors(idx, weight, targets, class_weight);
    check_options(options, weight.size(0));
    const LossInputs inputs = prepare(idx, weight, targets, class_weight);
    at::Tensor logits;
    WeightGradient gradient;
    const at::Tensor loss = embedding_cross_entropy_cpu(
        inputs, options, {compute_grad ? &gradient : nullptr, return_logits ? &logits : nullptr});
    if (!return_logits) logits = at::empty({0}, weight.options());
    if (!compute_grad)
        gradient = {at::empty({0}, idx.options().dtype(at::kLong)), at::empty({0}, weight.options())};
    return {loss, logits, gradient.rows, gradient.values};
}

std::tuple<at::Tensor, at::Tensor> backward_op_cpu(const at::Tensor& grad_loss, const at::Tensor& idx,
                                                   const at::Tensor& weight, const at::Tensor& targets,
                                                   const std::optional<at::Tensor>& class_weight,
                                                   int64_t ignore_index, int64_t reduction,
                                                   double label_smoothing, double z_loss, int64_t padding_idx,
                                                   bool sparse) {
    const LossOptions options{ignore_index, reduction, label_smoothing, z_loss, padding_idx, sparse};
    check_tensors(idx, weight, targets, class_weight);
    check_options(options, weight.size(0));
    const int64_t num_gradients = reduction == at::Reduction::None ? targets.numel() : 1;
    TORCH_CHECK(grad_loss.numel() == num_gradients, kName, ": expected grad_loss to have ", num_gradients,
                " elements, got shape ", grad_loss.sizes());
    WeightGradient gradient =
        embedding_cross_entropy_backward_cpu(grad_loss, prepare(idx, weight, targets, class_weight), options);
    return {gradient.rows, gradient.values};
}

// ---------------------------------------------------------------------------------------------- autograd

c10::OperatorHandle find_op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

struct LossArguments {
    at::Tensor idx, weight, targets;
    std::optional<at::Tensor> class_weight;
    LossOptions options;
    bool return_logits = false;

    // loss, logits, grad_rows, grad_values
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(bool compute_grad) const {
        static const auto op =
            find_op("bigramx::embedding_cross_entropy_forward").typed<decltype(forward_op_cpu)>();
        return op.call(idx, weight, targets, class_weight, options.ignore_index, options.reduction,
                       options.label_smoothing, options.z_loss, options.padding_idx, options.sparse,
                       return_logits, compute_grad);
    }

    std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_loss) const {
        static const auto op =
            find_op("bigramx::embedding_cross_entropy_backward").typed<decltype(backward_op_cpu)>();
        return op.call(grad_loss, idx, weight, targets, class_weight, options.ignore_index, options.reduction,
                       options.label_smoothing, options.z_loss, options.padding_idx, options.sparse);
    }
};

// One sparse dimension, over the rows, as nn.Embedding(sparse=True) gives it; the rows are distinct.
at::Tensor assemble(const std::tuple<at::Tensor, at::Tensor>& gradient, const at::Tensor& weight,
                    bool sparse) {
    const auto& [rows, values] = gradient;
    if (!sparse) return values;
    return at::_sparse_coo_tensor_unsafe_symint(rows.unsqueeze(0), values, weight.sym_sizes(),
                                                values.options().layout(at::kSparse), /*is_coalesced=*/true);
}

// Whether the tensor may be a stand-in for tracing (torch.compile, torch.export), whose value cannot be read.
bool is_traced(const at::Tensor& tensor) { return at::isTensorSubclassLike(tensor); }

// A gradient in 16 bits has lost what a loss scale is there to save: it may be handed over, but not scaled.
bool may_scale(const at::Tensor& gradient) {
    return gradient.scalar_type() == at::kFloat || gradient.scalar_type() == at::kDouble;
}

// Gives a gradient that was made under create_graph=True a history, so that only a second differentiation
// raises.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
    static at::Tensor forward(AutogradContext*, const at::Tensor& gradient, const at::Tensor& /*grad_loss*/,
                              const at::Tensor& /*weight*/) {
        return gradient.detach();
    }

    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false, kName, ": the gradient of weight cannot be differentiated a second time");
    }
};

// (weight, arguments) -> (loss, logits). The tensors among the arguments are hidden in their struct: none of
// them is differentiable.
struct LossFunction : torch::autograd::Function<LossFunction> {
    static variable_list forward(AutogradContext* ctx, const at::Tensor& weight,
                                 const LossArguments& arguments) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        const LossOptions& options = arguments.options;
        TORCH_CHECK_NOT_IMPLEMENTED(
            !options.sparse || !weight.key_set().has(c10::DispatchKey::Python), kName,
            ": sparse gradients are not implemented under torch.compile and torch.export");
        const bool compute_grad =
            options.reduction != at::Reduction::None && (may_scale(weight) || !is_traced(weight));
        const auto [loss, logits, grad_rows, grad_values] = arguments.forward(compute_grad);
        if (compute_grad) {
            ctx->saved_data["gradient"] = assemble({grad_rows, grad_values}, weight, options.sparse);
        }
        save_options(ctx, options);
        ctx->save_for_backward(
            {weight, arguments.idx, arguments.targets, arguments.class_weight.value_or(at::Tensor())});
        ctx->set_materialize_grads(false);
        if (!arguments.return_logits) ctx->mark_non_differentiable({logits});
        return {loss, logits};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
        const at::Tensor& grad_loss = grad_outputs[0];
        const at::Tensor& grad_logits = grad_outputs[1];
        at::Tensor gradient = take_gradient(ctx);
        if (grad_loss.defined()) {
            const at::NoGradGuard no_grad;
            gradient = grad_weight(ctx, grad_loss, std::move(gradient));
        } else {
            gradient = at::Tensor();
        }
        if (gradient.defined() && at::GradMode::is_enabled()) {
            gradient = OnceDifferentiable::apply(gradient, grad_loss, ctx->get_saved_variables()[0]);
        }
        if (grad_logits.defined()) {
            const at::Tensor through_logits = embedding_gradient(ctx, grad_logits);
            gradient = gradient.defined() ? gradient + through_logits : through_logits;
        }
        return {gradient, at::Tensor()};
    }

  private:
    // The forward pass made the gradient for grad_loss = 1. The first backward pass takes it away, and so
    // owns it and may scale it in place; whoever comes later finds it gone and computes it anew.
    static at::Tensor take_gradient(AutogradContext* ctx) {
        const auto entry = ctx->saved_data.find("gradient");
        if (entry == ctx->saved_data.end()) return {};
        at::Tensor gradient = std::move(entry->second).toTensor();
        ctx->saved_data.erase(entry);
        return gradient;
    }

    static at::Tensor grad_weight(AutogradContext* ctx, const at::Tensor& grad_loss, at::Tensor gradient) {
        if (gradient.defined()) {
            if (is_traced(grad_loss)) return gradient.mul(grad_loss);
            const double scale = grad_loss.item<double>();
            if (scale == 1.0) return gradient;
            // Not by an infinity: rows without pairs must stay zero.
            if (may_scale(gradient) && std::isfinite(scale)) return gradient.mul_(scale);
        }
        const LossArguments arguments = saved_arguments(ctx);
        return assemble(arguments.backward(grad_loss), arguments.weight, arguments.options.sparse);
    }

    static at::Tensor embedding_gradient(AutogradContext* ctx, const at::Tensor& grad_logits) {
        const LossArguments arguments = saved_arguments(ctx);
        return at::embedding_backward_symint(grad_logits, arguments.idx.reshape(-1),
                                             arguments.weight.sym_size(0), arguments.options.padding_idx,
                                             /*scale_grad_by_freq=*/false, arguments.options.sparse);
    }

    static LossArguments saved_arguments(AutogradContext* ctx) {
        const variable_list saved = ctx->get_saved_variables();
        return {saved[1], saved[0], saved[2],
                saved[3].defined() ? std::make_optional(saved[3]) : std::nullopt, saved_options(ctx)};
    }

    static void save_options(AutogradContext* ctx, const LossOptions& options) {
        ctx->saved_data["ignore_index"] = options.ignore_index;
        ctx->saved_data["reduction"] = options.reduction;
        ctx->saved_data["label_smoothing"] = options.label_smoothing;
        ctx->saved_data["z_loss"] = options.z_loss;
        ctx->saved_data["padding_idx"] = options.padding_idx;
        ctx->saved_data["sparse"] = options.sparse;
    }

    static LossOptions saved_options(AutogradContext* ctx) {
        return {ctx->saved_data["ignore_index"].toInt(),       ctx->saved_data["reduction"].toInt(),
                ctx->saved_data["label_smoothing"].toDouble(), ctx->saved_data["z_loss"].toDouble(),
                ctx->saved_data["padding_idx"].toInt(),        ctx->saved_data["sparse"].toBool()};
    }
};

std::tuple<at::Tensor, at::Tensor> embedding_cross_entropy(
    const at::Tensor& idx, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_weight, int64_t ignore_index, int64_t reduction,
    double label_smoothing, double z_loss, int64_t padding_idx, bool sparse, bool return_logits) {
    const LossOptions options{ignore_index, reduction, label_smoothing, z_loss, padding_idx, sparse};
    const LossArguments arguments{idx, weight, targets, class_weight, options, return_logits};
    check_devices(idx, weight, targets, class_weight);  // before a tensor on another device picks the kernel
    TORCH_CHECK_NOT_IMPLEMENTED(!weight._fw_grad(/*level=*/0).defined(), kName,
                                ": forward-mode differentiation is not implemented");
    if (!at::GradMode::is_enabled() || !weight.requires_grad()) {
        const auto [loss, logits, grad_rows, grad_values] = arguments.forward(/*compute_grad=*/false);
        return {loss, logits};
    }
    variable_list outputs = LossFunction::apply(weight, arguments);
    return {std::move(outputs[0]), std::move(outputs[1])};
}

TORCH_LIBRARY_IMPL(bigramx, CompositeImplicitAutograd, m) {
    m.impl("embedding_cross_entropy", &embedding_cross_entropy);
}

TORCH_LIBRARY_IMPL(bigramx, CPU, m) {
    m.impl("embedding_cross_entropy_forward", &forward_op_cpu);
    m.impl("embedding_cross_entropy_backward", &backward_op_cpu);
}

}  // namespace
}  // namespace bigramx
