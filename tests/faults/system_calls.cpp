// Stands between a process and its C library (LD_PRELOAD): counts the calls that touch paths with a mark in them, and at one of them kills
// the process, tears the write, or fails with an error. Armed by injector.py in a forked child, through the variables below.
//
// Reads are counted only if `fault_reads` is set: a kill before a read leaves what a kill before the next write leaves.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum Mode { COUNT = 0, KILL_BEFORE = 1, KILL_AFTER = 2, TEAR = 3, FAIL_ONCE = 4, FAIL_FROM_HERE = 5 };

extern "C" {
char fault_mark[256] = "";  // part of the paths that count; empty: nothing does
long fault_at = -1;         // the number of the call to meet, from 1
int fault_mode = COUNT;
int fault_errno = 0;
int fault_reads = 0;
int fault_log = -1;         // descriptor that gets a line for each call that counts
long fault_count = 0;
}

static const int MOST_DESCRIPTORS = 4096;
static bool marked[MOST_DESCRIPTORS];  // descriptors of paths that count
static char names[MOST_DESCRIPTORS][256];

template <class F> static F original(F, const char* name) { return reinterpret_cast<F>(dlsym(RTLD_NEXT, name)); }
#define ORIGINAL(name) static auto real = original(&name, #name)

static bool counts(const char* path) { return fault_mark[0] && path && strstr(path, fault_mark); }
static bool counts(int fd) { return fault_mark[0] && fd >= 0 && fd < MOST_DESCRIPTORS && marked[fd]; }
static void mark(int fd, const char* path) {  // nullptr: a descriptor that does not count
  if (fd < 0 || fd >= MOST_DESCRIPTORS) return;
  marked[fd] = path != nullptr;
  snprintf(names[fd], sizeof names[fd], "%s", path ? path : "");
}
static const char* name_of(int fd) { return fd >= 0 && fd < MOST_DESCRIPTORS ? names[fd] : ""; }

static void note(const char* call, const char* path) {
  if (fault_log < 0) return;
  char line[700];
  int size = snprintf(line, sizeof line, "%ld %s %s\n", fault_count, call, path);
  static auto real = original(&write, "write");
  if (real(fault_log, line, size) < 0) _exit(98);
}

static void die() { kill(getpid(), SIGKILL); }

enum Verdict { GO, FAIL, MEET };  // MEET: this is the call, and it is to be made, wholly or in part, before the end

static Verdict arrive(const char* call, const char* path) {
  fault_count++;
  note(call, path);
  if (fault_mode == FAIL_FROM_HERE ? fault_count < fault_at : fault_count != fault_at) return GO;
  switch (fault_mode) {
    case KILL_BEFORE: die(); return GO;
    case KILL_AFTER: case TEAR: return MEET;
    case FAIL_ONCE: case FAIL_FROM_HERE: errno = fault_errno; return FAIL;
    default: return GO;
  }
}

template <class R, class Call> static R meet(const char* name, const char* path, R failure, Call call) {
  Verdict verdict = arrive(name, path);
  if (verdict == FAIL) return failure;
  R result = call();
  if (verdict == MEET) die();
  return result;
}

#define OPEN(name, before, arguments, also)                                                         \
  extern "C" int name before {                                                                      \
    mode_t mode = 0;                                                                                \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    ORIGINAL(name);                                                                                 \
    bool writes = flags & (O_WRONLY | O_RDWR);                                                      \
    bool is = counts(path) || (also);                                                               \
    int fd = is && (writes || fault_reads)                                                          \
                 ? meet(writes ? "open-to-write" : "open-to-read", path, -1, [&] { return real arguments; }) \
                 : real arguments;                                                                  \
    mark(fd, is ? path : nullptr);                                                                  \
    return fd;                                                                                      \
  }
OPEN(open, (const char* path, int flags, ...), (path, flags, mode), false)
OPEN(open64, (const char* path, int flags, ...), (path, flags, mode), false)
OPEN(openat, (int folder, const char* path, int flags, ...), (folder, path, flags, mode), counts(folder))
OPEN(openat64, (int folder, const char* path, int flags, ...), (folder, path, flags, mode), counts(folder))

extern "C" ssize_t write(int fd, const void* data, size_t size) {
  ORIGINAL(write);
  if (!counts(fd)) return real(fd, data, size);
  return meet("write", name_of(fd), ssize_t(-1), [&] { return real(fd, data, fault_mode == TEAR && fault_count == fault_at ? size / 2 : size); });
}

extern "C" ssize_t read(int fd, void* data, size_t size) {
  ORIGINAL(read);
  if (!counts(fd) || !fault_reads) return real(fd, data, size);
  return meet("read", name_of(fd), ssize_t(-1), [&] { return real(fd, data, size); });
}

extern "C" DIR* opendir(const char* path) {
  ORIGINAL(opendir);
  if (!counts(path) || !fault_reads) return real(path);
  return meet("opendir", path, static_cast<DIR*>(nullptr), [&] { return real(path); });
}

extern "C" int close(int fd) {
  ORIGINAL(close);
  if (!counts(fd)) return real(fd);
  int result = meet("close", name_of(fd), -1, [&] { return real(fd); });
  mark(fd, nullptr);
  if (result < 0) real(fd);  // a close that fails has closed all the same
  return result;
}

#define ON_DESCRIPTOR(name, before, arguments)                          \
  extern "C" int name before {                                          \
    ORIGINAL(name);                                                     \
    if (!counts(fd)) return real arguments;                             \
    return meet(#name, name_of(fd), -1, [&] { return real arguments; });         \
  }
ON_DESCRIPTOR(fsync, (int fd), (fd))
ON_DESCRIPTOR(fdatasync, (int fd), (fd))
ON_DESCRIPTOR(flock, (int fd, int operation), (fd, operation))
ON_DESCRIPTOR(ftruncate, (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(ftruncate64, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, before, arguments, path)                          \
  extern "C" int name before noexcept {                                 \
    ORIGINAL(name);                                                     \
    if (!counts(path)) return real arguments;                           \
    return meet(#name, path, -1, [&] { return real arguments; });       \
  }
ON_PATH(mkdir, (const char* path, mode_t mode), (path, mode), path)
ON_PATH(rmdir, (const char* path), (path), path)
ON_PATH(unlink, (const char* path), (path), path)
ON_PATH(link, (const char* from, const char* to), (from, to), to)
ON_PATH(symlink, (const char* from, const char* to), (from, to), to)
ON_PATH(truncate, (const char* path, off_t size), (path, size), path)

extern "C" int rename(const char* from, const char* to) noexcept {
  ORIGINAL(rename);
  if (!counts(from) && !counts(to)) return real(from, to);
  return meet("rename", to, -1, [&] { return real(from, to); });
}

extern "C" int unlinkat(int folder, const char* path, int flags) noexcept {
  ORIGINAL(unlinkat);
  if (!counts(folder) && !counts(path)) return real(folder, path, flags);
  return meet("unlinkat", path, -1, [&] { return real(folder, path, flags); });
}
