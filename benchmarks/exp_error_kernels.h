// The exponential of an array of whole vectors. Compiled once for each CPU target
// (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

inline void exponential(const float* from, float* to, int64_t size) {
    for (int64_t k = 0; k < size; k += kLanes<float>) store(to + k, exp(load(from + k)));
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
