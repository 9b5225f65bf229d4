#include "cpu/base/gradient_pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "cpu/base/huge_pages.h"

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace bigramx::cpu {
namespace {

constexpr size_t kLeastBytes = size_t{1} << 17;     // the least that the C library asks the system for
constexpr size_t kMostUnadvised = size_t{1} << 25;  // the C library keeps smaller ones as they are, too
constexpr int kMostPassedOver = 8;                  // by requests for other sizes, before a block is freed

// In front of each block's memory, in bytes that are not given to the system. As large as the alignment.
struct alignas(64) BlockHeader {
    size_t bytes;  // of the memory behind it
    int passed_over;
};

BlockHeader& header_of(void* memory) { return static_cast<BlockHeader*>(memory)[-1]; }

// The kept blocks: that freed last, and one of another size. A thread that looks at a block takes it out
// first.
std::array<std::atomic<void*>, 2> slots{};
std::atomic<size_t> limit{0};
std::atomic<int64_t> hits{0}, misses{0};

void release(void* memory) {
    if (memory != nullptr) c10::free_cpu(&header_of(memory));
}

// In place of what another thread may have put there meanwhile.
void keep(std::atomic<void*>& slot, void* memory) {
    if (memory != nullptr) release(slot.exchange(memory));
}

// Whether one block serves both: the number of rows that occur varies from step to step.
bool are_similar(size_t bytes, size_t other) {
    const auto [less, more] = std::minmax(bytes, other);
    return more - less <= less / 4;
}

// A kept block of at least so many bytes, or null. Frees those that no longer seem to be of use.
void* take(size_t bytes) {
    void* found = nullptr;
    std::array<void*, 2> kept{slots[0].exchange(nullptr), slots[1].exchange(nullptr)};
    for (void*& memory : kept) {
        if (memory == nullptr) continue;
        BlockHeader& header = header_of(memory);
        const bool is_similar = are_similar(header.bytes, bytes);
        if (found == nullptr && is_similar && header.bytes >= bytes) {
            found = std::exchange(memory, nullptr);
        } else if (is_similar || ++header.passed_over > kMostPassedOver) {
            release(std::exchange(memory, nullptr));
        }
    }
    if (found == nullptr) release(std::exchange(kept[1], nullptr));  // fresh memory beside one block, not two
    keep(slots[0], kept[0]);
    keep(slots[1], kept[1]);
    return found;
}

// Unused pages still count where the addresses themselves are limited (ulimit -v).
bool is_address_space_limited() {
#if defined(__linux__)
    rlimit addresses{};
    return getrlimit(RLIMIT_AS, &addresses) == 0 && addresses.rlim_cur != RLIM_INFINITY;
#else
    return false;
#endif
}

void give(void* memory) {
    const size_t most = limit.load();
    if (header_of(memory).bytes > most || is_address_space_limited()) return release(memory);
    if (header_of(memory).bytes > kMostUnadvised) advise_free(memory, header_of(memory).bytes);
    void* other = nullptr;
    for (std::atomic<void*>& slot : slots) {
        void* kept = slot.exchange(nullptr);
        if (kept == nullptr) continue;
        const size_t kept_bytes = header_of(kept).bytes, bytes = header_of(memory).bytes;
        if (are_similar(kept_bytes, bytes)) {
            if (kept_bytes > bytes) std::swap(kept, memory);
        } else if (other == nullptr && kept_bytes + bytes <= most) {
            std::swap(kept, other);
        }
        release(kept);
    }
    header_of(memory).passed_over = 0;
    keep(slots[0], memory);
    keep(slots[1], other);
    if (limit.load() < most) empty_gradient_pool();  // set meanwhile
}

// Null if there is no memory.
void* allocate_block(size_t bytes) {
    try {
        auto* const header = static_cast<BlockHeader*>(c10::alloc_cpu(sizeof(BlockHeader) + bytes));
        *header = {bytes, 0};
        advise_huge_pages(header + 1, bytes);
        return header + 1;
    } catch (const c10::Error&) {
        return nullptr;
    }
}

// Tells the profiler what torch's own allocator would.
void give_back(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    give(memory);
}

class GradientAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t bytes) override {
        c10::Allocator* const plain = c10::GetCPUAllocator();
        if (bytes < kLeastBytes || plain != c10::GetDefaultCPUAllocator()) return plain->allocate(bytes);
        void* memory = take(bytes);
        (memory != nullptr ? hits : misses).fetch_add(1, std::memory_order_relaxed);
        if (memory == nullptr) {
            // Before malloc fails: glibc then reserves another arena, whose addresses the next call lacks.
            if (is_address_space_limited()) empty_gradient_pool();
            memory = allocate_block(bytes);
        }
        if (memory == nullptr) {
            empty_gradient_pool();
            return plain->allocate(bytes);  // or its error
        }
        c10::profiledCPUMemoryReporter().New(memory, bytes);
        return {memory, memory, &give_back, c10::Device(c10::kCPU)};
    }

    void copy_data(void* to, const void* from, size_t bytes) const override {
        default_copy_data(to, from, bytes);
    }
};

}  // namespace

at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType dtype) {
    // Never destroyed: tensors may outlive all that is.
    static GradientAllocator* const allocator = new GradientAllocator;
    return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                     std::nullopt);
}

void set_gradient_pool_limit(int64_t bytes) {
    limit.store(static_cast<size_t>(std::max<int64_t>(0, bytes)));
    empty_gradient_pool();
}

void empty_gradient_pool() {
    for (std::atomic<void*>& slot : slots) release(slot.exchange(nullptr));
}

std::tuple<int64_t, int64_t, int64_t, int64_t> gradient_pool_info() {
    size_t held = 0;
    for (std::atomic<void*>& slot : slots) {
        void* const memory = slot.exchange(nullptr);
        if (memory == nullptr) continue;
        held += header_of(memory).bytes;
        keep(slot, memory);
    }
    return {limit.load(), held, hits.load(), misses.load()};
}

}  // namespace bigramx::cpu
