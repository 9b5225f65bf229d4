// The scratch memory of embedding_cross_entropy.
#pragma once

#include <cstdint>

#include "../embedding_cross_entropy.h"
#include "buffer.h"
#include "pairs.h"

namespace bigramx {

// Sums over the pairs of some rows, before the scale of the reduction.
struct LossSums {
    double cross_entropy = 0, z_loss = 0;

    LossSums& operator+=(const LossSums& other) {
        cross_entropy += other.cross_entropy;
        z_loss += other.z_loss;
        return *this;
    }
};

struct LossWorkspace {
    Pairs pairs;
    Buffer<char> exponentials;       // of the rows that each thread works on
    Buffer<int32_t> target_counts;   // (threads, C), all zero between rows
    Buffer<LossSums> sums_of_block;  // (blocks of rows)
};

}  // namespace bigramx
