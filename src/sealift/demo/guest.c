/* The test guest: fills its memory with a known pattern, keeps rewriting and checking it, and ticks on the console.
 *
 * Parameters, from the kernel command line:
 *   sl.secret=HEX   1 to 64 bytes from which the pattern derives (default 00)
 *   sl.mem=MB       how much memory to fill (default 32)
 *   sl.dirty=MBPS   how much of it to rewrite each second, page after page (default 0)
 *   sl.hot=MB       rewrite only the first so many (default: all of it)
 *   sl.check=MBPS   how much to verify each second (default 32; 0 = as fast as it goes)
 *   sl.tick=MS      time between two ticks (default 50)
 *   sl.disk=1       write a numbered block to /dev/vda each 100 ms, durably, and read it back
 *
 * Lines on the console, each written whole:
 *   READY                              memory is filled
 *   TICK n ms                          n counts from 1; ms on the guest's monotonic clock since its boot
 *   CHECK pass=n pages=n bad=n         after each pass over all pages; bad counts since the start
 *   BAD page=n version=n               for the first few wrong pages
 *   FOUND blocks=n bad=n last=n        what lay on the disk at the start: blocks of this secret, those of them that are
 *                                      not as they were written, and the highest number, from which it goes on
 *   DISK n ok|bad                      after each block
 *   FATAL why                          nothing more will come
 *
 * A page of 4096 bytes, as 512 little-endian 64-bit words:
 *   words 0..3    the marker: the same in every page, and a function of the secret alone
 *   words 4..511  xorshift64 (13, 7, 17), begun at splitmix(hash ^ splitmix(page) ^ splitmix(~version))
 * with  hash      = FNV-1a-64 of the secret's bytes
 *       marker[i] = splitmix(hash + i + 1), i = 0..3
 *       splitmix  = the output function of splitmix64 (add 0x9e3779b97f4a7c15, then the two multiplications)
 * A block on the disk is such a page too, see SLOTS_MAX below.
 * Versions are kept in a table of their own, so a page that a migration lost or left stale does not match. guest.py
 * computes the same marker.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/input.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MARKER_WORDS = 4, STRIPES = 64, SECRET_MAX = 64 };

static char command_line[4096];
static uint64_t hash;
static uint64_t marker[MARKER_WORDS];
static uint64_t *memory;
static uint32_t *versions;
static long pages;
static pthread_mutex_t stripes[STRIPES]; /* page n is read and written under stripe n % STRIPES */
static pthread_mutex_t disk_turn = PTHREAD_MUTEX_INITIALIZER; /* held while a block is written and read back */

static void say(const char *format, ...) {
  char line[256];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (length > (int)sizeof line) length = sizeof line;
  /* one write: the terminal driver does not let other threads' lines in between */
  if (write(STDOUT_FILENO, line, (size_t)length) < 0) { /* no console: nobody to tell */ }
}

static void fatal(const char *why, long value) {
  say("FATAL %s %ld%s%s\n", why, value, errno ? ": " : "", errno ? strerror(errno) : "");
  for (;;) pause(); /* process 1 must not end */
}

static const char *text(const char *name) {
  size_t length = strlen(name);
  for (const char *at = command_line; (at = strstr(at, name)); at += length)
    if ((at == command_line || at[-1] == ' ') && at[length] == '=') return at + length + 1;
  return NULL;
}

static long number(const char *name, long fallback) {
  const char *value = text(name);
  return value ? atol(value) : fallback;
}

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void sleep_until_us(int64_t when) {
  struct timespec t = {.tv_sec = when / 1000000, .tv_nsec = when % 1000000 * 1000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {}
}

static void start(void *(*body)(void *)) {
  pthread_t thread;
  int failed = pthread_create(&thread, NULL, body, NULL);
  if (failed) {
    errno = failed;
    fatal("no thread", 0);
  }
}

static uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

static void derive(void) {
  const char *hex = text("sl.secret");
  if (!hex) hex = "00";
  hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < SECRET_MAX && isxdigit(hex[0]) && isxdigit(hex[1]); i++, hex += 2) {
    char byte[3] = {hex[0], hex[1], 0};
    hash = (hash ^ strtoul(byte, NULL, 16)) * 0x100000001b3ull;
  }
  for (int i = 0; i < MARKER_WORDS; i++) marker[i] = splitmix(hash + (uint64_t)i + 1);
}

static uint64_t seed(long page, uint32_t version) {
  uint64_t x = splitmix(hash ^ splitmix((uint64_t)page) ^ splitmix(~(uint64_t)version));
  return x ? x : 1;
}

static uint64_t next(uint64_t x) {
  x ^= x << 13;
  x ^= x >> 7;
  return x ^ (x << 17);
}

static void fill(uint64_t *words, long page, uint32_t version) {
  uint64_t x = seed(page, version);
  for (int i = 0; i < MARKER_WORDS; i++) words[i] = marker[i];
  for (int i = MARKER_WORDS; i < WORDS; i++) words[i] = x = next(x);
}

static int is_right(const uint64_t *words, long page, uint32_t version) {
  uint64_t x = seed(page, version), wrong = 0;
  for (int i = 0; i < MARKER_WORDS; i++) wrong |= words[i] ^ marker[i];
  for (int i = MARKER_WORDS; i < WORDS; i++) {
    x = next(x);
    wrong |= words[i] ^ x;
  }
  return !wrong;
}

/* Keeps to `mbps` in slices of 10 ms; what could not be done in time (the guest was stopped) is not made up for. */
struct pace {
  int64_t due_us;
  long per_slice, left;
};

static struct pace pace_of(long mbps) {
  long per_slice = mbps * 256 / 100;
  return (struct pace){.due_us = now_us(), .per_slice = per_slice > 0 ? per_slice : 1, .left = per_slice};
}

static void keep_pace(struct pace *pace) {
  if (--pace->left > 0) return;
  pace->left = pace->per_slice;
  pace->due_us += 10000;
  int64_t now = now_us();
  if (pace->due_us < now) pace->due_us = now;
  else sleep_until_us(pace->due_us);
}

_Noreturn static void *ticker(void *unused) {
  (void)unused;
  struct sched_param priority = {.sched_priority = 10}; /* so that ticks stay regular on one busy virtual CPU */
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority);
  int64_t period = number("sl.tick", 50) * 1000, due = now_us();
  if (period < 1000) period = 1000;
  for (long n = 1;; n++) {
    int64_t now = now_us();
    say("TICK %ld %lld\n", n, (long long)(now / 1000));
    due += period;
    if (due < now) due = now + period;
    sleep_until_us(due);
  }
}

_Noreturn static void *dirtier(void *unused) {
  (void)unused;
  long hot = number("sl.hot", 0) * 256;
  if (hot <= 0 || hot > pages) hot = pages;
  struct pace pace = pace_of(number("sl.dirty", 0));
  for (long page = 0;; page = (page + 1) % hot) {
    pthread_mutex_lock(&stripes[page % STRIPES]);
    fill(memory + page * WORDS, page, ++versions[page]);
    pthread_mutex_unlock(&stripes[page % STRIPES]);
    keep_pace(&pace);
  }
}

_Noreturn static void *checker(void *unused) {
  (void)unused;
  long bad = 0, rate = number("sl.check", 32);
  struct pace pace = pace_of(rate);
  for (long pass = 1;; pass++) {
    for (long page = 0; page < pages; page++) {
      pthread_mutex_lock(&stripes[page % STRIPES]);
      uint32_t version = versions[page];
      int right = is_right(memory + page * WORDS, page, version);
      pthread_mutex_unlock(&stripes[page % STRIPES]);
      if (!right && ++bad <= 5) say("BAD page=%ld version=%u\n", page, version);
      if (rate > 0) keep_pace(&pace);
    }
    say("CHECK pass=%ld pages=%ld bad=%ld\n", pass, pages, bad);
  }
}

/* Block n lies in slot n % slots: the page (slot, n), but for the first word after the marker, which is n. */
enum { NUMBER = MARKER_WORDS, SLOTS_MAX = 1024, CHUNK = 64 };

static void fill_block(uint64_t *block, long slot, long n) {
  fill(block, slot, (uint32_t)n);
  block[NUMBER] = (uint64_t)n;
}

/* The number of the block in this slot: 0 when none of ours is there, -1 when one of ours is there and not right. */
static long number_of(uint64_t *block, long slot, long slots) {
  if (memcmp(block, marker, sizeof marker)) return 0;
  long n = (long)block[NUMBER];
  uint64_t wanted[WORDS];
  fill_block(wanted, slot, n);
  return n > 0 && n % slots == slot && !memcmp(block, wanted, PAGE) ? n : -1;
}

/* Fills `held`, the number of the block in each slot; answers the highest. A block that is older than the one written
 * last to its slot is bad as well: numbers are given out without a gap. */
static long take_stock(int disk, long slots, long *held) {
  uint64_t *in = aligned_alloc(PAGE, CHUNK * PAGE);
  long last = 0, right = 0, bad = 0;
  if (!in) fatal("no memory", 0);
  for (long slot = 0; slot < slots; slot++) {
    long left = slots - slot < CHUNK ? slots - slot : CHUNK;
    if (slot % CHUNK == 0 && pread(disk, in, (size_t)left * PAGE, (off_t)slot * PAGE) != left * PAGE)
      fatal("cannot read block", slot);
    held[slot] = number_of(in + slot % CHUNK * WORDS, slot, slots);
    if (held[slot] > last) last = held[slot];
  }
  free(in);
  for (long slot = 0; slot < slots; slot++) {
    long wanted = last - (last - slot + slots) % slots;
    if (held[slot] > 0 && held[slot] == wanted) right++;
    else if (held[slot] || wanted > 0) bad++;
    if (held[slot] < 0) held[slot] = 0;
  }
  say("FOUND blocks=%ld bad=%ld last=%ld\n", right, bad, last);
  return last;
}

/* Writes each block durably, reads it back at once, and one older slot as well. */
_Noreturn static void *disk_writer(void *unused) {
  (void)unused;
  int disk = -1;
  for (int i = 0; i < 100 && (disk = open("/dev/vda", O_RDWR | O_DIRECT | O_DSYNC)) < 0; i++) usleep(50000);
  uint64_t size = 0;
  if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) < 0 || size < PAGE) fatal("no disk", disk);
  long slots = size / PAGE < SLOTS_MAX ? (long)(size / PAGE) : SLOTS_MAX;
  long *held = calloc((size_t)slots, sizeof *held);
  uint64_t *out = aligned_alloc(PAGE, PAGE), *in = aligned_alloc(PAGE, PAGE);
  if (!held || !out || !in) fatal("no memory", 0);
  long last = take_stock(disk, slots, held);
  uint64_t random = seed(0, 0);
  int64_t due = now_us();
  for (long n = last + 1;; n++) {
    long slot = n % slots;
    pthread_mutex_lock(&disk_turn);
    fill_block(out, slot, n);
    int right = pwrite(disk, out, PAGE, (off_t)slot * PAGE) == PAGE;
    held[slot] = n;
    right = right && pread(disk, in, PAGE, (off_t)slot * PAGE) == PAGE && !memcmp(in, out, PAGE);
    random = next(random);
    long older = (long)(random % (uint64_t)slots);
    if (held[older])
      right = right && pread(disk, in, PAGE, (off_t)older * PAGE) == PAGE && number_of(in, older, slots) == held[older];
    say("DISK %ld %s\n", n, right ? "ok" : "bad");
    pthread_mutex_unlock(&disk_turn);
    due += 100000;
    int64_t now = now_us();
    if (due < now) due = now;
    else sleep_until_us(due);
  }
}

/* The power button, so that a polite stop works; without its driver only a forced one does. */
static void *power_button(void *device) {
  int button = open(device, O_RDONLY);
  struct input_event event;
  while (button >= 0 && read(button, &event, sizeof event) == sizeof event)
    if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
      say("POWEROFF\n");
      /* For good: the kernel takes the disk away on its way out, and a block under way would be called bad. */
      pthread_mutex_lock(&disk_turn);
      reboot(RB_POWER_OFF);
    }
  return NULL;
}

static void *buttons(void *unused) {
  static char devices[4][24];
  for (int i = 0; i < 4; i++) {
    pthread_t thread;
    snprintf(devices[i], sizeof devices[i], "/dev/input/event%d", i);
    if (!access(devices[i], R_OK)) pthread_create(&thread, NULL, power_button, devices[i]);
  }
  return unused;
}

static long available_mb(void) {
  char line[128];
  long kb = 0;
  FILE *file = fopen("/proc/meminfo", "r");
  while (file && fgets(line, sizeof line, file))
    if (sscanf(line, "MemAvailable: %ld", &kb) == 1) break;
  if (file) fclose(file);
  return kb / 1024;
}

int main(void) {
  struct termios settings;
  if (!tcgetattr(STDOUT_FILENO, &settings)) {
    settings.c_oflag &= ~(tcflag_t)OPOST; /* lines end in \n alone */
    tcsetattr(STDOUT_FILENO, TCSANOW, &settings);
  }
  int file = open("/proc/cmdline", O_RDONLY);
  if (file < 0 || read(file, command_line, sizeof command_line - 1) < 0) fatal("no /proc/cmdline", file);
  close(file);
  derive();
  for (int i = 0; i < STRIPES; i++) pthread_mutex_init(&stripes[i], NULL);

  long megabytes = number("sl.mem", 32), free_mb = available_mb();
  errno = 0;
  if (megabytes < 1 || (free_mb && megabytes + 4 > free_mb)) fatal("sl.mem does not fit; MB available:", free_mb);
  pages = megabytes * 256;
  memory = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  versions = calloc((size_t)pages, sizeof *versions);
  if (memory == MAP_FAILED || !versions) fatal("no memory, MB:", megabytes);
  madvise(memory, (size_t)pages * PAGE, MADV_HUGEPAGE); /* far fewer page faults, which are slow under TCG */
  start(ticker);
  start(buttons);
  for (long page = 0; page < pages; page++) fill(memory + page * WORDS, page, 0);
  say("READY\n");
  if (number("sl.dirty", 0) > 0) start(dirtier);
  if (number("sl.disk", 0)) start(disk_writer);
  checker(NULL);
}
