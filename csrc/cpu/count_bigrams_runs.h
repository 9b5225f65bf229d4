// Runs of counted pairs: ascending, each pair with its count in 64 bits. What sparse counts consist of.
#pragma once

#include <c10/util/FunctionRef.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace bigramx::cpu {

struct NotEnoughMemory : std::bad_alloc {
    const char* what() const noexcept override { return "count_bigrams: not enough memory for the counts"; }
};

// Memory that is not filled. Large arrays are pages of their own, which the system has back as soon as they
// are freed or cut off; memory from malloc might stay with the process.
template <typename T>
class Array {
  public:
    Array() = default;
    explicit Array(int64_t size) : size_(size) {
        const size_t bytes = size * sizeof(T);
        if (bytes >= kMapped) {
            mapped_ = whole_pages(bytes);
            void* const pages =
                mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            begin_ = pages == MAP_FAILED ? nullptr : static_cast<T*>(pages);
        } else {
            begin_ = static_cast<T*>(std::malloc(bytes + 1));
        }
        if (begin_ == nullptr) throw NotEnoughMemory();
    }
    Array(Array&& other) noexcept { *this = std::move(other); }
    Array& operator=(Array&& other) noexcept {
        std::swap(begin_, other.begin_);
        std::swap(size_, other.size_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~Array() {
        if (mapped_ > 0) {
            munmap(begin_, mapped_);
        } else {
            std::free(begin_);
        }
    }

    // Cuts off what is behind so many elements.
    void shrink(int64_t size) {
        size_ = size;
        const size_t bytes = size * sizeof(T);
        if (mapped_ == 0) {
            void* const shrunk = std::realloc(begin_, bytes + 1);
            if (shrunk != nullptr) begin_ = static_cast<T*>(shrunk);
            return;
        }
        const size_t kept = whole_pages(bytes + 1);
        if (kept >= mapped_) return;
        munmap(reinterpret_cast<char*>(begin_) + kept, mapped_ - kept);
        mapped_ = kept;
    }

    T* begin() const { return begin_; }
    T* end() const { return begin_ + size_; }
    T& operator[](int64_t k) const { return begin_[k]; }
    int64_t size() const { return size_; }

  private:
    static constexpr size_t kMapped = 1 << 17;

    static size_t whole_pages(size_t bytes) {
        static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        return (bytes + page - 1) / page * page;
    }

    T* begin_ = nullptr;
    int64_t size_ = 0;
    size_t mapped_ = 0;  // bytes; 0: from malloc
};

// How 64 bits are divided: from the highest, the row within its block, the column, and the count. Rows come
// in at most 1024 blocks of 2^row_bits each; what belongs to different blocks is counted, merged and freed
// apart.
struct PairFormat {
    explicit PairFormat(int64_t vocab_size);

    // Takes the place of a token between sequences: no pair with it is counted.
    uint32_t separator() const { return static_cast<uint32_t>(vocab_size); }
    int64_t block_of(int64_t row) const { return row >> row_bits; }
    int64_t first_row(int64_t block) const { return block << row_bits; }

    // A key is an entry without its count; of a row it has what distinguishes it within its block.
    uint64_t key_of(int64_t row, int64_t column) const {
        return static_cast<uint64_t>(row - first_row(block_of(row))) << token_bits |
               static_cast<uint64_t>(column);
    }
    int64_t row_of(uint64_t key) const { return static_cast<int64_t>(key >> token_bits); }
    int64_t column_of(uint64_t key) const {
        return static_cast<int64_t>(key & ((uint64_t{1} << token_bits) - 1));
    }
    uint64_t key_of(uint64_t entry) const { return entry >> count_bits; }
    uint64_t count_of(uint64_t entry) const { return entry & max_count(); }
    uint64_t max_count() const { return (uint64_t{1} << count_bits) - 1; }

    int64_t vocab_size;  // V
    int token_bits;      // of a column, and of the separator
    int row_bits;        // of a row within its block
    int count_bits;      // the others
    int64_t num_blocks;
};

// The pairs of a block, ascending, each once. Never changed once it is made, so that threads may share it.
struct Run {
    explicit Run(int64_t size) : entries(size) {}

    Array<uint64_t> entries;
    std::map<uint64_t, int64_t> carries;  // by key: to be multiplied by 2^count_bits and added
    int64_t num_pairs = 0;                // the sum of the counts
};

using Runs = std::vector<std::shared_ptr<const Run>>;  // of one block

// Adds the count of a pair that comes after all that the run has; its entry is written at `end`.
void append(const PairFormat& format, uint64_t key, int64_t count, uint64_t*& end, Run& run);

// Merges the last run with the one before, unless that is at least `ratio` times as long; and so on.
void merge_last_runs(const PairFormat& format, int64_t ratio, Runs& runs);

// Calls visit(task) for all tasks, in several threads if they are about so many elements; handlers of signals
// run in between, and may raise.
void for_each_task(int64_t num_tasks, int64_t num_elements, c10::function_ref<void(int64_t task)> visit);

struct CountRunsParams {
    // Writes the tokens from begin to end, in 32 bits each; returns whether all are in range. Called by
    // several threads.
    c10::function_ref<bool(int64_t begin, int64_t end, uint32_t* tokens)> copy_tokens;
    int64_t num_pairs;    // one less than the tokens; at most most_pairs()
    int64_t skipped_row;  // whose pairs are not counted, or -1
    int64_t merge_ratio;  // as merge_last_runs takes it
    bool has_separators;
};

// Counts so many pairs at a time.
class RunCounter {
  public:
    explicit RunCounter(const PairFormat& format) : format_(format) {}

    // What two arrays of 100 MB hold. The more there are, the fewer runs have to be merged.
    int64_t most_pairs() const { return int64_t{3} << (has_small_keys() ? 23 : 22); }

    // Appends a run to each block in which there are pairs, and merges the last ones. Returns false if a
    // token is out of range.
    bool count(const CountRunsParams& params, std::vector<Runs>& blocks);

  private:
    bool has_small_keys() const { return format_.token_bits + format_.row_bits <= 32; }
    template <typename key_t>
    bool count_keys(const CountRunsParams& params, std::vector<Runs>& blocks);

    PairFormat format_;
    Array<uint64_t> keys_, scratch_;
};

}  // namespace bigramx::cpu
