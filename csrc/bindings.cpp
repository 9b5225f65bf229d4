// The Python module, and the schema of every op on one page.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "adamw.h"
#include "direct_op.h"
#include "interrupt.h"
#include "tokenizer.h"

TORCH_LIBRARY(bigramx, m) {
    // Differentiable. reduction: 0 none, 1 mean, 2 sum. padding_idx: -1 for none. logits: (N, C), or (0)
    // where return_logits is False.
    m.def(
        "embedding_cross_entropy(Tensor idx, Tensor weight, Tensor targets, Tensor? class_weight=None, "
        "int ignore_index=-100, int reduction=1, float label_smoothing=0.0, float z_loss=0.0, "
        "int padding_idx=-1, bool sparse=False, bool return_logits=False) -> (Tensor loss, Tensor logits)");

    // Its two kernels. The gradient of weight is dense, (R, C), with grad_rows empty; or sparse, the rows
    // that occur, (K, C), and their numbers, (K); or empty where compute_grad is False.
    m.def(
        "embedding_cross_entropy_forward(Tensor idx, Tensor weight, Tensor targets, Tensor? class_weight, "
        "int ignore_index, int reduction, float label_smoothing, float z_loss, int padding_idx, bool sparse, "
        "bool return_logits, bool compute_grad) "
        "-> (Tensor loss, Tensor logits, Tensor grad_rows, Tensor grad_values)");
    m.def(
        "embedding_cross_entropy_backward(Tensor grad_loss, Tensor idx, Tensor weight, Tensor targets, "
        "Tensor? class_weight, int ignore_index, int reduction, float label_smoothing, float z_loss, "
        "int padding_idx, bool sparse) -> (Tensor grad_rows, Tensor grad_values)");

    // (V) or (B, V) probabilities -> (num_samples) or (B, num_samples) int64.
    m.def(
        "multinomial(Tensor probs, int num_samples, bool replacement=False, *, str? sampler=None, "
        "Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});

    // idx (B, T), continued: (B, T + max_new_tokens) int64; shorter where all chains met `stop`, up to which
    // those that met it earlier are filled with it. temperature 0: the likeliest token.
    m.def(
        "generate(Tensor idx, Tensor weight, int max_new_tokens, float temperature=1.0, int? top_k=None, "
        "float? top_p=None, float? min_p=None, int? stop=None, str? sampler=None, *, "
        "Generator? generator=None) -> Tensor",
        {at::Tag::nondeterministic_seeded});

    // (N) tokens -> (V, V) int64: how often token j follows token i.
    m.def("count_bigrams(Tensor tokens, int vocab_size) -> Tensor");

    // (N) tokens -> idx, targets (B, T) int64: the lecture's draws.
    m.def(
        "get_batch(Tensor tokens, int batch_size, int block_size, Generator? generator=None) "
        "-> (Tensor idx, Tensor targets)",
        {at::Tag::nondeterministic_seeded});

    // One step of AdamW in place; step counts from 1.
    m.def(
        "adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        "Tensor(d!)? max_exp_avg_sq, float step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, bool maximize) -> ()");

    // Steps of get_batch, embedding_cross_entropy and adamw_, until losses, (steps) float64, is full or the
    // time is up; returns how many.
    m.def(
        "fit_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) losses, "
        "Tensor tokens, int batch_size, int block_size, int padding_idx, float step, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, float max_seconds, *, Generator? generator=None) -> int",
        {at::Tag::nondeterministic_seeded});
}

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

#if defined(_OPENMP)
constexpr const char* kParallel = "OpenMP";
#else
constexpr const char* kParallel = "none";
#endif

// What setup.py has the kernels in cuda/ compiled for.
#if !defined(BIGRAMX_CUDA_ARCHITECTURES)
#define BIGRAMX_CUDA_ARCHITECTURES ""
#endif

std::map<std::string, std::string> build_info() {
    return {{"compiler", kCompiler},
            {"parallel", kParallel},
            {"cpu_capability", at::get_cpu_capability()},
            {"cuda_architectures", BIGRAMX_CUDA_ARCHITECTURES},
            {"torch_version", TORCH_VERSION}};
}

void run_signal_handlers() {
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

#if defined(BIGRAMX_CUDA)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// fit_ is a loop over the kernels of the CPU.
bool has_cuda_kernel(const std::string& op) { return kHasCuda && op != "bigramx::fit_"; }

void no_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack*) {
    const std::string& name = op.operator_name().name;
    TORCH_CHECK(false, name, ": no kernel is built for device ",
                c10::DeviceTypeName(c10::dispatchKeyToDeviceType(keys.highestPriorityTypeId()), true),
                "; this build of bigramx has kernels of it for ",
                has_cuda_kernel(name) ? "cpu and cuda" : "cpu");
}

// Devices without a kernel say so, each by its name.
void refuse(torch::Library& m, c10::DispatchKey key) {
    for (const char* op :
         {"bigramx::embedding_cross_entropy_forward", "bigramx::embedding_cross_entropy_backward",
          "bigramx::multinomial", "bigramx::generate", "bigramx::count_bigrams", "bigramx::adamw_",
          "bigramx::fit_"}) {
        if (key == c10::DispatchKey::CUDA && has_cuda_kernel(op)) continue;
        m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_kernel>());
    }
}

}  // namespace

TORCH_LIBRARY_IMPL(bigramx, CUDA, m) { refuse(m, c10::DispatchKey::CUDA); }
TORCH_LIBRARY_IMPL(bigramx, MPS, m) { refuse(m, c10::DispatchKey::MPS); }
TORCH_LIBRARY_IMPL(bigramx, XPU, m) { refuse(m, c10::DispatchKey::XPU); }

namespace py = pybind11;
using bigramx::DirectOp;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using at::Tensor;
    m.doc() = "The compiled kernels of bigramx. The ops are in torch.ops.bigramx.";
    m.def("build_info", &build_info);
    m.def("count_and_step_adamw", &bigramx::count_and_step_adamw, py::call_guard<py::gil_scoped_release>());
    DirectOp<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                        const std::optional<Tensor>&, int64_t, int64_t, double, double,
                                        int64_t, bool, bool)>::define(m, "embedding_cross_entropy",
                                                                      "bigramx::embedding_cross_entropy");
    DirectOp<std::tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t,
                                        const std::optional<at::Generator>&)>::define(m, "get_batch",
                                                                                      "bigramx::get_batch");
    py::class_<bigramx::Alphabet>(m, "Alphabet")
        .def(py::init<py::handle>())
        .def("encode", &bigramx::Alphabet::encode)
        .def("decode", &bigramx::Alphabet::decode)
        .def("decode_sequence", &bigramx::Alphabet::decode_sequence);
    bigramx::handle_signals = &run_signal_handlers;
}
