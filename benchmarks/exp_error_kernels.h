// The exponential of an array of whole vectors. Compiled once for each CPU capability
// (for_each_capability.h).

namespace bigramx::BIGRAMX_CAPABILITY {

inline void exponential(const float* from, float* to, int64_t size) {
    for (int64_t k = 0; k < size; k += kLanes<float>) store(to + k, exp(load(from + k)));
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
