// Tests of the emulator: kernels with an injected fault, which must be detected, and without it, when the
// result must be correct. Run by test_simt.py.
#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "cuda/base/block.cuh"
#include "cuda/base/launch.h"
#include "cuda/base/vector_access.cuh"
#include "device_memory.h"
#include "simt.h"

namespace bigramx::cuda {
namespace {

constexpr int kThreads = 64;
constexpr const char* kName = "injected_faults";

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("wrong result: ") + what);
}

// An array in device memory.
template <typename T>
class Array {
  public:
    explicit Array(size_t size) : data_(static_cast<T*>(simt::allocate(size * sizeof(T)))), size_(size) {}
    Array(size_t size, T value) : Array(size) { std::fill_n(data_, size, value); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { simt::release(data_); }

    T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) const { return data_[i]; }

  private:
    T* const data_;
    const size_t size_;
};

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
         const Arguments&... arguments) {
    launch({kName, nullptr, blocks, threads, shared_bytes}, kernel, arguments...);
}

__device__ int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---------------------------------------------------------------------------------- order within a block

__global__ void reverse_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const slots = shared.take<int>(blockDim.x);
    slots[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (!broken) __syncthreads();
    out[threadIdx.x] = slots[blockDim.x - 1 - threadIdx.x];
}

void missing_barrier(bool broken) {
    const Array<int> out(kThreads);
    run(reverse_kernel, 1, kThreads, kThreads * sizeof(int), broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == kThreads - 1 - i, "reversed");
}

// The next round overwrites what other threads may not have read yet.
__global__ void rotate_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const slots = shared.take<int>(blockDim.x);
    int value = static_cast<int>(threadIdx.x);
    for (int round = 0; round < 3; ++round) {
        slots[threadIdx.x] = value;
        __syncthreads();
        value = slots[(threadIdx.x + 1) % blockDim.x];
        if (!broken) __syncthreads();
    }
    out[threadIdx.x] = value;
}

void missing_barrier_after_reading(bool broken) {
    const Array<int> out(kThreads);
    run(rotate_kernel, 1, kThreads, kThreads * sizeof(int), broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == (i + 3) % kThreads, "rotated");
}

__global__ void swap_in_warp_kernel(bool broken, bool by_shuffle, int* out) {
    SharedMemory shared;
    auto* const slots = shared.take<int>(blockDim.x);
    slots[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (!broken) __syncwarp();
    if (by_shuffle) __shfl_xor_sync(kAllLanes, 1, 1);
    out[threadIdx.x] = slots[threadIdx.x ^ 1];
}

void swap_in_warp(bool broken, bool by_shuffle) {
    const Array<int> out(kThreads);
    run(swap_in_warp_kernel, 1, kThreads, kThreads * sizeof(int), broken, by_shuffle, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == (i ^ 1), "swapped");
}

void missing_warp_barrier(bool broken) { swap_in_warp(broken, false); }
void shuffle_as_warp_barrier(bool broken) { swap_in_warp(broken, true); }

// A warp's barrier orders nothing between warps.
__global__ void swap_warps_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const slots = shared.take<int>(blockDim.x);
    slots[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (broken) {
        __syncwarp();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = slots[threadIdx.x ^ kWarp];
}

void warp_barrier_between_warps(bool broken) {
    const Array<int> out(kThreads);
    run(swap_warps_kernel, 1, kThreads, kThreads * sizeof(int), broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == (i ^ kWarp), "swapped");
}

__global__ void count_kernel(bool broken, int* count) {
    if (broken) {
        *count += 1;
    } else {
        atomicAdd(count, 1);
    }
}

void missing_atomic(bool broken) {
    const Array<int> count(1, 0);
    run(count_kernel, 3, kThreads, 0, broken, count.data());
    expect(count[0] == 3 * kThreads, "count");
}

void missing_atomic_between_blocks(bool broken) {
    const Array<int> count(1, 0);
    run(count_kernel, 3, 1, 0, broken, count.data());
    expect(count[0] == 3, "count");
}

__global__ void count_in_block_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const count = shared.take<int>(1);
    if (threadIdx.x == 0) *count = 0;
    if (!broken) __syncthreads();
    atomicAdd(count, 1);
    __syncthreads();
    if (threadIdx.x == 0) *out = *count;
}

void missing_barrier_before_atomics(bool broken) {
    const Array<int> out(1);
    run(count_in_block_kernel, 1, kThreads, sizeof(int), broken, out.data());
    expect(out[0] == kThreads, "count");
}

__global__ void read_count_kernel(bool broken, int* count, int* out) {
    atomicAdd(count, 1);
    if (!broken) __syncthreads();
    out[threadIdx.x] = *count;
}

void missing_barrier_after_atomics(bool broken) {
    const Array<int> count(1, 0), out(kThreads);
    run(read_count_kernel, 1, kThreads, 0, broken, count.data(), out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == kThreads, "count");
}

// Each thread writes two bytes of its own; broken: shares them with the next thread.
__global__ void write_half_words_kernel(bool broken, uint16_t* out) {
    out[broken ? threadIdx.x / 2 : threadIdx.x] = 7;
}

void shared_half_word(bool broken) {
    const Array<uint16_t> out(kThreads);
    run(write_half_words_kernel, 1, kThreads, 0, broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == 7, "elements");
}

// A vector of bytes that were written one by one.
__global__ void bytes_and_vectors_kernel(bool broken, uint8_t* out) {
    out[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
    if (!broken) __syncthreads();
    if (threadIdx.x % kVectorSize<uint8_t> != 0) return;
    AlignedVector<uint8_t> vector = load_vector(out + threadIdx.x);
    for (uint8_t& element : vector.elements) ++element;
    store_vector(out + threadIdx.x, vector);
}

void bytes_and_vectors(bool broken) {
    const Array<uint8_t> out(kThreads);
    run(bytes_and_vectors_kernel, 1, kThreads, 0, broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == i + 1, "elements");
}

// ---------------------------------------------------------------------------------- order between blocks

// The ways in which a block can fail to pass its result to the last block.
enum class Ticket {
    correct,
    without_release,
    without_acquire,
    without_barrier_before,
    without_barrier_after
};

__device__ bool is_last(Ticket way, unsigned* ticket, int* scratch) {
    if (way != Ticket::without_barrier_before) __syncthreads();
    if (threadIdx.x == 0) {
        if (way != Ticket::without_release) __threadfence();
        *scratch = atomicAdd(ticket, 1u) == gridDim.x - 1;
        if (way != Ticket::without_acquire) __threadfence();
    }
    if (way != Ticket::without_barrier_after) __syncthreads();
    return *scratch != 0;
}

// Every thread writes an element; the last block sums them.
__global__ void sum_kernel(Ticket way, int* partial, unsigned* ticket, int* total) {
    SharedMemory shared;
    auto* const scratch = shared.take<int>(kMaxWarps);
    auto* const flag = shared.take<int>(1);
    partial[thread_of_grid()] = thread_of_grid();
    if (!is_last(way, ticket, flag)) return;
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * blockDim.x + threadIdx.x];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *total = sum;
}

void sum_by_last_block(Ticket way) {
    constexpr int kBlocks = 5, kAll = kBlocks * kThreads;
    constexpr auto kShared =
        static_cast<size_t>(SharedMemory::bytes<int>(kMaxWarps) + SharedMemory::bytes<int>(1));
    const Array<int> partial(kAll), total(1);
    const Array<unsigned> ticket(1, 0);
    run(sum_kernel, kBlocks, kThreads, kShared, way, partial.data(), ticket.data(), total.data());
    expect(total[0] == kAll * (kAll - 1) / 2, "sum");
}

void missing_release(bool broken) { sum_by_last_block(broken ? Ticket::without_release : Ticket::correct); }
void missing_acquire(bool broken) { sum_by_last_block(broken ? Ticket::without_acquire : Ticket::correct); }
void missing_barrier_before_ticket(bool broken) {
    sum_by_last_block(broken ? Ticket::without_barrier_before : Ticket::correct);
}
void missing_barrier_after_ticket(bool broken) {
    sum_by_last_block(broken ? Ticket::without_barrier_after : Ticket::correct);
}

// The results of atomics must also be released before plain reads.
__global__ void count_then_read_kernel(Ticket way, int* count, unsigned* ticket, int* out) {
    SharedMemory shared;
    auto* const flag = shared.take<int>(1);
    atomicAdd(count, 1);
    if (is_last(way, ticket, flag)) out[threadIdx.x] = *count;
}

void missing_release_of_atomics(bool broken) {
    const Array<int> count(1, 0), out(kThreads);
    const Array<unsigned> ticket(1, 0);
    const Ticket way = broken ? Ticket::without_release : Ticket::correct;
    run(count_then_read_kernel, 3, kThreads, sizeof(int), way, count.data(), ticket.data(), out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == 3 * kThreads, "count");
}

// Every block reads the element that the last block clears; broken: any other block clears it.
__global__ void read_then_clear_kernel(bool broken, int* value, unsigned* ticket, int* out) {
    SharedMemory shared;
    auto* const flag = shared.take<int>(1);
    out[thread_of_grid()] = *value;
    const bool last = is_last_block(ticket, flag);
    if ((broken ? !last : last) && threadIdx.x == 0) *value = 0;
}

void cleared_by_any(bool broken) {
    const Array<int> value(1, 7), out(3 * kThreads);
    const Array<unsigned> ticket(1, 0);
    run(read_then_clear_kernel, 3, kThreads, sizeof(int), broken, value.data(), ticket.data(), out.data());
    expect(value[0] == 0 && out[0] == 7, "elements");
}

// ----------------------------------------------------------------------------------- order between kernels

__global__ void fill_kernel(int* values) {
    let_next_kernel_begin();
    values[thread_of_grid()] = thread_of_grid();
}

// Overlaps fill_kernel.
__global__ void add_one_to_each_kernel(bool waits, const int* values, int* out) {
    let_next_kernel_begin();
    if (waits) wait_for_kernel_before();
    out[thread_of_grid()] = values[thread_of_grid()] + 1;
    wait_for_kernel_before();
}

// Overlaps add_one_to_each_kernel, and through it fill_kernel.
__global__ void clear_kernel(bool waits, int* values) {
    if (waits) wait_for_kernel_before();
    values[thread_of_grid()] = 0;
    wait_for_kernel_before();
}

template <typename... Parameters, typename... Arguments>
void run_overlapping(void (*kernel)(Parameters...), const Arguments&... arguments) {
    launch({kName, nullptr, 2, kThreads, 0, /*overlaps=*/true}, kernel, arguments...);
}

void fill_then_add(bool waits_to_read, bool waits_to_clear) {
    const Array<int> values(2 * kThreads), sums(2 * kThreads);
    run(fill_kernel, 2, kThreads, 0, values.data());
    run_overlapping(add_one_to_each_kernel, waits_to_read, values.data(), sums.data());
    run_overlapping(clear_kernel, waits_to_clear, values.data());
    for (int i = 0; i < 2 * kThreads; ++i) expect(sums[i] == i + 1 && values[i] == 0, "sums");
}

void read_before_waiting(bool broken) { fill_then_add(!broken, true); }
void written_before_waiting(bool broken) { fill_then_add(true, !broken); }

__global__ void wait_but_for_one_thread_kernel(bool broken) {
    if (!broken || thread_of_grid() != kThreads + 3) wait_for_kernel_before();
}

void returns_without_waiting(bool broken) {
    const Array<int> values(2 * kThreads);
    run(fill_kernel, 2, kThreads, 0, values.data());
    run_overlapping(wait_but_for_one_thread_kernel, broken);
}

// A kernel that follows a memset begins after it.
void kernels_that_need_not_wait(bool) {
    const Array<int> values(2 * kThreads), sums(2 * kThreads);
    run(fill_kernel, 2, kThreads, 0, values.data());
    run(add_one_to_each_kernel, 2, kThreads, 0, false, values.data(), sums.data());
    clear(kName, nullptr, values.data(), values.size() * sizeof(int));
    run_overlapping(add_one_to_each_kernel, false, values.data(), sums.data());
    for (int i = 0; i < 2 * kThreads; ++i) expect(sums[i] == 1, "sums");
}

// ----------------------------------------------------------------------------------------------- bounds

__global__ void copy_kernel(const float* from, int64_t size, float* to) {
    if (thread_of_grid() < size) to[thread_of_grid()] = from[thread_of_grid()];
}

void copy(int from_size, int size, int to_size, int copied) {
    const Array<float> from(from_size, 1.0f), to(to_size);
    run(copy_kernel, 3, kThreads, 0, from.data(), copied, to.data());
    for (int i = 0; i < size; ++i) expect(to[i] == 1, "elements");
}

void reads_past_end(bool broken) { copy(129, 129, 192, broken ? 130 : 129); }
void writes_past_end(bool broken) { copy(192, 129, 129, broken ? 130 : 129); }
void unwritten_element(bool broken) { copy(129, 129, 129, broken ? 128 : 129); }

void freed_memory(bool broken) {
    const Array<float> to(kThreads);
    const float* freed = nullptr;
    {
        const Array<float> from(kThreads, 1.0f);
        freed = from.data();
        if (!broken) run(copy_kernel, 1, kThreads, 0, freed, kThreads, to.data());
    }
    if (broken) run(copy_kernel, 1, kThreads, 0, freed, kThreads, to.data());
}

__global__ void write_shared_kernel(int last) {
    SharedMemory shared;
    auto* const bytes = shared.take<uint8_t>(last);
    bytes[last] = 1;
}

void writes_past_shared_memory(bool broken) { run(write_shared_kernel, 1, 1, 17, broken ? 17 : 16); }

__global__ void read_unwritten_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const slots = shared.take<int>(blockDim.x + 1);
    slots[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = slots[threadIdx.x + (broken ? 1 : 0)];
}

void unwritten_shared_memory(bool broken) {
    const Array<int> out(kThreads);
    run(read_unwritten_kernel, 1, kThreads, (kThreads + 1) * sizeof(int), broken, out.data());
}

// The shared memory of one block is not passed on to the next.
__global__ void write_in_first_block_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const slot = shared.take<int>(1);
    if (!broken || blockIdx.x == 0) *slot = 1;
    out[blockIdx.x] = *slot;
}

void shared_memory_of_earlier_block(bool broken) {
    const Array<int> out(2);
    run(write_in_first_block_kernel, 2, 1, sizeof(int), broken, out.data());
}

// One element in each of a few rows of a table of more than 2^32 elements.
constexpr int64_t kRow = 70001;

__global__ void write_rows_kernel(int way, float* table) {
    const int row = static_cast<int>(blockIdx.x) * 35000, columns = static_cast<int>(kRow);
    int64_t offset = 0;
    if (way == 0) offset = static_cast<int64_t>(row) * columns;
    if (way == 1) offset = static_cast<unsigned>(row) * static_cast<unsigned>(columns);
    if (way == 2) offset = row * columns;
    table[offset] = 1;
}

void write_rows(int way) {
    const Array<float> table(kRow * kRow);
    run(write_rows_kernel, 3, 1, 0, way, table.data());
    for (const int64_t row : {0, 35000, 70000}) expect(table[row * kRow] == 1, "elements");
}

void offset_that_wraps(bool broken) { write_rows(broken ? 1 : 0); }
void offset_that_overflows(bool broken) { write_rows(broken ? 2 : 0); }

__global__ void read_vector_kernel(const float* from, float* to) { store_vector(to, load_vector(from)); }

void misaligned_vector(bool broken) {
    const Array<float> from(8, 1.0f), to(4);
    run(read_vector_kernel, 1, 1, 0, from.data() + (broken ? 1 : 4), to.data());
    expect(to[3] == 1, "elements");
}

__global__ void misaligned_atomic_kernel(unsigned char* memory) {
    atomicAdd(reinterpret_cast<unsigned*>(memory), 1u);
}

void misaligned_atomic(bool broken) {
    const Array<unsigned char> memory(16, 0);
    run(misaligned_atomic_kernel, 1, 1, 0, memory.data() + (broken ? 2 : 4));
}

__global__ void local_array_kernel(int64_t i, float* out) {
    AlignedVector<float> vector{};
    vector.elements[i] = 1;
    *out = vector.elements[0] + vector.elements[3];
}

void index_past_local_array(bool broken) {
    const Array<float> out(1);
    run(local_array_kernel, 1, 1, 0, broken ? 4 : 3, out.data());
    expect(out[0] == 1, "sum");
}

__global__ void share_local_kernel(bool broken, int* out) {
    SharedMemory shared;
    auto* const pointers = shared.take<int*>(blockDim.x);
    int local = 1;
    pointers[threadIdx.x] = &local;
    __syncthreads();
    out[threadIdx.x] = *pointers[broken ? threadIdx.x ^ 1 : threadIdx.x];
    __syncthreads();
}

void local_of_another_thread(bool broken) {
    const Array<int> out(kThreads);
    run(share_local_kernel, 1, kThreads, kThreads * sizeof(int*), broken, out.data());
}

__global__ void copy_bytes_kernel(const uint8_t* from, int64_t bytes, uint8_t* to) {
    memcpy(to, from, static_cast<size_t>(bytes));
}

void memcpy_past_end(bool broken) {
    const Array<uint8_t> from(100, 1), to(99);
    run(copy_bytes_kernel, 1, 1, 0, from.data(), broken ? 100 : 99, to.data());
    expect(to[98] == 1, "elements");
}

void memset_past_end(bool broken) {
    const Array<int> out(10);
    clear(kName, nullptr, out.data(), broken ? 41 : 40);
    expect(out[9] == 0, "elements");
}

// --------------------------------------------------------------------------------- divergence, launches

__global__ void diverge_kernel(bool broken) {
    if (broken && threadIdx.x == 5) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

void divergent_barrier(bool broken) { run(diverge_kernel, 1, kThreads, 0, broken); }

__global__ void return_early_kernel(bool broken) {
    if (broken && threadIdx.x == 5) return;
    __syncthreads();
}

void early_return(bool broken) { run(return_early_kernel, 1, kThreads, 0, broken); }

__global__ void return_early_in_warp_kernel(bool broken, int* out) {
    if (broken && threadIdx.x == 5) return;
    const int sum = warp_sum(1);
    out[threadIdx.x] = sum;
}

void early_return_in_warp(bool broken) {
    const Array<int> out(kThreads);
    run(return_early_in_warp_kernel, 1, kThreads, 0, broken, out.data());
    for (int i = 0; i < kThreads; ++i) expect(out[i] == kWarp, "sums");
}

__global__ void loop_kernel(bool broken) {
    const unsigned rounds = broken ? threadIdx.x % 2 + 1 : 2;
    for (unsigned round = 0; round < rounds; ++round) __syncthreads();
}

void barrier_in_uneven_loop(bool broken) { run(loop_kernel, 1, kThreads, 0, broken); }

__global__ void diverge_in_warp_kernel(bool broken, int* out) {
    int sum = 0;
    if (broken && threadIdx.x % 2 == 0) {
        sum = __shfl_xor_sync(kAllLanes, 1, 2);
    } else {
        sum = __shfl_xor_sync(kAllLanes, 1, 4);
    }
    out[threadIdx.x] = sum;
}

void divergent_shuffle(bool broken) {
    const Array<int> out(kThreads);
    run(diverge_in_warp_kernel, 1, kThreads, 0, broken, out.data());
}

// One lane waits for its warp, while all others wait for the block.
__global__ void wait_crosswise_kernel(bool broken) {
    if (broken && threadIdx.x == 0) __syncwarp();
    __syncthreads();
}

void crosswise_waits(bool broken) { run(wait_crosswise_kernel, 1, kThreads, 0, broken); }

__global__ void shuffle_in_mask_kernel(unsigned mask, int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 8);
}

void shuffle_outside_mask(bool broken) {
    const Array<int> out(16);
    run(shuffle_in_mask_kernel, 1, kWarp, 0, broken ? 0xFF : 0xFFFF, out.data());
    for (int i = 0; i < 16; ++i) expect(out[i] == (i ^ 8), "lanes");
}

__global__ void assert_kernel(int value) {
    device_assert(value >= 0, "injected_faults: expected value >= 0");
}

void failed_assertion(bool broken) { run(assert_kernel, 2, kThreads, 0, broken ? -1 : 0); }

__global__ void wait_for_block_kernel(unsigned* flag, bool forever) {
    while (forever && atomicAdd(flag, 0u) == 0) {
    }
}

void endless_loop(bool broken) {
    simt::max_preemptions = 1000;
    const Array<unsigned> flag(1, 0);
    run(wait_for_block_kernel, 1, 2, 0, flag.data(), broken);
}

__global__ void empty_kernel() {}

void too_many_threads(bool broken) { run(empty_kernel, 1, broken ? 1025 : 1024, 0); }
void too_much_shared_memory(bool broken) { run(empty_kernel, 1, 1, broken ? 232449 : 232448); }

__global__ void another_empty_kernel() {}

void shared_memory_not_asked_for(bool broken) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(1);
    config.dynamicSmemBytes = (48 << 10) + (broken ? 1 : 0);
    check_cuda(kName, cudaLaunchKernelEx(&config, another_empty_kernel));
}

// ---------------------------------------------------------------------------------- functions of CUDA

// Every thread checks the result of every warp and block function.
__global__ void warp_functions_kernel(int* errors) {
    const int lane = lane_of_thread();
    const auto expect_equal = [&](int64_t value, int64_t expected) {
        if (value != expected) atomicAdd(errors, 1);
    };
    expect_equal(__shfl_sync(kAllLanes, lane, 7), 7);
    expect_equal(__shfl_sync(kAllLanes, lane, 9, 8), lane / 8 * 8 + 1);
    expect_equal(__shfl_up_sync(kAllLanes, lane, 3), lane < 3 ? lane : lane - 3);
    expect_equal(__shfl_up_sync(kAllLanes, lane, 3, 8), lane % 8 < 3 ? lane : lane - 3);
    expect_equal(__shfl_down_sync(kAllLanes, lane, 3), lane > 28 ? lane : lane + 3);
    expect_equal(__shfl_xor_sync(kAllLanes, lane * 0x1'0000'0000, 5), (lane ^ 5) * 0x1'0000'0000);
    expect_equal(static_cast<int64_t>(__shfl_xor_sync(kAllLanes, lane + 0.5, 5) * 2), (lane ^ 5) * 2 + 1);
    expect_equal(__ballot_sync(kAllLanes, lane % 2), 0xAAAAAAAA);
    expect_equal(__match_any_sync(kAllLanes, lane / 4), 0xFu << lane / 4 * 4);
    expect_equal(__any_sync(kAllLanes, lane == 3) != 0, 1);
    expect_equal(__any_sync(kAllLanes, 0) != 0, 0);
    expect_equal(__all_sync(kAllLanes, lane < 32) != 0, 1);
    expect_equal(__all_sync(kAllLanes, lane < 31) != 0, 0);
    expect_equal(warp_sum(lane), 31 * 16);
    expect_equal(warp_inclusive_scan(lane), lane * (lane + 1) / 2);
    expect_equal(__syncthreads_count(lane < 3), 3 * warps_of_block());
    expect_equal(__syncthreads_or(threadIdx.x == 5) != 0, 1);
    expect_equal(__syncthreads_and(threadIdx.x == 5) != 0, 0);
    expect_equal(__popc(0xF0u) + __popcll(0xF0ull) + __ffs(8) + __clz(1) + __clz(0), 4 + 4 + 4 + 31 + 32);
    expect_equal(__umulhi(0x80000000u, 6u), 3);
    expect_equal(static_cast<int64_t>(__umul64hi(uint64_t{1} << 63, 6)), 3);
    if (lane < 8) expect_equal(__ballot_sync(0xFF, 1), 0xFF);
}

__global__ void atomics_kernel(int* ints, unsigned long long* words, double* number) {
    const auto i = static_cast<int>(threadIdx.x);
    atomicAdd(number, 0.5);
    atomicMin(ints + 0, -i);
    atomicMax(ints + 1, i);
    atomicOr(ints + 2, 1 << i % 8);
    atomicExch(ints + 3, 7);
    atomicAdd(words + 0, 1ull << 32);
    unsigned long long seen = 0, before = 0;
    while ((seen = atomicCAS(words + 1, before, before + 2)) != before) before = seen;
}

void correct_functions(bool) {
    const Array<int> errors(1, 0), ints(4, 0);
    const Array<unsigned long long> words(2, 0);
    const Array<double> number(1, 0.0);
    run(warp_functions_kernel, 2, kThreads, 0, errors.data());
    expect(errors[0] == 0, "functions of a warp or block");
    run(atomics_kernel, 1, kThreads, 0, ints.data(), words.data(), number.data());
    expect(number[0] == kThreads / 2 && ints[0] == 1 - kThreads && ints[1] == kThreads - 1, "atomics");
    expect(ints[2] == 0xFF && ints[3] == 7 && words[0] == uint64_t{kThreads} << 32, "atomics");
    expect(words[1] == 2 * kThreads, "atomics");
}

// ----------------------------------------------------------- the shared headers, mutated by test_simt.py

// Each function is called twice, so that the second call finds what the first has left in shared memory.
__global__ void block_functions_kernel(int* errors) {
    SharedMemory shared;
    auto* const scratch = shared.take<int>(kMaxWarps);
    const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int round = 0; round < 2; ++round) {
        int total = 0;
        if (block_sum(i + round, scratch) != threads * (threads - 1) / 2 + round * threads)
            atomicAdd(errors, 1);
        if (block_exclusive_scan(i, scratch, &total) != i * (i - 1) / 2) atomicAdd(errors, 1);
        if (total != threads * (threads - 1) / 2) atomicAdd(errors, 1);
    }
}

void block_functions(bool) {
    const Array<int> errors(1, 0);
    run(block_functions_kernel, 2, 5 * kWarp, kMaxWarps * sizeof(int), errors.data());
    expect(errors[0] == 0, "sums");
}

__global__ void sum_by_tickets_kernel(int* partial, unsigned* ticket, int* total) {
    SharedMemory shared;
    auto* const scratch = shared.take<int>(kMaxWarps);
    auto* const flag = shared.take<int>(1);
    partial[thread_of_grid()] = thread_of_grid();
    if (!is_last_block(ticket, flag)) return;
    int sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * blockDim.x + threadIdx.x];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *total = sum;
}

void last_block(bool) {
    constexpr int kBlocks = 5, kAll = kBlocks * kThreads;
    constexpr auto kShared = SharedMemory::bytes<int>(kMaxWarps) + SharedMemory::bytes<int>(1);
    const Array<int> partial(kAll), total(1);
    const Array<unsigned> ticket(1, 0);
    run(sum_by_tickets_kernel, kBlocks, kThreads, static_cast<size_t>(kShared), partial.data(), ticket.data(),
        total.data());
    expect(total[0] == kAll * (kAll - 1) / 2, "sum");
}

// Adds one to each element of a row of any alignment and length.
template <typename T>
__global__ void add_one_kernel(T* row, int64_t size) {
    for_each_aligned_vector<2>(
        row, size,
        [&](int k, AlignedVector<T> vector) {
            for (T& element : vector.elements) element = static_cast<T>(element + 1);
            store_vector(row + k, vector);
        },
        [&](int k) { row[k] = static_cast<T>(row[k] + 1); });
}

template <typename T>
void add_one(size_t begin, size_t size) {
    const Array<T> row(begin + size, T{1});
    run(add_one_kernel<T>, 1, kWarp, 0, row.data() + begin, static_cast<int64_t>(size));
    for (size_t i = 0; i < begin + size; ++i) expect(row[i] == (i < begin ? 1 : 2), "elements");
}

void vectors_of_rows(bool) {
    for (const size_t size : {0, 1, 15, 16, 17, 33, 1027}) {
        for (size_t begin = 0; begin < 16; ++begin) {
            add_one<uint8_t>(begin, size);
            add_one<float>(begin, size);
        }
    }
}

__global__ void note_order_kernel(unsigned* cursor, int* order) {
    order[atomicAdd(cursor, 1u)] = thread_of_grid();
}

struct Case {
    const char* name;
    void (*run)(bool broken);
};

#define CASE(name) {#name, name}
constexpr Case kCases[] = {
    CASE(missing_barrier),
    CASE(missing_barrier_after_reading),
    CASE(missing_warp_barrier),
    CASE(shuffle_as_warp_barrier),
    CASE(warp_barrier_between_warps),
    CASE(missing_atomic),
    CASE(missing_atomic_between_blocks),
    CASE(missing_barrier_before_atomics),
    CASE(missing_barrier_after_atomics),
    CASE(shared_half_word),
    CASE(bytes_and_vectors),
    CASE(missing_release),
    CASE(missing_acquire),
    CASE(missing_release_of_atomics),
    CASE(missing_barrier_before_ticket),
    CASE(missing_barrier_after_ticket),
    CASE(cleared_by_any),
    CASE(read_before_waiting),
    CASE(written_before_waiting),
    CASE(returns_without_waiting),
    CASE(reads_past_end),
    CASE(writes_past_end),
    CASE(unwritten_element),
    CASE(freed_memory),
    CASE(writes_past_shared_memory),
    CASE(unwritten_shared_memory),
    CASE(shared_memory_of_earlier_block),
    CASE(offset_that_wraps),
    CASE(offset_that_overflows),
    CASE(misaligned_vector),
    CASE(misaligned_atomic),
    CASE(index_past_local_array),
    CASE(local_of_another_thread),
    CASE(memcpy_past_end),
    CASE(memset_past_end),
    CASE(divergent_barrier),
    CASE(early_return),
    CASE(early_return_in_warp),
    CASE(barrier_in_uneven_loop),
    CASE(divergent_shuffle),
    CASE(crosswise_waits),
    CASE(shuffle_outside_mask),
    CASE(failed_assertion),
    CASE(endless_loop),
    CASE(too_many_threads),
    CASE(too_much_shared_memory),
    CASE(shared_memory_not_asked_for),
    CASE(correct_functions),
    CASE(block_functions),
    CASE(last_block),
    CASE(kernels_that_need_not_wait),
    CASE(vectors_of_rows),
};
#undef CASE

std::string message;

}  // namespace
}  // namespace bigramx::cuda

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The error that the case raises; empty if it raises none; null if there is no such case.
EXPORTED const char* run_fault(const char* name, bool broken, uint64_t seed) {
    using namespace bigramx::cuda;
    simt::random_below.seed(seed);
    for (const Case& known : kCases) {
        if (std::strcmp(known.name, name) != 0) continue;
        message.clear();
        try {
            known.run(broken);
        } catch (const std::exception& error) {
            message = error.what();
        }
        if (cudaGetLastError() != cudaSuccess) message = "an error is left for the next check to find";
        return message.c_str();
    }
    return nullptr;
}

// The indices of the threads within the grid, in the order in which they ran.
EXPORTED void run_order(int blocks, int threads, uint64_t seed, int* order) {
    using namespace bigramx::cuda;
    simt::random_below.seed(seed);
    const Array<unsigned> cursor(1, 0);
    const Array<int> seen(static_cast<size_t>(blocks) * threads);
    run(note_order_kernel, blocks, threads, 0, cursor.data(), seen.data());
    std::copy_n(seen.data(), seen.size(), order);
}

EXPORTED uint16_t float_to_half(float value) { return __float2half_rn(value).bits; }
EXPORTED uint16_t float_to_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }
EXPORTED float half_to_float(uint16_t bits) { return __half2float({bits}); }
EXPORTED float bfloat16_to_float(uint16_t bits) { return __bfloat162float({bits}); }
