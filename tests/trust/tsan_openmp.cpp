// Tells ThreadSanitizer what happens before what at the two ends of a parallel region. libgomp is not
// instrumented and waits by futexes of its own, so that every write of a worker would look like a race with
// what reads it afterwards. Linked with --wrap=GOMP_parallel, which is all of libgomp that at::parallel_for
// compiles to.
using Body = void (*)(void*);

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __real_GOMP_parallel(Body body, void* data, unsigned num_threads, unsigned flags);

void __wrap_GOMP_parallel(Body body, void* data, unsigned num_threads, unsigned flags) {
    struct Region {
        Body body;
        void* data;
        char begin, end;
    } region{body, data, 0, 0};
    const Body annotated = [](void* argument) {
        auto& [body, data, begin, end] = *static_cast<Region*>(argument);
        __tsan_acquire(&begin);
        body(data);
        __tsan_release(&end);
    };
    __tsan_release(&region.begin);
    __real_GOMP_parallel(annotated, &region, num_threads, flags);
    __tsan_acquire(&region.end);
}
}
