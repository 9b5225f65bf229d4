#include "deferred_adamw.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <array>
#include <vector>

#include "base/checks.h"
#include "base/op_names.h"
#include "cpu/base/partition.h"
#include "cpu/deferred_adamw_rows.h"

#define BIGRAMX_KERNELS "cpu/deferred_adamw_kernels.h"
#include "cpu/base/foreach_target.h"

namespace bigramx {

using namespace cpu;

namespace {

// rows[0 .. count), or the first `count` rows where it is null.
int64_t row_at(const int64_t* rows, int64_t k) { return rows != nullptr ? rows[k] : k; }

// Raises before anything has changed. Rows that come twice take their steps once, but have no two gradients.
std::vector<int64_t> distinct_rows(const DeferredAdamWParams& params) {
    const int64_t num_rows = params.param.size(0);
    std::vector<int64_t> rows;
    std::vector<bool> is_among(static_cast<size_t>(num_rows));
    const int64_t* const given = params.rows.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < params.rows.numel(); ++k) {
        TORCH_CHECK_INDEX(static_cast<uint64_t>(given[k]) < static_cast<uint64_t>(num_rows), kDeferredAdamW,
                          ": index out of range: rows holds ", given[k], " at position ", k,
                          ", expected 0 <= rows < ", num_rows);
        const auto row = static_cast<size_t>(given[k]);
        TORCH_CHECK_VALUE(!is_among[row] || !params.grad.defined(), kDeferredAdamW,
                          ": expected rows to be distinct, as those of a coalesced gradient are, got ",
                          given[k], " twice");
        if (!is_among[row]) rows.push_back(given[k]);
        is_among[row] = true;
    }
    return rows;
}

// The steps that a row takes must be in the schedule.
void check_steps(const DeferredAdamWParams& params, const int64_t* rows, int64_t count) {
    const int64_t* const row_steps = params.row_steps.const_data_ptr<int64_t>();
    const int64_t least = params.step - params.schedule.size(0);
    const int64_t most = params.step - (params.grad.defined() ? 1 : 0);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t steps = row_steps[row_at(rows, k)];
        TORCH_CHECK_VALUE(steps >= least && steps <= most, kDeferredAdamW, ": expected row_steps of row ",
                          row_at(rows, k), " to be from ", least, " to ", most, ", got ", steps);
    }
}

template <typename scalar_t>
AdamWSchedule<scalar_t> schedule_of(const DeferredAdamWParams& params) {
    const int64_t num_steps = params.schedule.size(0);
    AdamWSchedule<scalar_t> schedule(params.step - num_steps + 1);
    const double* options = params.schedule.const_data_ptr<double>();
    for (int64_t k = 0; k < num_steps; ++k, options += 5) {
        const AdamWOptions of_step{options[0], options[1], options[2],
                                   options[3], options[4], params.maximize};
        check_adamw_options("deferred_adamw_: schedule", of_step, params.param.scalar_type());
        schedule.add(of_step);
    }
    return schedule;
}

template <typename Visit>
void for_each_row(const int64_t* rows, int64_t count, int64_t num_columns, const Visit& visit) {
    const int64_t size = rows_of_block(num_columns);
    for_each_block((count + size - 1) / size, [&](int64_t, int64_t block) {
        const int64_t end = std::min(count, (block + 1) * size);
        for (int64_t k = block * size; k < end; ++k) visit(k, row_at(rows, k));
    });
}

}  // namespace

template <typename scalar_t>
void cpu::catch_up(const DeferredRows<scalar_t>& deferred, const int64_t* rows, int64_t count,
                   int64_t last_step) {
    const auto kernel = BIGRAMX_DISPATCH_TARGET(catch_up_kernel<scalar_t>);
    for_each_row(rows, count, deferred.num_columns,
                 [&](int64_t, int64_t row) { kernel(deferred, row, last_step); });
}

template void cpu::catch_up(const DeferredRows<float>&, const int64_t*, int64_t, int64_t);
template void cpu::catch_up(const DeferredRows<double>&, const int64_t*, int64_t, int64_t);

void deferred_adamw_cpu(const DeferredAdamWParams& params) {
    std::vector<int64_t> distinct;
    if (params.rows.defined()) distinct = distinct_rows(params);
    const int64_t* const rows = params.rows.defined() ? distinct.data() : nullptr;
    const int64_t count =
        params.rows.defined() ? static_cast<int64_t>(distinct.size()) : params.param.size(0);
    check_steps(params, rows, count);
    AT_DISPATCH_FLOATING_TYPES(params.param.scalar_type(), kDeferredAdamW, [&] {
        const AdamWSchedule<scalar_t> schedule = schedule_of<scalar_t>(params);
        const DeferredRows<scalar_t> deferred{
            {params.param.data_ptr<scalar_t>(), params.exp_avg.data_ptr<scalar_t>(),
             params.exp_avg_sq.data_ptr<scalar_t>()},
            params.param.size(1),
            params.row_steps.data_ptr<int64_t>(),
            &schedule};
        if (!params.grad.defined()) {
            // No new version: to autograd the rows have changed when they missed the steps.
            catch_up(deferred, rows, count, params.step);
            return;
        }
        bump_versions({params.param, params.exp_avg, params.exp_avg_sq, params.row_steps});
        const scalar_t* const grad = params.grad.const_data_ptr<scalar_t>();
        const auto miss = BIGRAMX_DISPATCH_TARGET(catch_up_kernel<scalar_t>);
        const auto take = BIGRAMX_DISPATCH_TARGET(step_row_kernel<scalar_t>);
        for_each_row(rows, count, deferred.num_columns, [&](int64_t k, int64_t row) {
            miss(deferred, row, params.step - 1);
            take(deferred, row, params.step, grad + k * deferred.num_columns);
        });
    });
}

}  // namespace bigramx
