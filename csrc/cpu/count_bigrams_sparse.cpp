#include "cpu/count_bigrams_sparse.h"

#include <ATen/Dispatch.h>
#include <ATen/Dispatch_v2.h>
#include <ATen/ops/_sparse_csr_tensor_unsafe.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "base/checked.h"
#include "base/checks.h"
#include "base/interrupt.h"
#include "base/op_names.h"
#include "cpu/base/huge_pages.h"

namespace bigramx::cpu {

namespace {

constexpr int64_t kFewTokens = 1 << 18, kMostPending = 1 << 20;
constexpr int64_t kMergeRatio = 4;  // of the lengths of a run and the next one
constexpr int64_t kMergeAll = std::numeric_limits<int32_t>::max();

#define BIGRAMX_DISPATCH_TOKENS(tokens, ...)                                                            \
    AT_DISPATCH_V2((tokens).scalar_type(), kCountBigrams, AT_WRAP(__VA_ARGS__), at::kByte, at::kUInt16, \
                   at::kUInt32, at::kInt, at::kLong)

// Writes tokens with 32 bits. Returns whether they are, as written, below the limit.
template <typename token_t>
bool copy_tokens(const token_t* tokens, int64_t n, uint32_t limit, uint32_t* copies) {
    bool in_range = true;
    for (int64_t k = 0; k < n; ++k) {
        if constexpr (sizeof(token_t) > sizeof(uint32_t)) {
            copies[k] = static_cast<uint32_t>(std::min<uint64_t>(tokens[k], ~uint32_t{0}));
        } else {
            copies[k] = static_cast<uint32_t>(tokens[k]);  // negative tokens become too large
        }
        in_range &= copies[k] < limit;
    }
    return in_range;
}

// For the first token out of range; position: that of the first of all.
[[noreturn]] void raise_out_of_range(const at::Tensor& tokens, int64_t position, int64_t vocab_size) {
    BIGRAMX_DISPATCH_TOKENS(tokens, [&] {
        SignalCheck signals;
        const scalar_t* const values = tokens.const_data_ptr<scalar_t>();
        for (int64_t n = 0; n < tokens.numel(); ++n) {
            signals.poll(1);
            const auto token = static_cast<int64_t>(values[n]);
            TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, kCountBigrams, ": tokens holds ", token,
                              " at position ", position + n, ", expected 0 <= token < ", vocab_size);
        }
    });
    raise_changed(kCountBigrams, "tokens");
}

at::Tensor allocate(int64_t size, at::ScalarType dtype) {
    try {
        const at::Tensor tensor = at::empty({size}, at::dtype(dtype));
        advise_huge_pages(tensor);
        return tensor;
    } catch (const c10::Error&) {
        throw NotEnoughMemory();
    }
}

int64_t sum_of_pairs(int64_t a, int64_t b) {
    int64_t sum = 0;
    if (c10::add_overflows(a, b, &sum)) {
        throw std::overflow_error("count_bigrams: expected the sum of the counts to be less than 2^63");
    }
    return sum;
}

int64_t num_entries(const std::vector<Runs>& blocks) {
    int64_t size = 0;
    for (const Runs& runs : blocks) {
        for (const auto& run : runs) size += run->entries.size();
    }
    return size;
}

struct CsrParts {
    at::Tensor crow_indices;  // (rows + 1) int64
    at::Tensor col_indices;   // (pairs) int32 or int64
    at::Tensor values;        // (pairs) int32 or int64
};

// Calls visit with pointers to the columns and the counts.
template <typename Visit>
void dispatch_csr(const CsrParts& parts, const Visit& visit) {
    AT_DISPATCH_INDEX_TYPES(parts.col_indices.scalar_type(), kCountBigrams, [&] {
        auto* const columns = parts.col_indices.data_ptr<index_t>();
        AT_DISPATCH_INDEX_TYPES(parts.values.scalar_type(), kCountBigrams,
                                [&] { visit(columns, parts.values.data_ptr<index_t>()); });
    });
}

void check_csr(const CsrParts& parts, int64_t vocab_size) {
    for (const auto& [name, tensor] :
         {NamedTensor{"crow_indices", parts.crow_indices}, NamedTensor{"col_indices", parts.col_indices},
          NamedTensor{"values", parts.values}}) {
        check_dense(kCountBigrams, name, tensor);
        check_tensor(kCountBigrams, name, tensor);
        TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && !is_lazy(tensor), kCountBigrams,
                    ": expected ", name, " to be contiguous, on the CPU");
        check_dtype(kCountBigrams, name, tensor, {at::kLong, at::kInt});
        TORCH_CHECK_VALUE(tensor.dim() == 1, kCountBigrams, ": expected ", name, " to be 1-D, got shape ",
                          tensor.sizes());
    }
    check_dtype(kCountBigrams, "crow_indices", parts.crow_indices, {at::kLong});
    TORCH_CHECK_VALUE(parts.crow_indices.numel() == vocab_size + 1, kCountBigrams, ": expected ",
                      vocab_size + 1, " crow_indices, got ", parts.crow_indices.numel());
    TORCH_CHECK_VALUE(parts.col_indices.numel() == parts.values.numel(), kCountBigrams,
                      ": expected as many col_indices as values, got ", parts.col_indices.numel(), " and ",
                      parts.values.numel());
}

// Some rows of a block: the entries of its only run from `first` to before `last`.
struct RunRows {
    int64_t begin_row = 0, end_row = 0;  // within the block; none where they descend
    int64_t first = 0, last = 0;
    int64_t largest = 0;   // of the counts in the run
    int64_t position = 0;  // of its first entry among all
};

RunRows rows_of(const PairFormat& format, const Runs& runs, int64_t begin_row, int64_t end_row) {
    RunRows rows{begin_row, end_row};
    if (runs.empty() || begin_row >= end_row) return rows;
    const Run& run = *runs[0];
    const Array<uint64_t>& entries = run.entries;
    const auto first_of = [&](int64_t row) {
        return std::partition_point(
                   entries.begin(), entries.end(),
                   [&](uint64_t entry) { return format.row_of(format.key_of(entry)) < row; }) -
               entries.begin();
    };
    rows.first = first_of(begin_row);
    rows.last = first_of(end_row);
    uint64_t largest = 0;
    for (const uint64_t entry : entries) largest = std::max(largest, format.count_of(entry));
    // Not more than the sum, nor less than what it is if there are carries.
    rows.largest = run.carries.empty() ? static_cast<int64_t>(largest) : run.num_pairs;
    return rows;
}

// crow: for the first row of the block.
template <typename column_t, typename value_t>
void write_rows(const PairFormat& format, const Runs& runs, const RunRows& rows, int64_t* crow,
                column_t* columns, value_t* values) {
    int64_t row = rows.begin_row, position = rows.position;
    for (int64_t k = rows.first; k < rows.last; ++k, ++position) {
        const uint64_t entry = runs[0]->entries[k], key = format.key_of(entry);
        for (; row <= format.row_of(key); ++row) crow[row] = position;
        columns[position] = static_cast<column_t>(format.column_of(key));
        values[position] = static_cast<value_t>(format.count_of(entry));
    }
    for (; row < rows.end_row; ++row) crow[row] = position;
    if (runs.empty()) return;
    for (const auto& [key, carry] : runs[0]->carries) {
        const Array<uint64_t>& entries = runs[0]->entries;
        const int64_t k =
            std::lower_bound(entries.begin(), entries.end(), key << format.count_bits) - entries.begin();
        if (k < rows.first || k >= rows.last) continue;
        values[rows.position + k - rows.first] += static_cast<value_t>(carry << format.count_bits);
    }
}

// The rows from begin to before end, of blocks with one run at most, which are freed meanwhile if nobody else
// has them. is_narrow: in int32 where that suffices.
CsrParts csr_of(const PairFormat& format, std::vector<Runs> blocks, int64_t begin, int64_t end,
                bool is_narrow) {
    std::vector<RunRows> parts(format.num_blocks);
    for_each_task(format.num_blocks, num_entries(blocks), [&](int64_t block) {
        const int64_t first_row = format.first_row(block), last_row = format.first_row(block + 1);
        parts[block] = rows_of(format, blocks[block], std::max(begin, first_row) - first_row,
                               std::min(end, last_row) - first_row);
    });
    int64_t size = 0, largest = 0;
    for (RunRows& part : parts) {
        part.position = size;
        size += part.last - part.first;
        largest = std::max(largest, part.largest);
    }
    const bool is_small = largest <= std::numeric_limits<int32_t>::max();
    const CsrParts csr{allocate(end - begin + 1, at::kLong), allocate(size, is_narrow ? at::kInt : at::kLong),
                       allocate(size, is_narrow && is_small ? at::kInt : at::kLong)};
    auto* const crow = csr.crow_indices.data_ptr<int64_t>();
    dispatch_csr(csr, [&](auto* columns, auto* values) {
        for_each_task(format.num_blocks, size, [&](int64_t block) {
            const int64_t first_row = format.first_row(block);
            write_rows(format, blocks[block], parts[block], crow + (first_row - begin), columns, values);
            blocks[block].clear();
        });
    });
    crow[end - begin] = size;
    return csr;
}

void merge_last_runs(const PairFormat& format, int64_t ratio, std::vector<Runs>& blocks) {
    for_each_task(format.num_blocks, num_entries(blocks),
                  [&](int64_t block) { merge_last_runs(format, ratio, blocks[block]); });
}

PairFormat checked_format(int64_t vocab_size) {
    TORCH_CHECK_VALUE(vocab_size > 0 && vocab_size <= int64_t{1} << 31, kCountBigrams,
                      ": expected 0 < vocab_size <= 2^31, got ", vocab_size);
    return PairFormat(vocab_size);
}

}  // namespace

PairCounter::PairCounter(int64_t vocab_size, std::optional<int64_t> eot)
    : format_(checked_format(vocab_size)), eot_(eot), blocks_(format_.num_blocks) {
    TORCH_CHECK_VALUE(!eot || (*eot >= 0 && *eot < vocab_size), kCountBigrams, ": expected 0 <= eot < ",
                      vocab_size, ", got ", eot.value_or(-1));
}

// ------------------------------------------------------------------------------------------------- counting

void PairCounter::update(const at::Tensor& tokens, int64_t begin, int64_t end) {
    check_dense(kCountBigrams, "tokens", tokens);
    check_tokens(kCountBigrams, tokens);
    TORCH_CHECK(tokens.is_cpu(), kCountBigrams, ": expected tokens on the CPU, got ", tokens.device());
    const int64_t num_tokens = tokens.numel();
    TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= std::max<int64_t>(num_tokens - 1, 0),
                      kCountBigrams, ": expected 0 <= begin <= end < ", num_tokens, ", got ", begin, " and ",
                      end);
    if (num_tokens == 0) return;
    const at::Tensor part = materialized(tokens.narrow(0, begin, end - begin + 1)).contiguous();
    part.numel() <= kFewTokens ? update_few(part, begin) : update_many(part, begin);
}

void PairCounter::update_few(const at::Tensor& tokens, int64_t position) {
    std::vector<uint32_t> copies(tokens.numel() + 1, format_.separator());
    BIGRAMX_DISPATCH_TOKENS(tokens, [&] {
        if (!copy_tokens(tokens.const_data_ptr<scalar_t>(), tokens.numel(), format_.separator(),
                         copies.data())) {
            raise_out_of_range(tokens, position, format_.vocab_size);
        }
    });
    const auto size = static_cast<int64_t>(copies.size());
    while (true) {
        {
            const std::lock_guard lock(mutex_);
            const auto num_pending = static_cast<int64_t>(pending_.size());
            if (num_pending + size <= kMostPending) {
                sum_of_pairs(num_pairs_, num_pending + size);
                pending_.insert(pending_.end(), copies.begin(), copies.end());
                return;
            }
        }
        flush();
    }
}

void PairCounter::update_many(const at::Tensor& tokens, int64_t position) {
    std::unique_ptr<RunCounter> counter;
    {
        const std::lock_guard lock(mutex_);
        counter = std::move(scratch_);
    }
    if (counter == nullptr) counter = std::make_unique<RunCounter>(format_);
    std::vector<Runs> added(format_.num_blocks);
    const int64_t num_pairs = tokens.numel() - 1;
    for (int64_t begin = 0; begin < num_pairs; begin += counter->most_pairs()) {
        const int64_t size = std::min(counter->most_pairs(), num_pairs - begin);
        BIGRAMX_DISPATCH_TOKENS(tokens, [&] {
            const scalar_t* const values = tokens.const_data_ptr<scalar_t>() + begin;
            const auto copy = [&](int64_t first, int64_t last, uint32_t* copies) {
                return copy_tokens(values + first, last - first, format_.separator(), copies);
            };
            if (!counter->count({copy, size, eot_.value_or(-1), kMergeRatio, false}, added)) {
                raise_out_of_range(tokens, position, format_.vocab_size);
            }
        });
    }
    merged(kMergeRatio);
    SignalCheck().handle();  // what would raise behind this would raise too late
    const std::lock_guard lock(mutex_);
    add(added);
    scratch_ = std::move(counter);
}

// Counts what is pending at the call.
void PairCounter::flush() {
    int64_t end;
    {
        const std::lock_guard lock(mutex_);
        end = num_flushed_ + static_cast<int64_t>(pending_.size());
    }
    while (!try_flush(end)) continue;
}

// Counts what is pending, unless another thread does so first, which may know of less. Returns whether the
// tokens before end have been counted.
bool PairCounter::try_flush(int64_t end) {
    std::vector<uint32_t> tokens;
    int64_t num_flushed;
    {
        const std::lock_guard lock(mutex_);
        if (num_flushed_ >= end) return true;
        tokens = pending_;
        num_flushed = num_flushed_;
    }
    const auto size = static_cast<int64_t>(tokens.size());
    std::vector<Runs> added(format_.num_blocks);
    const auto copy = [&](int64_t first, int64_t last, uint32_t* copies) {
        return copy_tokens(tokens.data() + first, last - first, format_.separator() + 1, copies);
    };
    RunCounter(format_).count({copy, size - 1, eot_.value_or(-1), kMergeRatio, true}, added);
    merged(kMergeRatio);
    const std::lock_guard lock(mutex_);
    if (num_flushed == num_flushed_) {
        add(added, size);
        pending_.erase(pending_.begin(), pending_.begin() + size);
        num_flushed_ += size;
    }
    return num_flushed_ >= end;
}

// With the lock. num_flushed: how many of the pending tokens these are.
void PairCounter::add(const std::vector<Runs>& added, int64_t num_flushed) {
    int64_t num_pairs = num_pairs_;
    for (size_t block = 0; block < added.size(); ++block) {
        for (const auto& run : added[block]) num_pairs = sum_of_pairs(num_pairs, run->num_pairs);
        blocks_[block].reserve(blocks_[block].size() + added[block].size());
    }
    sum_of_pairs(num_pairs, static_cast<int64_t>(pending_.size()) - num_flushed);
    for (size_t block = 0; block < added.size(); ++block) {
        blocks_[block].insert(blocks_[block].end(), added[block].begin(), added[block].end());
    }
    num_pairs_ = num_pairs;
}

void PairCounter::merge(PairCounter& other) {
    TORCH_CHECK_VALUE(other.format_.vocab_size == format_.vocab_size && other.eot_ == eot_, kCountBigrams,
                      ": expected counts of the same vocab_size and eot");
    other.flush();
    const std::vector<Runs> added = other.merged(kMergeRatio);
    merged(kMergeRatio);
    SignalCheck().handle();  // what would raise behind this would raise too late
    const std::lock_guard lock(mutex_);
    add(added);
}

void PairCounter::add_csr(const at::Tensor& crow_indices, const at::Tensor& col_indices,
                          const at::Tensor& values) {
    const CsrParts parts{crow_indices, col_indices, values};
    check_csr(parts, format_.vocab_size);
    const auto* const crow = parts.crow_indices.const_data_ptr<int64_t>();
    const int64_t size = parts.values.numel(), vocab_size = format_.vocab_size;
    Array<int64_t> ends(vocab_size + 1);  // a copy, which nobody changes
    SignalCheck signals;
    for (int64_t row = 0; row <= vocab_size; ++row) {
        signals.poll(1);
        ends[row] = crow[row];
        TORCH_CHECK_VALUE(row == 0 ? ends[0] == 0 : ends[row - 1] <= ends[row], kCountBigrams,
                          ": expected crow_indices that begin with 0 and do not descend, got ", ends[row],
                          " at position ", row);
    }
    TORCH_CHECK_VALUE(ends[vocab_size] == size, kCountBigrams, ": expected crow_indices to end with ", size,
                      ", the number of counts, got ", ends[vocab_size]);
    std::vector<Runs> added(format_.num_blocks);
    dispatch_csr(parts, [&](const auto* columns, const auto* values) {
        for_each_task(format_.num_blocks, size, [&](int64_t block) {
            const int64_t first_row = format_.first_row(block);
            const int64_t last_row = std::min(format_.first_row(block + 1), vocab_size);
            if (first_row >= last_row || ends[first_row] == ends[last_row]) return;
            auto run = std::make_shared<Run>(ends[last_row] - ends[first_row]);
            uint64_t* end = run->entries.begin();
            for (int64_t row = first_row; row < last_row; ++row) {
                int64_t before = -1;
                for (int64_t k = ends[row]; k < ends[row + 1]; ++k) {
                    const int64_t column = columns[k], count = values[k];
                    TORCH_CHECK_VALUE(before < column && column < vocab_size, kCountBigrams,
                                      ": expected col_indices of row ", row, " that ascend from 0 to below ",
                                      vocab_size, ", got ", column, " after ", before);
                    TORCH_CHECK_VALUE(count >= 0, kCountBigrams, ": expected values >= 0, got ", count,
                                      " in row ", row, ", column ", column);
                    before = column;
                    if (count == 0 || row == eot_) continue;
                    append(format_, format_.key_of(row, column), count, end, *run);
                    run->num_pairs = sum_of_pairs(run->num_pairs, count);
                }
            }
            run->entries.shrink(end - run->entries.begin());
            if (run->entries.size() > 0) added[block].push_back(std::move(run));
        });
    });
    merged(kMergeRatio);
    SignalCheck().handle();  // what would raise behind this would raise too late
    const std::lock_guard lock(mutex_);
    add(added);
}

// -------------------------------------------------------------------------------------------------- reading

// All counts at a moment, of which some runs have been merged, here and in the counter.
std::vector<Runs> PairCounter::merged(int64_t ratio) {
    std::vector<Runs> blocks;
    {
        const std::lock_guard lock(mutex_);
        blocks = blocks_;
    }
    for_each_task(format_.num_blocks, num_entries(blocks), [&](int64_t block) {
        Runs& runs = blocks[block];
        const Runs before = runs;
        merge_last_runs(format_, ratio, runs);
        if (runs.size() == before.size()) return;
        Runs replacement = runs;
        const std::lock_guard lock(mutex_);
        Runs& current = blocks_[block];
        if (current.size() < before.size() || !std::equal(before.begin(), before.end(), current.begin()))
            return;
        replacement.insert(replacement.end(), current.begin() + static_cast<int64_t>(before.size()),
                           current.end());
        current.swap(replacement);
    });
    return blocks;
}

// All counts, which the counter has no longer.
std::vector<Runs> PairCounter::released() {
    std::vector<Runs> blocks(format_.num_blocks);
    {
        const std::lock_guard lock(mutex_);
        blocks_.swap(blocks);
        num_pairs_ = 0;
        scratch_.reset();
    }
    merge_last_runs(format_, kMergeAll, blocks);
    return blocks;
}

int64_t PairCounter::num_pairs() {
    flush();
    const std::lock_guard lock(mutex_);
    return num_pairs_;
}

int64_t PairCounter::num_distinct() {
    flush();
    return num_entries(merged(kMergeAll));
}

bool PairCounter::equals(PairCounter& other) {
    if (other.format_.vocab_size != format_.vocab_size || other.eot_ != eot_) return false;
    flush();
    other.flush();
    const std::vector<Runs> ours = merged(kMergeAll), theirs = other.merged(kMergeAll);
    std::atomic<bool> is_equal{true};
    for_each_task(format_.num_blocks, num_entries(ours), [&](int64_t block) {
        const Runs &a = ours[block], &b = theirs[block];
        const bool is_same =
            a.size() == b.size() && (a.empty() || (a[0]->carries == b[0]->carries &&
                                                   std::equal(a[0]->entries.begin(), a[0]->entries.end(),
                                                              b[0]->entries.begin(), b[0]->entries.end())));
        if (!is_same) is_equal = false;
    });
    return is_equal;
}

at::Tensor PairCounter::csr(int64_t begin, int64_t end, bool releases) {
    TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= format_.vocab_size, kCountBigrams,
                      ": expected 0 <= begin <= end <= ", format_.vocab_size, ", got ", begin, " and ", end);
    flush();
    const CsrParts csr = csr_of(format_, releases ? released() : merged(kMergeAll), begin, end, false);
    struct Silence : c10::WarningHandler {
        void process(const c10::Warning&) override {}
    } silence;  // that these tensors are in beta state
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    return at::_sparse_csr_tensor_unsafe(csr.crow_indices, csr.col_indices, csr.values,
                                         {end - begin, format_.vocab_size},
                                         at::dtype(at::kLong).layout(at::kSparseCsr));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> PairCounter::parts() {
    flush();
    const auto& [crow, columns, values] = csr_of(format_, merged(kMergeAll), 0, format_.vocab_size, true);
    return {crow, columns, values};
}

}  // namespace bigramx::cpu
