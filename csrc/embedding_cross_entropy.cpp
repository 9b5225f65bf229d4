#include "embedding_cross_entropy.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <utility>

#include "base/autograd_node.h"
#include "base/checks.h"
#include "base/dispatch.h"
#include "base/op_names.h"

namespace bigramx {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Options = EmbeddingCrossEntropyOptions;
using Params = EmbeddingCrossEntropyParams;
using Result = EmbeddingCrossEntropyResult;

constexpr const char* kName = kEmbeddingCrossEntropy;

// ---------------------------------------------------------------------------------------------- checks

void check_options(const Options& options, int64_t num_rows) {
    TORCH_CHECK_VALUE(options.reduction >= 0 && options.reduction < at::Reduction::END, kName, ": ",
                      options.reduction, " is not a valid value for reduction");
    TORCH_CHECK(options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0, kName,
                ": label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
    TORCH_CHECK_VALUE(options.z_loss >= 0.0 && std::isfinite(options.z_loss), kName,
                      ": z_loss must be finite and >= 0, got ", options.z_loss);
    check_padding(kName, options.padding_idx, num_rows);
}

// Calls visit(name, tensor) for each tensor that is given.
template <typename Visit>
void for_each_tensor(const Params& params, const Visit& visit) {
    visit("idx", params.idx);
    visit("weight", params.weight);
    visit("targets", params.targets);
    if (params.class_weight.defined()) visit("class_weight", params.class_weight);
}

void check_devices(const Params& params) {
    for_each_tensor(params, [&](const char* name, const at::Tensor& tensor) {
        check_same_device(kName, name, tensor, "weight", params.weight);
    });
}

// As F.cross_entropy: of the dtype of the logits, which under autocast are in the dtype of the loss.
void check_class_weight(const at::Tensor& class_weight, const Params& params) {
    const at::Tensor& weight = params.weight;
    check_dtype(kName, "class_weight", class_weight, {params.loss_dtype});
    TORCH_CHECK(class_weight.dim() == 1 && class_weight.size(0) == weight.size(1), kName,
                ": class_weight should be defined either for all ", weight.size(1),
                " classes or no classes but got class_weight of shape: ", class_weight.sizes());
    TORCH_CHECK(!class_weight.requires_grad(), kName,
                ": not differentiable with respect to class_weight; it cannot have requires_grad True");
}

// Classes, of the shape of idx; or probabilities of the classes, (..., C).
void check_targets(const Params& params) {
    c10::SymDimVector shape(params.idx.sym_sizes());
    if (params.has_soft_targets()) {
        shape.push_back(params.weight.sym_size(1));
    } else {
        check_dtype(kName, "targets", params.targets, {at::kLong, at::kInt, at::kByte});
    }
    TORCH_CHECK_VALUE(params.targets.sym_sizes() == c10::SymIntArrayRef(shape), kName,
                      ": expected targets to have the shape of idx, ", c10::SymIntArrayRef(shape), ", got ",
                      params.targets.sym_sizes());
}

void check_params(const Params& params) {
    check_devices(params);
    check_matrix(kName, "weight", params.weight);
    check_floating(kName, "weight", params.weight);
    check_dtype(kName, "idx", params.idx, {at::kLong, at::kInt});
    check_targets(params);
    if (params.class_weight.defined()) check_class_weight(params.class_weight, params);
    check_options(params.options, params.weight.size(0));
}

// For the two kernels, which are ops too.
void check_kernel_params(const Params& params) {
    for_each_tensor(params,
                    [](const char* name, const at::Tensor& tensor) { check_tensor(kName, name, tensor); });
    check_params(params);
    TORCH_CHECK(!params.has_soft_targets(), kName,
                ": expected targets to be classes, got probabilities, of dtype ",
                params.targets.scalar_type());
    const at::ScalarType dtype = params.loss_dtype;
    TORCH_CHECK_NOT_IMPLEMENTED(
        dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, kName,
        ": expected loss_dtype to be float64, float32, bfloat16 or float16, got ", dtype);
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

Result call_forward(const Params& params) {
    static const auto op =
        find_op<decltype(EmbeddingCrossEntropy::forward)>("bigramx::embedding_cross_entropy_forward");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, logits, grad_rows, grad_values] = std::apply(
        [&](const auto&... option) {
            return op.call(params.idx, params.weight, params.targets, optional_of(params.class_weight),
                           option..., params.return_logits, params.compute_grad, params.loss_dtype);
        },
        Options::fields(params.options));
    return {std::move(loss), std::move(logits), {std::move(grad_rows), std::move(grad_values)}};
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

// ---------------------------------------------------------------------------------------------- plain path

// What PyTorch's own ops make of it: differentiable any number of times, in any mode.

// (N, C): the rows of idx.
at::Tensor plain_logits(const Params& params) {
    return at::embedding_symint(params.weight, params.idx.reshape(-1), params.options.padding_idx,
                                /*scale_grad_by_freq=*/false, params.options.sparse);
}

// z_loss * logsumexp^2 of each pair that counts, reduced.
at::Tensor plain_z_loss(const at::Tensor& logits, const at::Tensor& targets, const Options& options) {
    at::Tensor penalties = options.z_loss * logits.logsumexp(-1).square();
    at::Tensor counts =
        targets.dim() == 1 ? targets != options.ignore_index : at::ones_like(penalties, at::kBool);
    penalties = penalties.masked_fill(counts.logical_not(), 0);
    if (options.reduction == at::Reduction::None) return penalties;
    const at::Tensor sum = penalties.sum();
    return options.reduction == at::Reduction::Mean ? sum / counts.sum() : sum;
}

at::Tensor plain_loss(at::Tensor logits, const Params& params) {
    const Options& options = params.options;
    logits = logits.to(params.loss_dtype);
    const at::Tensor targets = params.has_soft_targets() ? params.targets.reshape_symint(logits.sym_sizes())
                                                         : params.targets.reshape(-1).to(at::kLong);
    at::Tensor loss =
        at::cross_entropy_loss_symint(logits, targets, optional_of(params.class_weight), options.reduction,
                                      options.ignore_index, options.label_smoothing);
    if (options.z_loss > 0) loss = loss + plain_z_loss(logits, targets, options);
    return params.is_reduced() ? loss : loss.reshape_symint(params.idx.sym_sizes());
}

// The gradient of the loss for the logits. It can be differentiated where gradients are recorded
// (create_graph). Hooks on the logits do not see it here.
at::Tensor plain_gradient(const at::Tensor& logits, const Params& params, const at::Tensor& grad_loss) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    const at::Tensor own = create_graph ? logits.view_as(logits) : logits.detach().requires_grad_();
    return torch::autograd::grad({plain_loss(own, params)}, {own}, {grad_loss},
                                 /*retain_graph=*/create_graph, create_graph)[0];
}

// The gradient of weight, (R, C), from that of its rows idx.
at::Tensor plain_embedding_backward(const at::Tensor& grad_logits, const at::Tensor& idx,
                                    const c10::SymInt& num_rows, const Options& options) {
    return at::embedding_backward_symint(grad_logits, idx.reshape(-1), num_rows, options.padding_idx,
                                         /*scale_grad_by_freq=*/false, options.sparse);
}

// Whether the tensor may be a tracer's (torch.compile, torch.export), whose values cannot be read.
bool is_traced(const at::Tensor& tensor) { return at::isTensorSubclassLike(tensor); }

void check_plain_params(const Params& params) {
    for_each_tensor(params, [](const char* name, const at::Tensor& tensor) {
        if (!is_traced(tensor)) check_tensor(kName, name, tensor);
    });
    check_params(params);
}

// Whether the table is larger than its memory, which then does not bound the number of rows: the kernels,
// which group the pairs by row, take memory for each row.
bool outgrows_memory(const at::Tensor& weight) {
    if (weight.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || weight.dim() != 2) return false;
    return weight.numel() == 0 || (weight.stride(0) == 0 && weight.size(0) > 1);
}

// Whether float64 may not hold sums of the class weights, so that the order of operations matters: PyTorch's
// own. Not on a GPU, as the host would wait for the numbers.
bool outgrows_float64(const at::Tensor& class_weight, const at::Tensor& weight) {
    if (!class_weight.defined() || class_weight.scalar_type() != at::kDouble) return false;
    if (!class_weight.is_cpu() || is_traced(class_weight)) return false;
    if (weight.dim() != 2 || class_weight.dim() != 1 || class_weight.size(0) != weight.size(1)) return false;
    check_tensor(kName, "class_weight", class_weight);
    return outgrows_dtype_cpu(materialized(class_weight).contiguous());
}

// Whether the kernels do not know these targets, or this kind of differentiation: forward mode, torch.func;
// or the graph cannot keep weight, one of inference mode, which the plain path does not.
bool takes_plain_path(const Params& params) {
    if (params.has_soft_targets() || params.weight._fw_grad(/*level=*/0).defined()) return true;
    if (params.weight.is_inference() && params.weight.requires_grad()) return true;
    if (outgrows_memory(params.weight) || outgrows_float64(params.class_weight, params.weight)) return true;
    for (const at::Tensor& tensor : {params.idx, params.weight, params.targets, params.class_weight}) {
        if (tensor.defined() && tensor.key_set().has_any(c10::functorch_transforms_ks)) return true;
    }
    return false;
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

// weight -> logits, which the kernel has written: the lookup's place in the graph, before the loss.
struct LogitsBackward final : torch::autograd::Node {
    SavedVariable idx;
    c10::SymInt num_rows;
    Options options;
    bool is_released = false;

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        // unpack() raises on a second way through the graph.
        if (!grads[0].defined() && !is_released) return {at::Tensor()};
        return {plain_embedding_backward(grads[0], idx.unpack(), num_rows, options)};
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        idx.reset_data();
        is_released = true;
    }
};

// (weight, logits) -> loss. The logits, defined if they are returned, are where the loss comes from for those
// who look at their gradient; the others are spared it: the gradient goes to weight directly.
struct LossBackward final : torch::autograd::Node {
    SavedVariable weight, logits, idx, targets, class_weight;
    Options options;
    at::Tensor gradient;  // of weight, for grad_loss = 1; undefined if not computed, or once taken

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const at::Tensor& grad_loss = grads[0];
        if (!grad_loss.defined()) return {at::Tensor(), at::Tensor()};
        const bool is_observed = are_logits_observed();
        if (is_observed || at::GradMode::is_enabled()) return plain_gradients(grad_loss, is_observed);
        return {grad_weight(grad_loss), at::Tensor()};
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable* saved : {&weight, &logits, &idx, &targets, &class_weight}) saved->reset_data();
        gradient.reset();
    }

  private:
    bool are_logits_observed() {
        const torch::autograd::Edge& edge = next_edge(1);
        return edge.is_valid() && is_observed(*edge.function);
    }

    // The last backward pass takes the gradient that the forward pass has computed, and thus may scale it in
    // place; those that keep the graph take a copy.
    at::Tensor take_gradient() {
        if (!gradient.defined() || !torch::autograd::get_current_graph_task_keep_graph()) {
            return std::move(gradient);
        }
        return gradient.clone();
    }

    at::Tensor grad_weight(const at::Tensor& grad_loss) {
        if (gradient.defined() && is_traced(grad_loss)) return gradient.mul(grad_loss);
        const auto saved = [&] { return prepare(saved_params(grad_loss, weight.unpack())); };
        at::Tensor taken = take_gradient();
        if (taken.defined()) {
            taken = BIGRAMX_DISPATCH_DEVICE(taken, embedding_cross_entropy_scale_gradient, taken, grad_loss,
                                            saved);
        }
        if (taken.defined()) return taken;
        const Params params = saved_params(grad_loss, weight.unpack());
        return assemble(call_backward(grad_loss, params), params.weight, params.options.sparse);
    }

    // The gradient of the logits, for those who look at it, or else that of weight.
    variable_list plain_gradients(const at::Tensor& grad_loss, bool is_observed) {
        if (const at::Tensor unchanged = unchanged_logits(); unchanged.defined()) {
            const Params params = saved_params(grad_loss, /*weight=*/{});
            return {at::Tensor(), plain_gradient(unchanged, params, grad_loss)};
        }
        // Logits that their owner has changed have no second derivative any more: unpack() raises.
        if (is_observed && at::GradMode::is_enabled()) logits.unpack();
        const Params params = saved_params(grad_loss, weight.unpack());
        const at::Tensor grad_logits = plain_gradient(plain_logits(params), params, grad_loss);
        if (is_observed) return {at::Tensor(), grad_logits};
        return {plain_embedding_backward(grad_logits, params.idx, params.weight.sym_size(0), options),
                at::Tensor()};
    }

    // Undefined if they were not returned, or have been changed by their owner.
    at::Tensor unchanged_logits() {
        try {
            return logits.unpack();
        } catch (const c10::Error&) {
            return {};
        }
    }

    Params saved_params(const at::Tensor& grad_loss, const at::Tensor& unpacked_weight) {
        return {idx.unpack(),          unpacked_weight, targets.unpack(),
                class_weight.unpack(), options,         grad_loss.scalar_type()};
    }
};

auto node_of_logits(const Params& params) {
    auto node = make_node<LogitsBackward>(params.weight);
    node->idx = SavedVariable(params.idx, /*is_output=*/false);
    node->num_rows = params.weight.sym_size(0);
    node->options = params.options;
    return node;
}

auto node_of_loss(const Params& params, const at::Tensor& logits, const WeightGradient& gradient) {
    auto node = make_node<LossBackward>(params.weight, logits);
    node->weight = SavedVariable(params.weight, /*is_output=*/false);
    node->logits = SavedVariable(logits, /*is_output=*/false);
    node->idx = SavedVariable(params.idx, /*is_output=*/false);
    node->targets = SavedVariable(params.targets, /*is_output=*/false);
    node->class_weight = SavedVariable(params.class_weight, /*is_output=*/false);
    node->options = params.options;
    if (params.compute_grad) node->gradient = assemble(gradient, params.weight, params.options.sparse);
    return node;
}

// The results of the kernels, with their history.
std::tuple<at::Tensor, at::Tensor> differentiable_results(Params params) {
    const at::Tensor& weight = params.weight;
    TORCH_CHECK_NOT_IMPLEMENTED(
        !params.options.sparse || !weight.key_set().has(c10::DispatchKey::Python), kName,
        ": sparse gradients are not implemented under torch.compile and torch.export");
    params.compute_grad = params.is_reduced() && (can_scale_gradient(weight) || !is_traced(weight));
    const Result result = call_forward(params);
    const at::Tensor logits = params.return_logits ? result.logits : at::Tensor();
    if (logits.defined()) torch::autograd::set_history(logits, node_of_logits(params));
    torch::autograd::set_history(result.loss, node_of_loss(params, logits, result.gradient));
    return {result.loss, result.logits};
}

// The dtype of F.cross_entropy's result: that of the logits, or float32 under autocast, where it casts its
// arguments but for float64.
void apply_autocast(Params& params) {
    params.loss_dtype = params.weight.scalar_type();
    const c10::DeviceType device = params.weight.device().type();
    if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return;
    const auto widened = [](at::ScalarType dtype) {
        return dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype;
    };
    params.loss_dtype = widened(params.loss_dtype);
    at::Tensor& class_weight = params.class_weight;
    if (!class_weight.defined()) return;
    if (!is_traced(class_weight)) check_tensor(kName, "class_weight", class_weight);
    class_weight = class_weight.to(widened(class_weight.scalar_type()));
}

}  // namespace

template <typename... Option>
std::tuple<at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::differentiable(
    const Tensor& idx, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& class_weight,
    Option... option, bool return_logits) {
    Params params{idx,         weight,     targets,      class_weight.value_or(Tensor()),
                  {option...}, at::kFloat, return_logits};
    for_each_tensor(params, [](const char* name, const Tensor& tensor) { check_dense(kName, name, tensor); });
    check_devices(params);  // before a tensor on another device picks the kernel
    apply_autocast(params);
    if (takes_plain_path(params)) {
        check_plain_params(params);
        const Tensor logits = plain_logits(params);
        return {plain_loss(logits, params), return_logits ? logits : at::empty({0}, weight.options())};
    }
    if (at::GradMode::is_enabled() && weight.requires_grad()) return differentiable_results(params);
    const Result result = call_forward(params);
    return {result.loss, result.logits};
}

template <typename... Option>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::forward(
    const Tensor& idx, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& class_weight,
    Option... option, bool return_logits, bool compute_grad, std::optional<at::ScalarType> loss_dtype) {
    const Params params{idx,           weight,
                        targets,       class_weight.value_or(Tensor()),
                        {option...},   loss_dtype.value_or(weight.scalar_type()),
                        return_logits, compute_grad};
    check_kernel_params(params);
    auto [loss, logits, gradient] = BIGRAMX_DISPATCH_DEVICE(weight, embedding_cross_entropy, prepare(params));
    if (!return_logits) logits = at::empty({0}, weight.options());
    if (!compute_grad) {
        gradient = {at::empty({0}, idx.options().dtype(at::kLong)), at::empty({0}, weight.options())};
    }
    if (loss.scalar_type() != params.loss_dtype) loss = loss.to(params.loss_dtype);
    return {loss, logits, gradient.rows, gradient.values};
}

template <typename... Option>
std::tuple<at::Tensor, at::Tensor> EmbeddingCrossEntropyOps<Option...>::backward(
    const Tensor& grad_loss, const Tensor& idx, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& class_weight, Option... option) {
    check_defined(kName, "grad_loss", grad_loss);
    check_floating(kName, "grad_loss", grad_loss);
    const Params params{
        idx, weight, targets, class_weight.value_or(Tensor()), {option...}, grad_loss.scalar_type()};
    check_kernel_params(params);
    check_tensor(kName, "grad_loss", grad_loss);
    check_same_device(kName, "grad_loss", grad_loss, "weight", weight);
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
TORCH_LIBRARY_IMPL(bigramx, FuncTorchBatchedDecomposition, m) {  // torch.vmap
    m.impl(kName, &EmbeddingCrossEntropy::differentiable);
}
BIGRAMX_REGISTER("embedding_cross_entropy_forward", &EmbeddingCrossEntropy::forward)
BIGRAMX_REGISTER("embedding_cross_entropy_backward", &EmbeddingCrossEntropy::backward)

}  // namespace bigramx
