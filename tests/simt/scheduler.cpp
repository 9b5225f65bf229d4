// Runs the threads of a block, one block after another: see simt.h.
//
// A thread is a fiber with its own stack. It runs until it waits (at a barrier or in a warp collective),
// ends, or is preempted, which can happen at any memory access; then a random ready thread continues. The
// last thread to arrive makes the waiting ones ready.
#include <cuda_runtime.h>
#include <execinfo.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "memory.h"
#include "simt.h"

namespace simt {
namespace {

uint64_t number_of_environment(const char* name, uint64_t otherwise) {
    const char* const text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 0);
}

}  // namespace

__thread const Thread* running = nullptr;
__thread cudaError_t last_error = cudaSuccess;
uint64_t max_preemptions = 1 << 24;
Random random_below(number_of_environment("SIMT_SEED", 0));

namespace {

constexpr size_t kAlwaysAllowedShared = 48 << 10;  // bytes; more must be requested
constexpr uint64_t kMaxBlocks = 0x7FFFFFFF;
constexpr int kMultiprocessors = 3;
constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4 << 10;
constexpr int kMaxFrames = 24;
constexpr const char* kWarpOps[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                    "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                    "__any_sync",       "__all_sync",      "__match_any_sync"};

struct Fiber : Thread {
    bool has_ended;
    Site site;  // where it last waited
    bool is_started = false;
    jmp_buf context;  // where it continues
    int predicate;    // passed to a barrier
};

// Lanes that wait for each other.
struct Collective {
    WarpOp op;
    unsigned mask;
    Site site;
    unsigned arrived;
};

struct Warp {
    unsigned lanes, ended;  // masks
    std::vector<Collective> open;
    uint64_t values[kWarp], results[kWarp];
    int arguments[kWarp], widths[kWarp];
};

// The running launch and its running block.
struct Machine {
    std::vector<Fiber> fibers;  // one per thread of the largest block so far
    std::thread::id host;       // the thread that the fibers belong to
    Call call;
    dim3 grid, size;
    unsigned block;
    unsigned ready[kMaxThreads];  // threads
    unsigned num_ready, num_ended, num_at_barrier;
    unsigned first_at_barrier;  // thread
    int barrier_result;
    uint64_t preemptions;
    Warp warps[kMaxWarps];
    jmp_buf host_context;  // where the host continues when a block has ended
    bool has_failed;
    std::string error;
    void* frames[kMaxFrames];
    int num_frames;
    uint64_t num_launches = 0, num_memsets = 0;
    bool follows_kernel = false;                             // what the stream did last
    std::unordered_map<const void*, size_t> allowed_shared;  // by kernel
};
Machine& machine = *new Machine;
std::mutex machine_mutex;

Fiber& running_fiber() { return machine.fibers[running->index]; }
bool same(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || std::string_view(a.file) == b.file);
}

// ------------------------------------------------------------------------------------------------- fibers

// Runs the same thread of one block after another.
void fiber_main();

[[noreturn]] void start(Fiber& fiber) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = const_cast<unsigned char*>(fiber.stack);
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    fiber.is_started = true;
    setcontext(&context);
    std::abort();
}

[[noreturn]] void resume(Fiber& fiber) {
    running = &fiber;
    if (fiber.is_started) _longjmp(fiber.context, 1);
    start(fiber);
}

[[noreturn]] void return_to_host() {
    running = nullptr;
    _longjmp(machine.host_context, 1);
}

void make_ready(unsigned thread) { machine.ready[machine.num_ready++] = thread; }

[[noreturn]] void fail_deadlock();

// Continues with one of the ready threads.
[[noreturn]] void resume_any() {
    if (machine.num_ready == 0) {
        if (machine.num_ended == machine.size.x) return_to_host();
        fail_deadlock();
    }
    unsigned& chosen = machine.ready[random_below(machine.num_ready)];
    const unsigned thread = chosen;
    chosen = machine.ready[--machine.num_ready];
    resume(machine.fibers[thread]);
}

// Lets others run until this thread is chosen again.
void yield() {
    if (_setjmp(running_fiber().context) == 0) resume_any();
}

// The stack of a thread, above an inaccessible guard page.
const unsigned char* map_stack() {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<const unsigned char*>(memory) + kGuardBytes;
}

// Fibers that a failure abandoned, or that belong to another thread of the host, start anew.
void prepare_fibers(unsigned threads) {
    if (machine.has_failed || machine.host != std::this_thread::get_id()) {
        for (Fiber& fiber : machine.fibers) fiber.is_started = false;
    }
    machine.host = std::this_thread::get_id();
    while (machine.fibers.size() < threads) {
        Fiber& fiber = machine.fibers.emplace_back();
        fiber.index = static_cast<unsigned>(machine.fibers.size() - 1);
        fiber.stack = map_stack();
        fiber.stack_end = fiber.stack + kStackBytes;
    }
}

// ---------------------------------------------------------------------------------------- ends of threads

std::string name_of(unsigned thread) { return simt::name_of(thread, machine.block); }

// A thread waits for another that has already ended.
[[noreturn]] void fail_abandoned(unsigned waiting, unsigned ended) {
    fail("divergent barrier: " + name_of(waiting) + " waits " + describe(machine.fibers[waiting].site) +
         ", but " + name_of(ended) + " has returned");
}

unsigned first_lane(unsigned mask) { return static_cast<unsigned>(__builtin_ctz(mask)); }

unsigned first_ended() {
    const auto found = std::find_if(machine.fibers.begin(), machine.fibers.begin() + machine.size.x,
                                    [](const Fiber& fiber) { return fiber.has_ended; });
    return found->index;
}

void end_thread() {
    Fiber& self = running_fiber();
    if (!order.has_waited(self.index))
        fail(name_of_running() + " returns without having waited for the kernel before");
    self.has_ended = true;
    ++machine.num_ended;
    if (machine.num_at_barrier > 0) fail_abandoned(machine.first_at_barrier, self.index);
    Warp& warp = machine.warps[self.index / kWarp];
    const unsigned lane = 1u << self.index % kWarp;
    warp.ended |= lane;
    for (const Collective& collective : warp.open) {
        if ((collective.mask & lane) == 0) continue;
        fail_abandoned(self.index / kWarp * kWarp + first_lane(collective.arrived), self.index);
    }
    yield();
}

void fiber_main() {
    for (;;) {
        machine.call.run(machine.call.arguments);
        end_thread();
    }
}

void fail_deadlock() {
    constexpr int kNamed = 4;
    std::string message;
    int named = 0;
    const Fiber* last = nullptr;
    for (unsigned thread = 0; thread < machine.size.x && named < kNamed; ++thread) {
        const Fiber& fiber = machine.fibers[thread];
        if (fiber.has_ended || (last != nullptr && same(last->site, fiber.site))) continue;
        message += (named++ == 0 ? " " : "; ") + name_of(thread) + " waits " + describe(fiber.site);
        last = &fiber;
    }
    fail("deadlock:" + message + ", each for others");
}

// -------------------------------------------------------------------------------------- barriers and warps

int combine_predicates(BlockOp op) {
    const auto begin = machine.fibers.begin(), end = begin + machine.size.x;
    const auto holds = [](const Fiber& fiber) { return fiber.predicate != 0; };
    switch (op) {
        case BlockOp::barrier: return 0;
        case BlockOp::count: return static_cast<int>(std::count_if(begin, end, holds));
        case BlockOp::all: return std::all_of(begin, end, holds);
        case BlockOp::any: return std::any_of(begin, end, holds);
    }
    return 0;
}

// The lane that a lane reads from in a shuffle.
int source_of(WarpOp op, int lane, int argument, int width) {
    const int segment = lane & -width;  // the first lane that it can read from
    switch (op) {
        case WarpOp::shuffle: return segment + (argument & (width - 1));
        case WarpOp::shuffle_up: return lane - argument >= segment ? lane - argument : lane;
        case WarpOp::shuffle_down: return lane + argument < segment + width ? lane + argument : lane;
        case WarpOp::shuffle_xor: return (lane ^ argument) < segment + width ? lane ^ argument : lane;
        default: return lane;
    }
}

// The lanes of a mask for which the predicate holds.
template <typename Holds>
unsigned lanes_where(unsigned mask, const Holds& holds) {
    unsigned lanes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1) != 0 && holds(lane)) lanes |= 1u << lane;
    }
    return lanes;
}

uint64_t result_for(int lane, const Collective& collective, const Warp& warp) {
    const unsigned mask = collective.mask;
    const auto is_true = [&](int other) { return warp.values[other] != 0; };
    const auto is_equal = [&](int other) { return warp.values[other] == warp.values[lane]; };
    switch (collective.op) {
        case WarpOp::barrier: return 0;
        case WarpOp::ballot: return lanes_where(mask, is_true);
        case WarpOp::any: return lanes_where(mask, is_true) != 0;
        case WarpOp::all: return lanes_where(mask, is_true) == mask;
        case WarpOp::match_any: return lanes_where(mask, is_equal);
        default: return warp.values[source_of(collective.op, lane, warp.arguments[lane], warp.widths[lane])];
    }
}

[[noreturn]] void fail_in_warp(WarpOp op, Site site, const std::string& what) {
    fail(std::string(kWarpOps[static_cast<int>(op)]) + ": " + name_of_running() + " " + what + ", " +
         describe(site));
}

// Rejects what no lane may request.
void check_collective(WarpOp op, unsigned mask, int argument, int width, Site site, const Warp& warp) {
    const int lane = static_cast<int>(running->index) % kWarp;
    if ((mask >> lane & 1) == 0) fail_in_warp(op, site, "is not in its own mask");
    if ((mask & ~warp.lanes) != 0)
        fail_in_warp(op, site, "has lanes in its mask that the block does not have");
    if ((mask & warp.ended) != 0) fail_in_warp(op, site, "waits for a lane that has returned");
    const bool is_shuffle = op >= WarpOp::shuffle && op <= WarpOp::shuffle_xor;
    if (!is_shuffle) return;
    if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
        fail_in_warp(op, site, "has a width that is not a power of two up to 32");
    const int source = source_of(op, lane, argument, width);
    if (source < 0 || source >= kWarp || (mask >> source & 1) == 0)
        fail_in_warp(op, site, "reads from a lane that is not in its mask");
}

Collective& join(Warp& warp, WarpOp op, unsigned mask, Site site) {
    for (Collective& collective : warp.open) {
        if (collective.op == op && collective.mask == mask && same(collective.site, site)) return collective;
    }
    return warp.open.emplace_back(Collective{op, mask, site, 0});
}

void complete(Warp& warp, unsigned index, Collective& collective) {
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((collective.mask >> lane & 1) == 0) continue;
        warp.results[lane] = result_for(lane, collective, warp);
        make_ready(index * kWarp + static_cast<unsigned>(lane));
    }
    if (collective.op == WarpOp::barrier && collective.mask == ~0u) order.warp_barrier(index);
    collective = warp.open.back();
    warp.open.pop_back();
}

// ----------------------------------------------------------------------------------------------- launches

size_t max_shared_bytes() {
    return std::min(number_of_environment("SIMT_MAX_SHARED_BYTES", kMaxSharedBytes), kMaxSharedBytes);
}

void prepare_block(unsigned block) {
    const unsigned threads = machine.size.x;
    machine.block = block;
    machine.num_ready = machine.num_ended = machine.num_at_barrier = 0;
    machine.preemptions = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
        machine.fibers[thread].has_ended = false;
        make_ready(thread);
    }
    for (unsigned first = 0; first < threads; first += kWarp) {
        Warp& warp = machine.warps[first / kWarp];
        const unsigned lanes = std::min(threads - first, unsigned{kWarp});
        warp.lanes = ~0u >> (kWarp - lanes);
        warp.ended = 0;
        warp.open.clear();
    }
    begin_block(block, threads);
}

// Returns when all threads have ended or one has failed.
void run_block(unsigned block) {
    prepare_block(block);
    if (_setjmp(machine.host_context) == 0) resume_any();
}

// Runs all blocks in a sufficiently random order: i -> (first + i * stride) mod blocks.
void run_blocks(uint64_t blocks) {
    const uint64_t first = random_below(static_cast<uint32_t>(blocks));
    uint64_t stride = 1 + random_below(static_cast<uint32_t>(blocks));
    while (std::gcd(stride, blocks) != 1) ++stride;
    for (uint64_t i = 0; i < blocks && !machine.has_failed; ++i) {
        run_block(static_cast<unsigned>((first + i * stride) % blocks));
    }
}

std::string message_of_failure() {
    const std::string lines = source_lines(machine.frames, machine.num_frames);
    return machine.error + " (SIMT_SEED=" + std::to_string(random_below.seed()) + ", launch " +
           std::to_string(machine.num_launches) + ")" + lines;
}

}  // namespace

std::string name_of(unsigned thread, unsigned block) {
    return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

std::string name_of_running() { return name_of(running->index, machine.block); }

void fail_as(const std::string& message) {
    machine.has_failed = true;
    machine.error = message;
    machine.num_frames = 0;
    return_to_host();
}

void fail(const std::string& message) {
    void* frames[kMaxFrames];
    const int num_frames = backtrace(frames, kMaxFrames);
    std::copy_n(frames, num_frames, machine.frames);
    machine.has_failed = true;
    machine.error = message;
    machine.num_frames = num_frames;
    return_to_host();
}

void preempt() {
    if (++machine.preemptions > max_preemptions)
        fail("no end in sight: " + name_of_running() + " is still running");
    make_ready(running->index);
    yield();
}

int block_barrier(BlockOp op, int predicate, Site site) {
    Fiber& self = running_fiber();
    self.predicate = predicate;
    self.site = site;
    if (machine.num_ended > 0) fail_abandoned(self.index, first_ended());
    if (machine.num_at_barrier == 0) machine.first_at_barrier = self.index;
    const Fiber& first = machine.fibers[machine.first_at_barrier];
    if (!same(first.site, site)) {
        fail("divergent barrier: " + name_of_running() + " waits " + describe(site) + ", but " +
             name_of(first.index) + " " + describe(first.site));
    }
    if (++machine.num_at_barrier == machine.size.x) {
        machine.num_at_barrier = 0;
        machine.barrier_result = combine_predicates(op);
        order.block_barrier();
        for (unsigned thread = 0; thread < machine.size.x; ++thread) make_ready(thread);
    }
    yield();
    return machine.barrier_result;
}

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site) {
    const unsigned index = running->index / kWarp, lane = running->index % kWarp;
    Warp& warp = machine.warps[index];
    check_collective(op, mask, argument, width, site, warp);
    warp.values[lane] = value;
    warp.arguments[lane] = argument;
    warp.widths[lane] = width;
    Collective& collective = join(warp, op, mask, site);
    collective.arrived |= 1u << lane;
    running_fiber().site = site;
    if (collective.arrived == mask) complete(warp, index, collective);
    yield();
    return warp.results[lane];
}

cudaError_t remembered(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Call& call) {
    const dim3 grid = config.grid_size, size = config.block_size;
    if (grid.x == 0 || grid.x > kMaxBlocks || size.x == 0 || size.x > kMaxThreads)
        return remembered(cudaErrorInvalidConfiguration);
    if (grid.y * grid.z * size.y * size.z != 1)
        throw std::runtime_error("simt: grids and blocks have one dimension");
    const std::lock_guard<std::mutex> lock(machine_mutex);
    const auto allowed = machine.allowed_shared.find(call.kernel);
    const size_t most = allowed == machine.allowed_shared.end() ? kAlwaysAllowedShared : allowed->second;
    if (config.dynamicSmemBytes > std::max(most, kAlwaysAllowedShared))
        return remembered(cudaErrorInvalidValue);

    prepare_fibers(size.x);
    const bool overlaps = machine.follows_kernel && config.numAttrs > 0 &&
                          config.attrs->val.programmaticStreamSerializationAllowed != 0;
    begin_kernel(config.dynamicSmemBytes, call.arguments, call.arguments_bytes, overlaps);
    ++machine.num_launches;
    machine.follows_kernel = true;
    machine.call = call;
    machine.grid = grid;
    machine.size = size;
    machine.has_failed = false;
    run_blocks(grid.x);
    const std::string failure = machine.has_failed ? message_of_failure() : "";
    end_kernel();
    if (!failure.empty()) throw std::runtime_error(failure);
    return cudaSuccess;
}

uint64_t num_nodes() { return machine.num_launches + machine.num_memsets; }

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > max_shared_bytes())
        return remembered(cudaErrorInvalidValue);
    const std::lock_guard<std::mutex> lock(machine_mutex);
    machine.allowed_shared[kernel] = static_cast<size_t>(bytes);
    return cudaSuccess;
}

}  // namespace simt

uint3 simt_thread_index() { return {simt::running->index, 0, 0}; }
uint3 simt_block_index() { return {simt::machine.block, 0, 0}; }
dim3 simt_block_size() { return simt::machine.size; }
dim3 simt_grid_size() { return simt::machine.grid; }

const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    }
    return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const bool is_count = attribute == cudaDevAttrMultiProcessorCount;
    *value = is_count ? simt::kMultiprocessors : static_cast<int>(simt::max_shared_bytes());
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    ++simt::machine.num_memsets;
    simt::machine.follows_kernel = false;
    return simt::remembered(simt::set_memory(memory, value, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}

void simt_assert_fail(const char* assertion, const char* file, unsigned line, const char*) noexcept {
    if (simt::running != nullptr)
        simt::fail_as(std::string(assertion) + " (" + simt::name_of_running() + ")");
    std::fprintf(stderr, "%s:%u: assertion failed: %s\n", file, line, assertion);
    std::abort();
}
