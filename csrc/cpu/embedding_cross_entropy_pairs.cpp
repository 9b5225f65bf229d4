#include "cpu/embedding_cross_entropy_pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "base/checked.h"
#include "base/op_names.h"

namespace bigramx::cpu {
namespace {

constexpr int64_t kGrainSize = 1 << 15;  // pairs

// A table of counts pays if it has few entries per pair, or fits into the L1 cache. Pairs with losses or
// gradients of their own cannot be counted.
bool is_worth_counting(const EmbeddingCrossEntropyParams& params, int64_t stride) {
    constexpr int64_t kSmall = 1 << 14;
    const int64_t num_pairs = params.idx.numel();
    int64_t entries = 0;
    return params.is_reduced() && num_pairs <= std::numeric_limits<int32_t>::max() &&
           !c10::mul_overflows(params.weight.size(0), std::max<int64_t>(stride, 1), &entries) &&
           entries <= std::max(kSmall, 4 * num_pairs);
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

    bool is_row(int64_t n) const { return static_cast<uint64_t>(idx[n]) < static_cast<uint64_t>(num_rows); }
    bool is_ignored(int64_t n) const { return targets[n] == ignore_index; }
    bool is_class(int64_t n) const {
        return static_cast<uint64_t>(targets[n]) < static_cast<uint64_t>(num_classes);
    }

    // Raises the error of the first pair that is out of range.
    void check() const {
        for (int64_t n = 0; n < num_pairs; ++n) {
            TORCH_CHECK_INDEX(is_row(n), kEmbeddingCrossEntropy, ": index out of range: idx holds ", idx[n],
                              " at position ", n, ", expected 0 <= idx < ", num_rows);
            TORCH_CHECK_INDEX(is_class(n) || is_ignored(n), kEmbeddingCrossEntropy, ": Target ", targets[n],
                              " is out of bounds: at position ", n, ", expected 0 <= targets < ", num_classes,
                              " or ignore_index = ", ignore_index);
        }
    }

    // Calls visit(chunk, n) for each pair, the chunks in parallel. visit returns false for a pair out of
    // range.
    template <typename Visit>
    void for_each_pair(int64_t num_chunks, const Visit& visit) const {
        std::atomic<bool> in_range = true;
        at::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
            for (int64_t chunk = first; chunk < last; ++chunk) {
                const int64_t end = num_pairs * (chunk + 1) / num_chunks;
                for (int64_t n = num_pairs * chunk / num_chunks; n < end; ++n) {
                    if (!visit(chunk, n)) {
                        in_range = false;
                        return;
                    }
                }
            }
        });
        if (!in_range) check();
    }

    const int64_t* idx;
    const int64_t* targets;
    int64_t num_pairs, num_rows, num_classes, ignore_index;
};

int64_t num_chunks_of(int64_t num_pairs) {
    return std::clamp<int64_t>(num_pairs / kGrainSize, 1, at::get_num_threads());
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
    batch.for_each_pair(num_chunks, [&](int64_t chunk, int64_t n) {
        int32_t* table = chunk == 0 ? counts.begin() : counts_of_chunks_.begin() + (chunk - 1) * table_size;
        const int64_t row = batch.idx[n];
        if (!batch.is_row(n) || !(batch.is_class(n) || batch.is_ignored(n))) return false;
        ++table[batch.is_ignored(n) ? ignored + row : row * stride + batch.targets[n]];
        ++table[totals + row];
        return true;
    });
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
        int32_t* table = counts_of_chunks_.begin() + (chunk - 1) * table_size;
        for (int64_t k = 0; k < table_size; ++k) counts[k] += table[k];
        std::fill(table, table + table_size, 0);
    }
    num_targets = 0;
    for (int64_t row = 0; row < batch.num_rows; ++row) num_targets += num_counted(row);
}

// A stable counting sort by row. cursor_t: no wider than needed to count the pairs, so that the cursors stay
// in the L1 cache.
template <typename cursor_t>
void Pairs::list(const EmbeddingCrossEntropyParams& params, Buffer<cursor_t>& cursors) {
    const Batch batch(params);
    const int64_t num_rows = batch.num_rows, num_chunks = num_chunks_of(batch.num_pairs);
    cursors.resize(checked_product(kEmbeddingCrossEntropy, "the cursors", num_chunks, num_rows));
    std::fill(cursors.begin(), cursors.end(), cursor_t(0));
    batch.for_each_pair(num_chunks, [&, first = cursors.begin()](int64_t chunk, int64_t n) {
        if (!batch.is_row(n)) return false;
        ++first[chunk * num_rows + batch.idx[n]];
        return true;
    });

    row_begin.resize(checked_sum(kEmbeddingCrossEntropy, "the rows", num_rows, 1));
    int64_t begin = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        row_begin[row] = begin;
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
            begin += std::exchange(cursors[chunk * num_rows + row], static_cast<cursor_t>(begin));
        }
    }
    row_begin[num_rows] = begin;

    const bool indexed = !params.is_reduced();
    targets.resize(batch.num_pairs);
    pair_indices.resize(indexed ? batch.num_pairs : 0);
    batch.for_each_pair(num_chunks, [&, first = cursors.begin(), to = targets.begin(),
                                     index = pair_indices.begin()](int64_t chunk, int64_t n) {
        const cursor_t place = first[chunk * num_rows + batch.idx[n]]++;
        to[place] = batch.is_ignored(n) ? kIgnored : static_cast<int32_t>(batch.targets[n]);
        if (indexed) index[place] = n;
        return batch.is_class(n) || batch.is_ignored(n);
    });
    num_targets = batch.num_pairs - std::count(targets.begin(), targets.end(), kIgnored);
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
