// Which accesses are ordered, that is, happen in the same order in every run: within a kernel by its barriers
// and fences; and those of the kernels before it, unless it overlaps them and has not waited. Memory that is
// released and allocated again in between has forgotten its accesses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

// When memory was accessed, and by which thread: the time in the upper bits, the thread in the lower ones.
// Each barrier and fence advances the time. As blocks run one after another, the time identifies the block
// and the launch. 0: never accessed.
using Stamp = uint64_t;

constexpr Stamp kThreadMask = kMaxThreads - 1;
// Others have accessed it as well, unordered:
constexpr Stamp kSeveralLanes = 1 << 10;  // lanes of the same warp
constexpr Stamp kSeveralWarps = 1 << 11;  // warps of the same block
constexpr Stamp kOtherBlocks = 1 << 12;   // earlier blocks of the launch
constexpr Stamp kTick = 1 << 13;

constexpr unsigned thread_of(Stamp stamp) { return stamp & kThreadMask; }

class Order {
  public:
    // overlaps: the launches before, back to one that does not overlap, may still run.
    void begin_launch(bool overlaps) {
        launch_ = now_ += kTick;
        if (!overlaps) first_launch_ = launch_;
        blocks_.clear();
        releases_.clear();
    }

    void begin_block(unsigned block, unsigned threads) {
        block_ = barrier_ = now_ += kTick;
        std::fill_n(warp_barriers_, kMaxWarps, block_);
        std::fill_n(threads_, threads, ThreadState{});
        acquires_.clear();
        blocks_.push_back({block_, block});
    }

    void end_launch() { now_ += kTick; }

    void block_barrier() { barrier_ = now_ += kTick; }
    void warp_barrier(unsigned warp) { warp_barriers_[warp] = now_ += kTick; }

    // A fence before an atomic releases what the thread has done, and what its block has done before the last
    // barrier, to all later blocks that use the same atomic. A fence after an atomic acquires what was
    // released through it.
    void fence(unsigned thread) {
        now_ += kTick;
        threads_[thread].fence = {now_, barrier_};
        if (threads_[thread].atomic != nullptr) acquires_.push_back({threads_[thread].atomic, thread, now_});
    }

    void atomic(unsigned thread, const void* address) {
        threads_[thread].atomic = address;
        const Fence& fence = threads_[thread].fence;
        if (fence.time == 0) return;
        std::vector<Release>& releases = releases_[address];
        if (!releases.empty() && releases.back().block == blocks_.size() - 1) releases.pop_back();
        releases.push_back({blocks_.size() - 1, thread, fence});
    }

    void wait_for_kernels_before(unsigned thread) { threads_[thread].has_waited = true; }
    bool has_waited(unsigned thread) const { return first_launch_ == launch_ || threads_[thread].has_waited; }

    // The start of the launch and of the block.
    Stamp launch() const { return launch_; }
    Stamp block() const { return block_; }
    // For a thread, earlier stamps in device memory are past.
    Stamp oldest(unsigned thread) const { return has_waited(thread) ? launch_ : first_launch_; }

    // Whether the thread runs after all accesses that a stamp stands for. Stamps before `oldest` are past.
    bool is_after(Stamp stamp, unsigned thread, Stamp oldest) const {
        if (stamp < oldest) return true;
        if (stamp < launch_) return false;
        if (stamp < block_ || (stamp & kOtherBlocks) != 0) {
            if (!is_after_blocks(stamp, thread)) return false;
            if (stamp < block_) return true;
        }
        if (stamp < barrier_) return true;
        if ((stamp & (kThreadMask | kSeveralLanes | kSeveralWarps)) == thread) return true;
        return is_after_in_warp(stamp, thread);
    }

    // The stamp of an access now.
    Stamp now(unsigned thread) const { return now_ | thread; }

    // The stamp of an access now that also stands for an earlier one.
    Stamp joined(Stamp stamp, unsigned thread, Stamp oldest) const {
        const Stamp fresh = now(thread);
        if (stamp < oldest || stamp < launch_) return fresh;
        if (stamp < block_) return fresh | kOtherBlocks;
        const Stamp others = fresh | (stamp & kOtherBlocks);
        if (stamp < barrier_ || is_after_in_warp(stamp, thread)) return others;
        if (thread_of(stamp) == thread) return others | (stamp & (kSeveralLanes | kSeveralWarps));
        const bool in_warp = thread_of(stamp) / kWarp == thread / kWarp && (stamp & kSeveralWarps) == 0;
        return others | (in_warp ? kSeveralLanes : kSeveralWarps);
    }

    // The number of the block in its grid.
    unsigned block_of(Stamp stamp) const { return blocks_[rank_of(stamp)].number; }

  private:
    struct Block {
        Stamp start;
        unsigned number;
    };

    struct Fence {
        Stamp time = 0;     // what the thread did before
        Stamp barrier = 0;  // what others of its block did before
    };

    struct ThreadState {
        Fence fence;                   // the last one
        const void* atomic = nullptr;  // the last one that the thread performed
        bool has_waited = false;       // for the kernels before
    };

    struct Release {
        size_t block;  // by rank
        unsigned thread;
        Fence fence;
    };

    struct Acquire {
        const void* atomic;
        unsigned thread;
        Stamp time;
    };

    // The block's position in the order in which the blocks of the launch run.
    size_t rank_of(Stamp stamp) const {
        size_t below = 0, end = blocks_.size();
        while (end - below > 1) {
            const size_t middle = (below + end) / 2;
            (stamp < blocks_[middle].start ? end : below) = middle;
        }
        return below;
    }

    bool is_after_in_warp(Stamp stamp, unsigned thread) const {
        const unsigned warp = thread / kWarp;
        return thread_of(stamp) / kWarp == warp && (stamp & kSeveralWarps) == 0 &&
               stamp < warp_barriers_[warp];
    }

    // Whether the thread has acquired what the block of the stamp released; if several blocks have accessed
    // the memory, what all earlier blocks released.
    bool is_after_blocks(Stamp stamp, unsigned thread) const {
        for (const Acquire& acquire : acquires_) {
            if (acquire.thread != thread && acquire.time >= barrier_) continue;
            const auto found = releases_.find(acquire.atomic);
            if (found != releases_.end() && are_released(found->second, stamp)) return true;
        }
        return false;
    }

    // releases: of one atomic, at most one per block, in the order in which the blocks run.
    bool are_released(const std::vector<Release>& releases, Stamp stamp) const {
        const size_t current = blocks_.size() - 1;
        const size_t earlier_blocks = releases.size() - (releases.back().block == current ? 1 : 0);
        if ((stamp & kOtherBlocks) != 0 && earlier_blocks < current) return false;
        if (stamp >= block_) return true;
        const auto release =
            std::lower_bound(releases.begin(), releases.end(), rank_of(stamp),
                             [](const Release& release, size_t rank) { return release.block < rank; });
        if (release == releases.end() || release->block != rank_of(stamp)) return false;
        const bool own = (stamp & (kThreadMask | kSeveralLanes | kSeveralWarps)) == release->thread;
        return stamp < (own ? release->fence.time : release->fence.barrier);
    }

    Stamp now_ = kTick, launch_ = 0, block_ = 0;
    Stamp first_launch_ = 0;               // the earliest one that may still run
    Stamp barrier_ = 0;                    // the last one of the block
    Stamp warp_barriers_[kMaxWarps] = {};  // the last one of each warp with all its lanes
    ThreadState threads_[kMaxThreads];
    std::vector<Block> blocks_;
    std::unordered_map<const void*, std::vector<Release>> releases_;  // by atomic, then by block
    std::vector<Acquire> acquires_;                                   // of this block
};

}  // namespace simt
