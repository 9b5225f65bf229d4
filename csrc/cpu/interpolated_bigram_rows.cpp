#include "cpu/interpolated_bigram_rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "base/op_names.h"
#include "cpu/sampling/guide_table.h"
#include "sampling/fixed_point_cdf.h"

namespace bigramx::cpu {
namespace {

bool is_weight(double number) { return number >= 0 && std::isfinite(number); }

// Weights scaled and rounded down to integers, of which sums are exact.
class IntegerWeights {
  public:
    explicit IntegerWeights(double largest) : scale_(largest) {}
    uint64_t operator()(double weight) const { return round_down(scale_.scaled(weight)); }

  private:
    ProbScale<double> scale_;
};

double largest_of(const RowWeights& weights) {
    double largest = weights.unigram;
    for (const auto& pair : weights.pairs) largest = std::max(largest, pair.weight);
    return largest;
}

FixedPointCdf cdf_of(const RowWeights& weights, const IntegerWeights& integer) {
    WeightSum total = integer(weights.unigram);
    for (const auto& pair : weights.pairs) total += integer(pair.weight);
    return FixedPointCdf(total);
}

// A token of a row, weighted by (its probability / the largest of the row)^(1/t).
struct Candidate {
    double weight;
    double unigram_weight;  // what of it the unigram has
    uint32_t token;
    bool is_seen;

    double own() const { return std::max(weight - unigram_weight, 0.0); }
    bool operator<(const Candidate& other) const {  // comes before
        return weight > other.weight || (weight == other.weight && token < other.token);
    }
};

// Merges the tokens that were seen with those of the unigram.
class Descending {
  public:
    Descending(std::vector<Candidate> seen, const UnigramCdf& unigram, double backoff, int64_t vocab_size)
        : seen_(std::move(seen)), unigram_(unigram), backoff_(backoff), vocab_size_(vocab_size) {
        by_token_.reserve(seen_.size());
        for (const Candidate& candidate : seen_) by_token_.push_back(candidate.token);
        std::sort(by_token_.begin(), by_token_.end());
        std::sort(seen_.begin(), seen_.end());
        find_unseen();
    }

    // The next one, or null.
    const Candidate* peek() const {
        const Candidate* const seen = next_seen_ < seen_.size() ? &seen_[next_seen_] : nullptr;
        const Candidate* const unseen = rank_ < vocab_size_ ? &unseen_ : nullptr;
        if (seen == nullptr || unseen == nullptr) return seen == nullptr ? unseen : seen;
        return *seen < *unseen ? seen : unseen;
    }

    void pop() {
        if (peek()->is_seen) {
            ++next_seen_;
        } else {
            ++rank_;
            find_unseen();
        }
    }

  private:
    void find_unseen() {
        for (; rank_ < vocab_size_; ++rank_) {
            const uint32_t token = unigram_.token(rank_);
            if (std::binary_search(by_token_.begin(), by_token_.end(), token)) continue;
            const double weight = backoff_ * unigram_.weight(token);
            unseen_ = {weight, weight, token, false};
            return;
        }
    }

    std::vector<Candidate> seen_;
    std::vector<uint32_t> by_token_;
    const UnigramCdf& unigram_;
    const double backoff_;
    const int64_t vocab_size_;
    size_t next_seen_ = 0;
    int64_t rank_ = 0;
    Candidate unseen_{};
};

// Those that the filters keep, which are the first. total: of the weights.
std::vector<Candidate> most_likely(Descending& candidates, const GenerateParams& options, double total) {
    const bool is_argmax = options.temperature == 0;
    const auto top_k = static_cast<size_t>(is_argmax ? 1 : options.top_k.value_or(0));
    const double min_p = options.min_p.value_or(0);
    std::vector<Candidate> kept;
    double before = 0;  // the sum of those before
    for (const Candidate* next; (next = candidates.peek()) != nullptr; candidates.pop()) {
        if (top_k > 0 && kept.size() >= top_k) {
            if (is_argmax || next->weight != kept[top_k - 1].weight) break;
        } else if (top_k == 0 && !kept.empty()) {
            if (options.top_p.has_value() && before >= *options.top_p * total) break;
            if (next->weight < min_p * kept[0].weight) break;
        }
        kept.push_back(*next);
        before += next->weight;
    }
    if (top_k == 0) return kept;
    if (options.top_p.has_value()) {
        const double most = *options.top_p * before;
        size_t count = 0;
        for (before = 0; count < kept.size() && (count == 0 || before < most); ++count) {
            before += kept[count].weight;
        }
        kept.resize(count);
    }
    while (!kept.empty() && kept.back().weight < min_p * kept[0].weight) kept.pop_back();
    return kept;
}

// The weights of what the filters keep.
RowWeights weights_of_kept(const std::vector<Candidate>& kept, const UnigramCdf& unigram, double backoff) {
    RowWeights weights;
    for (const Candidate& candidate : kept) {
        if (!candidate.is_seen) weights.unigram_count = unigram.rank(candidate.token) + 1;
    }
    weights.unigram = backoff * unigram.sum(weights.unigram_count);
    for (const Candidate& candidate : kept) {
        if (!candidate.is_seen) continue;
        const bool unigram_has_it = unigram.rank(candidate.token) < weights.unigram_count;
        weights.pairs.push_back({unigram_has_it ? candidate.own() : candidate.weight, candidate.token});
    }
    std::sort(weights.pairs.begin(), weights.pairs.end(),
              [](const auto& pair, const auto& other) { return pair.token < other.token; });
    return weights;
}

}  // namespace

InterpolatedBigram::Numbers::Numbers(const at::Tensor& tensor) {
    if (tensor.scalar_type() == at::kFloat) {
        single_ = tensor.const_data_ptr<float>();
    } else {
        double_ = tensor.const_data_ptr<double>();
    }
}

InterpolatedBigram::InterpolatedBigram(const InterpolatedBigramParams& params)
    : vocab_size_(params.vocab_size()),
      num_pairs_(params.num_pairs()),
      crow_(params.crow_indices.const_data_ptr<int64_t>()),
      columns_(params.col_indices.const_data_ptr<int32_t>()),
      pair_probs_(params.pair_probs),
      backoff_(params.backoff),
      unigram_(params.unigram) {}

UnigramCdf::UnigramCdf(const InterpolatedBigram& model, double exponent) {
    const int64_t vocab_size = model.vocab_size();
    weights_.resize(vocab_size);
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double prob = model.unigram(j);
        TORCH_CHECK(is_weight(prob), kInterpolatedBigramGenerate,
                    ": expected unigram to be finite and >= 0, got ", prob, " at position ", j);
        weights_[j] = prob;
        largest_ = std::max(largest_, prob);
    }
    order_.resize(vocab_size);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](uint32_t j, uint32_t k) { return weights_[j] > weights_[k]; });
    ranks_.resize(vocab_size);
    for (int64_t rank = 0; rank < vocab_size; ++rank) ranks_[order_[rank]] = static_cast<uint32_t>(rank);
    if (largest_ == 0) return;
    for (double& weight : weights_) weight = std::pow(weight / largest_, exponent);
    make_cdf();
}

void UnigramCdf::make_cdf() {
    const int64_t vocab_size = static_cast<int64_t>(order_.size());
    cdf_.resize(vocab_size);
    const IntegerWeights integer(1);
    WeightSum total = 0;
    for (const uint32_t token : order_) total += integer(weights_[token]);
    const FixedPointCdf fixed(total);
    WeightSum sum = 0;
    for (int64_t rank = 0; rank < vocab_size; ++rank) {
        sum += integer(weights_[order_[rank]]);
        cdf_[rank] = fixed.cdf(sum);
    }
    unit_ = std::ldexp(1.0, fixed.shift() + 1 - kWeightBits);  // the largest weight, 1, has kWeightBits - 1
    int guide_bits = 1;
    while (int64_t{1} << guide_bits < vocab_size) ++guide_bits;
    guide_shift_ = std::max(bit_length(fixed.last()) - guide_bits, 0);
    const auto num_buckets = static_cast<int64_t>(fixed.last() >> guide_shift_) + 1;
    guide_.resize(num_buckets + 1);
    fill_guide_table(vocab_size, num_buckets, guide_.data(), [&](int64_t rank) {
        const uint64_t end = cdf_[rank], before_bucket = (uint64_t{1} << guide_shift_) - 1;
        return static_cast<int64_t>((end + before_bucket) >> guide_shift_);
    });
}

uint32_t UnigramCdf::find(int64_t count, uint64_t r) const {
    const uint64_t target = share_of_total(r, cdf_[count - 1]);
    uint32_t rank = guide_[target >> guide_shift_];
    while (cdf_[rank] <= target) ++rank;
    return order_[rank];
}

InterpolatedRows::InterpolatedRows(const InterpolatedBigramParams& params, const GenerateParams& options)
    : params_(params),
      options_(options),
      model_(params_),
      exponent_(options.temperature == 0 ? 1 : 1 / options.temperature),
      removes_tokens_(options.removes_tokens() || options.temperature == 0),
      unigram_(model_, exponent_),
      rows_(model_.vocab_size(), Row{0, kUnprepared, 0}),
      entries_(model_.num_pairs() + kEndEntries * model_.vocab_size() + 1),
      guide_(entries_.size()) {
    guide_[0] = 0;
}

bool InterpolatedRows::is_distribution(int64_t token) {
    const int shift = __atomic_load_n(&rows_[token].guide_shift, __ATOMIC_ACQUIRE);
    return shift == kUnprepared ? prepare(token) : shift != kInvalid;
}

// Where the slice of time is over, it prepares none.
bool InterpolatedRows::prepare(int64_t token) {
    if (slice.ends()) return false;
    const std::lock_guard<std::mutex> lock(mutexes_[token % kNumMutexes]);
    Row& row = rows_[token];
    if (row.guide_shift != kUnprepared) return row.guide_shift != kInvalid;
    const RowWeights weights = weights_of(token);
    const double largest = largest_of(weights);
    if (!(largest > 0) || !std::isfinite(largest)) {
        any_is_invalid_.store(true, std::memory_order_relaxed);
        __atomic_store_n(&row.guide_shift, kInvalid, __ATOMIC_RELEASE);
        return false;
    }
    const IntegerWeights integer(largest);
    const FixedPointCdf fixed = cdf_of(weights, integer);
    const HighCdf high(fixed.last());

    int64_t first_pair, end_pair;
    model_.pairs_of(token, first_pair, end_pair);
    row.begin = first_pair + kEndEntries * token + 1;
    row.unigram_count = static_cast<uint32_t>(weights.unigram_count);
    Entry* const entries = entries_.begin() + row.begin;
    const auto count = static_cast<int64_t>(weights.pairs.size());
    constexpr uint32_t kAboveAllDraws = uint32_t{1} << kHighDrawBits;
    entries[-1] = {kAboveAllDraws, kUnigram};
    WeightSum sum = 0;
    for (int64_t k = 0; k < count; ++k) {
        sum += integer(weights.pairs[k].weight);
        entries[k] = {high.cdf(fixed.cdf(sum)), weights.pairs[k].token};
    }
    entries[count] = {kAboveAllDraws, kUnigram};

    int guide_bits = 0;
    while (int64_t{2} << guide_bits <= count) ++guide_bits;
    const int shift = kHighDrawBits - guide_bits;
    if (guide_bits > 0) {
        fill_guide_table(count + 1, int64_t{1} << guide_bits, guide_.begin() + row.begin, [&](int64_t k) {
            return (int64_t{entries[k].cdf} + (int64_t{1} << shift) - 1) >> shift;
        });
    }
    __atomic_store_n(&row.guide_shift, shift, __ATOMIC_RELEASE);
    return true;
}

RowWeights InterpolatedRows::weights_of(int64_t row) const {
    int64_t begin, end;
    const double backoff = model_.backoff(row);
    if (!model_.pairs_of(row, begin, end) || !is_weight(backoff)) return {};
    double largest = backoff * unigram_.largest();  // if its token was seen, that token's is larger
    for (int64_t k = begin; k < end; ++k) {
        const int64_t token = model_.column(k);
        const double own = model_.pair_prob(k);
        if (token < 0 || token >= model_.vocab_size() || !is_weight(own)) return {};
        largest = std::max(largest, own + backoff * model_.unigram(token));
    }
    const auto power = [&](double prob) { return std::pow(prob / largest, exponent_); };
    const double scaled_backoff = power(backoff * unigram_.largest());
    RowWeights weights{{}, scaled_backoff * unigram_.sum(model_.vocab_size()), model_.vocab_size()};
    weights.pairs.reserve(end - begin);
    std::vector<Candidate> seen;
    seen.reserve(removes_tokens_ ? end - begin : 0);
    for (int64_t k = begin; k < end; ++k) {
        const auto token = static_cast<uint32_t>(model_.column(k));
        const double own = model_.pair_prob(k);
        const Candidate candidate{power(own + backoff * model_.unigram(token)),
                                  scaled_backoff * unigram_.weight(token), token, /*is_seen=*/true};
        weights.pairs.push_back({exponent_ == 1 ? own / largest : candidate.own(), token});
        if (removes_tokens_) seen.push_back(candidate);
    }
    if (!removes_tokens_) return weights;
    double total = weights.unigram;
    for (const auto& pair : weights.pairs) total += pair.weight;
    Descending candidates(std::move(seen), unigram_, scaled_backoff, model_.vocab_size());
    return weights_of_kept(most_likely(candidates, options_, total), unigram_, scaled_backoff);
}

// Where the high bits of a draw do not decide.
uint32_t InterpolatedRows::find_exactly(const Place& place) const {
    const RowWeights weights = weights_of(place.row);
    const IntegerWeights integer(largest_of(weights));
    const WeightSum target_sum = cdf_of(weights, integer).target_sum(place.draws->complete(place.k));
    WeightSum sum = 0;
    for (const auto& pair : weights.pairs) {
        sum += integer(pair.weight);
        if (sum >= target_sum) return pair.token;
    }
    return kUnigram;
}

}  // namespace bigramx::cpu
