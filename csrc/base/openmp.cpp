// Parallel regions that Clang compiled are run by the OpenMP runtime of torch, libgomp, as GCC's are. Clang's
// own would be a second one in the process, with threads of its own, of which torch.set_num_threads and
// at::in_parallel_region know nothing.

#if defined(__clang__) && defined(_OPENMP)

#include <cstdarg>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int kMostVariables = 12;  // that the regions of ATen/Parallel.h share: half as many

using Outlined = void (*)(int32_t* global_thread, int32_t* thread, void*, void*, void*, void*, void*, void*,
                          void*, void*, void*, void*, void*, void*);

struct Region {
    Outlined outlined;
    void* shared[kMostVariables];
};

// Arguments that the function does not have are passed in vain: the caller removes them.
void run_region(void* data) {
    const auto& [outlined, shared] = *static_cast<const Region*>(data);
    int32_t thread = 0;
    outlined(&thread, &thread, shared[0], shared[1], shared[2], shared[3], shared[4], shared[5], shared[6],
             shared[7], shared[8], shared[9], shared[10], shared[11]);
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*run)(void*), void* data, unsigned num_threads, unsigned flags);

// What Clang calls for a parallel region without clauses.
void __kmpc_fork_call(void* /*location*/, int32_t num_shared, Outlined outlined, ...) {
    if (num_shared > kMostVariables) std::abort();
    Region region{outlined, {}};
    va_list shared;
    va_start(shared, outlined);
    for (int32_t k = 0; k < num_shared; ++k) region.shared[k] = va_arg(shared, void*);
    va_end(shared);
    GOMP_parallel(run_region, &region, 0, 0);
}

}  // extern "C"

#endif
