// Checks rows of probabilities. Compiled once for each CPU capability (for_each_capability.h).

namespace bigramx::BIGRAMX_CAPABILITY {

// Whether all probs are finite and not negative, and one is positive. Read as integers, the bits of such
// numbers stand in their order, and those of all others above them.
template <typename scalar_t>
bool is_distribution(const scalar_t* probs, int64_t vocab_size) {
    using T = Accumulator<scalar_t>;
    using Integer = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const auto larger = [](Vector<Integer> a, Vector<Integer> b) { return a > b ? a : b; };
    Vector<Integer> largest{};
    for_each_vector<T>(vocab_size, [&](Lanes<T> lanes) {
        const Vector<T> prob = lanes.load(probs, T(0)) + T(0);  // -0 is 0
        largest = larger(largest, reinterpret_cast<Vector<Integer>>(prob));
    });
    const T infinity = std::numeric_limits<T>::infinity();
    Integer infinite;
    std::memcpy(&infinite, &infinity, sizeof(infinite));
    const Integer bits = reduce<Integer>(largest, larger);
    return bits > 0 && bits < infinite;
}

}  // namespace bigramx::BIGRAMX_CAPABILITY
