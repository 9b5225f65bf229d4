// Checks every memory access of a kernel: see simt.h. The compiler inserts calls of the __tsan_ functions.
//
// An access must be within one live allocation, the shared memory of the block, or the thread's own stack;
// constants and the arguments of the kernel may be read. Two accesses to the same byte, at least one a write
// and not both atomic, must be ordered (order.h): each granule of 4 bytes has a cell that records who has
// accessed it. Bytes that are accessed singly or in pairs have their own cells.
#include "memory.h"

#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "device_memory.h"

namespace bigramx::cuda {

// Declared by the kernels. The second half keeps out-of-bounds accesses away from other data.
alignas(1024) unsigned char bigramx_shared_memory[2 * simt::kMaxSharedBytes];

}  // namespace bigramx::cuda

namespace simt {

Order order;

namespace {

using Byte = unsigned char;
using bigramx::cuda::bigramx_shared_memory;

constexpr int kPoison = 0xFF;                      // NaN; -1
constexpr size_t kMaxPoisonedBytes = 64ull << 20;  // larger allocations use no memory until accessed
constexpr size_t kRedZone = 512;                   // around each allocation
constexpr size_t kMappedBytes = 1ull << 20;        // allocations of this size or larger are mapped
constexpr size_t kGranule = 4;
constexpr uint32_t kPreemptionInterval = 128;  // accesses, at most

enum class Access { read, write, atomic };
constexpr const char* kDoes[] = {"reads", "writes", "atomically updates"};
constexpr const char* kHasDone[] = {"read", "written", "atomically updated"};

// Zeros that use no memory until they are accessed.
void* map_zeros(size_t bytes) {
    void* const memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

// The last accesses to a granule or a byte. A write clears those before it.
struct Cell {
    Stamp last[3];      // by Access
    uint64_t is_split;  // of a granule: whether its bytes have their own cells
};

template <typename T>
class LazyArray {
  public:
    LazyArray() = default;
    LazyArray(const LazyArray&) = delete;
    LazyArray& operator=(const LazyArray&) = delete;
    ~LazyArray() {
        if (elements_ != nullptr) munmap(elements_, size_ * sizeof(T));
    }

    // `size` elements, initially zero.
    T* get(size_t size) {
        if (elements_ == nullptr) {
            elements_ = static_cast<T*>(map_zeros(size * sizeof(T)));
            size_ = size;
        }
        return elements_;
    }

  private:
    T* elements_ = nullptr;
    size_t size_ = 0;
};

// An allocation, or the shared memory of a block.
struct Region {
    const Byte* const begin;
    const size_t bytes;
    void* const base;         // what to release; null if adopted
    const size_t base_bytes;  // 0: allocated by malloc, not mapped
    LazyArray<Cell> cells, byte_cells;

    Region(const Byte* begin, size_t bytes, void* base, size_t base_bytes)
        : begin(begin), bytes(bytes), base(base), base_bytes(base_bytes) {}

    size_t granules() const { return bytes / kGranule + 2; }
    bool contains(const Byte* address) const { return static_cast<size_t>(address - begin) < bytes; }
};

// The allocations, by address. Never destroyed: some tensors are released only when the process ends.
std::map<const Byte*, Region>& regions = *new std::map<const Byte*, Region>;
std::mutex& regions_mutex = *new std::mutex;  // held during a launch

constexpr int kRecent = 4;
Region* recent[kRecent];  // the regions last found, newest first, then null: kernels use few regions

struct Range {
    const Byte* begin;
    size_t bytes;
    bool contains(const Byte* address, size_t size) const {
        const auto offset = static_cast<size_t>(address - begin);
        return offset < bytes && size <= bytes - offset;
    }
};

Range arguments{nullptr, 0};
Range constants{nullptr, 0};  // the range read last
Region shared(bigramx_shared_memory, kMaxSharedBytes, nullptr, 0);
size_t shared_bytes = 0;           // of it, how much each block of the launch has
Byte is_written[kMaxSharedBytes];  // of each byte of shared memory, whether the block has written it
uint32_t until_preemption;         // accesses

void draw_preemption() { until_preemption = 1 + random_below(kPreemptionInterval); }

// ------------------------------------------------------------------------------------------- allocations

void forget_recent() { std::fill(recent, recent + kRecent, nullptr); }

// The last region that begins at or before the address, or end().
std::map<const Byte*, Region>::iterator region_before(const Byte* address) {
    auto after = regions.upper_bound(address);
    return after == regions.begin() ? regions.end() : std::prev(after);
}

Region* find_region(const Byte* address) {
    for (Region* region : recent) {
        if (region != nullptr && region->contains(address)) return region;
    }
    const auto found = region_before(address);
    if (found == regions.end() || !found->second.contains(address)) return nullptr;
    std::copy_backward(recent, recent + kRecent - 1, recent + kRecent);
    return recent[0] = &found->second;
}

// Adopted memory has been released by its owner if it is allocated again.
void forget_adopted(const Byte* begin, size_t bytes) {
    for (auto last = region_before(begin + bytes); last != regions.end();
         last = region_before(begin + bytes)) {
        const Region& region = last->second;
        if (region.base != nullptr || region.begin + region.bytes <= begin) return;
        regions.erase(last);
    }
}

void add_region(const Byte* begin, size_t bytes, void* base, size_t base_bytes) {
    const std::lock_guard<std::mutex> lock(regions_mutex);
    forget_recent();
    forget_adopted(begin, bytes);
    regions.try_emplace(begin, begin, bytes, base, base_bytes);
}

}  // namespace

void* allocate(size_t bytes) {
    if (bytes == 0) return nullptr;
    const size_t base_bytes = (bytes + 3 * kRedZone - 1) / kRedZone * kRedZone;
    const bool mapped = bytes >= kMappedBytes;
    void* const base = mapped ? map_zeros(base_bytes) : std::aligned_alloc(kRedZone, base_bytes);
    if (base == nullptr) throw std::bad_alloc();
    Byte* const memory = static_cast<Byte*>(base) + kRedZone;
    if (bytes <= kMaxPoisonedBytes) std::memset(memory, kPoison, bytes);
    add_region(memory, bytes, base, mapped ? base_bytes : 0);
    return memory;
}

void release(void* memory) {
    if (memory == nullptr) return;
    const std::lock_guard<std::mutex> lock(regions_mutex);
    const auto found = regions.find(static_cast<const Byte*>(memory));
    void* const base = found->second.base;
    const size_t base_bytes = found->second.base_bytes;
    forget_recent();
    regions.erase(found);
    if (base_bytes == 0) {
        std::free(base);
    } else {
        munmap(base, base_bytes);
    }
}

void adopt(const void* memory, size_t bytes) {
    const auto* const begin = static_cast<const Byte*>(memory);
    {
        const std::lock_guard<std::mutex> lock(regions_mutex);
        const Region* const known = find_region(begin);
        if (bytes == 0 || (known != nullptr && known->contains(begin + bytes - 1))) return;
    }
    add_region(begin, bytes, nullptr, 0);
}

void forget(const void* memory) {
    const std::lock_guard<std::mutex> lock(regions_mutex);
    const auto found = regions.find(static_cast<const Byte*>(memory));
    if (found == regions.end() || found->second.base != nullptr) return;
    forget_recent();
    regions.erase(found);
}

bool set_memory(void* memory, int value, size_t bytes) {
    {
        const std::lock_guard<std::mutex> lock(regions_mutex);
        const auto* const begin = static_cast<const Byte*>(memory);
        const Region* const region = find_region(begin);
        if (region == nullptr || !Range{region->begin, region->bytes}.contains(begin, bytes)) return false;
    }
    std::memset(memory, value, bytes);
    return true;
}

void begin_kernel(size_t bytes_of_block, const void* kernel_arguments, size_t arguments_bytes,
                  bool overlaps) {
    regions_mutex.lock();
    shared_bytes = bytes_of_block;
    arguments = {static_cast<const Byte*>(kernel_arguments), arguments_bytes};
    draw_preemption();
    order.begin_launch(overlaps);
}

void begin_block(unsigned block, unsigned threads) {
    std::memset(bigramx_shared_memory, kPoison, shared_bytes);
    std::memset(is_written, 0, shared_bytes);
    order.begin_block(block, threads);
}

void end_kernel() {
    order.end_launch();
    regions_mutex.unlock();
}

// ---------------------------------------------------------------------------------------------- the checks

namespace {

std::string count_of_bytes(size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

std::string does(Access kind, size_t bytes) {
    return name_of_running() + " " + kDoes[static_cast<int>(kind)] + " " + count_of_bytes(bytes);
}

std::string place_in(const Region& region, const Byte* address) {
    const bool is_shared = &region == &shared;
    return " at byte " + std::to_string(address - region.begin) + " of " +
           (is_shared ? "the shared memory of the block" : "a device allocation") + ", which has " +
           count_of_bytes(is_shared ? shared_bytes : region.bytes);
}

[[noreturn]] void fail_out_of_bounds(const Byte* address, size_t bytes, Access kind) {
    constexpr auto kNear = static_cast<ptrdiff_t>(kRedZone);
    const auto before = region_before(address);
    const auto after = regions.upper_bound(address);
    std::string place =
        " where there is no device memory, at " + std::to_string(reinterpret_cast<uintptr_t>(address));
    if (after != regions.end() && after->first - address <= kNear) {
        place = place_in(after->second, address);
    } else if (before != regions.end() &&
               address - before->first - static_cast<ptrdiff_t>(before->second.bytes) < kNear) {
        place = place_in(before->second, address);
    }
    fail("out of bounds: " + does(kind, bytes) + place);
}

[[noreturn]] void fail_race(const Region& region, const Byte* address, size_t bytes, Access kind,
                            Access earlier, Stamp stamp) {
    const bool several = (stamp & (kSeveralLanes | kSeveralWarps | kOtherBlocks)) != 0;
    if (stamp < order.launch()) {
        fail("data race: " + does(kind, bytes) + place_in(region, address) + "; a kernel before has " +
             kHasDone[static_cast<int>(earlier)] + " them, for which the thread has not waited");
    }
    fail("data race: " + does(kind, bytes) + place_in(region, address) + "; " +
         name_of(thread_of(stamp), order.block_of(stamp)) + (several ? ", among others," : "") + " has " +
         kHasDone[static_cast<int>(earlier)] + " them, and nothing orders the two");
}

// Whether the module has constants at the address; remembers their range.
int find_constants(dl_phdr_info* module, size_t, void* address_of) {
    const auto* const address = *static_cast<const Byte**>(address_of);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        const ElfW(Phdr) & segment = module->dlpi_phdr[i];
        const bool readable =
            (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0) || segment.p_type == PT_GNU_RELRO;
        const Range range{reinterpret_cast<const Byte*>(module->dlpi_addr + segment.p_vaddr),
                          segment.p_memsz};
        if (!readable || !range.contains(address, 1)) continue;
        constants = range;
        return 1;
    }
    return 0;
}

bool is_constant(const Byte* address, size_t bytes) {
    if (arguments.contains(address, bytes) || constants.contains(address, bytes)) return true;
    return dl_iterate_phdr(find_constants, &address) != 0 && constants.contains(address, bytes);
}

struct Checked {
    Region& region;
    const Byte* address;
    size_t bytes;
    Access kind;
    Stamp oldest;
};

void check_cell(const Checked& access, const Cell& cell) {
    constexpr Access kKinds[] = {Access::read, Access::write, Access::atomic};
    for (const Access earlier : kKinds) {
        if (earlier == access.kind && earlier != Access::write) continue;
        const Stamp stamp = cell.last[static_cast<int>(earlier)];
        if (order.is_after(stamp, running->index, access.oldest)) continue;
        fail_race(access.region, access.address, access.bytes, access.kind, earlier, stamp);
    }
}

void note_in_cell(const Checked& access, Cell& cell) {
    Stamp& last = cell.last[static_cast<int>(access.kind)];
    if (access.kind == Access::write) {
        cell = {};
        last = order.now(running->index);
    } else {
        last = order.joined(last, running->index, access.oldest);
    }
}

// Checks `bytes` bytes from `offset` within the granule on.
void check_granule(const Checked& access, size_t granule, size_t offset, size_t bytes) {
    Cell& cell = access.region.cells.get(access.region.granules())[granule];
    check_cell(access, cell);
    const bool whole = bytes == kGranule;
    if (whole && cell.is_split == 0) return note_in_cell(access, cell);
    Cell* const byte_cells =
        access.region.byte_cells.get(access.region.granules() * kGranule) + granule * kGranule;
    if (cell.is_split == 0) {
        std::fill_n(byte_cells, kGranule, Cell{});
        cell.is_split = 1;
    }
    for (size_t byte = offset; byte < offset + bytes; ++byte) {
        check_cell(access, byte_cells[byte]);
        if (!whole) note_in_cell(access, byte_cells[byte]);
    }
    if (whole) note_in_cell(access, cell);
}

void check_initialised(const Checked& access) {
    Byte* const written = is_written + (access.address - shared.begin);
    if (access.kind == Access::write) {
        std::memset(written, 1, access.bytes);
    } else if (std::memchr(written, 0, access.bytes) != nullptr) {
        fail("uninitialised: " + does(access.kind, access.bytes) + place_in(shared, access.address) +
             "; no thread of the block has written them");
    }
}

void check_in_region(const Checked& access) {
    if (&access.region == &shared) check_initialised(access);
    const size_t first = reinterpret_cast<uintptr_t>(access.region.begin) / kGranule;
    auto address = reinterpret_cast<uintptr_t>(access.address);
    const uintptr_t end = address + access.bytes;
    while (address < end) {
        const size_t offset = address % kGranule, bytes = std::min(kGranule - offset, end - address);
        check_granule(access, address / kGranule - first, offset, bytes);
        address += bytes;
    }
}

void check(const void* pointer, size_t bytes, Access kind) {
    if (running == nullptr || bytes == 0) return;
    const auto* const address = static_cast<const Byte*>(pointer);
    if (address >= running->stack && address < running->stack_end) return;
    if (--until_preemption == 0) {
        draw_preemption();
        preempt();
    }
    if (Range{bigramx_shared_memory, sizeof(bigramx_shared_memory)}.contains(address, 1)) {
        if (!Range{shared.begin, shared_bytes}.contains(address, bytes))
            fail("out of bounds: " + does(kind, bytes) + place_in(shared, address));
        return check_in_region({shared, address, bytes, kind, order.block()});
    }
    if (Region* const region = find_region(address)) {
        if (!region->contains(address + bytes - 1)) fail_out_of_bounds(address, bytes, kind);
        return check_in_region({*region, address, bytes, kind, order.oldest(running->index)});
    }
    if (kind != Access::read || !is_constant(address, bytes)) fail_out_of_bounds(address, bytes, kind);
}

void check_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    fail("misaligned: " + does(Access::atomic, bytes) + " at " +
         std::to_string(reinterpret_cast<uintptr_t>(address)));
}

}  // namespace

// ------------------------------------------------------------------------------------- atomics and fences

template <typename T>
T atomic(AtomicOp op, T* address, T operand, T expected) {
    check_aligned(address, sizeof(T));
    check(address, sizeof(T), Access::atomic);
    order.atomic(running->index, address);
    const T before = *address;
    switch (op) {
        case AtomicOp::add:
            if constexpr (std::is_same_v<T, int>) {
                *address = static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(operand));
            } else {
                *address = before + operand;
            }
            break;
        case AtomicOp::min: *address = std::min(before, operand); break;
        case AtomicOp::max: *address = std::max(before, operand); break;
        case AtomicOp::exchange: *address = operand; break;
        case AtomicOp::compare_and_swap:
            if (before == expected) *address = operand;
            break;
        case AtomicOp::bit_or:
            if constexpr (std::is_integral_v<T>) *address = before | operand;
            break;
    }
    return before;
}

template int atomic(AtomicOp, int*, int, int);
template unsigned atomic(AtomicOp, unsigned*, unsigned, unsigned);
template unsigned long long atomic(AtomicOp, unsigned long long*, unsigned long long, unsigned long long);
template float atomic(AtomicOp, float*, float, float);
template double atomic(AtomicOp, double*, double, double);

}  // namespace simt

void cudaGridDependencySynchronize() { simt::order.wait_for_kernels_before(simt::running->index); }

void __threadfence() { simt::order.fence(simt::running->index); }

// --------------------------------------------------------------------------------- what the compiler calls

extern "C" {

#define SIMT_ACCESS(bytes)                                                                            \
    void __tsan_read##bytes(const void* address) { simt::check(address, bytes, simt::Access::read); } \
    void __tsan_write##bytes(const void* address) { simt::check(address, bytes, simt::Access::write); }

SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)

void __tsan_read_range(const void* address, size_t bytes) { simt::check(address, bytes, simt::Access::read); }
void __tsan_write_range(const void* address, size_t bytes) {
    simt::check(address, bytes, simt::Access::write);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Kernels call these instead of libc's functions: the Makefile renames the symbols.
void* simt_memcpy(void* to, const void* from, size_t bytes) {
    simt::check(from, bytes, simt::Access::read);
    simt::check(to, bytes, simt::Access::write);
    return std::memcpy(to, from, bytes);
}
void* simt_memmove(void* to, const void* from, size_t bytes) {
    simt::check(from, bytes, simt::Access::read);
    simt::check(to, bytes, simt::Access::write);
    return std::memmove(to, from, bytes);
}
void* simt_memset(void* to, int value, size_t bytes) {
    simt::check(to, bytes, simt::Access::write);
    return std::memset(to, value, bytes);
}

// Called by -fsanitize=undefined, with data that begins with a source location.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

[[noreturn]] static void fail_undefined(const char* what, const SourceLocation* at) {
    const std::string place = simt::describe({at->file, static_cast<int>(at->line)});
    if (simt::running != nullptr)
        simt::fail(std::string(what) + ": " + simt::name_of_running() + ", " + place);
    std::fprintf(stderr, "%s on the host, %s\n", what, place.c_str());
    std::abort();
}

#define SIMT_UNDEFINED(check, what, ...) \
    void __ubsan_handle_##check(const SourceLocation* at, ##__VA_ARGS__) { fail_undefined(what, at); }

SIMT_UNDEFINED(type_mismatch_v1, "misaligned", uintptr_t)
SIMT_UNDEFINED(out_of_bounds, "index out of bounds", uintptr_t)
SIMT_UNDEFINED(add_overflow, "integer overflow", uintptr_t, uintptr_t)
SIMT_UNDEFINED(sub_overflow, "integer overflow", uintptr_t, uintptr_t)
SIMT_UNDEFINED(mul_overflow, "integer overflow", uintptr_t, uintptr_t)
SIMT_UNDEFINED(negate_overflow, "integer overflow", uintptr_t)
SIMT_UNDEFINED(divrem_overflow, "division by zero", uintptr_t, uintptr_t)
SIMT_UNDEFINED(shift_out_of_bounds, "shift out of bounds", uintptr_t, uintptr_t)

}  // extern "C"
