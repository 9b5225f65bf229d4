// Chains of tokens, parallel over time.
//
// The draw at step t of a chain is keyed by t, so a step is a fixed map of tokens to tokens, and chains from
// any two tokens soon coalesce (the coupling that coupling from the past is based on: Propp, Wilson, "Exact
// sampling with coupled Markov chains and applications to statistical mechanics", 1996). A chain is cut into
// segments. Each warms up over the steps before it, from a guessed token. All segments run at the same time,
// over threads and, within a thread, over lanes, so that while one lane waits for memory others proceed. Then
// the boundaries are checked: a segment that began with a wrong token is repaired, that is, run again from
// the right token until it coalesces with what was written. The result is thus that of a serial loop.
//
// All this is done in slices of time, between which signal handlers run: each segment remembers where it was.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "base/interrupt.h"
#include "cpu/generate_rows.h"
#include "cpu/sampling/philox_fill.h"
#include "generate.h"

namespace bigramx::cpu {

// tokens: (B, num_steps) int64, rows `stride` apart; the token before the first of each chain is the last of
// its prompt.
struct Chains {
    int64_t* tokens;
    int64_t num_chains, num_steps;
    int64_t stride;

    int64_t* at(int64_t chain, int64_t step) const { return tokens + chain * stride + step; }
    int64_t before(int64_t chain, int64_t step) const { return at(chain, step)[-1]; }
};

// Rows: one of those in generate_rows.h for the sampler "philox".
template <typename Rows>
class ChainRunner {
  public:
    ChainRunner(Rows& rows, uint64_t seed, const Chains& chains, const StopTokens& stop)
        : rows_(rows),
          seed_(seed),
          chains_(chains),
          stop_(stop),
          lengths_(chains.num_chains),
          running_(chains.num_chains) {
        std::iota(running_.begin(), running_.end(), 0);
    }

    // Returns the number of steps: fewer than num_steps if all chains meet a stop token. Chains that meet one
    // before the last chain does are filled with it.
    int64_t run() {
        int64_t tokens_a_round = stop_.any() ? kSegment : kMaxTokensARound;  // chains may stop soon
        int64_t begin = 0;
        while (begin < chains_.num_steps && !running_.empty()) {
            const int64_t steps = tokens_a_round / static_cast<int64_t>(running_.size()) / kBlock * kBlock;
            const int64_t end = std::min(chains_.num_steps, begin + std::max(steps, kBlock));
            run_round(begin, end);
            for (const int64_t chain : running_) {
                lengths_[chain] = length_to_stop(chain, begin, end);
                signals_.poll(end - begin);
            }
            if (!rows_.all_are_distributions()) check_rows(begin, end);
            running_.erase(std::remove_if(running_.begin(), running_.end(),
                                          [&](int64_t chain) { return has_stopped(chain); }),
                           running_.end());
            begin = end;
            tokens_a_round = std::min(2 * tokens_a_round, kMaxTokensARound);
        }
        const int64_t length = *std::max_element(lengths_.begin(), lengths_.end());
        for (int64_t chain = 0; chain < chains_.num_chains; ++chain) {
            const int64_t last = chains_.before(chain, lengths_[chain]);
            std::fill(chains_.at(chain, lengths_[chain]), chains_.at(chain, length), last);
        }
        return length;
    }

  private:
    static constexpr int64_t kBlock = DrawBlock::kSize;  // steps
    static constexpr int64_t kWarmUp = 2 * kBlock;
    static constexpr int64_t kSegment = 32 * kBlock;
    static constexpr int64_t kMaxTokensARound = Rows::kGrainSize << 10;
    static constexpr int64_t kStepsAReading = 16 * kBlock;  // of the clock

    struct Segment {
        int64_t chain, begin, end;
        int64_t next;    // the step at which it goes on, before `begin` in the warm-up
        uint32_t token;  // the one before
    };

    void run_round(int64_t begin, int64_t end) {
        const bool is_parallel = Rows::kLanes * at::get_num_threads() > 1;
        const int64_t steps_a_segment = is_parallel ? std::min(kSegment, end - begin) : end - begin;
        const int64_t warm_up = steps_a_segment < end - begin ? kWarmUp : 0;
        segments_.clear();
        for (const int64_t chain : running_) {
            const auto token = static_cast<uint32_t>(chains_.before(chain, begin));
            for (int64_t step = begin; step < end; step += steps_a_segment) {
                segments_.push_back(
                    {chain, step, std::min(end, step + steps_a_segment), step - warm_up, token});
            }
            signals_.poll(1);
        }
        entries_.resize(segments_.size());
        // The same in each slice, whose handlers may set the number of threads: the lanes of a part go in
        // step.
        const int64_t grain_size = std::max<int64_t>(Rows::kLanes, Rows::kGrainSize / steps_a_segment);
        const int64_t num_parts =
            std::min<int64_t>((num_segments() + grain_size - 1) / grain_size, at::get_num_threads());
        in_slices([&] {
            at::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
                for (int64_t part = first; part < last; ++part)
                    run_segments<Rows::kLanes>(begin, num_segments() * part / num_parts,
                                               num_segments() * (part + 1) / num_parts);
            });
        });
        if (all_boundaries_are_right()) return;
        for (Segment& segment : segments_) segment.next = segment.begin;
        const int64_t segments_a_chain = num_segments() / static_cast<int64_t>(running_.size());
        in_slices([&] {
            at::parallel_for(0, running_.size(), 1, [&](int64_t first, int64_t last) {
                for (int64_t k = first * segments_a_chain; k < last * segments_a_chain; ++k) {
                    if (!repair(k)) return;
                }
            });
        });
    }

    // Calls work(), which goes on where it was when its slice of time was over, until it is done.
    template <typename Work>
    void in_slices(const Work& work) {
        do {
            rows_.slice.begin();
            work();
            signals_.poll();
        } while (rows_.slice.is_over());
    }

    // `lanes` segments at a time while that many are left, then half as many.
    template <int lanes>
    void run_segments(int64_t round_begin, int64_t first, int64_t last) {
        for (; first + lanes <= last && !rows_.slice.is_over(); first += lanes) {
            run_lanes<lanes>(round_begin, first);
        }
        if constexpr (lanes > 1) run_segments<lanes / 2>(round_begin, first, last);
    }

    // The last token of each lane, and the draws or, in place of their high bits, tokens of a block of steps.
    template <int lanes>
    struct Lanes {
        uint32_t tokens[lanes];
        DrawBlock blocks[lanes];
    };

    // Fills the blocks with the tokens of `count` steps. position(segment): the first step.
    template <int lanes, typename Position>
    void step(Lanes<lanes>& state, int64_t first, int64_t count, const Position& position) {
        for (int lane = 0; lane < lanes; ++lane) {
            const Segment& segment = segments_[first + lane];
            state.blocks[lane].fill_high(seed_, segment.chain, position(segment), count);
            if constexpr (Rows::kNeedsLowBits) state.blocks[lane].fill_low(count);
            if constexpr (Rows::kNeedsSecondDraws) state.blocks[lane].fill_second(count);
        }
        follow(state, count, std::make_integer_sequence<int, lanes>());
    }

    // Unrolled over the lanes, so that their tokens stay in registers.
    template <int lanes, int... lane>
    void follow(Lanes<lanes>& state, int64_t count, std::integer_sequence<int, lane...>) {
        uint32_t tokens[lanes] = {state.tokens[lane]...};
        for (int64_t k = 0; k < count; ++k) {
            const typename Rows::Place places[] = {rows_.locate(tokens[lane], state.blocks[lane], k)...};
            ((state.blocks[lane].high[k] = tokens[lane] = rows_.find(places[lane])), ...);
        }
        ((state.tokens[lane] = tokens[lane]), ...);
    }

    // The lanes go in step. Where the slice of time ends within a block, the block is drawn again: its rows
    // may not have been prepared.
    template <int lanes>
    void run_lanes(int64_t round_begin, int64_t first) {
        Segment* const segments = &segments_[first];
        Lanes<lanes> state;
        int64_t longest = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            state.tokens[lane] = segments[lane].token;
            longest = std::max(longest, segments[lane].end - segments[lane].begin);
        }
        for (int64_t done = segments[0].next - segments[0].begin; done < longest; done += kBlock) {
            if (done == 0) enter<lanes>(round_begin, first, state.tokens);
            if (done % kStepsAReading == 0) rows_.slice.ends();
            const int64_t count = std::min(kBlock, longest - done);
            step(state, first, count, [&](const Segment& segment) { return segment.begin + done; });
            if (rows_.slice.is_over()) return;
            for (int lane = 0; lane < lanes; ++lane) {
                Segment& segment = segments[lane];
                if (done >= 0) {
                    const int64_t kept = std::clamp<int64_t>(segment.end - segment.begin - done, 0, count);
                    std::copy_n(state.blocks[lane].high, kept,
                                chains_.at(segment.chain, segment.begin + done));
                }
                segment.next = segment.begin + done + count;
                segment.token = state.tokens[lane];
            }
        }
    }

    // After the warm-up, in which those that begin with the round were not guessed.
    template <int lanes>
    void enter(int64_t round_begin, int64_t first, uint32_t* tokens) {
        for (int lane = 0; lane < lanes; ++lane) {
            const Segment& segment = segments_[first + lane];
            if (segment.begin == round_begin) {
                tokens[lane] = static_cast<uint32_t>(chains_.before(segment.chain, round_begin));
            }
            entries_[first + lane] = tokens[lane];
        }
    }

    bool is_boundary_right(int64_t k) const {
        return entries_[k] == static_cast<uint32_t>(chains_.before(segments_[k].chain, segments_[k].begin));
    }

    bool all_boundaries_are_right() const {
        for (int64_t k = 0; k < num_segments(); ++k) {
            if (!is_boundary_right(k)) return false;
        }
        return true;
    }

    // The segment before is right. This one is right from where the right chain coalesces with it. Returns
    // false if the slice of time ends before.
    bool repair(int64_t k) {
        Segment& segment = segments_[k];
        Lanes<1> state;
        while (!is_boundary_right(k)) {
            if ((segment.next - segment.begin) % kStepsAReading == 0) rows_.slice.ends();
            const int64_t count = std::min(kBlock, segment.end - segment.next);
            state.tokens[0] = static_cast<uint32_t>(chains_.before(segment.chain, segment.next));
            step(state, k, count, [&](const Segment&) { return segment.next; });
            if (rows_.slice.is_over()) return false;
            int64_t* const written = chains_.at(segment.chain, segment.next);
            const uint32_t* const drawn = state.blocks[0].high;
            int64_t corrected = 0;
            for (; corrected < count && written[corrected] != drawn[corrected]; ++corrected) {
                written[corrected] = drawn[corrected];
            }
            segment.next += count;
            const bool is_right = corrected < count || segment.next == segment.end;
            if (is_right) entries_[k] = static_cast<uint32_t>(chains_.before(segment.chain, segment.begin));
        }
        return true;
    }

    int64_t length_to_stop(int64_t chain, int64_t begin, int64_t end) const {
        if (!stop_.any()) return end;
        const int64_t *first = chains_.at(chain, begin), *last = chains_.at(chain, end);
        const int64_t* found =
            stop_.several.empty()
                ? std::find(first, last, *stop_.one)
                : std::find_if(first, last, [&](int64_t token) { return stop_.contains(token); });
        return found == last ? end : found + 1 - chains_.at(chain, 0);
    }

    bool has_stopped(int64_t chain) const {
        return stop_.any() && stop_.contains(chains_.before(chain, lengths_[chain]));
    }

    // Raises if a chain has drawn from a row that is not a distribution: the error of the first step and,
    // within it, of the first chain. Rows that segments met during their warm-up only do not count.
    void check_rows(int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step) {
            for (const int64_t chain : running_) {
                if (step >= lengths_[chain]) continue;
                const int64_t token = chains_.before(chain, step);
                rows_.check(token);
            }
            signals_.poll(static_cast<int64_t>(running_.size()));
        }
    }

    int64_t num_segments() const { return static_cast<int64_t>(segments_.size()); }

    Rows& rows_;
    const uint64_t seed_;
    const Chains chains_;
    const StopTokens& stop_;
    std::vector<int64_t> lengths_;   // (B): steps so far, up to and including the stop token
    std::vector<int64_t> running_;   // the chains that have not met a stop token
    std::vector<Segment> segments_;  // of the current round, chain by chain
    std::vector<uint32_t> entries_;  // (segments): the token before the first of each
    SignalCheck signals_;
};

}  // namespace bigramx::cpu
