// Preloaded into a process (LD_PRELOAD), makes one call of the C library fail, once armed: the k-th write,
// fsync, rename, ... or the k-th allocation of at least so many bytes. tests/trust/fault_scenarios.py arms
// it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static const char* _Atomic armed = NULL;  // the name of the call that fails; NULL: none
static atomic_long until_failure = 0;
static atomic_long num_failures = 0;
static atomic_int failure_errno = 0;
static atomic_size_t least_bytes = 0;

// The k-th call of the function `name` fails with errno `error`, k from 1; of the allocations, those of at
// least `least` bytes count. The name must outlive the arming.
void fault_arm(const char* name, long k, int error, size_t least) {
    atomic_store(&num_failures, 0);
    atomic_store(&until_failure, k);
    atomic_store(&failure_errno, error);
    atomic_store(&least_bytes, least);
    atomic_store(&armed, name);
}

// Ends it; returns how many calls have failed, 0 or 1.
long fault_disarm(void) {
    atomic_store(&armed, NULL);
    return atomic_load(&num_failures);
}

static int fails(const char* name) {
    const char* wanted = atomic_load(&armed);
    if (wanted == NULL || strcmp(wanted, name) != 0) return 0;
    if (atomic_fetch_sub(&until_failure, 1) != 1) return 0;
    atomic_fetch_add(&num_failures, 1);
    errno = atomic_load(&failure_errno);
    return 1;
}

static int allocation_fails(size_t bytes) {
    return atomic_load(&armed) != NULL && bytes >= atomic_load(&least_bytes) && fails("malloc");
}

// The function of the C library that has the name of the one around it.
#define REAL(name)                        \
    static __typeof__(&name) real = NULL; \
    if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define WRAP(result, name, failure, parameters, arguments) \
    result name parameters {                               \
        REAL(name);                                        \
        return fails(#name) ? failure : real arguments;    \
    }

WRAP(int, fsync, -1, (int fd), (fd))
WRAP(int, rename, -1, (const char* from, const char* to), (from, to))
WRAP(int, link, -1, (const char* from, const char* to), (from, to))
WRAP(int, unlink, -1, (const char* path), (path))
WRAP(int, fchmod, -1, (int fd, mode_t mode), (fd, mode))
WRAP(int, fchown, -1, (int fd, uid_t user, gid_t group), (fd, user, group))
WRAP(int, chown, -1, (const char* path, uid_t user, gid_t group), (path, user, group))
WRAP(int, ftruncate64, -1, (int fd, off64_t size), (fd, size))
WRAP(int, flock, -1, (int fd, int operation), (fd, operation))
WRAP(off64_t, lseek64, -1, (int fd, off64_t offset, int whence), (fd, offset, whence))
WRAP(ssize_t, read, -1, (int fd, void* bytes, size_t size), (fd, bytes, size))

// "short write": half of the bytes arrive, as a disk that fills up may do.
ssize_t write(int fd, const void* bytes, size_t size) {
    REAL(write);
    if (fails("write")) return -1;
    return real(fd, bytes, fails("short write") && size > 1 ? size / 2 : size);
}

// The file is closed all the same, as on Linux.
int close(int fd) {
    REAL(close);
    const int failed = fails("close"), result = real(fd);
    if (failed) errno = atomic_load(&failure_errno);
    return failed ? -1 : result;
}

#define WRAP_OPEN(name, signature, arguments)                                         \
    int name signature {                                                              \
        va_list list;                                                                 \
        va_start(list, flags);                                                        \
        const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                                 \
        REAL(name);                                                                   \
        return fails("open") ? -1 : real arguments;                                   \
    }

WRAP_OPEN(open, (const char* path, int flags, ...), (path, flags, mode))
WRAP_OPEN(open64, (const char* path, int flags, ...), (path, flags, mode))
WRAP_OPEN(openat, (int folder, const char* path, int flags, ...), (folder, path, flags, mode))
WRAP_OPEN(openat64, (int folder, const char* path, int flags, ...), (folder, path, flags, mode))

// glibc's own, as dlsym allocates.
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) { return allocation_fails(bytes) ? NULL : __libc_malloc(bytes); }

void* calloc(size_t count, size_t bytes) {
    return allocation_fails(count * bytes) ? NULL : __libc_calloc(count, bytes);
}

void* realloc(void* memory, size_t bytes) {
    return allocation_fails(bytes) ? NULL : __libc_realloc(memory, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) {
    return allocation_fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
}

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
    void* const allocated = allocation_fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
    if (allocated == NULL) return ENOMEM;
    *memory = allocated;
    return 0;
}
