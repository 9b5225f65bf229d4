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
#include "gpu.h"

#if defined(BIGRAMX_CUDA)
#include <ATen/Context.h>
#include <ATen/ops/index_select.h>

#include "cuda/embedding_cross_entropy.h"
#endif

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

#if defined(BIGRAMX_CUDA)

LossCall make_call(const LossInputs& inputs, const LossOptions& options) {
    const at::Tensor& weight = inputs.weight;
    const int64_t num_pairs = inputs.idx.numel();
    TORCH_CHECK(num_pairs <= std::numeric_limits<uint32_t>::max(), kName,
                ": expected fewer than 2^32 pairs on a GPU, got ", num_pairs);
    TORCH_CHECK(weight.size(1) <= std::numeric_limits<int32_t>::max(), kName,
                ": expected weight to have at most 2147483647 columns, got ", weight.size(1));
    LossCall call{};
    call.type = float_type(weight);
    call.weight = weight.const_data_ptr();
    call.row_stride = weight.stride(0);
    call.num_rows = weight.size(0);
    call.num_classes = weight.size(1);
    call.idx = inputs.idx.const_data_ptr<int64_t>();
    call.targets = inputs.targets.const_data_ptr<int64_t>();
    call.num_pairs = num_pairs;
    if (inputs.class_weight.defined()) call.class_weight = inputs.class_weight.const_data_ptr();
    call.ignore_index = options.ignore_index;
    call.is_mean = options.reduction == at::Reduction::Mean;
    call.is_reduced = options.reduction != at::Reduction::None;
    call.label_smoothing = options.label_smoothing;
    call.z_loss = options.z_loss;
    call.padding_idx = options.padding_idx;
    return call;
}

void set_gradient(LossCall& call, const WeightGradient& gradient, bool sparse) {
    call.gradient = gradient.values.data_ptr();
    if (sparse) call.grad_rows = gradient.rows.data_ptr<int64_t>();
}

// Allocates it, and has the call write it.
WeightGradient make_gradient(LossCall& call, const at::Tensor& weight, bool sparse) {
    const int64_t num_slots = sparse ? std::min(call.num_pairs, call.num_rows) : call.num_rows;
    WeightGradient gradient{at::empty({sparse ? num_slots : 0}, weight.options().dtype(at::kLong)),
                            at::empty({num_slots, call.num_classes}, weight.options())};
    set_gradient(call, gradient, sparse);
    return gradient;
}

void launch(const LossCall& call, const GpuScope& scope, const at::Tensor& weight) {
    const at::Tensor scratch =
        at::empty({embedding_cross_entropy_scratch_bytes(call)}, weight.options().dtype(at::kByte));
    launch_embedding_cross_entropy(call, scratch.data_ptr(), scope.stream());
}

at::Tensor embedding_cross_entropy_cuda(const LossInputs& inputs, const LossOptions& options,
                                        const LossExtras& extras) {
    const GpuScope scope(inputs.weight);
    LossCall call = make_call(inputs, options);
    const at::IntArrayRef shape = call.is_reduced ? at::IntArrayRef() : inputs.targets.sizes();
    const at::Tensor loss = at::empty(shape, inputs.weight.options());
    call.loss = loss.data_ptr();
    if (extras.gradient != nullptr) {
        *extras.gradient = make_gradient(call, inputs.weight, options.sparse);
    }
    launch(call, scope, inputs.weight);
    if (extras.logits != nullptr) *extras.logits = inputs.weight.index_select(0, inputs.idx.reshape(-1));
    return loss;
}

WeightGradient embedding_cross_entropy_backward_cuda(const at::Tensor& grad_loss, const LossInputs& inputs,
                                                     const LossOptions& options) {
    const GpuScope scope(inputs.weight);
    LossCall call = make_call(inputs, options);
    if (!call.is_reduced) {  // the pairs of a row are added up in no fixed order
        at::globalContext().alertNotDeterministic("embedding_cross_entropy_backward with reduction='none'");
    }
    const at::Tensor grad_losses = grad_loss.to(inputs.weight.scalar_type()).contiguous();
    call.grad_loss = grad_losses.const_data_ptr();
    WeightGradient gradient = make_gradient(call, inputs.weight, options.sparse);
    launch(call, scope, inputs.weight);
    return gradient;
}

#endif

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_op(
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
    const LossExtras extras{compute_grad ? &gradient : nullptr, return_logits ? &logits : nullptr};
    const at::Tensor loss = BIGRAMX_BY_DEVICE(weight, embedding_cross_entropy, inputs, options, extras);
    if (!return_logits) logits = at::empty({0}, weight.options());
    if (!compute_grad)
        gradient = {at::empty({0}, idx.options().dtype(at::kLong)), at::empty({0}, weight.options())};
    return {loss, logits, gradient.rows, gradient.values};
}

std::tuple<at::Tensor, at::Tensor> backward_op(const at::Tensor& grad_loss, const at::Tensor& idx,
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
    const LossInputs inputs = prepare(idx, weight, targets, class_weight);
    const WeightGradient gradient =
        BIGRAMX_BY_DEVICE(weight, embedding_cross_entropy_backward, grad_loss, inputs, options);
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
            find_op("bigramx::embedding_cross_entropy_forward").typed<decltype(forward_op)>();
        return op.call(idx, weight, targets, class_weight, options.ignore_index, options.reduction,
                       options.label_smoothing, options.z_loss, options.padding_idx, options.sparse,
                       return_logits, compute_grad);
    }

    std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_loss) const {
        static const auto op =
            find_op("bigramx::embedding_cross_entropy_backward").typed<decltype(backward_op)>();
        return op.call(grad_loss, idx, weight, targets, class_weight, options.ignore_index, options.reduction,
                       options.label_smoothing, options.z_loss, options.padding_idx, options.sparse);
    }
};

// One sparse dimension, over the rows, as nn.Embedding(sparse=True) gives it; on the CPU the rows are
// distinct.
at::Tensor assemble(const std::tuple<at::Tensor, at::Tensor>& gradient, const at::Tensor& weight,
                    bool sparse) {
    const auto& [rows, values] = gradient;
    if (!sparse) return values;
    return at::_sparse_coo_tensor_unsafe_symint(rows.unsqueeze(0), values, weight.sym_sizes(),
                                                values.options().layout(at::kSparse),
                                                /*is_coalesced=*/!is_on_gpu(values));
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
        if (gradient.defined() && is_traced(grad_loss)) return gradient.mul(grad_loss);
        if (gradient.defined()) gradient = BIGRAMX_BY_DEVICE(gradient, scaled, ctx, grad_loss, gradient);
        if (gradient.defined()) return gradient;
        const LossArguments arguments = saved_arguments(ctx);
        return assemble(arguments.backward(grad_loss), arguments.weight, arguments.options.sparse);
    }

    // The gradient for `grad_loss`, from that for 1; undefined where it must be computed anew.
    static at::Tensor scaled_cpu(AutogradContext*, const at::Tensor& grad_loss, const at::Tensor& gradient) {
        const double scale = grad_loss.item<double>();
        if (scale == 1.0) return gradient;
        // Not by an infinity: rows without pairs must stay zero.
        return may_scale(gradient) && std::isfinite(scale) ? gradient.mul_(scale) : at::Tensor();
    }

#if defined(BIGRAMX_CUDA)
    // Without the host knowing `grad_loss`. bfloat16 has the exponents of float32: scaling it loses nothing
    // that a loss scale is there to save.
    static at::Tensor scaled_cuda(AutogradContext* ctx, const at::Tensor& grad_loss,
                                  const at::Tensor& gradient) {
        const GpuScope scope(gradient);
        const at::Tensor values = gradient.is_sparse() ? gradient._values() : gradient;
        if (values.scalar_type() != at::kHalf) {
            launch_scale_gradient(float_type(values), values.data_ptr(), values.numel(),
                                  grad_loss.const_data_ptr(), scope.stream());
            return gradient;
        }
        const LossArguments arguments = saved_arguments(ctx);
        const LossInputs inputs =
            prepare(arguments.idx, arguments.weight, arguments.targets, arguments.class_weight);
        LossCall call = make_call(inputs, arguments.options);
        call.grad_loss = grad_loss.const_data_ptr();
        call.unless_one = true;
        set_gradient(call, {gradient.is_sparse() ? gradient._indices().select(0, 0) : at::Tensor(), values},
                     gradient.is_sparse());
        launch(call, scope, inputs.weight);
        return gradient;
    }
#endif

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

void register_ops(torch::Library& m) {
    m.impl("embedding_cross_entropy_forward", &forward_op);
    m.impl("embedding_cross_entropy_backward", &backward_op);
}

BIGRAMX_REGISTER(register_ops)

}  // namespace
}  // namespace bigramx
