// Sizes that callers choose, in arithmetic that raises where 64 bits do not hold the result.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <cstdint>

namespace bigramx {

// what: the formula, as the message names it.
inline int64_t checked_product(const char* op, const char* what, int64_t a, int64_t b) {
    int64_t product = 0;
    TORCH_CHECK(!c10::mul_overflows(a, b, &product), op, ": expected ", what, " to be less than 2^63, got ",
                a, " * ", b);
    return product;
}

inline int64_t checked_sum(const char* op, const char* what, int64_t a, int64_t b) {
    int64_t sum = 0;
    TORCH_CHECK(!c10::add_overflows(a, b, &sum), op, ": expected ", what, " to be less than 2^63, got ", a,
                " + ", b);
    return sum;
}

}  // namespace bigramx
