// Trace mode: the compiler calls us at every memory access. Counts traffic, and finds data races,
// reads of unwritten memory and accesses out of bounds to the byte.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// The latest accesses of a kind to a cell. `among`: 0 one thread's, 1 several lanes' of a simdgroup,
// 2 several simdgroups', 3 several threadgroups', none of which the others' are ordered before.
struct Access {
  u32 serial, epoch, simd_epoch, pc;
  u16 thread;
  u8 among, atomic;
};
struct Cell {
  Access write, read;
};

namespace {

constexpr u64 kLine = 128;
Cell* arena_cells;
Buffer* last_buffer;
Block* last_block;

// Does everything in `a` happen before what the running thread does now?
inline bool ordered(const Access& a, u32 space) {
  if (!a.serial) return true;
  if (a.serial != M.serial || a.among == 3) return false;
  if (a.epoch < M.epoch[space]) return true;
  const Thread& me = M.now->at;
  if (a.among == 0 && a.thread == me.index) return true;
  return a.among <= 1 && a.thread / kLanes == me.simdgroup && a.simd_epoch < M.simdgroups[me.simdgroup].epoch[space];
}

inline void record(Access& a, u32 space, bool atomic, u64 pc) {
  const Thread& me = M.now->at;
  u8 among = 0;
  if (!ordered(a, space)) {
    among = a.serial != M.serial ? 3 : a.thread / kLanes == me.simdgroup ? 1 : 2;
    if (a.among > among) among = a.among;
    atomic = atomic && a.atomic;
  }
  u32 simd_epoch = M.simdgroups[me.simdgroup].epoch[space];
  a = {M.serial, M.epoch[space], simd_epoch, u32(pc - M.module), u16(me.index), among, atomic};
}

[[noreturn]] void race(const Access& a, bool write, bool other_write, u64 pc, const char* where) {
  if (a.serial == M.serial)
    fault(kRace, pc, 0, "data race: %s of %s is not ordered with the %s by thread index %u @P%x@",
          write ? "write" : "read", where, other_write ? "write" : "read", a.thread, a.pc);
  fault(kRace, pc, 0, "data race: %s of %s, and a %s by another threadgroup @P%x@", write ? "write" : "read", where,
        other_write ? "write" : "read", a.pc);
}

inline void check(Cell& c, u32 space, bool write, bool atomic, u64 pc, bool initialised, u64 address) {
  if (space == 1) {  // what an earlier threadgroup left in the arena
    if (c.write.serial != M.serial) c.write = {};
    if (c.read.serial != M.serial) c.read = {};
  }
  bool race_write = !ordered(c.write, space) && !(atomic && c.write.atomic);
  bool race_read = write && !ordered(c.read, space) && !(atomic && c.read.atomic);
  if (race_write || race_read || (!write && !c.write.serial && !initialised)) {
    char where[250];
    if (space == 0) {
      describe_device((u8*)address, where, sizeof where);
    } else {
      snprintf(where, sizeof where, "byte %lld of a threadgroup variable of %u bytes",
               (long long)(address - u64(M.arena) - last_block->offset), last_block->size);
    }
    if (race_write) race(c.write, write, true, pc, where);
    if (race_read) race(c.read, write, false, pc, where);
    if (!M.pending.kind) {  // a write in the same epoch would make it a race
      Fault& f = M.pending;
      f.kind = kUnwritten;
      f.pc = pc - M.module;
      f.site = M.now->op == kFragment ? M.now->site : 0;
      memcpy(f.position, &M.now->at.in_group, sizeof f.position);
      memcpy(f.group, &M.now->at.group, sizeof f.group);
      snprintf(f.text, sizeof f.text, "read of unwritten memory: %s", where);
    }
  }
  if (!write) return record(c.read, space, atomic, pc);
  record(c.write, space, atomic, pc);
  if (ordered(c.read, space)) c.read = {};
}

// Counts a line once for a simdgroup until its lanes meet again.
void count_line(Simdgroup& g, u64 key, u64& counter) {
  if (g.recent == key) return;
  g.recent = key;
  if (2 * g.used >= g.capacity) {
    Line* old = g.lines;
    u32 n = g.capacity;
    g.capacity = n ? 4 * n : 1024;
    g.lines = (Line*)calloc(g.capacity, sizeof *g.lines);
    for (u32 i = 0; i < n; i++) {
      if (old[i].generation != g.generation) continue;
      u64 at = old[i].key * 0x9e3779b97f4a7c15ull >> 20;
      while (g.lines[at % g.capacity].generation == g.generation) at++;
      g.lines[at % g.capacity] = old[i];
    }
    free(old);
  }
  u64 at = key * 0x9e3779b97f4a7c15ull >> 20;
  for (;; at++) {
    Line& line = g.lines[at % g.capacity];
    if (line.generation != g.generation) {
      line = {key, g.generation};
      g.used++;
      counter++;
      return;
    }
    if (line.key == key) return;
  }
}

void access_device(u8* a, u32 size, bool write, bool atomic, u64 pc) {
  Buffer* b = last_buffer;
  if (!b || a < b->base || a + size > b->base + b->size) {
    b = nullptr;
    for (u32 i = 0; i < M.launch->n_buffers && !b; i++) {
      Buffer& x = M.launch->buffers[i];
      if (a >= x.base && a + size <= x.base + x.size) b = &x;
    }
    if (!b) {
      char where[250];
      fault(kOutOfBounds, pc, 0, "out-of-bounds %s of %u bytes at %s", write ? "write" : "read", size,
            describe_device(a, where, sizeof where));
    }
    last_buffer = b;
  }
  if (write && !b->writable) {
    char where[250];
    fault(kInputWrite, pc, 0, "write to an input: %s", describe_device(a, where, sizeof where));
  }
  (write ? b->bytes_written : b->bytes_read) += size;
  u64& counter = write ? b->lines_written : b->lines_read;
  Simdgroup& g = M.simdgroups[M.now->at.simdgroup];
  u64 offset = u64(a - b->base), first = offset / kLine, last = (offset + size - 1) / kLine;
  u64 tag = u64(b - M.launch->buffers) << 1 | write;
  count_line(g, first << 8 | tag, counter);
  if (last != first) count_line(g, last << 8 | tag, counter);
  if (!b->shadow) return;
  for (u64 i = offset / b->granule; i <= (offset + size - 1) / b->granule; i++)
    check(b->shadow[i], 0, write, atomic, pc, b->initialised, u64(b->base) + i * b->granule);
}

void access_arena(u8* a, u32 size, bool write, bool atomic, u64 pc) {
  u64 offset = u64(a - M.arena);
  Block* b = last_block;
  if (!b || offset < b->offset || offset + size > b->offset + b->size) {
    b = nullptr;
    for (Block& x : M.blocks)
      if (x.size && offset >= x.offset && offset + size <= x.offset + x.size) b = &x;
    if (!b)
      fault(kOutOfBounds, pc, 0, "out-of-bounds %s of %u bytes outside of every threadgroup variable",
            write ? "write" : "read", size);
    last_block = b;
  }
  (write ? M.launch->threadgroup_bytes_written : M.launch->threadgroup_bytes_read) += size;
  for (u32 i = 0; i < size; i++) check(arena_cells[offset + i], 1, write, atomic, pc, false, u64(a) + i);
}

u64 shadow_size(const Buffer& b) { return (b.size / b.granule + 1) * sizeof(Cell); }

}  // namespace

void trace_access(u64 address, u32 size, bool write, bool atomic, u64 pc) {
  u8* a = (u8*)address;
  if (a >= M.device && a < M.device_end) return access_device(a, size, write, atomic, pc);
  if (a >= M.arena - kPage && a < M.arena_end + kPage) return access_arena(a, size, write, atomic, pc);
}

void trace_sync(Simdgroup& g) {
  g.generation++;
  g.used = 0;
  g.recent = ~0ull;
}

void trace_begin() {
  if (!arena_cells) arena_cells = (Cell*)calloc(2 * kPage, sizeof(Cell));
  last_buffer = nullptr;
  last_block = nullptr;
  for (u32 i = 0; i < M.launch->n_buffers; i++) {
    Buffer& b = M.launch->buffers[i];
    if (b.writable)
      b.shadow = (Cell*)mmap(nullptr, shadow_size(b), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
}

void trace_end() {
  for (u32 i = 0; i < M.launch->n_buffers; i++) {
    Buffer& b = M.launch->buffers[i];
    if (!b.shadow) continue;
    for (u64 k = 0; k < b.size / b.granule && !b.initialised; k++)
      if (!b.shadow[k].write.serial) b.bytes_unwritten += b.granule;
    munmap(b.shadow, shadow_size(b));
    b.shadow = nullptr;
  }
}

extern "C" {

#define PC u64(__builtin_return_address(0))
#define CALLBACKS(n)                                                                       \
  void __tsan_read##n(u64 a) { trace_access(a, n, false, false, PC); }                     \
  void __tsan_write##n(u64 a) { trace_access(a, n, true, false, PC); }                     \
  void __tsan_unaligned_read##n(u64 a) { trace_access(a, n, false, false, PC); }           \
  void __tsan_unaligned_write##n(u64 a) { trace_access(a, n, true, false, PC); }
CALLBACKS(1) CALLBACKS(2) CALLBACKS(4) CALLBACKS(8) CALLBACKS(16)
void __tsan_read_range(u64 a, u64 n) { trace_access(a, u32(n), false, false, PC); }
void __tsan_write_range(u64 a, u64 n) { trace_access(a, u32(n), true, false, PC); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n) trace_access(u64(from), u32(n), false, false, PC), trace_access(u64(to), u32(n), true, false, PC);
  return memmove(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) { return __tsan_memcpy(to, from, n); }
void* __tsan_memset(void* to, int value, size_t n) {
  if (n) trace_access(u64(to), u32(n), true, false, PC);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
