// The exponential of an array of whole vectors. Compiled once for each CPU target
// (cpu/base/foreach_target.h).

namespace bigramx::cpu::BIGRAMX_TARGET {

inline void exponential(const float* from, float* to, int64_t size) {
    for (int64_t k = 0; k < size; k += kLanes<float>) {
        Vector<float> x[] = {load(from + k)};
        exp_each(x);
        store(to + k, x[0]);
    }
}

}  // namespace bigramx::cpu::BIGRAMX_TARGET
