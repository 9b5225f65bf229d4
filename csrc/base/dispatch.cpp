#include "base/dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace bigramx {
namespace {

constexpr const char* kNamespace = "bigramx";

void no_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack*) {
    const auto device = c10::dispatchKeyToDeviceType(keys.highestPriorityTypeId());
    const bool mentions_cuda = kHasCudaKernels && device != c10::DeviceType::CUDA;
    const std::string& name = op.operator_name().name;  // with its namespace
    TORCH_CHECK(false, name.substr(name.rfind(':') + 1), ": no kernel is built for device ",
                c10::DeviceTypeName(device, true), "; expected tensors on ",
                mentions_cuda ? "cpu or cuda" : "cpu");
}

}  // namespace

void refuse_devices_without_kernels() {
    static std::vector<torch::Library> refusals;  // a library's destructor takes back what it registered
    auto& dispatcher = c10::Dispatcher::singleton();
    const auto names = dispatcher.getRegistrationsForDispatchKey(c10::DispatchKey::CPU);
    for (const c10::DispatchKey key :
         {c10::DispatchKey::CUDA, c10::DispatchKey::MPS, c10::DispatchKey::XPU}) {
        torch::Library& library =
            refusals.emplace_back(torch::Library::IMPL, kNamespace, key, __FILE__, __LINE__);
        for (const c10::OperatorName& name : names) {
            if (name.getNamespace() != kNamespace) continue;
            const auto op = dispatcher.findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str());
            const bool has_kernel = op.hasKernelForDispatchKey(key) ||
                                    op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
            if (!has_kernel) {
                library.impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&no_kernel>());
            }
        }
    }
}

}  // namespace bigramx
