#include "cpu/interpolated_bigram_rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "base/op_names.h"
#include "cpu/base/huge_pages.h"
#include "cpu/sampling/guide_table.h"
#include "sampling/distribution_errors.h"
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
        ranks_of_seen_.reserve(seen_.size() + 1);
        for (const Candidate& candidate : seen_) ranks_of_seen_.push_back(unigram_.rank(candidate.token));
        std::sort(ranks_of_seen_.begin(), ranks_of_seen_.end());
        ranks_of_seen_.push_back(vocab_size);
        std::sort(seen_.begin(), seen_.end());
        find_unseen();
    }

    // Takes the next one; false if there is none.
    bool take(Candidate& next) {
        const bool any_seen = next_seen_ < seen_.size(), any_unseen = rank_ < vocab_size_;
        if (any_seen && (!any_unseen || seen_[next_seen_] < unseen_)) {
            next = seen_[next_seen_++];
            return true;
        }
        next = unseen_;
        ++rank_;
        find_unseen();
        return any_unseen;
    }

  private:
    void find_unseen() {
        for (; rank_ == ranks_of_seen_[next_rank_] && rank_ < vocab_size_; ++rank_) ++next_rank_;
        if (rank_ >= vocab_size_) return;
        const double weight = backoff_ * unigram_.weight(rank_);
        unseen_ = {weight, weight, unigram_.token(rank_), false};
    }

    std::vector<Candidate> seen_;
    std::vector<int64_t> ranks_of_seen_;  // and, last, V
    const UnigramCdf& unigram_;
    const double backoff_;
    const int64_t vocab_size_;
    size_t next_seen_ = 0, next_rank_ = 0;
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
    for (Candidate next{}; candidates.take(next);) {
        if (top_k > 0 && kept.size() >= top_k) {
            if (is_argmax || next.weight != kept[top_k - 1].weight) break;
        } else if (top_k == 0 && !kept.empty()) {
            if (options.top_p.has_value() && before >= *options.top_p * total) break;
            if (next.weight < min_p * kept[0].weight) break;
        }
        kept.push_back(next);
        before += next.weight;
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
      unigram_(params.unigram) {
    bool ascends = crow_[0] == 0 && crow_[vocab_size_] == num_pairs_;
    for (int64_t row = 0; row < vocab_size_; ++row) ascends &= begin(row) <= end(row);
    TORCH_CHECK(ascends, kInterpolatedBigram, ": expected crow_indices to ascend from 0 to ", num_pairs_);
}

UnigramCdf::UnigramCdf(const InterpolatedBigram& model, double exponent)
    : entries_(model.vocab_size()), weights_(model.vocab_size()), ranks_(model.vocab_size()) {
    const int64_t vocab_size = model.vocab_size();
    for (int64_t j = 0; j < vocab_size; ++j) {
        const double prob = model.unigram(j);
        TORCH_CHECK(is_weight(prob), kInterpolatedBigramGenerate,
                    ": expected unigram to be finite and >= 0, got ", prob, " at position ", j);
        largest_ = std::max(largest_, prob);
    }
    std::vector<uint32_t> order(vocab_size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t j, uint32_t k) { return model.unigram(j) > model.unigram(k); });
    for (int64_t rank = 0; rank < vocab_size; ++rank) {
        const uint32_t token = order[rank];
        entries_[rank] = {0, token};
        ranks_[token] = static_cast<uint32_t>(rank);
        if (largest_ > 0) weights_[rank] = std::pow(model.unigram(token) / largest_, exponent);
    }
    if (largest_ > 0) make_cdf();
}

void UnigramCdf::make_cdf() {
    const auto vocab_size = static_cast<int64_t>(weights_.size());
    const IntegerWeights integer(1);
    WeightSum total = 0;
    for (const double weight : weights_) total += integer(weight);
    const FixedPointCdf fixed(total);
    WeightSum sum = 0;
    for (int64_t rank = 0; rank < vocab_size; ++rank) {
        sum += integer(weights_[rank]);
        entries_[rank].cdf = fixed.cdf(sum);
    }
    unit_ = std::ldexp(1.0, fixed.shift() + 1 - kWeightBits);  // the largest weight, 1, has kWeightBits - 1
    int guide_bits = 1;
    while (int64_t{1} << guide_bits < vocab_size) ++guide_bits;
    guide_shift_ = std::max(bit_length(fixed.last()) - guide_bits, 0);
    const auto num_buckets = static_cast<int64_t>(fixed.last() >> guide_shift_) + 1;
    guide_.resize(num_buckets + 1);
    fill_guide_table(vocab_size, num_buckets, guide_.data(), [&](int64_t rank) {
        const uint64_t end = entries_[rank].cdf, before_bucket = (uint64_t{1} << guide_shift_) - 1;
        return static_cast<int64_t>((end + before_bucket) >> guide_shift_);
    });
}

InterpolatedRows::InterpolatedRows(const InterpolatedBigramParams& params, const GenerateParams& options,
                                   int64_t num_draws)
    : params_(params),
      options_(options),
      model_(params_),
      exponent_(options.temperature == 0 ? 1 : 1 / options.temperature),
      removes_tokens_(options.removes_tokens() || options.temperature == 0),
      unigram_(model_, exponent_),
      rows_(model_.vocab_size(), Row{0, kUnprepared, 0}),
      entries_(model_.num_pairs() + kOtherEntries * model_.vocab_size() + 1),
      guide_(entries_.size()) {
    guide_[0] = 0;
    const bool will_meet_most_rows =
        num_draws / 4 >= model_.vocab_size();  // else these pages are mostly empty
    if (!will_meet_most_rows) return;
    advise_huge_pages(entries_.begin(), entries_.size() * sizeof(Entry));
    advise_huge_pages(guide_.begin(), guide_.size() * sizeof(uint32_t));
}

bool InterpolatedRows::is_distribution(int64_t token) {
    const int shift = __atomic_load_n(&rows_[token].guide_shift, __ATOMIC_ACQUIRE);
    return shift == kUnprepared ? prepare(token) : shift != kInvalid;
}

void InterpolatedRows::check(int64_t token) {
    TORCH_CHECK(is_distribution(token), kInterpolatedBigramGenerate, ": " BIGRAMX_INVALID_PROBS ": row ",
                token, " of pair_probs and backoff, or a column beyond V, or " BIGRAMX_ZERO_PROBS);
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

    row.begin = model_.begin(token) + kOtherEntries * token + 1;
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
    std::fill_n(entries + count, kSearchWidth, Entry{kAboveAllDraws, kUnigram});

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
    const int64_t begin = model_.begin(row), end = model_.end(row);
    const double backoff = model_.backoff(row);
    if (!is_weight(backoff)) return {};
    double largest = backoff * unigram_.largest();  // if its token was seen, that token's is larger
    for (int64_t k = begin; k < end; ++k) {
        const int64_t token = model_.column(k);
        const double own = model_.pair_prob(k);
        if (token < 0 || token >= model_.vocab_size() || !is_weight(own)) return {};
        largest = std::max(largest, own + backoff * model_.unigram(token));
    }
    const auto power = [&](double prob) {
        return exponent_ == 1 ? prob / largest : std::pow(prob / largest, exponent_);
    };
    const double scaled_backoff = power(backoff * unigram_.largest());
    RowWeights weights{{}, scaled_backoff * unigram_.sum(model_.vocab_size()), model_.vocab_size()};
    weights.pairs.reserve(end - begin);
    if (exponent_ == 1) {
        for (int64_t k = begin; k < end; ++k) {
            weights.pairs.push_back({model_.pair_prob(k) / largest, static_cast<uint32_t>(model_.column(k))});
        }
        if (!removes_tokens_) return weights;
    }
    std::vector<Candidate> seen;
    seen.reserve(end - begin);
    for (int64_t k = begin; k < end; ++k) {
        const auto token = static_cast<uint32_t>(model_.column(k));
        seen.push_back({power(model_.pair_prob(k) + backoff * model_.unigram(token)),
                        scaled_backoff * unigram_.weight(unigram_.rank(token)), token, /*is_seen=*/true});
        if (exponent_ != 1) weights.pairs.push_back({seen.back().own(), token});
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
