/* Preloaded: the call EIO_CALL (open, read) on files with EIO_ON in their path is an
   input/output error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static int broken_name(const char *name, const char *call) {
  const char *on = getenv("EIO_ON"), *calls = getenv("EIO_CALL");
  return on && name && strstr(name, on) && strcmp(calls, call) == 0;
}

static int broken(int file, const char *call) {
  char link[64], name[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, name, sizeof name - 1);
  if (size < 0) return 0;
  name[size] = 0;
  return broken_name(name, call);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(value) do { errno = EIO; return value; } while (0)

ssize_t read(int f, void *to, size_t n) {
  if (broken(f, "read")) FAIL(-1);
  return REAL(read)(f, to, n);
}
ssize_t pread(int f, void *to, size_t n, off_t at) {
  if (broken(f, "read")) FAIL(-1);
  return REAL(pread)(f, to, n, at);
}
ssize_t pread64(int f, void *to, size_t n, off64_t at) {
  if (broken(f, "read")) FAIL(-1);
  return REAL(pread64)(f, to, n, at);
}
void *mmap(void *to, size_t n, int p, int flags, int f, off_t at) {
  if (f >= 0 && broken(f, "read")) FAIL(MAP_FAILED);
  return REAL(mmap)(to, n, p, flags, f, at);
}
void *mmap64(void *to, size_t n, int p, int flags, int f, off64_t at) {
  if (f >= 0 && broken(f, "read")) FAIL(MAP_FAILED);
  return REAL(mmap64)(to, n, p, flags, f, at);
}

#define MODE(flags) \
  int mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); \
  }

int open(const char *name, int flags, ...) {
  MODE(flags)
  if (broken_name(name, "open")) FAIL(-1);
  return REAL(open)(name, flags, mode);
}
int open64(const char *name, int flags, ...) {
  MODE(flags)
  if (broken_name(name, "open")) FAIL(-1);
  return REAL(open64)(name, flags, mode);
}
int openat(int in, const char *name, int flags, ...) {
  MODE(flags)
  if (broken_name(name, "open")) FAIL(-1);
  return REAL(openat)(in, name, flags, mode);
}
int openat64(int in, const char *name, int flags, ...) {
  MODE(flags)
  if (broken_name(name, "open")) FAIL(-1);
  return REAL(openat64)(in, name, flags, mode);
}
