// The words of the Mersenne Twister, uniform draws from them, and the exponential race of torch.multinomial.
// Compiled once for each CPU target (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

// words[624:1248] from words[0:624]: the recurrence of MT19937. Vectors are independent, as a word depends on
// none less than 227 words before it.
inline void next_state_kernel(uint32_t* words) {
    constexpr int64_t kDistance = 397;
    for (int64_t k = 0; k < kStateWords; k += kLanes<uint32_t>) {
        const Bits word = load(words + k), next = load(words + k + 1);
        const Bits mixed = (word & 0x80000000u) | (next & 0x7FFFFFFFu);
        const Bits odd = Bits{} - (next & 1);
        store(words + kStateWords + k, load(words + k + kDistance) ^ (mixed >> 1) ^ (odd & 0x9908B0DFu));
    }
}

template <typename Words>
inline __attribute__((always_inline)) Words temper(Words words) {
    words ^= words >> 11;
    words ^= (words << 7) & 0x9D2C5680u;
    words ^= (words << 15) & 0xEFC60000u;
    return words ^ (words >> 18);
}

// A draw is the low 53 bits of a pair of words, of which the first is the high one, times 2^-53: uniform on
// [0, 1), as at::uniform_real_distribution<double>.
constexpr uint32_t kHighBits = (1u << 21) - 1;

inline double uniform(std::pair<uint32_t, uint32_t> words) {
    const uint64_t high = temper(words.first) & kHighBits, low = temper(words.second);
    return static_cast<double>(high << 32 | low) * 0x1p-53;
}

// n < 2^52: the low bits of 2^52 + n.
inline Vector<double> to_double(Vector<uint64_t> n) {
    return reinterpret_cast<Vector<double>>(n | 0x4330000000000000u) - 0x1p52;
}

// Each pair as a 64-bit integer, the first word in the low half.
inline Vector<uint64_t> load_pairs(const uint32_t* words) {
    return reinterpret_cast<Vector<uint64_t>>(temper(load(words)));
}

inline void uniforms_kernel(const uint32_t* words, int64_t count, double* draws) {
    for_each_vector<double>(count, [&](Lanes<double> lanes) {
        const Vector<uint64_t> pairs = load_pairs(words + 2 * lanes.begin);
        lanes.store(draws, to_double(pairs & kHighBits) * 0x1p-21 + to_double(pairs >> 32) * 0x1p-53);
    });
}

// The draws from the first word of each pair alone: rounded down to a multiple of kStep.
constexpr float kStep = 0x1p-21f;

inline Vector<double> round_down_uniforms(const uint32_t* words, double) {
    return to_double(load_pairs(words) & kHighBits) * double{kStep};
}

template <size_t... lane>
inline Bits even_lanes(Bits a, Bits b, std::index_sequence<lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, 2 * lane...);
#else
    return __builtin_shuffle(a, b, Bits{2 * lane...});
#endif
}

inline Vector<float> round_down_uniforms(const uint32_t* words, float) {
    constexpr int64_t kWords = kLanes<uint32_t>;
    const Bits first = even_lanes(load(words), load(words + kWords), std::make_index_sequence<kWords>());
    const auto high = reinterpret_cast<Vector<int32_t>>(temper(first) & kHighBits);
    return __builtin_convertvector(high, Vector<float>) * kStep;
}

// The tokens that may have the largest ratio. Logarithms are taken only if there are two or more.
template <typename scalar_t>
class Candidates {
  public:
    void add(int64_t token, scalar_t prob, const uint32_t* words) {
        const Candidate candidate{token, prob, {words[0], words[1]}};
        if (count_++ == 0) {
            first_ = candidate;
        } else {
            compare(candidate);
        }
    }

    // positive: some ratio is known to be positive, so that a single candidate has won.
    int64_t winner(bool positive) {
        if (count_ == 1 && positive) return first_.token;
        if (count_ == 1) offer(first_);
        return best_.token();
    }

  private:
    struct Candidate {
        int64_t token;
        scalar_t prob;
        std::pair<uint32_t, uint32_t> words;
    };

    __attribute__((noinline)) void compare(const Candidate& candidate) {
        if (count_ == 2) offer(first_);
        offer(candidate);
    }

    void offer(const Candidate& candidate) {
        const double q = -std::log1p(-uniform(candidate.words));
        best_.offer(candidate.token, candidate.prob, static_cast<scalar_t>(q));
    }

    int64_t count_ = 0;
    Candidate first_;
    BestRatio<scalar_t> best_;
};

// Writes an upper bound of each ratio prob / q; returns a lower bound of the largest ratio.
//
// q = -log1p(-u), and u / q = 1 - u/2 - u^2/12 - u^3/24 - ... (Gregory's coefficients, which sum to zero),
// where the terms from u^3 on sum to at most 5/12 u^3. u is known rounded down to a multiple of kStep: its
// low bits reduce the ratio by a relative 3 kStep / u at most. This also covers the rounding of a subnormal q
// in float16, to multiples of kStep / 8.
template <typename scalar_t, typename T = opmath_t<scalar_t>>
__attribute__((noinline)) T bound_ratios(const uint32_t* words, const scalar_t* probs, int64_t count,
                                         T* uppers) {
    const Vector<T> infinity = broadcast(std::numeric_limits<T>::infinity()), zero{};
    Vector<T> best = zero;
    for_each_vector<T>(count, [&](Lanes<T> lanes) {
        const Vector<T> u = round_down_uniforms(words + 2 * lanes.begin, T());
        const Vector<T> reciprocal = 1 / u, ratio = lanes.load(probs, T(0)) * reciprocal;
        const Vector<T> upper = 1 - u * (T(1) / 2 + u * (T(1) / 12));
        const Vector<T> lower = upper - u * u * u * (T(5) / 12) - reciprocal * (3 * T{kStep});
        store(uppers + lanes.begin, u > 0 ? ratio * upper : infinity);
        best = max(u > 0 ? ratio * lower : zero, best);
    });
    return horizontal_max<T>(best);
}

// The token with the largest prob / q. Only tokens whose upper bound reaches the best lower bound are
// candidates: mostly one.
template <typename scalar_t>
int64_t exponential_race_kernel(GeneratorStream& stream, const scalar_t* probs, int64_t vocab_size) {
    using acc_t = opmath_t<scalar_t>;
    using Limits = std::numeric_limits<scalar_t>;
    constexpr int64_t kBlock = GeneratorStream::kMaxDraws, kGroup = 64;
    // Ratios that differ by this relative margin, rounding included, differ in the dtype, unless subnormal.
    const acc_t margin = 4 * static_cast<acc_t>(Limits::epsilon()) + acc_t(0x1p-18);
    const acc_t smallest = 2 * static_cast<acc_t>(Limits::min()), largest = static_cast<acc_t>(Limits::max());

    alignas(BIGRAMX_VECTOR_BYTES) acc_t uppers[kBlock];
    Candidates<scalar_t> candidates;
    acc_t best = 0;
    for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
        const int64_t count = std::min(kBlock, vocab_size - begin);
        const uint32_t* words = stream.take(count);
        best = std::max(best, bound_ratios(words, probs + begin, count, uppers));
        const acc_t bound = best < smallest ? std::numeric_limits<acc_t>::denorm_min()
                                            : std::min(best, largest) * (1 - margin);
        for (int64_t group = 0; group < count; group += kGroup) {
            const int64_t size = std::min(kGroup, count - group);
            uint64_t reaching = 0;
            for_each_vector<acc_t>(size, [&](Lanes<acc_t> lanes) {
                reaching |= lanes_reaching<acc_t>(load(uppers + group + lanes.begin), bound) << lanes.begin;
            });
            reaching &= ~uint64_t{0} >> (kGroup - size);
            for (; reaching != 0; reaching &= reaching - 1) {
                const int64_t j = group + __builtin_ctzll(reaching);
                candidates.add(begin + j, probs[begin + j], words + 2 * j);
            }
        }
    }
    return candidates.winner(best >= smallest);
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
