#include "base/dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

#include "base/checks.h"

namespace bigramx {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr const char* kNamespace = "bigramx";

std::string name_of(const c10::OperatorHandle& op) {
    const std::string& name = op.operator_name().name;  // with its namespace
    return name.substr(name.rfind(':') + 1);
}

// Calls visit(argument, value) for each tensor among the arguments on the stack.
template <typename Visit>
void for_each_tensor(const c10::OperatorHandle& op, torch::jit::Stack& stack, const Visit& visit) {
    const std::vector<c10::Argument>& arguments = op.schema().arguments();
    c10::IValue* value = stack.data() + stack.size() - arguments.size();
    for (const c10::Argument& argument : arguments) {
        if (value->isTensor() && value->toTensor().defined()) visit(argument, *value);
        ++value;
    }
}

void no_kernel(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
    const std::string name = name_of(op);
    for_each_tensor(op, *stack, [&](const c10::Argument& argument, const c10::IValue& value) {
        check_dense(name.c_str(), argument.name().c_str(), value.toTensor());
    });
    const auto device = c10::dispatchKeyToDeviceType(keys.highestPriorityTypeId());
    const bool mentions_cuda = kHasCudaKernels && device != c10::DeviceType::CUDA;
    TORCH_CHECK(false, name, ": no kernel is built for device ", c10::DeviceTypeName(device, true),
                "; expected tensors on ", mentions_cuda ? "cpu or cuda" : "cpu");
}

// PyTorch's own fallback copies what has been written back by way of the op's result, which ours do not have.
void resolve_views(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
    for_each_tensor(op, *stack, [&](const c10::Argument& argument, c10::IValue& value) {
        if (!is_lazy(value.toTensor())) return;
        TORCH_CHECK(
            argument.alias_info() == nullptr || !argument.alias_info()->isWrite(), name_of(op), ": expected ",
            argument.name(),
            ", which is written, to hold its numbers in memory, got a conjugate or negative view, or a "
            "ZeroTensor");
        value = materialized(value.toTensor());
    });
    op.redispatchBoxed(keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Conjugate), stack);
}

template <c10::BoxedKernel::BoxedKernelFunction_withDispatchKeys* kernel, typename Includes>
void register_for(DispatchKey key, const Includes& includes) {
    static std::vector<torch::Library> libraries;  // a library's destructor takes back what it registered
    torch::Library& library =
        libraries.emplace_back(torch::Library::IMPL, kNamespace, key, __FILE__, __LINE__);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CPU)) {
        if (name.getNamespace() != kNamespace) continue;
        const auto op = dispatcher.findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str());
        if (includes(op)) {
            library.impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
        }
    }
}

}  // namespace

void complete_registrations() {
    for (const DispatchKey key : {DispatchKey::CUDA, DispatchKey::MPS, DispatchKey::XPU}) {
        register_for<&no_kernel>(key, [&](const c10::OperatorHandle& op) {
            return !op.hasKernelForDispatchKey(key) &&
                   !op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
        });
    }
    for (const DispatchKey key :
         {DispatchKey::QuantizedCPU, DispatchKey::SparseCPU, DispatchKey::SparseCsrCPU,
          DispatchKey::MkldnnCPU, DispatchKey::NestedTensorCPU, DispatchKey::QuantizedCUDA,
          DispatchKey::SparseCUDA, DispatchKey::SparseCsrCUDA, DispatchKey::NestedTensorCUDA,
          DispatchKey::AutogradNestedTensor}) {
        register_for<&no_kernel>(key, [](const c10::OperatorHandle&) { return true; });
    }
    for (const DispatchKey key : {DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor}) {
        register_for<&resolve_views>(key,
                                     [](const c10::OperatorHandle& op) { return op.schema().is_mutable(); });
    }
}

}  // namespace bigramx
