// Replaces csrc/cuda/base/device.cpp: every CPU tensor counts as a tensor on the device.
#include "cuda/base/device.h"

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <cstring>
#include <memory>
#include <string>

#include "base/dispatch.h"
#include "device_memory.h"
#include "sampling/generator.h"

namespace simt {
namespace {

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* const memory = simt::allocate(bytes);
        return {memory, memory, &simt::release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &simt::release; }
    void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// Copies of tensors and tensors read from files use ATen's default allocator, which cannot be replaced but
// reports its allocations to profilers.
struct Listener final : torch::profiler::impl::ProfilerStateBase {
    using Config = torch::profiler::impl::ProfilerConfig;

    Listener() : ProfilerStateBase(Config(torch::profiler::impl::ProfilerState::Disabled)) {}
    bool memoryProfilingEnabled() const override { return true; }
    torch::profiler::impl::ActiveProfilerType profilerType() override { return {}; }

    void reportMemoryUsage(void* memory, int64_t bytes, size_t, size_t, c10::Device) override {
        if (bytes > 0) {
            adopt(memory, static_cast<size_t>(bytes));
        } else {
            forget(memory);
        }
    }
};

bool is_capturing = false;

const bool is_installed = [] {
    constexpr uint8_t kPriority = 100;
    c10::SetCPUAllocator(new Allocator, kPriority);
    c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Listener>());
    return true;
}();

}  // namespace
}  // namespace simt

// Whether kernels are to believe that a CUDA graph captures their stream.
extern "C" __attribute__((visibility("default"))) void simt_set_capturing(bool capturing) {
    simt::is_capturing = capturing;
}

// The nodes that the kernels' host code has added to a graph so far.
extern "C" __attribute__((visibility("default"))) uint64_t simt_num_nodes() { return simt::num_nodes(); }

// The names of ATen's ops, with a space after each, that have run since `record` was last true.
extern "C" __attribute__((visibility("default"))) const char* simt_aten_ops(bool record) {
    static std::string names;
    static at::CallbackHandle handle = 0;
    if (!record) {
        at::removeCallback(handle);
        return names.c_str();
    }
    names.clear();
    handle = at::addGlobalCallback(at::RecordFunctionCallback(
        [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
            names += std::string(function.name()) + " ";
            return nullptr;
        }));
    return names.c_str();
}

namespace bigramx {

// Some tensors are older than this module, or use memory allocated by NumPy.
bool uses_cuda_kernels(const at::Tensor& tensor) {
    if (tensor.has_storage()) simt::adopt(tensor.storage().data(), tensor.storage().nbytes());
    return true;
}

namespace cuda {

StreamGuard::StreamGuard(const at::Tensor& tensor) : guard_(tensor.device()), stream_(nullptr) {}

void check_host_can_draw(const char* op) { TORCH_CHECK(!simt::is_capturing, op, BIGRAMX_FROZEN_DRAWS); }

Seed draw_cuda_seed(const char* op, const std::optional<at::Generator>& generator) {
    if (generator.has_value()) check_host_can_draw(op);
    return {draw_seed(generator), false, 0, nullptr, nullptr};
}

}  // namespace cuda
}  // namespace bigramx
