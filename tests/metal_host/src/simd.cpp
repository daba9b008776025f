// What lanes and threads compute together: simd operations, simdgroup matrices, atomics.
#include "runtime.h"

#include <string.h>

const char* const kOperations[] = {
    "simd_sum", "simd_product", "simd_min", "simd_max", "simd_and", "simd_or", "simd_xor",
    "simd_prefix_inclusive_sum", "simd_prefix_exclusive_sum", "simd_prefix_inclusive_product",
    "simd_prefix_exclusive_product", "simd_broadcast_first", "simd_shuffle", "simd_shuffle_xor",
    "simd_shuffle_down", "simd_shuffle_up", "simd_broadcast", "simd_shuffle_rotate_down",
    "simd_shuffle_rotate_up", "simd_shuffle_and_fill_down", "simd_shuffle_and_fill_up", "simd_ballot",
    "simd_any", "simd_all", "simd_is_first", "a simdgroup_matrix operation",
    "simdgroup_multiply", "simdgroup_barrier"};

namespace {

template <typename T> T unpack(u64 x) {
  T out;
  memcpy(&out, &x, sizeof out);
  return out;
}
template <typename T> u64 pack(T x) {
  u64 out = 0;
  memcpy(&out, &x, sizeof x);
  return out;
}
template <typename T> T combine(u32 op, T a, T b) {
  switch (op) {
    case 0: case 7: case 8: return T(a + b);
    case 1: case 9: case 10: return T(a * b);
    case 2: return b != b || a < b ? a : b;  // a NaN loses
    case 3: return b != b || a > b ? a : b;
  }
  u64 x = pack(a), y = pack(b);
  return unpack<T>(op == 4 ? x & y : op == 5 ? x | y : x ^ y);
}

template <typename T> void reduce(Fiber* lanes, u32 n, u32 op) {
  T v[kLanes];
  for (u32 i = 0; i < n; i++) v[i] = unpack<T>(lanes[i].value);
  if (op <= 6) {
    for (u32 step = kLanes / 2; step; step /= 2)
      for (u32 i = 0; i < step && i + step < n; i++) v[i] = combine(op, v[i], v[i + step]);
    for (u32 i = 0; i < n; i++) lanes[i].result = pack(v[0]);
    return;
  }
  bool exclusive = op == 8 || op == 10;
  T total = op >= 9 ? T(1) : T(0);
  for (u32 i = 0; i < n; i++) {
    T with = combine(op, total, v[i]);
    lanes[i].result = pack(exclusive ? total : with);
    total = with;
  }
}

void reduce_any(Fiber* lanes, u32 n, u32 op, u32 type) {
  switch (type) {
    case 0: return reduce<float>(lanes, n, op);
    case 1: return reduce<_Float16>(lanes, n, op);
    case 2: return reduce<__bf16>(lanes, n, op);
    case 3: return reduce<int8_t>(lanes, n, op);
    case 4: return reduce<u8>(lanes, n, op);
    case 5: return reduce<int16_t>(lanes, n, op);
    case 6: return reduce<u16>(lanes, n, op);
    case 7: return reduce<int32_t>(lanes, n, op);
    case 8: return reduce<u32>(lanes, n, op);
    case 9: return reduce<int64_t>(lanes, n, op);
    default: return reduce<u64>(lanes, n, op);
  }
}

float to_float(u64 address, u32 i, int type) {
  if (type == 0) return ((const float*)address)[i];
  return type == 1 ? float(((const _Float16*)address)[i]) : float(((const __bf16*)address)[i]);
}

// d = a * b + c over the lanes' fragments; products and sums in float, rounded once at the end.
void multiply(Fiber* lanes) {
  const int* types = (const int*)lanes[0].fill;
  float a[64], b[64], c[64] = {};
  for (u32 i = 0; i < 64; i++) {
    const u64* f = (const u64*)lanes[i / 2].value;
    a[i] = to_float(f[1], i % 2, types[1]);
    b[i] = to_float(f[2], i % 2, types[2]);
    if (types[3] >= 0) c[i] = to_float(f[3], i % 2, types[3]);
  }
  for (u32 i = 0; i < 8; i++)
    for (u32 k = 0; k < 8; k++)
      for (u32 j = 0; j < 8; j++) c[i * 8 + j] += a[i * 8 + k] * b[k * 8 + j];
  for (u32 i = 0; i < 64; i++) {
    u64 d = ((const u64*)lanes[i / 2].value)[0];
    if (types[0] == 0) ((float*)d)[i % 2] = c[i];
    else if (types[0] == 1) ((_Float16*)d)[i % 2] = _Float16(c[i]);
    else ((__bf16*)d)[i % 2] = __bf16(c[i]);
  }
}

}  // namespace

void evaluate(Simdgroup& g) {
  Fiber* lanes = &M.fibers[g.first];
  u32 n = g.lanes, op = lanes[0].op;
  if (op <= 10) return reduce_any(lanes, n, op, lanes[0].type);
  if (op == kMultiply || op == kFragment) {
    if (n < kLanes)
      fault(kDivergence, 0, lanes[0].site, "%s in a simdgroup of %u threads", kOperations[op], n);
    if (op == kMultiply) multiply(lanes);
  }
  u64 votes = 0;
  for (u32 i = 0; i < n; i++) votes |= u64(lanes[i].value & 1) << i;
  for (u32 i = 0; i < n; i++) {
    u32 arg = lanes[i].arg, from = i;
    u64 outside = ~0ull;  // what a lane that does not exist would give
    switch (op) {
      case 11: from = 0; break;
      case 12: case 16: from = arg; break;
      case 13: from = i ^ arg; break;
      case 14: from = i + arg; if (from >= kLanes) from = i; break;
      case 15: from = i >= arg ? i - arg : i; break;
      case 17: from = (i + arg) % kLanes; break;
      case 18: from = (i - arg) % kLanes; break;
      case 19: from = i + arg; if (from >= kLanes) outside = lanes[i].fill; break;
      case 20: from = i - arg; if (from >= kLanes) outside = lanes[i].fill; break;
      case 21: lanes[i].result = votes; continue;
      case 22: lanes[i].result = votes != 0; continue;
      case 23: lanes[i].result = votes == (1ull << n) - 1; continue;
      case 24: lanes[i].result = i == 0; continue;
      default: lanes[i].result = i; continue;
    }
    lanes[i].result = from < n ? lanes[from].value : outside;
  }
}

namespace {

template <typename T> u64 atomic_step(int op, u64 address, u64 value, u64 expected) {
  T* p = (T*)address;
  T old = *p, x = unpack<T>(value);
  switch (op) {
    case 0: *p = T(old + x); break;
    case 1: *p = T(old - x); break;
    case 2: *p = old < x ? old : x; break;
    case 3: *p = old > x ? old : x; break;
    case 4: case 5: case 6: *p = combine<T>(op, old, x); break;
    case 7: case 8: *p = x; break;
    case 10: if (pack(old) == expected) *p = x; break;
  }
  return pack(old);
}

}  // namespace

extern "C" u64 mh_atomic(int op, int type, u64 address, u64 value, u64 expected) {
  static const u32 sizes[] = {4, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8};
  caller = u64(__builtin_return_address(0));
  M.launch->atomics++;
  if (M.launch->trace) {
    if (op != 8) trace_access(address, sizes[type], false, true, caller);
    if (op != 9) trace_access(address, sizes[type], true, true, caller);
  }
  u64 old;
  switch (type) {
    case 0: old = atomic_step<float>(op, address, value, expected); break;
    case 4: old = atomic_step<u8>(op, address, value, expected); break;
    case 7: old = atomic_step<int32_t>(op, address, value, expected); break;
    case 8: old = atomic_step<u32>(op, address, value, expected); break;
    case 9: old = atomic_step<int64_t>(op, address, value, expected); break;
    case 10: old = atomic_step<u64>(op, address, value, expected); break;
    default: fault(kMisuse, caller, 0, "there are no atomics of this type");
  }
  caller = 0;
  return old;
}

