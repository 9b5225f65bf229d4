// ATen's Mersenne Twister (at::mt19937), vectorised: a whole state of 624 words at a time.
//
// The raw words form a sequence in which each word depends on those 624, 623 and 227 before it (Matsumoto,
// Nishimura: "Mersenne Twister: a 623-dimensionally equidistributed uniform pseudo-random number generator",
// 1998). A state of the engine is 624 of them, from a multiple of 624 on. Words are tempered where they are
// used.
#pragma once

#include <ATen/core/MT19937RNGEngine.h>

#include <algorithm>
#include <cstdint>

#include "cpu/base/buffer.h"

namespace bigramx::cpu {

constexpr int64_t kStateWords = at::MERSENNE_STATE_N;

// words[624:1248] from words[0:624].
void next_state(uint32_t* words);

class MersenneTwister {
  public:
    explicit MersenneTwister(const at::mt19937& engine)
        : engine_(engine), words_(kStates * kStateWords + kPadding) {
        const at::mt19937_data_pod data = engine.data();
        std::copy(data.state_.begin(), data.state_.end(), words_.begin());
        next_ = kStateWords + 1 - data.left_;
        end_ = kStateWords;
    }

    static constexpr int64_t kMaxWords = 2048;

    // The next `count` <= kMaxWords raw words, valid until the next call. Up to kPadding words after them are
    // readable, with unspecified contents.
    const uint32_t* take(int64_t count) {
        while (end_ - next_ < count) add_state();
        next_ += count;
        taken_ += count;
        return words_.begin() + next_ - count;
    }

    // ATen's engine, advanced by the words that were taken.
    at::mt19937 engine() const {
        at::mt19937 engine = engine_;
        if (taken_ == 0) return engine;
        at::mt19937_data_pod data = engine.data();
        const int64_t state = (next_ - 1) / kStateWords * kStateWords;  // of the last word taken
        std::copy_n(words_.begin() + state, kStateWords, data.state_.begin());
        data.next_ = static_cast<uint32_t>(next_ - state);
        data.left_ = static_cast<int>(kStateWords + 1 - (next_ - state));
        engine.set_data(data);
        return engine;
    }

  private:
    static constexpr int64_t kStates = 10, kPadding = 32;

    void add_state() {
        if (end_ + kStateWords + kPadding > words_.size()) move_to_front();
        next_state(words_.begin() + end_ - kStateWords);
        end_ += kStateWords;
    }

    // Keeps the states from the next word on, and at least the last state.
    void move_to_front() {
        const int64_t kept = std::min(next_, end_ - 1) / kStateWords * kStateWords;
        std::copy(words_.begin() + kept, words_.begin() + end_, words_.begin());
        next_ -= kept;
        end_ -= kept;
    }

    const at::mt19937 engine_;  // the original; copied, as a new one would be seeded, which is slow
    const Buffer<uint32_t> words_;
    int64_t next_;       // in words_
    int64_t end_;        // of what is generated, a multiple of kStateWords
    int64_t taken_ = 0;  // since engine_
};

}  // namespace bigramx::cpu
