#include "cpu/sampling/kept_tokens.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "sampling/fixed_point_cdf.h"

namespace bigramx::cpu {
namespace {

struct Token {
    double logit;
    int64_t token;
    uint64_t weight;
};

bool comes_before(const Token& a, const Token& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

double kth_largest(const double* logits, int64_t size, int64_t k) {
    std::vector<double> partitioned(logits, logits + size);
    std::nth_element(partitioned.begin(), partitioned.begin() + (k - 1), partitioned.end(), std::greater<>());
    return partitioned[k - 1];
}

template <typename Iterator>
WeightSum sum_of(Iterator begin, Iterator end) {
    WeightSum sum = 0;
    for (; begin != end; ++begin) sum += begin->weight;
    return sum;
}

}  // namespace

KeptTokens<double> select_tokens(const TokenFilter& filter, const double* logits, const uint64_t* weights,
                                 int64_t size) {
    KeptTokens<double> kept;
    if (filter.top_k < size) kept.least = kth_largest(logits, size, filter.top_k);
    if (filter.top_p == TokenFilter::kAllMass) return kept;
    std::vector<Token> tokens;
    for (int64_t k = 0; k < size; ++k) {
        if (logits[k] >= kept.least) tokens.push_back({logits[k], k, weights[k]});
    }
    auto begin = tokens.begin(), end = tokens.end();
    WeightSum target_sum = FixedPointCdf(sum_of(begin, end)).target_sum(filter.top_p);
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, comes_before);
        const WeightSum sum = sum_of(begin, middle);
        if (sum < target_sum) {
            target_sum -= sum;
            begin = middle;
        } else {
            end = middle;
        }
    }
    return {begin->logit, begin->token};
}

}  // namespace bigramx::cpu
