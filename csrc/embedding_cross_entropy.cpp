#include "embedding_cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <utility>
#include <vector>

#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Options = EmbeddingCrossEntropyOptions;
using Params = EmbeddingCrossEntropyParams;

constexpr const char* kName = kEmbeddingCrossEntropy;

// ---------------------------------------------------------------------------------------------- checks

void check_options(const Options& options, int64_t num_rows) {
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

void check_devices(const Params& params) {
    check_defined(kName, "idx", params.idx);
    check_defined(kName, "weight", params.weight);
    check_defined(kName, "targets", params.targets);
    check_same_device(kName, "idx", params.idx, "weight", params.weight);
    check_same_device(kName, "targets", params.targets, "weight", params.weight);
    if (params.class_weight.defined()) {
        check_same_device(kName, "class_weight", params.class_weight, "weight", params.weight);
    }
}

void check_class_weight(const at::Tensor& class_weight, const at::Tensor& weight) {
    check_dtype(kName, "class_weight", class_weight, {weight.scalar_type()});
    TORCH_CHECK(class_weight.dim() == 1 && class_weight.size(0) == weight.size(1), kName,
                ": class_weight should be defined either for all ", weight.size(1),
                " classes or no classes but got class_weight of shape: ", class_weight.sizes());
    TORCH_CHECK(!class_weight.requires_grad(), kName,
                ": not differentiable with respect to class_weight; it cannot have requires_grad True");
}

void check_params(const Params& params) {
    check_matrix(kName, "weight", params.weight);
    check_floating(kName, "weight", params.weight);
    check_dtype(kName, "idx", params.idx, {at::kLong, at::kInt});
    check_dtype(kName, "targets", params.targets, {at::kLong, at::kInt, at::kByte});
    check_devices(params);
    TORCH_CHECK_VALUE(params.idx.sym_sizes() == params.targets.sym_sizes(), kName,
                      ": expected targets to have the shape of idx, ", params.idx.sym_sizes(), ", got ",
                      params.targets.sym_sizes());
    if (params.class_weight.defined()) check_class_weight(params.class_weight, params.weight);
    check_options(params.options, params.weight.size(0));
}

// ---------------------------------------------------------------------------------------------- kernels

// The parameters as the kernels take them.
Params prepare(const Params& params) {
    Params prepared = params;
    const at::Tensor& weight = params.weight;
    const bool unit_stride = weight.size(1) <= 1 || weight.stride(1) == 1;
    prepared.idx = contiguous_int64(params.idx);
    prepared.targets = contiguous_int64(params.targets);
    if (!unit_stride) prepared.weight = weight.contiguous();
    if (params.class_weight.defined()) {
        prepared.class_weight = params.class_weight.to(at::toOpMathType(weight.scalar_type())).contiguous();
    }
    return prepared;
}

// Through the dispatcher, which hands tracers these two ops in place of their kernels.

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
    return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

auto call_forward(const Params& params) {
    static const auto op =
        find_op<decltype(EmbeddingCrossEntropy::forward)>("bigramx::embedding_cross_entropy_forward");
    return std::apply(
        [&](const auto&... option) {
            return op.call(params.idx, params.weight, params.targets, optional_of(params.class_weight),
                           option..., params.return_logits, params.compute_grad);
        },
        Options::fields(params.options));
}

WeightGradient call_backward(const at::Tensor& grad_loss, const Params& params) {
    static const auto op =
        find_op<decltype(EmbeddingCrossEntropy::backward)>("bigramx::embedding_cross_entropy_backward");
    const auto [rows, values] = std::apply(
        [&](const auto&... option) {
            return op.call(grad_loss, params.idx, params.weight, params.targets,
                           optional_of(params.class_weight), option...);
        },
        Options::fields(params.options));
    return {rows, values};
}

// ---------------------------------------------------------------------------------------------- autograd

// Dense, or sparse with one sparse dimension, the rows, as from nn.Embedding(sparse=True). On the CPU the
// rows are distinct.
at::Tensor assemble(const WeightGradient& gradient, const at::Tensor& weight, bool sparse) {
    if (!sparse) return gradient.values;
    return at::_sparse_coo_tensor_unsafe_symint(gradient.rows.unsqueeze(0), gradient.values,
                                                weight.sym_sizes(),
                                                gradient.values.options().layout(at::kSparse),
                                                /*is_coalesced=*/!uses_cuda_kernels(gradient.values));
}

// Whether the tensor may be a tracer's (torch.compile, torch.export), whose values cannot be read.
bool is_traced(const at::Tensor& tensor) { return at::isTensorSubclassLike(tensor); }

c10::IValue to_ivalue(const Options& options) {
    return std::apply(
        [](const auto&... option) { return c10::ivalue::Tuple::create(std::vector<c10::IValue>{option...}); },
        Options::fields(options));
}

Options from_ivalue(const c10::IValue& value) {
    const std::vector<c10::IValue> elements = value.toTupleRef().elements().vec();
    Options options{};
    size_t k = 0;
    std::apply([&](auto&... option) { ((option = elements[k++].to<std::decay_t<decltype(option)>>()), ...); },
               Options::fields(options));
    return options;
}

// Gives a gradient under create_graph=True a history, so that only differentiating it raises.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
    static at::Tensor forward(AutogradContext*, const at::Tensor& gradient, const at::Tensor& /*grad_loss*/,
                              const at::Tensor& /*weight*/) {
        return gradient.detach();
    }

    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false, kName, ": the gradient of weight cannot be differentiated a second time");
    }
};

// (weight, params) -> (loss, logits). Autograd does not see the tensors inside params: only weight is
// differentiable.
struct LossFunction : torch::autograd::Function<LossFunction> {
    static variable_list forward(AutogradContext* ctx, const at::Tensor& weight, Params params) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        TORCH_CHECK_NOT_IMPLEMENTED(
            !params.options.sparse || !weight.key_set().has(c10::DispatchKey::Python), kName,
            ": sparse gradients are not implemented under torch.compile and torch.export");
        params.compute_grad = params.is_reduced() && (can_scale_gradient(weight) || !is_traced(weight));
        const auto [loss, logits, grad_rows, grad_values] = call_forward(params);
        if (params.compute_grad) {
            ctx->saved_data["gradient"] = assemble({grad_rows, grad_values}, weight, params.options.sparse);
        }
        ctx->saved_data["options"] = to_ivalue(params.options);
        ctx->save_for_backward({weight, params.idx, params.targets, params.class_weight});
        ctx->set_materialize_grads(false);
        if (!params.return_logits) ctx->mark_non_differentiable({logits});
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
    // The forward pass has computed the gradient for grad_loss = 1. The first backward pass takes it, and
    // thus may scale it in place; later ones compute it again.
    static at::Tensor take_gradient(AutogradContext* ctx) {
        const auto entry = ctx->saved_data.find("gradient");
        if (entry == ctx->saved_data.end()) return {};
        at::Tensor gradient = std::move(entry->second).toTensor();
        ctx->saved_data.erase(entry);
        return gradient;
    }

    static at::Tensor grad_weight(AutogradContext* ctx, const at::Tensor& grad_loss, at::Tensor gradient) {
        if (gradient.defined() && is_traced(grad_loss)) return gradient.mul(grad_loss);
        const auto saved = [&] { return prepare(saved_params(ctx)); };
        if (gradient.defined()) {
            gradient = BIGRAMX_DISPATCH_DEVICE(gradient, embedding_cross_entropy_scale_gradient, gradient,
                                               grad_loss, saved);
        }
        if (gradient.defined()) return gradient;
        const Params params = saved_params(ctx);
        return assemble(call_backward(grad_loss, params), params.weight, params.options.sparse);
    }

    static at::Tensor embedding_gradient(AutogradContext* ctx, const at::Tensor& grad_logits) {
        const Params params = saved_params(ctx);
        return at::embedding_backward_symint(grad_logits, params.idx.reshape(-1), params.weight.sym_size(0),
                                             params.options.padding_idx, /*scale_grad_by_freq=*/false,
                                             params.options.sparse);
    }

    static Params saved_params(AutogradContext* ctx) {
        const variable_list saved = ctx->get_saved_variables();
        return {saved[1], saved[0], saved[2], saved[3], from_ivalue(ctx->saved_data["options"])};
    }
};

}  // namespace

template <typename... Option>
std::tuple<at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::differentiable(
    const Tensor& idx, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& class_weight,
    Option... option, bool return_logits) {
    const Params params{idx, weight, targets, class_weight.value_or(Tensor()), {option...}, return_logits};
    check_devices(params);  // before a tensor on another device picks the kernel
    TORCH_CHECK_NOT_IMPLEMENTED(!weight._fw_grad(/*level=*/0).defined(), kName,
                                ": forward-mode differentiation is not implemented");
    if (!at::GradMode::is_enabled() || !weight.requires_grad()) {
        const auto [loss, logits, grad_rows, grad_values] = call_forward(params);
        return {loss, logits};
    }
    variable_list outputs = LossFunction::apply(weight, params);
    return {std::move(outputs[0]), std::move(outputs[1])};
}

template <typename... Option>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::forward(
    const Tensor& idx, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& class_weight,
    Option... option, bool return_logits, bool compute_grad) {
    const Params params{idx,         weight,        targets,     class_weight.value_or(Tensor()),
                        {option...}, return_logits, compute_grad};
    check_params(params);
    auto [loss, logits, gradient] = BIGRAMX_DISPATCH_DEVICE(weight, embedding_cross_entropy, prepare(params));
    if (!return_logits) logits = at::empty({0}, weight.options());
    if (!compute_grad) {
        gradient = {at::empty({0}, idx.options().dtype(at::kLong)), at::empty({0}, weight.options())};
    }
    return {loss, logits, gradient.rows, gradient.values};
}

template <typename... Option>
std::tuple<at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::backward(
    const Tensor& grad_loss, const Tensor& idx, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& class_weight, Option... option) {
    const Params params{idx, weight, targets, class_weight.value_or(Tensor()), {option...}};
    check_params(params);
    const int64_t num_gradients = params.is_reduced() ? 1 : targets.numel();
    TORCH_CHECK(grad_loss.numel() == num_gradients, kName, ": expected grad_loss to have ", num_gradients,
                " elements, got shape ", grad_loss.sizes());
    const WeightGradient gradient =
        BIGRAMX_DISPATCH_DEVICE(weight, embedding_cross_entropy_backward, grad_loss, prepare(params));
    return {gradient.rows, gradient.values};
}

TORCH_LIBRARY_IMPL(bigramx, CompositeImplicitAutograd, m) {
    m.impl(kName, &EmbeddingCrossEntropy::differentiable);
}
BIGRAMX_REGISTER("embedding_cross_entropy_forward", &EmbeddingCrossEntropy::forward)
BIGRAMX_REGISTER("embedding_cross_entropy_backward", &EmbeddingCrossEntropy::backward)

}  // namespace bigramx
