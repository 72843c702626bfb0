/* Faults of input and output, loaded by LD_PRELOAD: the n-th call below a directory that changes the disk fails, is half
 * done, ends the process or sends it a signal. What calls did is logged for the simulation of a loss of power
 * (power_loss.py).
 *
 * Counted are open for writing, write, fsync, rename, mkdir, unlink and rmdir, also those that fail: each is logged with its
 * number before it is done (`call`), and again if it meets the fault (`fault`). Arm it by `arm_faults`; until then, and in
 * processes that the armed one starts, nothing happens. What a removed name meant is kept in `graves` as a hard link,
 * because a removal that was not synced may be undone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL, KILL, HALF_THEN_KILL, HALF_THEN_FAIL, TERMINATE };

static char prefix[PATH_MAX], graves[PATH_MAX];
static int nth, code, action, sticky, count;
static pid_t armed;
static FILE *record;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* `at`: number of the call, from 1; `then`: an action; `from_then_on`: all later calls fail, too. */
void arm_faults(const char *below, int at, int error, int then, int from_then_on, const char *log, const char *kept) {
    nth = at, code = error, action = then, sticky = from_then_on, count = 0, armed = getpid();
    strncpy(graves, kept, PATH_MAX - 1);
    record = *log ? fopen(log, "w") : NULL;
    if (record) setvbuf(record, NULL, _IOLBF, 0);
    strncpy(prefix, below, PATH_MAX - 1);
}

static int of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, prefix, strlen(prefix)) == 0;
}

static int below(int folder, const char *given, char *path) {
    if (!prefix[0] || !given) return 0;
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
    } else {
        char base[PATH_MAX / 2];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char found[PATH_MAX];
            of_descriptor(folder, found);
            snprintf(base, sizeof base, "%.2000s", found);
        }
        snprintf(path, PATH_MAX, "%s/%s", base, given);
    }
    return strncmp(path, prefix, strlen(prefix)) == 0;
}

static unsigned long inode_of(const char *path) {
    struct stat found;
    return lstat(path, &found) ? 0 : found.st_ino;
}

static void keep(const char *path) {
    char grave[PATH_MAX + 32];
    if (!graves[0] || !inode_of(path)) return;
    snprintf(grave, sizeof grave, "%s/%lu", graves, inode_of(path));
    /* A directory has no hard link. Left open it keeps its inode, so that no later file is taken for it. */
    if (linkat(AT_FDCWD, path, AT_FDCWD, grave, 0) && errno != EEXIST) open(path, O_PATH | O_CLOEXEC);
}

static void note(const char *what, unsigned long inode, long size, const char *path, const char *more) {
    if (!record) return;
    fprintf(record, "%s\t%lu\t%ld\t%s\t%s\n", what, inode, size, path, more);
}

/* The action that this call meets; ends the process itself where nothing of the call is done first. */
static int meet(int halves, const char *what, const char *path) {
    if (getpid() != armed) return NOTHING;
    pthread_mutex_lock(&lock);
    count++;
    int met = action && (count == nth || (sticky && count > nth)) ? action : NOTHING;
    note("call", count, 0, path, what);
    if (met) note("fault", count, 0, path, what);
    pthread_mutex_unlock(&lock);
    if (met == TERMINATE) {
        kill(getpid(), SIGTERM);
        return NOTHING;
    }
    if (met == KILL || (met == HALF_THEN_KILL && !halves)) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    if (met == HALF_THEN_FAIL && !halves) met = FAIL;
    if (met == FAIL) errno = code;
    return met;
}

static int opened(int descriptor, const char *path, const char *what) {
    if (descriptor >= 0 && path[0]) {
        struct stat found;
        fstat(descriptor, &found);
        note(what, found.st_ino, 0, path, "");
    }
    return descriptor;
}

#define OPEN(NAME, PARAMETERS, CALL, FOLDER) \
    int NAME PARAMETERS { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, int); \
            va_end(rest); \
        } \
        REAL(NAME); \
        char path[PATH_MAX] = ""; \
        const char *what = ""; \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(FOLDER, given, path)) { \
            what = inode_of(path) ? (flags & O_TRUNC ? "truncate" : "open") : "create"; \
            if (meet(0, what, path)) return -1; \
        } else { \
            path[0] = 0; \
        } \
        return opened(CALL, path, what); \
    }
OPEN(open, (const char *given, int flags, ...), real(given, flags, mode), AT_FDCWD)
OPEN(open64, (const char *given, int flags, ...), real(given, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *given, int flags, ...), real(folder, given, flags, mode), folder)
OPEN(openat64, (int folder, const char *given, int flags, ...), real(folder, given, flags, mode), folder)

static void note_size(const char *what, int descriptor, const char *path) {
    struct stat found;
    int before = errno;
    if (record && !fstat(descriptor, &found)) note(what, found.st_ino, found.st_size, path, "");
    errno = before;
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    char path[PATH_MAX];
    if (!prefix[0] || descriptor < 3 || !of_descriptor(descriptor, path)) return real(descriptor, bytes, size);
    int met = meet(1, "write", path);
    if (met == FAIL) return -1;
    if (met) {
        if (size > 1) real(descriptor, bytes, size / 2);
        note_size("write", descriptor, path);
        if (met == HALF_THEN_KILL) {
            kill(getpid(), SIGKILL);
            for (;;) pause();
        }
        errno = code;
        return -1;
    }
    ssize_t done = real(descriptor, bytes, size);
    note_size("write", descriptor, path);
    return done;
}

ssize_t writev(int descriptor, const struct iovec *pieces, int number) {
    REAL(writev);
    char path[PATH_MAX];
    if (!prefix[0] || descriptor < 3 || !of_descriptor(descriptor, path)) return real(descriptor, pieces, number);
    if (meet(0, "write", path)) return -1;
    ssize_t done = real(descriptor, pieces, number);
    note_size("write", descriptor, path);
    return done;
}

#define SYNC(NAME) \
    int NAME(int descriptor) { \
        REAL(NAME); \
        char path[PATH_MAX]; \
        if (!prefix[0] || !of_descriptor(descriptor, path)) return real(descriptor); \
        if (meet(0, "fsync", path)) return -1; \
        int done = real(descriptor); \
        if (!done) note_size("fsync", descriptor, path); \
        return done; \
    }
SYNC(fsync)
SYNC(fdatasync)

static int renamed(int done, const char *from, const char *to, unsigned long inode) {
    if (!done) note("rename", inode, 0, from, to);
    return done;
}

int rename(const char *old, const char *new) {
    REAL(rename);
    char from[PATH_MAX], to[PATH_MAX];
    if (!below(AT_FDCWD, new, to) || !below(AT_FDCWD, old, from)) return real(old, new);
    if (meet(0, "rename", from)) return -1;
    keep(to);
    unsigned long inode = inode_of(from);
    return renamed(real(old, new), from, to, inode);
}

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    REAL(renameat);
    char from[PATH_MAX], to[PATH_MAX];
    if (!below(new_folder, new, to) || !below(old_folder, old, from)) return real(old_folder, old, new_folder, new);
    if (meet(0, "rename", from)) return -1;
    keep(to);
    unsigned long inode = inode_of(from);
    return renamed(real(old_folder, old, new_folder, new), from, to, inode);
}

int link(const char *old, const char *new) {
    REAL(link);
    char path[PATH_MAX];
    int done = real(old, new);
    if (!done && below(AT_FDCWD, new, path)) note("link", inode_of(path), 0, path, "");
    return done;
}

int mkdir(const char *given, mode_t mode) {
    REAL(mkdir);
    char path[PATH_MAX];
    if (!below(AT_FDCWD, given, path)) return real(given, mode);
    if (meet(0, "mkdir", path)) return -1;
    int done = real(given, mode);
    if (!done) note("mkdir", inode_of(path), 0, path, "");
    return done;
}

#define REMOVE(NAME, PARAMETERS, CALL, FOLDER) \
    int NAME PARAMETERS { \
        REAL(NAME); \
        char path[PATH_MAX]; \
        if (!below(FOLDER, given, path)) return CALL; \
        if (meet(0, "remove", path)) return -1; \
        keep(path); \
        int done = CALL; \
        if (!done) note("remove", 0, 0, path, ""); \
        return done; \
    }
REMOVE(unlink, (const char *given), real(given), AT_FDCWD)
REMOVE(rmdir, (const char *given), real(given), AT_FDCWD)
REMOVE(unlinkat, (int folder, const char *given, int flags), real(folder, given, flags), folder)
