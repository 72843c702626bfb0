/* Storage of THROTTLE_BYTES_PER_SECOND below THROTTLE_DIRECTORY, for a process with this library in LD_PRELOAD.
 *
 * A write to a file there comes back when storage of that speed without a cache would have taken it. Threads share the
 * speed. Files that are written through a memory map, or by the C library's own buffers, are not slowed: nobody in the
 * benchmark writes so, and the benchmark looks at the speed that each came to.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const size_t PIECE = 1 << 20; /* bytes: storage takes them one after another, 0.05 s each at 20 MB/s */
static const ssize_t SMALL = 4096;   /* fewer are not looked at: logs, pipes */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double busy_until;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int is_slow(int file) {
    const char *directory = getenv("THROTTLE_DIRECTORY");
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (directory == NULL || length < 0) return 0;
    path[length] = '\0';
    return strncmp(path, directory, strlen(directory)) == 0;
}

static void wait_for(size_t bytes) {
    pthread_mutex_lock(&lock);
    double moment = now();
    if (busy_until < moment) busy_until = moment;
    busy_until += bytes / atof(getenv("THROTTLE_BYTES_PER_SECOND"));
    double left = busy_until - moment;
    pthread_mutex_unlock(&lock);
    struct timespec pause = {(time_t)left, (long)((left - (time_t)left) * 1e9)};
    nanosleep(&pause, NULL);
}

ssize_t write(int file, const void *from, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (real == NULL) real = dlsym(RTLD_NEXT, "write");
    if ((ssize_t)size < SMALL || !is_slow(file)) return real(file, from, size);
    size_t done = 0;
    while (done < size) {
        size_t piece = size - done < PIECE ? size - done : PIECE;
        ssize_t written = real(file, (const char *)from + done, piece);
        if (written <= 0) return done > 0 ? (ssize_t)done : written;
        wait_for(written);
        done += written;
    }
    return done;
}

ssize_t writev(int file, const struct iovec *from, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (real == NULL) real = dlsym(RTLD_NEXT, "writev");
    ssize_t written = real(file, from, count);
    if (written >= SMALL && is_slow(file)) wait_for(written);
    return written;
}

ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (real == NULL) real = dlsym(RTLD_NEXT, "pwrite64");
    ssize_t written = real(file, from, size, at);
    if (written >= SMALL && is_slow(file)) wait_for(written);
    return written;
}

ssize_t pwrite(int file, const void *from, size_t size, off_t at) { return pwrite64(file, from, size, at); }
