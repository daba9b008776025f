// State shared by the scheduler (runtime.cpp) and the tracer (trace.cpp). The structures up to
// Launch are mirrored by launch.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

constexpr u32 kLanes = 32, kMaxThreads = 1024, kMaxArena = 32768, kMaxBlocks = 64, kRedZone = 64;
constexpr size_t kPage = 65536;  // a multiple of every host's page
constexpr size_t kStackSize = 2 * kPage;  // half of it a guard

struct Cell;

struct Buffer {
  const char* name;
  u8* base;
  u64 size;
  u32 granule;   // bytes that one shadow cell stands for
  u32 writable, initialised, unused;
  Cell* shadow;  // trace mode, outputs only
  u64 bytes_read, bytes_written, lines_read, lines_written, bytes_unwritten;
};

struct Fault {
  u32 kind;  // 0: none
  u32 site;  // line << 8 | column of a synchronising call, or 0
  u64 pc;    // offset in the kernel's library, or 0
  u32 position[3], group[3];
  char text[400];
};

struct Launch {
  void (*entry)(void* const* buffers, const void* position);
  u32 grid[3], group[3];
  u64 seed;
  double time_limit;  // seconds of processor time
  u32 trace, n_buffers;
  Buffer* buffers;
  Fault fault;
  u64 threadgroups, barriers, simd_barriers, simd_operations, atomics;
  u64 threadgroup_memory, threadgroup_bytes_read, threadgroup_bytes_written;
};

struct Position3 { u32 x, y, z, unused; };
struct Thread {  // the layout of mh_thread in msl_threads.h
  Position3 in_grid, in_group, group, group_size, full_group_size, groups, grid, grid_size;
  u32 index, lane, simdgroup, simdgroups, width, full_simdgroups, quadgroup, quad_lane;
};

enum Wait : u8 { kRunnable, kAtBarrier, kAtSimd, kDone };

struct Fiber {
  void* sp;
  Wait wait;
  u32 site, op, type, arg;
  u64 value, fill, result, pc;
  Thread at;
};

struct Line {
  u64 key;
  u32 generation;
};
struct Simdgroup {
  u32 first, lanes, arrived;
  u32 epoch[2];  // of device and threadgroup memory: barriers passed
  Line* lines;
  u32 capacity, used, generation;
  u64 recent;
};

struct Block { u32 offset, size; };  // a threadgroup variable in the arena

struct Machine {
  Launch* launch;
  Fiber* now;
  u32 threads, epoch[2];
  u32 serial;                   // of the threadgroup: distinct in all launches
  Fault pending;                // a read of unwritten memory, until it is clear that nobody was about to write
  Fiber fibers[kMaxThreads];
  Simdgroup simdgroups[kMaxThreads / kLanes];
  Block blocks[kMaxBlocks];
  u32 arena_used;
  u8 *arena, *arena_end;        // between guard pages
  u8 *stacks, *stacks_end;
  u8 *device, *device_end;      // all buffers, each between guard regions
  u64 module;                   // load address of the kernel's library
  u64 code, code_end;           // its instructions
};
extern Machine M;

enum Kind : u32 {
  kOutOfBounds = 1, kInputWrite, kUnwritten, kRace, kDivergence, kThreadgroupMemory,
  kStackOverflow, kArithmetic, kMisuse, kTime,
};
[[noreturn]] void fault(Kind kind, u64 pc, u32 site, const char* format, ...) __attribute__((format(printf, 4, 5)));
const char* describe_device(const u8* address, char* out, size_t n);
void catch_faults(bool on);
void check_margins();
extern u64 caller;  // who called the runtime, while that touches a kernel's memory

enum { kFragment = 25, kMultiply = 26, kSimdBarrier = 27 };
extern const char* const kOperations[];
void evaluate(Simdgroup& group);  // the simd operation that all lanes have reached

void trace_begin();
void trace_end();
void trace_sync(Simdgroup& group);  // lanes of a simdgroup have met
void trace_access(u64 address, u32 size, bool write, bool atomic, u64 pc);
