// Memory of buffers between guard pages, and the faults that end a launch.
#include "runtime.h"

#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

u64 caller;

namespace {

constexpr u64 kMargin = 4096;
u64 guard_size;
u8* device_next;
pthread_t owner;
volatile bool running;
struct sigaction old_segv, old_bus, old_fpe, old_timer;
timer_t timer;
stack_t old_stack;
u8 signal_stack[65536], fault_stack[65536];

u64 pages(u64 size) { return (size + kPage - 1) / kPage * kPage; }

}  // namespace

const char* describe_device(const u8* address, char* out, size_t n) {
  const Buffer* best = nullptr;
  u64 distance = ~0ull;
  for (u32 i = 0; i < M.launch->n_buffers; i++) {
    const Buffer& b = M.launch->buffers[i];
    u64 d = address < b.base ? u64(b.base - address) : address >= b.base + b.size ? u64(address - b.base - b.size) : 0;
    if (d <= distance) best = &b, distance = d;
  }
  snprintf(out, n, "byte %lld of '%s', which has %llu", (long long)(address - best->base), best->name,
           (unsigned long long)best->size);
  return out;
}

namespace {

u64 pending_pc, pending_address;  // pc: after the instruction, like a return address
int pending_signal, pending_write;

void on_fault_stack() {
  char where[200];
  u8* a = (u8*)pending_address;
  u64 pc = caller ? caller : pending_pc;
  if (pending_signal == SIGFPE) fault(kArithmetic, pc, 0, "integer division by zero");
  if (pending_signal == SIGRTMIN + 5) fault(kTime, pc, 0, "still running after %g s", M.launch->time_limit);
  if (a >= M.stacks && a < M.stacks_end)
    fault(kStackOverflow, pc, 0, "more than %zu KiB of private memory", (kStackSize - kPage) / 1024);
  const char* access = pending_write > 0 ? "write" : pending_write == 0 ? "read" : "access";
  if (a >= M.arena - kPage && a < M.arena_end + kPage)
    fault(kOutOfBounds, pc, 0, "out-of-bounds %s at byte %lld of threadgroup memory", access, (long long)(a - M.arena));
  if (a >= M.device && a < M.device_end) {
    describe_device(a, where, sizeof where);
    for (u32 i = 0; i < M.launch->n_buffers; i++) {
      Buffer& b = M.launch->buffers[i];
      if (a >= b.base && a < b.base + b.size) fault(kInputWrite, pc, 0, "write to an input: %s", where);
    }
    fault(kOutOfBounds, pc, 0, "out-of-bounds %s at %s", access, where);
  }
  fault(kOutOfBounds, pc, 0, "out-of-bounds %s at address %p", access, (void*)a);
}

void on_signal(int number, siginfo_t* info, void* context) {
  bool mine = running && pthread_equal(pthread_self(), owner);
  ucontext_t* c = (ucontext_t*)context;
#if defined(__x86_64__) && defined(__linux__)
  u64 pc = u64(c->uc_mcontext.gregs[16]);                       // REG_RIP
  int write = int(c->uc_mcontext.gregs[19] >> 1 & 1);           // REG_ERR
#elif defined(__aarch64__) && defined(__linux__)
  u64 pc = c->uc_mcontext.pc;
  int write = -1;  // unknown
#else
#error "operating systems: Linux"
#endif
  if (number == SIGRTMIN + 5) {
    if (running && !mine) pthread_kill(owner, number);
    // Only the kernel's own code can be left at any instruction; otherwise the next tick tries again.
    if (!mine || pc < M.code || pc >= M.code_end) return;
  } else if (!mine) {  // somebody else's: as if we were not here
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaction(SIGFPE, &old_fpe, nullptr);
    return;
  }
  running = false;
  pending_signal = number;
  pending_address = u64(info->si_addr);
  pending_pc = pc + 1;
  pending_write = write;
  // Returning from the handler into on_fault_stack leaves the signal state clean.
  u64 top = (u64(fault_stack) + sizeof fault_stack) & ~63ull;
#if defined(__x86_64__)
  c->uc_mcontext.gregs[15] = (long long)(top - 8);  // REG_RSP
  c->uc_mcontext.gregs[16] = (long long)&on_fault_stack;
#else
  c->uc_mcontext.sp = top;
  c->uc_mcontext.pc = u64(&on_fault_stack);
#endif
}

}  // namespace

void catch_faults(bool on) {
  if (!on) {
    running = false;
    timer_delete(timer);
    sigaction(SIGRTMIN + 5, &old_timer, nullptr);
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaction(SIGFPE, &old_fpe, nullptr);
    sigaltstack(&old_stack, nullptr);
    return;
  }
  Dl_info info;
  dladdr((void*)M.launch->entry, &info);
  M.module = u64(info.dli_fbase);
  const Elf64_Ehdr* elf = (const Elf64_Ehdr*)M.module;
  const Elf64_Phdr* segments = (const Elf64_Phdr*)(M.module + elf->e_phoff);
  for (u32 i = 0; i < elf->e_phnum; i++)
    if (segments[i].p_type == PT_LOAD && segments[i].p_flags & PF_X) {
      M.code = M.module + segments[i].p_vaddr;
      M.code_end = M.code + segments[i].p_memsz;
    }
  owner = pthread_self();
  caller = 0;
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  sigaction(SIGFPE, &action, &old_fpe);
  sigaction(SIGRTMIN + 5, &action, &old_timer);
  running = true;
  struct sigevent event = {};
  event.sigev_notify = SIGEV_SIGNAL;
  event.sigev_signo = SIGRTMIN + 5;
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
  double limit = M.launch->time_limit;
  struct itimerspec ticks = {{0, 10000000}, {time_t(limit), long((limit - double(time_t(limit))) * 1e9)}};
  timer_settime(timer, 0, &ticks, nullptr);
}

// A write shortly before an output; trace mode says who did it.
void check_margins() {
  for (u32 i = 0; i < M.launch->n_buffers; i++) {
    const Buffer& b = M.launch->buffers[i];
    u64 slack = pages(b.size + 1) - b.size, margin = slack < kMargin ? slack : kMargin;
    for (u64 k = 1; b.writable && k <= margin; k++)
      if (b.base[-(long long)k] != 0xff) {
        Fault& f = M.launch->fault;
        f.kind = kOutOfBounds;
        f.position[0] = f.group[0] = ~0u;
        snprintf(f.text, sizeof f.text, "out-of-bounds write at byte -%llu of '%s'", (unsigned long long)k, b.name);
        return;
      }
  }
}

namespace {

u8* reserve(size_t size) {
  void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (u8*)p;
}

}  // namespace

extern "C" {

// __bf16 conversions that clang calls on hosts without them in hardware: to nearest even.
__bf16 __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  u16 top = x != x ? u16(bits >> 16 | 0x40) : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, top);
}

// Array subscripts that the compiler knows the bound of, and divisions (-fsanitize=...).
struct Location { const char* file; u32 line, column; };
void __ubsan_handle_out_of_bounds_abort(Location* where, u64 index) {
  fault(kOutOfBounds, 0, where->line << 8 | 1, "array index %lld is out of bounds", (long long)index);
}
void __ubsan_handle_divrem_overflow_abort(Location* where, u64, u64) {
  fault(kArithmetic, 0, where->line << 8 | 1, "integer division by zero");
}

int mh_init() {
  if (M.device) return 0;
  for (u64 size = 1ull << 39; size >= 1ull << 33 && !M.device; size >>= 3) {
    M.device = reserve(size);
    M.device_end = M.device + size;
    guard_size = size >> 9;
  }
  u8* arena = reserve(3 * 2 * kPage);
  M.stacks = reserve(kStackSize * kMaxThreads);
  if (!M.device || !arena || !M.stacks) return 1;
  M.stacks_end = M.stacks + kStackSize * kMaxThreads;
  M.arena = arena + 2 * kPage;
  M.arena_end = M.arena + 2 * kPage;
  mprotect(M.arena, 2 * kPage, PROT_READ | PROT_WRITE);
  for (u32 i = 0; i < kMaxThreads; i++)
    mprotect(M.stacks + i * kStackSize + kPage, kStackSize - kPage, PROT_READ | PROT_WRITE);
  device_next = M.device;
  return 0;
}

// A buffer that ends at a guard region; what is just before it is poison as well.
u8* mh_map(u64 size) {
  u64 room = pages(size + 1);
  u8* start = device_next + guard_size;
  if (start + room + guard_size > M.device_end || mprotect(start, room, PROT_READ | PROT_WRITE)) return nullptr;
  device_next = start + room;
  u64 slack = room - size, margin = slack < kMargin ? slack : kMargin;
  memset(start + slack - margin, 0xff, margin);
  return start + slack;
}

void mh_protect(u8* base, u64 size) {
  u64 room = pages(size + 1);
  mprotect(base + size - room, room, PROT_READ);
}

void mh_unmap_all() {
  if (device_next > M.device)
    mmap(M.device, u64(device_next - M.device), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  device_next = M.device;
}

}  // extern "C"
