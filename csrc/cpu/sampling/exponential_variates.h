// Exponential variates as torch.multinomial draws them, and its exponential race: token = argmax_j probs[j] /
// q[j] with q[j] exponentially distributed, the Gumbel-max trick without logarithms.
//
// ATen's serial kernel computes q[j] = -log1p(-u) in float64 from one 64-bit draw per element, rounded to the
// dtype. ReplayedRace replays these draws, and takes the logarithm only where it decides between tokens
// (exponential_variates_kernels.h). Other builds of ATen draw q with a vendor library: DrawnRace then asks
// ATen for q.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>

#include "base/interrupt.h"
#include "cpu/sampling/mersenne_twister.h"
#include "sampling/generator.h"

namespace bigramx::cpu {

// Draws from a generator, and leaves it advanced by the words that were taken. It holds the generator's lock
// while it draws, but not for long: others draw, and signal handlers run, in between.
class GeneratorStream {
  public:
    explicit GeneratorStream(at::CPUGeneratorImpl* generator)
        : generator_(generator), lock_(generator->mutex_, std::defer_lock) {}
    ~GeneratorStream() { release(); }
    GeneratorStream(const GeneratorStream&) = delete;
    GeneratorStream& operator=(const GeneratorStream&) = delete;

    static constexpr int64_t kMaxDraws = MersenneTwister::kMaxWords / 2;

    // The raw words, before tempering, of the next `count` <= kMaxDraws draws, two each.
    const uint32_t* take(int64_t count) {
        if (signals_.is_due(count)) pause();
        if (!twister_.has_value()) acquire();
        return twister_->take(2 * count);
    }

    // To be called before work on so many elements that draws nothing.
    void before_work(int64_t elements);

  private:
    void acquire();
    void release();
    void pause();

    at::CPUGeneratorImpl* generator_;
    std::unique_lock<std::mutex> lock_;
    std::optional<MersenneTwister> twister_;  // while the lock is held
    SignalCheck signals_;
};

// Uniform on [0, 1) in steps of 2^-53, as at::uniform_real_distribution<double>. count <= kMaxDraws.
void draw_uniforms(GeneratorStream& stream, int64_t count, double* draws);

// The winner of the exponential race over probs, (V).
template <typename scalar_t>
int64_t sample_token(GeneratorStream& stream, const scalar_t* probs, int64_t vocab_size);

// argmax as in ATen: the first of equals, and a NaN (0 / 0) above all.
template <typename scalar_t>
class BestRatio {
  public:
    void offer(int64_t token, scalar_t prob, scalar_t variate) {
        const scalar_t ratio = prob / variate;
        if (ratio > best_ || (ratio != ratio && best_ == best_)) {
            best_ = ratio;
            token_ = token;
        }
    }

    int64_t token() const { return token_; }

  private:
    scalar_t best_ = 0;
    int64_t token_ = 0;  // also if all ratios are 0
};

template <typename scalar_t>
class ReplayedRace {
  public:
    ReplayedRace(at::CPUGeneratorImpl* generator, int64_t vocab_size)
        : stream_(generator), vocab_size_(vocab_size) {}

    int64_t sample(const scalar_t* probs) { return sample_token(stream_, probs, vocab_size_); }

    void before_work(int64_t elements) { stream_.before_work(elements); }

  private:
    GeneratorStream stream_;
    int64_t vocab_size_;
};

template <typename scalar_t>
class DrawnRace {
  public:
    // ATen's variates depend on the size of the tensor: rows_per_draw samples share one.
    DrawnRace(const std::optional<at::Generator>& generator, int64_t vocab_size, int64_t rows_per_draw)
        : generator_(generator),
          variates_(
              at::empty({rows_per_draw, vocab_size}, at::dtype(c10::CppTypeToScalarType<scalar_t>::value))),
          vocab_size_(vocab_size),
          next_row_(rows_per_draw) {}

    int64_t sample(const scalar_t* probs) {
        if (next_row_ == variates_.size(0)) {
            variates_.exponential_(1, generator_);
            next_row_ = 0;
        }
        const scalar_t* variates = variates_.template const_data_ptr<scalar_t>() + next_row_++ * vocab_size_;
        BestRatio<scalar_t> winner;
        for (int64_t j = 0; j < vocab_size_; ++j) winner.offer(j, probs[j], variates[j]);
        signals_.poll(vocab_size_);
        return winner.token();
    }

    void before_work(int64_t elements) { signals_.poll(elements); }

  private:
    std::optional<at::Generator> generator_;
    at::Tensor variates_;
    int64_t vocab_size_;
    int64_t next_row_;
    SignalCheck signals_;
};

// The exponential variate of a uniform draw.
template <typename scalar_t>
scalar_t exponential(double draw) {
    return static_cast<scalar_t>(-std::log1p(-draw));
}

// Whether this build of ATen draws exponential variates as ReplayedRace does. Compared once per dtype, on
// private generators.
template <typename scalar_t>
bool replays_exponential() {
    static const bool same = [] {
        constexpr int64_t kSize = 1000, kCalls = 2;
        at::Generator drawn = at::detail::createCPUGenerator(), replayed = at::detail::createCPUGenerator();
        GeneratorStream stream(at::check_generator<at::CPUGeneratorImpl>(replayed));
        double draws[kSize];
        for (int64_t call = 0; call < kCalls; ++call) {
            const at::Tensor variates =
                at::empty({kSize}, at::dtype(c10::CppTypeToScalarType<scalar_t>::value));
            variates.exponential_(1, drawn);
            draw_uniforms(stream, kSize, draws);
            const scalar_t* q = variates.const_data_ptr<scalar_t>();
            for (int64_t j = 0; j < kSize; ++j) {
                if (q[j] != exponential<scalar_t>(draws[j])) return false;
            }
        }
        return true;
    }();
    return same;
}

// variates.exponential_() for a dense tensor, which is drawn in its memory order.
template <typename scalar_t>
void draw_exponential(const at::Tensor& variates, const std::optional<at::Generator>& generator) {
    if (!replays_exponential<scalar_t>()) {
        variates.exponential_(1, generator);
        return;
    }
    GeneratorStream stream(cpu_generator(generator));
    scalar_t* const q = variates.data_ptr<scalar_t>();
    double draws[GeneratorStream::kMaxDraws];
    for (int64_t begin = 0; begin < variates.numel(); begin += GeneratorStream::kMaxDraws) {
        const int64_t count = std::min(GeneratorStream::kMaxDraws, variates.numel() - begin);
        draw_uniforms(stream, count, draws);
        for (int64_t k = 0; k < count; ++k) q[begin + k] = exponential<scalar_t>(draws[k]);
    }
}

// Calls draw(race) with the race that draws as this build of ATen does.
template <typename scalar_t, typename Draw>
void with_exponential_race(const std::optional<at::Generator>& generator, int64_t vocab_size,
                           int64_t rows_per_draw, const Draw& draw) {
    if (replays_exponential<scalar_t>()) {
        ReplayedRace<scalar_t> race(cpu_generator(generator), vocab_size);
        draw(race);
    } else {
        DrawnRace<scalar_t> race(generator, vocab_size, rows_per_draw);
        draw(race);
    }
}

}  // namespace bigramx::cpu
