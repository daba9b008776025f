// Metal functions through which threads meet: barriers, simd operations, atomics, simdgroup
// matrices. All of them end in the runtime, with the line of the caller for its messages.
#pragma once

#define MH_SITE uint mh_site = (uint(__builtin_LINE()) << 8) | (uint(__builtin_COLUMN()) & 255)

extern "C" {
void mh_barrier(uint flags, bool simd, uint site);
ulong mh_simd(int op, int type, ulong bits, uint arg, ulong fill, uint site);
ulong mh_atomic(int op, int type, ulong address, ulong value, ulong expected);
ulong mh_threadgroup_memory(int id, ulong size, ulong align, uint site);
void mh_multiply(const int* types, const ulong* fragments, uint site);
}

namespace metal {

template <typename T> struct mh_type;
#define MH_TYPE(T, n, U) \
  template <> struct mh_type<T> { static constexpr constant int code = n; typedef U bits; };
MH_TYPE(float, 0, uint) MH_TYPE(half, 1, ushort) MH_TYPE(bfloat, 2, ushort)
MH_TYPE(int8_t, 3, uchar) MH_TYPE(uint8_t, 4, uchar) MH_TYPE(int16_t, 5, ushort)
MH_TYPE(uint16_t, 6, ushort) MH_TYPE(int32_t, 7, uint) MH_TYPE(uint32_t, 8, uint)
MH_TYPE(int64_t, 9, ulong) MH_TYPE(uint64_t, 10, ulong) MH_TYPE(char, 3, uchar) MH_TYPE(bool, 4, uchar)
#undef MH_TYPE
template <typename T> inline ulong mh_pack(T x) {
  return ulong(__builtin_bit_cast(typename mh_type<T>::bits, x));
}
template <typename T> inline T mh_unpack(ulong x) {
  return __builtin_bit_cast(T, typename mh_type<T>::bits(x));
}

// ---- barriers ---------------------------------------------------------------------------------

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline void threadgroup_barrier(mem_flags f, MH_SITE) { mh_barrier(uint(f), false, mh_site); }
inline void simdgroup_barrier(mem_flags f, MH_SITE) { mh_barrier(uint(f), true, mh_site); }

template <typename A> inline threadgroup A& mh_threadgroup(int id, MH_SITE) {
  return *(threadgroup A*)mh_threadgroup_memory(id, sizeof(A), alignof(A), mh_site);
}

// ---- simd operations --------------------------------------------------------------------------

#define MH_SIMD_VEC(name, N)                                                                   \
  template <typename T> inline vec<T, N> name(vec<T, N> x, MH_SITE) {                           \
    for (int i = 0; i < N; i++) x[i] = name(x[i], mh_site);                                    \
    return x;                                                                                  \
  }
#define MH_SIMD(name, op)                                                                      \
  template <typename T> inline T name(T x, MH_SITE) {                                          \
    return mh_unpack<T>(mh_simd(op, mh_type<T>::code, mh_pack(x), 0, 0, mh_site));             \
  }                                                                                            \
  MH_SIMD_VEC(name, 2) MH_SIMD_VEC(name, 3) MH_SIMD_VEC(name, 4)
MH_SIMD(simd_sum, 0) MH_SIMD(simd_product, 1) MH_SIMD(simd_min, 2) MH_SIMD(simd_max, 3)
MH_SIMD(simd_and, 4) MH_SIMD(simd_or, 5) MH_SIMD(simd_xor, 6)
MH_SIMD(simd_prefix_inclusive_sum, 7) MH_SIMD(simd_prefix_exclusive_sum, 8)
MH_SIMD(simd_prefix_inclusive_product, 9) MH_SIMD(simd_prefix_exclusive_product, 10)
MH_SIMD(simd_broadcast_first, 11)

#define MH_SHUFFLE_VEC(name, N)                                                                \
  template <typename T> inline vec<T, N> name(vec<T, N> x, ushort lane, MH_SITE) {              \
    for (int i = 0; i < N; i++) x[i] = name(x[i], lane, mh_site);                              \
    return x;                                                                                  \
  }
#define MH_SHUFFLE(name, op)                                                                   \
  template <typename T> inline T name(T x, ushort lane, MH_SITE) {                             \
    return mh_unpack<T>(mh_simd(op, mh_type<T>::code, mh_pack(x), lane, 0, mh_site));          \
  }                                                                                            \
  MH_SHUFFLE_VEC(name, 2) MH_SHUFFLE_VEC(name, 3) MH_SHUFFLE_VEC(name, 4)
MH_SHUFFLE(simd_shuffle, 12) MH_SHUFFLE(simd_shuffle_xor, 13) MH_SHUFFLE(simd_shuffle_down, 14)
MH_SHUFFLE(simd_shuffle_up, 15) MH_SHUFFLE(simd_broadcast, 16)
MH_SHUFFLE(simd_shuffle_rotate_down, 17) MH_SHUFFLE(simd_shuffle_rotate_up, 18)
#define MH_FILL(name, op)                                                                      \
  template <typename T> inline T name(T x, T fill, ushort delta, MH_SITE) {                    \
    return mh_unpack<T>(mh_simd(op, mh_type<T>::code, mh_pack(x), delta, mh_pack(fill), mh_site)); \
  }                                                                                            \
  template <typename T>                                                                        \
  inline vec<T, 2> name(vec<T, 2> x, vec<T, 2> fill, ushort delta, MH_SITE) {                   \
    for (int i = 0; i < 2; i++) x[i] = name(x[i], fill[i], delta, mh_site);                    \
    return x;                                                                                  \
  }
MH_FILL(simd_shuffle_and_fill_down, 19) MH_FILL(simd_shuffle_and_fill_up, 20)

struct simd_vote {
  typedef ulong vote_t;
  vote_t mask;
  explicit simd_vote(vote_t v) : mask(v) {}
  explicit operator vote_t() const { return mask; }
  bool any() const { return mask != 0; }
  bool all() const { return mask == 0xffffffff; }
};
inline simd_vote simd_ballot(bool x, MH_SITE) { return simd_vote(mh_simd(21, 4, x, 0, 0, mh_site)); }
inline simd_vote simd_active_threads_mask(MH_SITE) { return simd_vote(mh_simd(21, 4, 1, 0, 0, mh_site)); }
inline bool simd_any(bool x, MH_SITE) { return mh_simd(22, 4, x, 0, 0, mh_site); }
inline bool simd_all(bool x, MH_SITE) { return mh_simd(23, 4, x, 0, 0, mh_site); }
inline bool simd_is_first(MH_SITE) { return mh_simd(24, 4, 0, 0, 0, mh_site); }

// ---- atomics ----------------------------------------------------------------------------------

enum memory_order { memory_order_relaxed };
template <typename T> struct atomic { T mh_value; };
#define atomic_int mh_atomic_int  // OpenCL has types of these names
#define atomic_uint mh_atomic_uint
#define atomic_float mh_atomic_float
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

#define MH_FETCH(S, name, op)                                                                  \
  template <typename T>                                                                        \
  inline T name(volatile S atomic<T>* p, type_identity_t<T> x, memory_order) {                 \
    return mh_unpack<T>(mh_atomic(op, mh_type<T>::code, ulong(p), mh_pack(x), 0));             \
  }
#define MH_ATOMICS(S)                                                                          \
  MH_FETCH(S, atomic_fetch_add_explicit, 0) MH_FETCH(S, atomic_fetch_sub_explicit, 1)          \
  MH_FETCH(S, atomic_fetch_min_explicit, 2) MH_FETCH(S, atomic_fetch_max_explicit, 3)          \
  MH_FETCH(S, atomic_fetch_and_explicit, 4) MH_FETCH(S, atomic_fetch_or_explicit, 5)           \
  MH_FETCH(S, atomic_fetch_xor_explicit, 6) MH_FETCH(S, atomic_exchange_explicit, 7)           \
  template <typename T>                                                                        \
  inline void atomic_store_explicit(volatile S atomic<T>* p, type_identity_t<T> x, memory_order) { \
    mh_atomic(8, mh_type<T>::code, ulong(p), mh_pack(x), 0);                                   \
  }                                                                                            \
  template <typename T> inline T atomic_load_explicit(const volatile S atomic<T>* p, memory_order) { \
    return mh_unpack<T>(mh_atomic(9, mh_type<T>::code, ulong(p), 0, 0));                       \
  }                                                                                            \
  template <typename T>                                                                        \
  inline bool atomic_compare_exchange_weak_explicit(volatile S atomic<T>* p, thread T* expected, \
      type_identity_t<T> x, memory_order, memory_order) {                                      \
    ulong was = mh_pack(*expected);                                                            \
    ulong old = mh_atomic(10, mh_type<T>::code, ulong(p), mh_pack(x), was);                    \
    *expected = mh_unpack<T>(old);                                                             \
    return old == was;                                                                         \
  }
MH_ATOMICS(device)
MH_ATOMICS(threadgroup)

// ---- simdgroup matrices -----------------------------------------------------------------------

// Which lane holds which element is Apple's secret; here lane l holds two neighbours of row l / 4.
// The elements are private, so no kernel can depend on that.
inline uint mh_fragment(uint site) { return uint(mh_simd(25, 8, 0, 0, 0, site)); }
template <typename T, int Cols, int Rows> struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "only 8 x 8 matrices");
  T mh_e[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal, MH_SITE) {
    uint lane = mh_fragment(mh_site), row = lane / 4, col = lane % 4 * 2;
    for (uint i = 0; i < 2; i++) mh_e[i] = row == col + i ? diagonal : T(0);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int Cols, int Rows = Cols>
inline simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(type_identity_t<T> x) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.mh_e[0] = m.mh_e[1] = x;
  return m;
}

#define MH_MATRIX_IO(S)                                                                        \
  template <typename T>                                                                        \
  inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const S T* p, ulong stride = 8, \
      vec<ulong, 2> origin = 0, bool transpose = false, MH_SITE) {                              \
    uint lane = mh_fragment(mh_site), row = lane / 4, col = lane % 4 * 2;                      \
    for (uint i = 0; i < 2; i++) {                                                             \
      uint y = transpose ? col + i : row, x = transpose ? row : col + i;                       \
      m.mh_e[i] = p[(origin.y + y) * stride + origin.x + x];                                   \
    }                                                                                          \
  }                                                                                            \
  template <typename T>                                                                        \
  inline void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, S T* p, ulong stride = 8, \
      vec<ulong, 2> origin = 0, bool transpose = false, MH_SITE) {                              \
    uint lane = mh_fragment(mh_site), row = lane / 4, col = lane % 4 * 2;                      \
    for (uint i = 0; i < 2; i++) {                                                             \
      uint y = transpose ? col + i : row, x = transpose ? row : col + i;                       \
      p[(origin.y + y) * stride + origin.x + x] = m.mh_e[i];                                   \
    }                                                                                          \
  }
MH_MATRIX_IO(device)
MH_MATRIX_IO(threadgroup)

template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
    thread const simdgroup_matrix<A, 8, 8>& a, thread const simdgroup_matrix<B, 8, 8>& b,
    thread const simdgroup_matrix<C, 8, 8>& c, MH_SITE) {
  int types[4] = {mh_type<D>::code, mh_type<A>::code, mh_type<B>::code, mh_type<C>::code};
  ulong fragments[4] = {ulong(d.mh_e), ulong(a.mh_e), ulong(b.mh_e), ulong(c.mh_e)};
  mh_multiply(types, fragments, mh_site);
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
    thread const simdgroup_matrix<A, 8, 8>& a, thread const simdgroup_matrix<B, 8, 8>& b, MH_SITE) {
  int types[4] = {mh_type<D>::code, mh_type<A>::code, mh_type<B>::code, -1};
  ulong fragments[4] = {ulong(d.mh_e), ulong(a.mh_e), ulong(b.mh_e), 0};
  mh_multiply(types, fragments, mh_site);
}

}  // namespace metal

struct mh_thread {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threadgroups_per_grid;
  uint3 threads_per_grid, grid_size;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup, threads_per_simdgroup, dispatch_simdgroups_per_threadgroup;
  uint quadgroup_index_in_threadgroup, thread_index_in_quadgroup;
};
