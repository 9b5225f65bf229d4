// The Python module, and the schemas of all ops in one place.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "adamw.h"
#include "base/build_info.h"
#include "base/direct_op.h"
#include "base/dispatch.h"
#include "base/interrupt.h"
#include "base/op_names.h"
#include "count_bigrams.h"
#include "cpu/base/gradient_pool.h"
#include "cpu/count_bigrams_sparse.h"
#include "deferred_adamw.h"
#include "embedding_cross_entropy.h"
#include "fit.h"
#include "generate.h"
#include "get_batch.h"
#include "interpolated_bigram.h"
#include "multinomial.h"
#include "tokenizer.h"

// What the loss depends on besides idx, weight and targets. reduction: 0 none, 1 mean, 2 sum. padding_idx: -1
// for none.
#define LOSS_OPTIONS                                                                                 \
    "Tensor? class_weight=None, int ignore_index=-100, int reduction=1, float label_smoothing=0.0, " \
    "float z_loss=0.0, int padding_idx=-1, bool sparse=False"

TORCH_LIBRARY(bigramx, m) {
    // Differentiable. logits: (N, C), or (0) where return_logits is False.
    m.def("embedding_cross_entropy(Tensor idx, Tensor weight, Tensor targets, " LOSS_OPTIONS
          ", bool return_logits=False) -> (Tensor loss, Tensor logits)");

    // Its two kernels. loss_dtype: None for that of weight. The gradient of weight is dense, (R, C), with
    // grad_rows empty; or sparse, the rows that occur, (K, C), and their indices, (K); or empty where
    // compute_grad is False.
    m.def("embedding_cross_entropy_forward(Tensor idx, Tensor weight, Tensor targets, " LOSS_OPTIONS
          ", bool return_logits=False, bool compute_grad=False, ScalarType? loss_dtype=None) "
          "-> (Tensor loss, Tensor logits, Tensor grad_rows, Tensor grad_values)");
    m.def(
        "embedding_cross_entropy_backward(Tensor grad_loss, Tensor idx, Tensor weight, Tensor "
        "targets, " LOSS_OPTIONS ") -> (Tensor grad_rows, Tensor grad_values)");

    // (V) or (B, V) probabilities -> (num_samples) or (B, num_samples) int64.
    m.def(
        "multinomial(Tensor probs, int num_samples, bool replacement=False, str? sampler=None, "
        "Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});

    // idx (B, T) -> (B, T + max_new_tokens) int64, or shorter if all chains meet `stop` or one of
    // `more_stop`; chains that meet one before the last chain does are filled with it. temperature 0: the
    // argmax.
    m.def(
        "generate(Tensor idx, Tensor weight, int max_new_tokens, float temperature=1.0, int? top_k=None, "
        "float? top_p=None, float? min_p=None, int? stop=None, str? sampler=None, "
        "Generator? generator=None, int[] more_stop=[]) -> Tensor",
        {at::Tag::nondeterministic_seeded});

    // (N) tokens -> (V, V) int64: how often token j follows token i.
    m.def("count_bigrams(Tensor tokens, int vocab_size) -> Tensor");

    // p(targets | idx), float64, and whether these pairs were seen, in the shape of idx, by
    // pair_probs[i, j] + backoff[i] * unigram[j]: CSR, (V), (V).
    m.def(
        "interpolated_bigram(Tensor idx, Tensor targets, Tensor crow_indices, Tensor col_indices, "
        "Tensor pair_probs, Tensor backoff, Tensor unigram) -> (Tensor probs, Tensor is_seen)");

    // As generate, from these probabilities, by the sampler "philox".
    m.def(
        "interpolated_bigram_generate(Tensor idx, Tensor crow_indices, Tensor col_indices, "
        "Tensor pair_probs, Tensor backoff, Tensor unigram, int max_new_tokens, float temperature=1.0, "
        "int? top_k=None, float? top_p=None, float? min_p=None, int[] stop=[], Generator? generator=None) "
        "-> Tensor",
        {at::Tag::nondeterministic_seeded});

    // (N) tokens -> idx, targets (B, T) int64, drawn as in the lecture's get_batch.
    m.def(
        "get_batch(Tensor tokens, int batch_size, int block_size, Generator? generator=None) "
        "-> (Tensor idx, Tensor targets)",
        {at::Tag::nondeterministic_seeded, at::Tag::cudagraph_unsafe});

    // One step of AdamW in place. step: the count of this step, from 1.
    m.def(
        "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(d!)? max_exp_avg_sq, Tensor step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, bool maximize) -> ()");

    // Takes the steps that rows of param, (R, C), have yet to take, in place; row_steps, (R) int64: how many
    // each has taken. schedule, (S, 5) float64: lr, beta1, beta2, eps, weight_decay of the last S of `step`
    // steps. rows, (K): None for all. grad, (K, C): of the rows at the last step; it is zero at all others.
    m.def(
        "deferred_adamw_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) row_steps, "
        "Tensor schedule, int step, Tensor? rows=None, Tensor? grad=None, bool maximize=False) -> ()");

    // Steps of get_batch, embedding_cross_entropy and adamw_, until losses, (steps) float64, is full or the
    // time is up; returns the number of steps, which is added to `step`. row_steps, (V) int64: as of
    // deferred_adamw_, which takes what is left of the steps of rows that no batch met; None: no steps are
    // left.
    m.def(
        "fit_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, "
        "Tensor(e!) losses, Tensor tokens, int batch_size, int block_size, int padding_idx, float lr, "
        "float beta1, float beta2, float eps, float weight_decay, float max_seconds, "
        "Generator? generator=None, Tensor(f!)? row_steps=None) -> int",
        {at::Tag::nondeterministic_seeded});
}

namespace py = pybind11;

namespace {

// A method as DirectOp calls a function.
template <typename Class, typename Return, typename... Arguments>
void define_method(py::class_<Class>& m, const char* name, Return (Class::*method)(Arguments...)) {
    const auto call = [method](Class& self, Arguments... arguments) { return (self.*method)(arguments...); };
    m.def(name, bigramx::DirectOp<Return(Class&, Arguments...)>::wrapped(name, call));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace bigramx;
    m.doc() = "The compiled kernels of bigramx. The ops are in torch.ops.bigramx.";
    m.def("build_info", &build_info);
    m.def("empty_gradient_pool", &cpu::empty_gradient_pool);
    m.def("gradient_pool_info", &cpu::gradient_pool_info);
    m.def("set_gradient_pool_limit", &cpu::set_gradient_pool_limit);
    DirectOp<decltype(adamw_fits)>::define(m, "adamw_fits", &adamw_fits);
    DirectOp<decltype(adamw_step)>::define(m, "adamw_step", &adamw_step);
    DirectOp<decltype(adamw)>::define(m, "bigramx", kAdamW);
    DirectOp<decltype(count_bigrams)>::define(m, "bigramx", kCountBigrams);
    DirectOp<decltype(deferred_adamw)>::define(m, "bigramx", kDeferredAdamW);
    DirectOp<decltype(EmbeddingCrossEntropy::differentiable)>::define(m, "bigramx", kEmbeddingCrossEntropy);
    DirectOp<decltype(fit)>::define(m, "bigramx", kFit);
    DirectOp<decltype(generate)>::define(m, "bigramx", kGenerate);
    DirectOp<decltype(get_batch)>::define(m, "bigramx", kGetBatch);
    DirectOp<decltype(interpolated_bigram)>::define(m, "bigramx", kInterpolatedBigram);
    DirectOp<decltype(interpolated_bigram_generate)>::define(m, "bigramx", kInterpolatedBigramGenerate);
    DirectOp<decltype(multinomial)>::define(m, "bigramx", kMultinomial);
    py::class_<Alphabet>(m, "Alphabet")
        .def(py::init<py::handle>())
        .def("encode", &Alphabet::encode)
        .def("decode", &Alphabet::decode)
        .def("decode_sequence", &Alphabet::decode_sequence);
    using cpu::PairCounter;
    py::class_<PairCounter> counter(m, "PairCounter");
    counter.def(py::init(DirectOp<std::unique_ptr<PairCounter>(int64_t, std::optional<int64_t>)>::wrapped(
        "PairCounter", &std::make_unique<PairCounter, int64_t&, std::optional<int64_t>&>)));
    define_method(counter, "update", &PairCounter::update);
    define_method(counter, "merge", &PairCounter::merge);
    define_method(counter, "add_csr", &PairCounter::add_csr);
    define_method(counter, "num_pairs", &PairCounter::num_pairs);
    define_method(counter, "num_distinct", &PairCounter::num_distinct);
    define_method(counter, "equals", &PairCounter::equals);
    define_method(counter, "csr", &PairCounter::csr);
    define_method(counter, "parts", &PairCounter::parts);
    complete_registrations();
    handle_signals = [] {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
}
