#include "cpu/count_bigrams_runs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "base/interrupt.h"
#include "cpu/base/huge_pages.h"

namespace bigramx::cpu {

namespace {

constexpr int64_t kPairsATask = 1 << 20;  // whose tokens a thread copies, and whose keys it moves, at once
constexpr int kMostBlockBits = 10;
constexpr int kMostDigitBits = 11;  // of a radix sort: 2048 places to write to

int bits_of(uint64_t value) {
    int bits = 0;
    for (; value > 0; value >>= 1) ++bits;
    return bits;
}

}  // namespace

PairFormat::PairFormat(int64_t size)
    : vocab_size(size),
      token_bits(bits_of(size)),
      row_bits(std::max(0, token_bits - kMostBlockBits)),
      count_bits(64 - token_bits - row_bits),
      num_blocks(block_of(size) + 1) {}

void for_each_task(int64_t num_tasks, int64_t num_elements, c10::function_ref<void(int64_t task)> visit) {
    constexpr int64_t kGrainSize = 1 << 17;
    std::atomic<int64_t> next{0};
    const int64_t num_threads =
        std::min({int64_t{at::get_num_threads()}, num_tasks, 1 + num_elements / kGrainSize});
    TimeSlice slice;
    SignalCheck signals;
    while (next < num_tasks) {
        slice.begin();
        at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
            while (!slice.ends()) {
                const int64_t task = next++;
                if (task >= num_tasks) break;
                visit(task);
            }
        });
        signals.poll();
    }
}

// ------------------------------------------------------------------------------------------------- counting

namespace {

// LSD radix sort of keys of so many bits. The sorted keys are in `keys`; scratch: (n).
template <typename key_t>
void sort_keys(key_t* keys, key_t* scratch, int64_t n, int bits) {
    constexpr int64_t kFew = 256;
    if (n <= kFew) return std::sort(keys, keys + n);
    const int num_passes = (bits + kMostDigitBits - 1) / kMostDigitBits;
    const int digit_bits = (bits + num_passes - 1) / num_passes;
    const key_t digit_mask = (key_t{1} << digit_bits) - 1;
    key_t *from = keys, *to = scratch;
    for (int pass = 0; pass < num_passes; ++pass) {
        const int shift = pass * digit_bits;
        uint32_t places[1 << kMostDigitBits] = {};
        for (int64_t k = 0; k < n; ++k) ++places[from[k] >> shift & digit_mask];
        uint32_t sum = 0;
        for (uint32_t& place : places) sum += std::exchange(place, sum);
        for (int64_t k = 0; k < n; ++k) to[places[from[k] >> shift & digit_mask]++] = from[k];
        std::swap(from, to);
    }
    if (from != keys) std::copy(from, from + n, keys);
}

// Sorted keys -> the run of the distinct ones.
template <typename key_t>
std::shared_ptr<const Run> run_of_keys(const PairFormat& format, const key_t* keys, int64_t n) {
    int64_t num_distinct = 1;
    for (int64_t k = 1; k < n; ++k) num_distinct += keys[k] != keys[k - 1];
    auto run = std::make_shared<Run>(num_distinct);
    run->num_pairs = n;
    uint64_t* end = run->entries.begin();
    int64_t begin = 0;
    if (static_cast<uint64_t>(n) <= format.max_count()) {  // without branches
        for (int64_t k = 0; k + 1 < n; ++k) {
            *end =
                (static_cast<uint64_t>(keys[k]) << format.count_bits) + static_cast<uint64_t>(k + 1 - begin);
            const bool is_last = keys[k] != keys[k + 1];
            end += is_last;
            begin = is_last ? k + 1 : begin;
        }
    } else {
        for (int64_t k = 0; k + 1 < n; ++k) {
            if (keys[k] == keys[k + 1]) continue;
            append(format, keys[k], k + 1 - begin, end, *run);
            begin = k + 1;
        }
    }
    append(format, keys[n - 1], n - begin, end, *run);
    return run;
}

}  // namespace

void append(const PairFormat& format, uint64_t key, int64_t count, uint64_t*& end, Run& run) {
    const auto bits = static_cast<uint64_t>(count);
    if (bits > format.max_count()) run.carries[key] += count >> format.count_bits;
    *end++ = key << format.count_bits | (bits & format.max_count());
}

bool RunCounter::count(const CountRunsParams& params, std::vector<Runs>& blocks) {
    return has_small_keys() ? count_keys<uint32_t>(params, blocks) : count_keys<uint64_t>(params, blocks);
}

template <typename key_t>
bool RunCounter::count_keys(const CountRunsParams& params, std::vector<Runs>& blocks) {
    const int64_t n = params.num_pairs, num_blocks = format_.num_blocks;
    const int64_t num_words = ((n + 1) * static_cast<int64_t>(sizeof(key_t)) + 7) / 8;
    if (keys_.size() < num_words) {
        for (Array<uint64_t>* array : {&keys_, &scratch_}) {
            *array = Array<uint64_t>();
            *array = Array<uint64_t>(num_words);
            advise_huge_pages(array->begin(), array->size() * sizeof(uint64_t));
        }
    }
    auto *keys = reinterpret_cast<key_t*>(keys_.begin()),
         *scratch = reinterpret_cast<key_t*>(scratch_.begin());
    auto* const tokens = reinterpret_cast<uint32_t*>(scratch);  // (n + 1), until the keys are made

    // The tokens are copied, so that nobody changes them any more, and checked. The keys of a block will be
    // together, in the order of the tasks.
    const int64_t num_tasks = (n + kPairsATask - 1) / kPairsATask;
    std::vector<uint32_t> places(num_tasks * num_blocks);
    std::atomic<bool> in_range{true};
    for_each_task(num_tasks, n, [&](int64_t task) {
        constexpr int64_t kStep = 1 << 12;               // tokens that stay in the L1 cache
        uint32_t tables[4][(1 << kMostBlockBits)] = {};  // increments of one counter wait for each other
        const int64_t end = std::min(n, (task + 1) * kPairsATask);
        for (int64_t begin = task * kPairsATask; begin < end; begin += kStep) {
            const int64_t stop = std::min(begin + kStep, end);
            if (!params.copy_tokens(begin, stop + (stop == n), tokens + begin)) in_range = false;
            if (!in_range) return;
            for (int64_t k = begin; k < stop; ++k) ++tables[k % 4][format_.block_of(tokens[k])];
        }
        for (int64_t block = 0; block < num_blocks; ++block) {
            places[task * num_blocks + block] =
                tables[0][block] + tables[1][block] + tables[2][block] + tables[3][block];
        }
    });
    if (!in_range) return false;
    std::vector<uint32_t> begins;
    uint32_t sum = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        begins.push_back(sum);
        for (int64_t task = 0; task < num_tasks; ++task) {
            sum += std::exchange(places[task * num_blocks + block], sum);
        }
    }
    begins.push_back(sum);

    for_each_task(num_tasks, n, [&](int64_t task) {
        uint32_t* const next = places.data() + task * num_blocks;
        const int64_t end = std::min(n, (task + 1) * kPairsATask);
        const auto row_mask = static_cast<uint32_t>((int64_t{1} << format_.row_bits) - 1);
        for (int64_t k = task * kPairsATask; k < end; ++k) {
            const uint32_t row = tokens[k];
            keys[next[row >> format_.row_bits]++] =
                static_cast<key_t>(static_cast<key_t>(row & row_mask) << format_.token_bits | tokens[k + 1]);
        }
    });

    for_each_task(num_blocks, n, [&](int64_t block) {
        key_t *const first = keys + begins[block], *last = keys + begins[block + 1];
        if (params.has_separators || block == format_.block_of(params.skipped_row)) {
            const int64_t first_row = format_.first_row(block);
            last = std::remove_if(first, last, [&](key_t key) {
                const int64_t row = first_row + format_.row_of(key);
                return row == params.skipped_row || row == format_.vocab_size ||
                       format_.column_of(key) == format_.vocab_size;
            });
        }
        if (first == last) return;
        sort_keys(first, scratch + begins[block], last - first, format_.token_bits + format_.row_bits);
        blocks[block].push_back(run_of_keys(format_, first, last - first));
        merge_last_runs(format_, params.merge_ratio, blocks[block]);
    });
    return true;
}

// -------------------------------------------------------------------------------------------------- merging

namespace {

// The sums of two runs.
std::shared_ptr<const Run> merge_runs(const PairFormat& format, const Run& a, const Run& b) {
    auto run = std::make_shared<Run>(a.entries.size() + b.entries.size());
    run->num_pairs = a.num_pairs + b.num_pairs;
    run->carries = a.carries;
    for (const auto& [key, carry] : b.carries) run->carries[key] += carry;
    const uint64_t *next_a = a.entries.begin(), *next_b = b.entries.begin();
    uint64_t* end = run->entries.begin();
    while (next_a != a.entries.end() && next_b != b.entries.end()) {
        const uint64_t key_a = format.key_of(*next_a), key_b = format.key_of(*next_b);
        const bool from_a = key_a <= key_b, from_b = key_b <= key_a;
        const uint64_t key = from_a ? key_a : key_b;
        uint64_t count = (from_a ? format.count_of(*next_a) : 0) + (from_b ? format.count_of(*next_b) : 0);
        if (__builtin_expect(count > format.max_count(), false)) {
            run->carries[key] += 1;
            count &= format.max_count();
        }
        *end++ = key << format.count_bits | count;
        next_a += from_a;
        next_b += from_b;
    }
    end = std::copy(next_a, static_cast<const uint64_t*>(a.entries.end()), end);
    end = std::copy(next_b, static_cast<const uint64_t*>(b.entries.end()), end);
    run->entries.shrink(end - run->entries.begin());
    return run;
}

}  // namespace

void merge_last_runs(const PairFormat& format, int64_t ratio, Runs& runs) {
    while (runs.size() > 1) {
        auto &last = runs.back(), &before = *(runs.end() - 2);
        if (before->entries.size() / ratio >= last->entries.size()) return;
        before = merge_runs(format, *before, *last);
        runs.pop_back();
    }
}

}  // namespace bigramx::cpu
