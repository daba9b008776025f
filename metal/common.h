// Shared by all kernels: included before each of them as the header of mx.fast.metal_kernel.

constant constexpr float ZM_NEG_INF = -INFINITY;

// Elements of a row of n that each of the 32 lanes of a simdgroup holds, contiguous in memory.
template <int n>
struct Lane {
  enum { size = (n + 31) / 32 };
};

// ---- the compensated logit (method.md 2): attend, attend_chunk, score

// What the tokens behind a row add to its logit; a row of weight 0 holds nothing.
inline float zm_log_mass(float weight, float alpha) { return weight > 0 ? alpha * log(weight) : ZM_NEG_INF; }

// A score under the model's soft cap; beyond 10 tanh is 1 in float32.
inline float zm_capped(float score, float cap) { return cap * tanh(clamp(score / cap, -10.0f, 10.0f)); }

// `dot` and `half_norm` (half the squared norm) are those of the scaled query; `spread` is 0 unless rows were merged.
inline float zm_compensated(float dot, float log_mass, float kappa, float spread, float half_norm) {
  return dot + log_mass + (spread == 0 ? 0.0f : min(kappa, half_norm * spread));
}

// ---- attend

// Half of 2 * n values goes to the lane across `mask`, its other half comes from there.
template <int n>
inline void zm_fold(thread float (&v)[8], ushort lane, ushort mask) {
  for (int i = 0; i < n; i++) {
    const float low = v[i], high = v[i + n];
    const bool upper = lane & mask;
    v[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, mask);
  }
}

// Sums 8 values over the simdgroup with 9 shuffles: lane l returns the sum of value l / 4.
inline float zm_sum_of_8(thread float (&v)[8], ushort lane) {
  zm_fold<4>(v, lane, 16);
  zm_fold<2>(v, lane, 8);
  zm_fold<1>(v, lane, 4);
  v[0] += simd_shuffle_xor(v[0], 2);
  return v[0] + simd_shuffle_xor(v[0], 1);
}

// A lane's elements of a row of n numbers, 0 past its end.
template <int n, int each, typename T>
inline void zm_numbers(const device T* row, ushort lane, thread float (&x)[each]) {
  for (int e = 0; e < each; e++) x[e] = 32 * each == n || lane * each + e < n ? float(row[lane * each + e]) : 0.0f;
}

// A lane's elements of a row of n codes, as many of which share a scale and a bias as `group` says. All lanes call it.
// A lane's codes are one unit of memory, and each scale and bias is read once.
template <int bits, int group, int n, int each, typename T>
inline void zm_decoded(
    const device uint* row, const device T* scales, const device T* biases, ushort lane, thread float (&x)[each]) {
  constexpr int groups = n / group, width = bits * each, unit = width < 32 ? each : 32 / bits;
  const float scale_here = lane < groups ? float(scales[lane]) : 0.0f;
  const float bias_here = lane < groups ? float(biases[lane]) : 0.0f;
  const ushort mine = min(lane * each / group, groups - 1);
  const float scale = simd_shuffle(scale_here, mine), bias = simd_shuffle(bias_here, mine);
  const bool inside = lane * each < n;
  for (int w = 0; w < each / unit; w++) {
    uint codes = 0;
    if (inside) {
      codes = width >= 32   ? row[lane * (each / unit) + w]
              : width == 16 ? uint(((const device ushort*)row)[lane])
                            : uint(((const device uchar*)row)[lane]);
    }
    for (int e = 0; e < unit; e++) {
      x[w * unit + e] = inside ? scale * float((codes >> (bits * e)) & ((1u << bits) - 1)) + bias : 0.0f;
    }
  }
}

// ---- end of attend

// ---- merge and compact

// Where a row comes from, as one number: with K rows in the kept store,
//   c < 0            residual row -1 - c, counted over heads, of the merged rows
//   0 <= c < K       row c of the kept store, as it is
//   K <= c < 2K      the raw row c - K of the kept store: its weight is 1
//   2K <= c          row c - 2K of the recent store, counted over heads
inline int zm_kept_row(int row, int kept_rows) { return kept_rows + row; }
inline int zm_recent_row(int row, int kept_rows) { return 2 * kept_rows + row; }

// One lane's read of what all lanes need. The argument is read in the body, where its address space is known.
#define ZM_UNIFORM(x) simd_broadcast(thread_index_in_simdgroup == 0 ? (x) : 0, 0)

// By its bits, for a compiler may take it that there is no NaN.
inline bool zm_is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }

// A float as an integer with the same order; -0 equals 0, NaN equals -inf.
inline uint zm_ordered(float x) {
  uint bits = as_type<uint>(x);  // compared as bits, for a GPU may take a denormal for 0
  if (bits == 0x80000000u) bits = 0;
  if (zm_is_nan(x)) bits = 0xff800000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Exclusive prefix sum over a threadgroup of whole simdgroups, and its total; all threads call it.
// `sums` has one element a simdgroup.
inline uint zm_scan(uint x, threadgroup uint* sums, uint lane, uint simd, uint simds, thread uint& total) {
  uint before = simd_prefix_exclusive_sum(x);
  if (lane == 31) sums[simd] = before + x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint of_simd = lane < simds ? sums[lane] : 0;
  total = simd_sum(of_simd);
  before += simd_sum(lane < simd ? of_simd : 0);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return before;
}

// ---- begin: simdgroup matrices and tiles of rows (attend_chunk, score) ----

// For loops over arrays of fragments: only with known indices are they registers.
#define ZM_UNROLL _Pragma("clang loop unroll(full)")

// Fragments are 8 x 8; accumulators are float whatever T is.
template <typename T>
inline void zm_load(thread simdgroup_matrix<T, 8, 8>& m, const threadgroup T* p, int stride, bool transpose = false) {
  simdgroup_load(m, p, stride, ulong2(0, 0), transpose);
}

template <typename A, typename B>
inline void zm_multiply_accumulate(
    thread simdgroup_matrix<float, 8, 8>& sum, thread const simdgroup_matrix<A, 8, 8>& a,
    thread const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(sum, a, b, sum);
}

inline void zm_store(thread const simdgroup_matrix<float, 8, 8>& m, threadgroup float* p, int stride) {
  simdgroup_store(m, p, stride);
}

// Columns 0 ... 7 of the `count` <= 8 rows at p (zeros below them). A full fragment comes straight from
// memory; the ragged edge, whose missing rows may not exist, goes through `block`, 64 elements of this simdgroup.
template <typename T>
inline void zm_load_edge(
    thread simdgroup_matrix<T, 8, 8>& m, const device T* p, int stride, int count, bool transpose,
    threadgroup T* block, uint lane) {
  if (count >= 8) {
    simdgroup_load(m, p, stride, ulong2(0, 0), transpose);
    return;
  }
  for (int e = lane; e < 64; e += 32) {
    block[e] = e / 8 < count ? p[size_t(e / 8) * stride + e % 8] : T(0);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  zm_load(m, block, 8, transpose);
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Four elements that move at once, aligned like one.
template <typename T>
struct ZmFour {
  T x[4];
};

// All threads of the threadgroup copy `count` rows of `width` elements to rows of `stride`, zeros up to `rows`.
template <typename T, int width, int stride, int rows, int threads>
inline void zm_copy_rows(const device T* from, threadgroup T* to, int count, uint thread_index) {
  for (int e = thread_index; e < rows * width / 4; e += threads) {
    int row = e / (width / 4), column = e % (width / 4) * 4;
    ZmFour<T> x = {{T(0), T(0), T(0), T(0)}};
    if (row < count) {
      x = *(const device ZmFour<T>*)(from + size_t(row) * width + column);
    }
    *(threadgroup ZmFour<T>*)(to + row * stride + column) = x;
  }
}

// ---- end: simdgroup matrices and tiles of rows ----
