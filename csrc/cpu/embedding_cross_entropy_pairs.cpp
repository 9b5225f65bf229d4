#include "cpu/embedding_cross_entropy_pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <utility>

#include "base/checked.h"
#include "base/checks.h"
#include "base/op_names.h"

namespace bigramx::cpu {
namespace {

constexpr int64_t kGrainSize = 1 << 15;  // pairs

// A table of counts pays if it has few entries per pair and stays in the caches, or fits into the L1 cache.
// Pairs with losses or gradients of their own cannot be counted.
bool is_worth_counting(const EmbeddingCrossEntropyParams& params, int64_t stride) {
    constexpr int64_t kSmall = 1 << 14, kCached = 1 << 22;
    const int64_t num_pairs = params.idx.numel();
    int64_t entries = 0;
    return params.is_reduced() && num_pairs <= std::numeric_limits<int32_t>::max() &&
           !c10::mul_overflows(params.weight.size(0), std::max<int64_t>(stride, 1), &entries) &&
           entries <= std::max(kSmall, std::min(kCached, 4 * num_pairs));
}

// The batch as plain pointers, with range checks.
struct Batch {
    explicit Batch(const EmbeddingCrossEntropyParams& params)
        : idx(params.idx.const_data_ptr<int64_t>()),
          targets(params.targets.const_data_ptr<int64_t>()),
          num_pairs(params.idx.numel()),
          num_rows(params.weight.size(0)),
          num_classes(params.weight.size(1)),
          ignore_index(params.options.ignore_index) {}

    bool is_row(int64_t row) const { return static_cast<uint64_t>(row) < static_cast<uint64_t>(num_rows); }
    bool is_ignored(int64_t target) const { return target == ignore_index; }
    bool is_target(int64_t target) const {
        return static_cast<uint64_t>(target) < static_cast<uint64_t>(num_classes) || is_ignored(target);
    }

    // For the first pair that is out of range.
    [[noreturn]] void raise_out_of_range() const {
        for (int64_t n = 0; n < num_pairs; ++n) {
            TORCH_CHECK_INDEX(is_row(idx[n]), kEmbeddingCrossEntropy, ": index out of range: idx holds ",
                              idx[n], " at position ", n, ", expected 0 <= idx < ", num_rows);
            TORCH_CHECK_INDEX(is_target(targets[n]), kEmbeddingCrossEntropy, ": Target ", targets[n],
                              " is out of bounds: at position ", n, ", expected 0 <= targets < ", num_classes,
                              " or ignore_index = ", ignore_index);
        }
        raise_changed(kEmbeddingCrossEntropy, "idx and targets");
    }

    // Calls visit(chunk, begin, end) for each chunk of pairs, in parallel. visit returns false if one of them
    // is out of range.
    template <typename Visit>
    void for_each_chunk(int64_t num_chunks, const Visit& visit) const {
        std::atomic<bool> in_range = true;
        const auto visit_chunk = [&](int64_t chunk) {
            const int64_t begin = num_pairs * chunk / num_chunks, end = num_pairs * (chunk + 1) / num_chunks;
            if (!visit(chunk, begin, end)) in_range = false;
        };
        if (num_chunks == 1) {  // at::parallel_for costs as much as 80 pairs
            visit_chunk(0);
        } else {
            at::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
                for (int64_t chunk = first; chunk < last; ++chunk) visit_chunk(chunk);
            });
        }
        if (!in_range) raise_out_of_range();
    }

    const int64_t* idx;
    const int64_t* targets;
    int64_t num_pairs, num_rows, num_classes, ignore_index;
};

int64_t num_chunks_of(int64_t num_pairs) {
    return num_pairs < 2 * kGrainSize ? 1 : std::min<int64_t>(num_pairs / kGrainSize, at::get_num_threads());
}

// Calls visit(n) for each pair of a chunk until it returns false, and prefetch(n) before each cache line of
// them. Returns false if visit does.
template <typename Prefetch, typename Visit>
bool for_each_pair(int64_t begin, int64_t end, const Prefetch& prefetch, const Visit& visit) {
    constexpr int64_t kLine = 8;  // pairs
    for (int64_t n = begin; n < end;) {
        prefetch(n);
        for (const int64_t stop = std::min(n + kLine, end); n < stop; ++n) {
            if (!visit(n)) return false;
        }
    }
    return true;
}

// cursors (num_chunks, num_rows): the number of pairs, then the place of the first one in the list.
template <typename cursor_t>
inline __attribute__((always_inline)) void find_places(cursor_t* cursors, int64_t num_chunks,
                                                       int64_t num_rows, int64_t* row_begin) {
    int64_t place = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        row_begin[row] = place;
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
            place += std::exchange(cursors[chunk * num_rows + row], static_cast<cursor_t>(place));
        }
    }
    row_begin[num_rows] = place;
}

double total_class_weight(const EmbeddingCrossEntropyParams& params) {
    const at::Tensor class_weight = params.class_weight.to(at::kDouble);
    const double* weights = class_weight.const_data_ptr<double>();
    const int64_t* targets = params.targets.const_data_ptr<int64_t>();
    double total = 0;
    for (int64_t n = 0; n < params.targets.numel(); ++n) {
        if (targets[n] != params.options.ignore_index) total += weights[targets[n]];
    }
    return total;
}

}  // namespace

void Pairs::count(const EmbeddingCrossEntropyParams& params) {
    const Batch batch(params);
    const int64_t totals = batch.num_rows * stride, ignored = totals + batch.num_rows;  // where they begin
    const int64_t table_size = ignored + batch.num_rows;
    // The tables of the chunks take no more memory than the pairs.
    const int64_t num_chunks = std::clamp<int64_t>(batch.num_pairs / std::max<int64_t>(1, table_size), 1,
                                                   num_chunks_of(batch.num_pairs));
    counts.resize_zeros(table_size);
    totals_ = counts.begin() + totals;
    ignored_ = counts.begin() + ignored;
    std::fill(totals_, counts.end(), 0);
    counts_of_chunks_.resize_zeros((num_chunks - 1) * table_size);
    batch.for_each_chunk(num_chunks, [&, batch, row_stride = stride](int64_t chunk, int64_t begin,
                                                                     int64_t end) {
        int32_t* table = chunk == 0 ? counts.begin() : counts_of_chunks_.begin() + (chunk - 1) * table_size;
        for (int64_t n = begin; n < end; ++n) {
            const int64_t row = batch.idx[n], target = batch.targets[n];
            const bool is_row = batch.is_row(row), is_target = batch.is_target(target);
            if (!(is_row & is_target)) return false;
            ++table[batch.is_ignored(target) ? ignored + row : row * row_stride + target];
            ++table[totals + row];
        }
        return true;
    });
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
        int32_t* table = counts_of_chunks_.begin() + (chunk - 1) * table_size;
        for (int64_t k = 0; k < table_size; ++k) counts[k] += table[k];
        std::fill(table, table + table_size, 0);
    }
    num_targets = batch.num_pairs - std::accumulate(ignored_, counts.end(), int64_t{0});
}

// A stable counting sort by row. cursor_t: no wider than needed to count the pairs, so that the cursors stay
// in the L1 cache. Prefetched is what hardware prefetchers do not foresee: what is read, beyond the page, and
// the lines of the list that the next pairs of a row are stored to.
template <typename cursor_t>
void Pairs::list(const EmbeddingCrossEntropyParams& params, Buffer<cursor_t>& cursors) {
    constexpr int64_t kAhead = 1 << 11;  // pairs
    constexpr int64_t kLine = 64;        // bytes
    const Batch batch(params);
    const int64_t num_rows = batch.num_rows, num_chunks = num_chunks_of(batch.num_pairs);
    cursors.resize(checked_product(kEmbeddingCrossEntropy, "the cursors", num_chunks, num_rows));
    std::fill(cursors.begin(), cursors.end(), cursor_t(0));
    batch.for_each_chunk(num_chunks, [&, batch](int64_t chunk, int64_t begin, int64_t end) {
        cursor_t* const counts = cursors.begin() + chunk * num_rows;
        const auto prefetch = [&](int64_t n) { __builtin_prefetch(batch.idx + n + kAhead); };
        return for_each_pair(begin, end, prefetch, [&](int64_t n) {
            const int64_t row = batch.idx[n];
            if (!batch.is_row(row)) return false;
            ++counts[row];
            return true;
        });
    });

    row_begin.resize(checked_sum(kEmbeddingCrossEntropy, "the rows", num_rows, 1));
    if (num_chunks == 1) {  // known to the compiler: without an inner loop
        find_places(cursors.begin(), 1, num_rows, row_begin.begin());
    } else {
        find_places(cursors.begin(), num_chunks, num_rows, row_begin.begin());
    }

    const bool indexed = !params.is_reduced();
    targets.resize(batch.num_pairs);
    pair_indices.resize(indexed ? batch.num_pairs : 0);
    std::atomic<int64_t> num_ignored = 0;
    batch.for_each_chunk(num_chunks, [&, batch, indexed, to = targets.begin(), index = pair_indices.begin()](
                                         int64_t chunk, int64_t begin, int64_t end) {
        cursor_t* const places = cursors.begin() + chunk * num_rows;
        int64_t ignored = 0;
        const auto prefetch = [&](int64_t n) {
            __builtin_prefetch(batch.idx + n + kAhead);
            __builtin_prefetch(batch.targets + n + kAhead);
        };
        const bool in_range = for_each_pair(begin, end, prefetch, [&](int64_t n) {
            const int64_t target = batch.targets[n];
            const bool is_ignored = batch.is_ignored(target);
            const cursor_t place = places[batch.idx[n]]++;
            __builtin_prefetch(to + place + kLine / sizeof(*to), 1);
            to[place] = is_ignored ? kIgnored : static_cast<int32_t>(target);
            if (indexed) {
                __builtin_prefetch(index + place + kLine / sizeof(*index), 1);
                index[place] = n;
            }
            ignored += is_ignored;
            return batch.is_target(target);
        });
        num_ignored += ignored;
        return in_range;
    });
    num_targets = batch.num_pairs - num_ignored;
}

void Pairs::group(const EmbeddingCrossEntropyParams& params) {
    TORCH_CHECK(params.weight.size(1) <= std::numeric_limits<int32_t>::max(), kEmbeddingCrossEntropy,
                ": expected weight to have at most 2147483647 columns, got ", params.weight.size(1));
    stride = padded(params.weight.size(1));
    counted = is_worth_counting(params, stride);
    if (counted) {
        count(params);
    } else if (params.idx.numel() <= std::numeric_limits<uint32_t>::max()) {
        list(params, cursors_);
    } else {
        list(params, long_cursors_);
    }
    target_weight =
        params.class_weight.defined() ? total_class_weight(params) : static_cast<double>(num_targets);
}

}  // namespace bigramx::cpu
