// Runs a grid: threads are fibers of one OS thread, which change only at barriers and simd
// operations; faults end the launch and are described in Launch::fault.
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

Machine M;

namespace {

void *main_sp, *dead_sp;
void* arguments[64];
u32 queue[kMaxThreads], queued, queue_head, alive, at_barrier;
u64 random_state, threadgroup_used;

}  // namespace

// ---- switching between fibers -------------------------------------------------------------------

extern "C" void mh_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.globl mh_switch\nmh_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
constexpr u32 kSaved = 8, kReturn = 6;  // words of a frame, and which of them is the return address
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n.globl mh_switch\nmh_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
constexpr u32 kSaved = 20, kReturn = 11;
#else
#error "hosts: x86-64 and arm64"
#endif

[[noreturn]] static void leave() {
  mh_switch(&dead_sp, main_sp);
  __builtin_unreachable();
}

void fault(Kind kind, u64 pc, u32 site, const char* format, ...) {
  Fault& f = M.launch->fault;
  if (M.pending.kind && kind != kRace) {  // an unwritten value was read before, and came to this
    f = M.pending;
    leave();
  }
  f.kind = kind;
  // The loads and stores of simdgroup matrices follow a call that knows their line.
  f.site = site || M.now->op != kFragment ? site : M.now->site;
  f.pc = pc ? pc - M.module : 0;
  memcpy(f.position, &M.now->at.in_group, sizeof f.position);
  memcpy(f.group, &M.now->at.group, sizeof f.group);
  va_list list;
  va_start(list, format);
  vsnprintf(f.text, sizeof f.text, format, list);
  va_end(list);
  leave();
}

namespace {

// Nobody can run, yet not all threads have returned: they wait at different places.
[[noreturn]] void deadlock() {
  Fiber *waiting = nullptr, *other = nullptr;
  for (u32 i = 0; i < M.threads && !waiting; i++)
    if (M.fibers[i].wait == kAtSimd) waiting = &M.fibers[i];
  for (u32 i = 0; i < M.threads && !waiting; i++)
    if (M.fibers[i].wait == kAtBarrier) waiting = &M.fibers[i];
  bool simd = waiting->wait == kAtSimd;
  u32 first = simd ? M.simdgroups[waiting->at.simdgroup].first : 0;
  u32 count = simd ? M.simdgroups[waiting->at.simdgroup].lanes : M.threads, there = 0;
  for (u32 i = first; i < first + count; i++) {
    Fiber& f = M.fibers[i];
    if (f.wait == waiting->wait && f.site == waiting->site && f.op == waiting->op) there++;
    else if (!other) other = &f;
  }
  M.now = waiting;
  const char* name = simd ? kOperations[waiting->op] : "threadgroup_barrier";
  Position3 p = other->at.in_group;
  if (other->wait == kDone)
    fault(kDivergence, 0, waiting->site, "%s is reached by %u of %u threads: thread (%u, %u, %u) has returned",
          name, there, count, p.x, p.y, p.z);
  fault(kDivergence, 0, waiting->site, "%s is reached by %u of %u threads: thread (%u, %u, %u) waits in %s @L%u@",
        name, there, count, p.x, p.y, p.z,
        other->wait == kAtSimd ? kOperations[other->op] : "threadgroup_barrier", other->site >> 8);
}

u32 random_below(u32 n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32((random_state >> 33) % n);
}

void enqueue(u32 fiber) {
  M.fibers[fiber].wait = kRunnable;
  queue[(queue_head + queued++) % kMaxThreads] = fiber;
}

Fiber* next_fiber() {
  if (!queued) deadlock();
  if (M.launch->seed) {
    u32& chosen = queue[(queue_head + random_below(queued)) % kMaxThreads];
    u32 head = queue[queue_head];
    queue[queue_head] = chosen;
    chosen = head;
  }
  Fiber* f = &M.fibers[queue[queue_head]];
  queue_head = (queue_head + 1) % kMaxThreads;
  queued--;
  return f;
}

void run_another() {
  Fiber* me = M.now;
  Fiber* f = next_fiber();
  if (f == me) return;
  M.now = f;
  mh_switch(&me->sp, f->sp);
}

void fiber_main() {
  M.launch->entry(arguments, &M.now->at);
  Fiber* me = M.now;
  me->wait = kDone;
  if (M.launch->trace) trace_sync(M.simdgroups[me->at.simdgroup]);
  if (--alive == 0) leave();
  M.now = next_fiber();
  mh_switch(&me->sp, M.now->sp);
}

// All of the threads that meet are there: wakes them. With a seed, any may go first.
void release(u32 first, u32 count) {
  u32 me = M.now->at.index;
  for (u32 i = first; i < first + count; i++)
    if (i != me) enqueue(i);
  M.now->wait = kRunnable;
  if (M.launch->seed) {
    enqueue(me);
    run_another();
  }
}

void same_site(u32 first, u32 count, const char* name) {
  Fiber& a = M.fibers[first];
  for (u32 i = first + 1; i < first + count; i++) {
    Fiber& b = M.fibers[i];
    if (b.site == a.site && b.op == a.op && b.type == a.type) continue;
    M.now = &b;
    Position3 p = a.at.in_group;
    fault(kDivergence, 0, b.site, "%s diverges: thread (%u, %u, %u) is at another one @L%u@", name, p.x, p.y, p.z,
          a.site >> 8);
  }
}

u64 meet(u32 op, u32 type, u64 value, u32 arg, u64 fill, u32 site) {
  Fiber* me = M.now;
  Simdgroup& g = M.simdgroups[me->at.simdgroup];
  me->wait = kAtSimd;
  me->op = op; me->type = type; me->value = value; me->arg = arg; me->fill = fill; me->site = site;
  if (++g.arrived < g.lanes) {
    run_another();
    return me->result;
  }
  same_site(g.first, g.lanes, kOperations[op]);
  evaluate(g);
  g.arrived = 0;
  if (op == kSimdBarrier) {
    M.launch->simd_barriers++;
    for (u32 i = 0; i < 2; i++) g.epoch[i] += arg >> i & 1;
  } else {
    M.launch->simd_operations++;
  }
  if (M.launch->trace) trace_sync(g);
  release(g.first, g.lanes);
  return me->result;
}

}  // namespace

// ---- what kernels call ------------------------------------------------------------------------------

extern "C" {

u64 mh_simd(int op, int type, u64 bits, u32 arg, u64 fill, u32 site) {
  return meet(op, type, bits, arg, fill, site);
}

void mh_multiply(const int* types, const u64* fragments, u32 site) {
  meet(kMultiply, 0, u64(fragments), 0, u64(types), site);
}

void mh_barrier(u32 flags, bool simd, u32 site) {
  if (simd) {
    meet(kSimdBarrier, 0, 0, flags, 0, site);
    return;
  }
  M.now->wait = kAtBarrier;
  M.now->site = site;
  M.now->op = M.now->type = 0;
  if (++at_barrier < M.threads) return run_another();
  same_site(0, M.threads, "threadgroup_barrier");
  at_barrier = 0;
  if (M.pending.kind) fault(kUnwritten, 0, 0, "");
  M.launch->barriers++;
  for (u32 i = 0; i < 2; i++) M.epoch[i] += flags >> i & 1;
  if (M.launch->trace)
    for (u32 i = 0; i < M.threads; i += kLanes) trace_sync(M.simdgroups[i / kLanes]);
  release(0, M.threads);
}

u64 mh_threadgroup_memory(int id, u64 size, u64 align, u32 site) {
  Block& b = M.blocks[id];
  if (!b.size) {
    u32 start = (M.arena_used + align - 1) / align * align;
    // The limit counts variables, the arena also the red zones between them.
    threadgroup_used = (threadgroup_used + align - 1) / align * align + size;
    if (threadgroup_used > kMaxArena)
      fault(kThreadgroupMemory, 0, site,
            "%llu bytes of threadgroup memory, the limit is %u", (unsigned long long)threadgroup_used, kMaxArena);
    if (threadgroup_used > M.launch->threadgroup_memory) M.launch->threadgroup_memory = threadgroup_used;
    b.offset = start;
    b.size = u32(size);
    M.arena_used = start + u32(size) + kRedZone;
    memset(M.arena + start, 0xff, size + kRedZone);
  }
  return u64(M.arena + b.offset);
}

}  // extern "C"


// ---- a launch -----------------------------------------------------------------------------------------

namespace {

Position3 position(u32 index, const u32* size) {
  return {index % size[0], index / size[0] % size[1], index / size[0] / size[1], 0};
}

void prepare(u32 index, const Thread& common, const u32* size, Position3 origin) {
  Fiber& f = M.fibers[index];
  f.op = f.site = 0;
  Thread& t = f.at;
  t = common;
  t.in_group = position(index, size);
  t.in_grid = {origin.x + t.in_group.x, origin.y + t.in_group.y, origin.z + t.in_group.z, 0};
  t.index = index;
  t.lane = index % kLanes;
  t.simdgroup = index / kLanes;
  t.quadgroup = index / 4;
  t.quad_lane = index % 4;
  // Stacks start at different cache sets, or 1024 of them would share a few.
  u64* frame = (u64*)(M.stacks + (index + 1) * kStackSize - index % 64 * 192 - 64) - kSaved;
  memset(frame, 0, kSaved * sizeof *frame);
  frame[kReturn] = u64(&fiber_main);
  f.sp = frame;
}

void run_group(u32 index, const u32* groups) {
  const Launch& l = *M.launch;
  Position3 g = position(index, groups);
  Position3 origin = {g.x * l.group[0], g.y * l.group[1], g.z * l.group[2], 0};
  u32 begin[3] = {origin.x, origin.y, origin.z}, size[3];
  for (u32 i = 0; i < 3; i++) size[i] = l.grid[i] - begin[i] < l.group[i] ? l.grid[i] - begin[i] : l.group[i];
  u32 n = size[0] * size[1] * size[2];
  Thread common = {};
  common.group = g;
  common.group_size = {size[0], size[1], size[2], 0};
  common.full_group_size = {l.group[0], l.group[1], l.group[2], 0};
  common.groups = {groups[0], groups[1], groups[2], 0};
  common.grid = common.grid_size = {l.grid[0], l.grid[1], l.grid[2], 0};
  common.simdgroups = (n + kLanes - 1) / kLanes;
  common.full_simdgroups = (l.group[0] * l.group[1] * l.group[2] + kLanes - 1) / kLanes;
  common.width = kLanes;
  M.threads = alive = n;
  M.serial++;
  M.epoch[0] = M.epoch[1] = M.arena_used = at_barrier = queued = queue_head = 0;
  threadgroup_used = 0;
  memset(M.blocks, 0, sizeof M.blocks);
  for (u32 i = 0; i < n; i += kLanes) {
    Simdgroup& s = M.simdgroups[i / kLanes];
    s.first = i;
    s.lanes = n - i < kLanes ? n - i : kLanes;
    s.arrived = s.epoch[0] = s.epoch[1] = 0;
    if (l.trace) trace_sync(s);
  }
  for (u32 i = 0; i < n; i++) {
    prepare(i, common, size, origin);
    enqueue(i);
  }
  M.now = next_fiber();
  mh_switch(&main_sp, M.now->sp);
}

// A write between the variables of threadgroup memory; trace mode says who did it.
void check_red_zones() {
  for (const Block& b : M.blocks)
    for (u32 i = 0; b.size && i < kRedZone; i++)
      if (M.arena[b.offset + b.size + i] != 0xff && !M.launch->fault.kind) {
        Fault& f = M.launch->fault;
        f.kind = kOutOfBounds;
        memcpy(f.group, &M.now->at.group, sizeof f.group);
        f.position[0] = ~0u;
        snprintf(f.text, sizeof f.text, "out-of-bounds write after a threadgroup variable of %u bytes", b.size);
      }
}

}  // namespace

extern "C" int mh_run(Launch* launch) {
  M.launch = launch;
  M.pending.kind = 0;
  for (u32 i = 0; i < launch->n_buffers; i++) arguments[i] = launch->buffers[i].base;
  u32 groups[3];
  for (u32 i = 0; i < 3; i++) groups[i] = (launch->grid[i] + launch->group[i] - 1) / launch->group[i];
  u32 total = groups[0] * groups[1] * groups[2];
  launch->threadgroups = total;
  u32* order = (u32*)malloc(total * sizeof *order);
  random_state = launch->seed * 0x9e3779b97f4a7c15ull | 1;
  for (u32 i = 0; i < total; i++) {
    u32 j = launch->seed ? random_below(i + 1) : i;
    order[i] = order[j];
    order[j] = i;
  }
  catch_faults(true);
  if (launch->trace) trace_begin();
  for (u32 i = 0; i < total && !launch->fault.kind; i++) {
    run_group(order[i], groups);
    if (M.pending.kind && !launch->fault.kind) launch->fault = M.pending;
    check_red_zones();
  }
  if (launch->trace) trace_end();
  catch_faults(false);
  if (!launch->fault.kind) check_margins();
  free(order);
  return int(launch->fault.kind);
}
