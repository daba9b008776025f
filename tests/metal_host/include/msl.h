// The part of the Metal standard library that compute kernels use, for clang in "C++ for OpenCL"
// mode, where address spaces are part of the type as they are in Metal.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define __METAL__ 1
#define __METAL_VERSION__ 310
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wimplicit-float-conversion"

// Words that OpenCL reserves and Metal does not.
#define local mh_local
#define global mh_global
#define generic mh_generic
#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;

#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX ((half)65504.0f)
#define M_PI_F 3.14159265358979f
#define M_PI_2_F 1.57079632679490f
#define M_E_F 2.71828182845905f
#define M_LOG2E_F 1.44269504088896f
#define M_LN2_F 0.69314718055995f
#define M_SQRT2_F 1.41421356237310f
#define CHAR_BIT 8
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807L
#define ULONG_MAX 18446744073709551615UL

namespace metal {

// ---- types and traits -------------------------------------------------------------------------

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <bool B, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F> struct conditional { typedef T type; };
template <typename T, typename F> struct conditional<false, T, F> { typedef F type; };
template <bool B, typename T, typename F> using conditional_t = typename conditional<B, T, F>::type;
template <typename T> struct type_identity { typedef T type; };
template <typename T> using type_identity_t = typename type_identity<T>::type;
template <typename T> struct remove_const { typedef T type; };
template <typename T> struct remove_const<const T> { typedef T type; };
template <typename T, T v> struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;

#define MH_TRAIT(name, ...)                                                    \
  template <typename T> inline constexpr constant bool name##_v = __VA_ARGS__; \
  template <typename T> struct name : integral_constant<bool, (__VA_ARGS__)> {};
template <typename A, typename B> inline constexpr constant bool is_same_v = __is_same(A, B);
template <typename A, typename B> struct is_same : integral_constant<bool, __is_same(A, B)> {};
template <typename A, typename B>
inline constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <typename A, typename B>
struct is_convertible : integral_constant<bool, __is_convertible(A, B)> {};
MH_TRAIT(is_floating_point, __is_floating_point(T) || is_same_v<T, bfloat>)
MH_TRAIT(is_integral, __is_integral(T))
MH_TRAIT(is_signed, __is_signed(T))
MH_TRAIT(is_unsigned, __is_unsigned(T))
MH_TRAIT(is_arithmetic, __is_arithmetic(T) || is_same_v<T, bfloat>)
#undef MH_TRAIT

template <typename T> struct numeric_limits;
#define MH_INT_LIMITS(T, lo, hi)                                  \
  template <> struct numeric_limits<T> {                          \
    static constexpr T min() { return lo; }                       \
    static constexpr T lowest() { return lo; }                    \
    static constexpr T max() { return hi; }                       \
    static constexpr constant int digits = sizeof(T) * 8 - (lo < 0); \
  };
MH_INT_LIMITS(int8_t, -128, 127)
MH_INT_LIMITS(uint8_t, 0, 255)
MH_INT_LIMITS(int16_t, -32768, 32767)
MH_INT_LIMITS(uint16_t, 0, 65535)
MH_INT_LIMITS(int32_t, INT_MIN, INT_MAX)
MH_INT_LIMITS(uint32_t, 0, UINT_MAX)
MH_INT_LIMITS(int64_t, -LONG_MAX - 1, LONG_MAX)
MH_INT_LIMITS(uint64_t, 0, ULONG_MAX)
MH_INT_LIMITS(bool, 0, 1)
#undef MH_INT_LIMITS
#define MH_FLOAT_LIMITS(T, mn, mx, eps)                                          \
  template <> struct numeric_limits<T> {                                         \
    static constexpr T min() { return T(mn); }                                   \
    static constexpr T lowest() { return T(-mx); }                               \
    static constexpr T max() { return T(mx); }                                   \
    static constexpr T epsilon() { return T(eps); }                              \
    static constexpr T infinity() { return T(__builtin_inff()); }                \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }             \
  };
MH_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON)
MH_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
MH_FLOAT_LIMITS(bfloat, FLT_MIN, 3.38953139e+38f, 0.0078125f)
#undef MH_FLOAT_LIMITS

template <typename To, typename From> constexpr To as_type(From x) { return __builtin_bit_cast(To, x); }

// static_cast, which clang lacks between half and bfloat and between vectors.
template <typename To, typename From> constexpr To mh_cast(From x) {
  if constexpr (sizeof(To) == 2 && is_floating_point_v<To> && is_floating_point_v<From>)
    return static_cast<To>(static_cast<float>(x));
  else if constexpr (is_same_v<From, bfloat>)
    return static_cast<To>(static_cast<float>(x));
  else
    return static_cast<To>(x);
}
template <typename To, typename T, int N> inline To mh_cast(vec<T, N> x) { return __builtin_convertvector(x, To); }

// A vector's constructor: components and shorter vectors, or one value for all.
template <typename T, int N> struct mh_vec_maker {
  vec<T, N> out = {};
  int n = 0;
  template <typename U> void put(U x) { out[n++] = mh_cast<T>(x); }
  template <typename U, int M> void put(vec<U, M> x) {
    for (int i = 0; i < M; i++) out[n++] = mh_cast<T>(x[i]);
  }
};
template <typename T, int N, typename... A> inline vec<T, N> make_vec(A... a) {
  static_assert(sizeof...(A) <= N, "too many components");
  mh_vec_maker<T, N> m;
  (m.put(a), ...);
  if (m.n == 1)
    for (int i = 1; i < N; i++) m.out[i] = m.out[0];
  return m.out;
}

template <typename V> struct mh_vec_type;
template <typename T, int N> struct mh_vec_type<vec<T, N>> {
  template <typename... A> static vec<T, N> make(A... a) { return make_vec<T, N>(a...); }
};
template <typename V, typename... A> inline V make_as(A... a) { return mh_vec_type<V>::make(a...); }

// ---- mathematics ------------------------------------------------------------------------------

#define MH_EACH_VEC(M) M(2) M(3) M(4)
#define MH_F1_VEC(name, N)                                                                     \
  template <typename T> inline vec<T, N> name(vec<T, N> x) {                                    \
    vec<T, N> r;                                                                               \
    for (int i = 0; i < N; i++) r[i] = name(x[i]);                                             \
    return r;                                                                                  \
  }
#define MH_F1(name, f)                                                                         \
  inline float name(float x) { return f(x); }                                                  \
  inline half name(half x) { return half(f(float(x))); }                                       \
  inline bfloat name(bfloat x) { return bfloat(f(float(x))); }                                 \
  MH_F1_VEC(name, 2) MH_F1_VEC(name, 3) MH_F1_VEC(name, 4)
#define MH_F2_VEC(name, N)                                                                     \
  template <typename T> inline vec<T, N> name(vec<T, N> x, vec<T, N> y) {                       \
    vec<T, N> r;                                                                               \
    for (int i = 0; i < N; i++) r[i] = name(x[i], y[i]);                                       \
    return r;                                                                                  \
  }
#define MH_F2(name, f)                                                                         \
  inline float name(float x, float y) { return f(x, y); }                                      \
  inline half name(half x, half y) { return half(f(float(x), float(y))); }                     \
  inline bfloat name(bfloat x, bfloat y) { return bfloat(f(float(x), float(y))); }             \
  MH_F2_VEC(name, 2) MH_F2_VEC(name, 3) MH_F2_VEC(name, 4)

inline float mh_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float mh_exp10(float x) { return __builtin_powf(10.0f, x); }
inline float mh_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
inline float mh_fract(float x) { return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f); }
inline float mh_sat(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }

#define MH_MATH                                                                                \
  MH_F1(exp, __builtin_expf) MH_F1(exp2, __builtin_exp2f) MH_F1(exp10, mh_exp10)               \
  MH_F1(log, __builtin_logf) MH_F1(log2, __builtin_log2f) MH_F1(log10, __builtin_log10f)       \
  MH_F1(sqrt, __builtin_sqrtf) MH_F1(rsqrt, mh_rsqrt) MH_F1(sin, __builtin_sinf)               \
  MH_F1(cos, __builtin_cosf) MH_F1(tan, __builtin_tanf) MH_F1(sinh, __builtin_sinhf)           \
  MH_F1(cosh, __builtin_coshf) MH_F1(tanh, __builtin_tanhf) MH_F1(asin, __builtin_asinf)       \
  MH_F1(acos, __builtin_acosf) MH_F1(atan, __builtin_atanf) MH_F1(asinh, __builtin_asinhf)     \
  MH_F1(acosh, __builtin_acoshf) MH_F1(atanh, __builtin_atanhf) MH_F1(fabs, __builtin_fabsf)   \
  MH_F1(abs, __builtin_fabsf) MH_F1(floor, __builtin_floorf) MH_F1(ceil, __builtin_ceilf)      \
  MH_F1(round, __builtin_roundf) MH_F1(rint, __builtin_rintf) MH_F1(trunc, __builtin_truncf)   \
  MH_F1(sign, mh_sign) MH_F1(fract, mh_fract) MH_F1(saturate, mh_sat)                          \
  MH_F2(pow, __builtin_powf) MH_F2(powr, __builtin_powf) MH_F2(atan2, __builtin_atan2f)        \
  MH_F2(fmod, __builtin_fmodf) MH_F2(fmin, __builtin_fminf) MH_F2(fmax, __builtin_fmaxf)       \
  MH_F2(copysign, __builtin_copysignf) MH_F2(min, __builtin_fminf) MH_F2(max, __builtin_fmaxf)
MH_MATH
namespace fast { MH_MATH }
namespace precise { MH_MATH }
#undef MH_MATH

#define MH_INT_MATH(T)                                                                         \
  inline T min(T x, T y) { return x < y ? x : y; }                                             \
  inline T max(T x, T y) { return x > y ? x : y; }                                             \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                              \
  inline T abs(T x) { return x < T(0) ? T(-x) : x; }                                           \
  inline T popcount(T x) { return T(__builtin_popcountg(x)); }                                 \
  inline T clz(T x) { return T(__builtin_clzg(x, int(sizeof(T) * 8))); }                       \
  inline T ctz(T x) { return T(__builtin_ctzg(x, int(sizeof(T) * 8))); }
#define MH_SIGNED_MATH(S, U)                                                                   \
  inline S min(S x, S y) { return x < y ? x : y; }                                             \
  inline S max(S x, S y) { return x > y ? x : y; }                                             \
  inline S clamp(S x, S lo, S hi) { return min(max(x, lo), hi); }                              \
  inline S abs(S x) { return x < S(0) ? S(-x) : x; }                                           \
  inline S popcount(S x) { return S(__builtin_popcountg(U(x))); }                              \
  inline S clz(S x) { return S(__builtin_clzg(U(x), int(sizeof(S) * 8))); }                    \
  inline S ctz(S x) { return S(__builtin_ctzg(U(x), int(sizeof(S) * 8))); }
MH_INT_MATH(uint8_t) MH_INT_MATH(uint16_t) MH_INT_MATH(uint32_t) MH_INT_MATH(uint64_t)
MH_SIGNED_MATH(int8_t, uint8_t) MH_SIGNED_MATH(int16_t, uint16_t)
MH_SIGNED_MATH(int32_t, uint32_t) MH_SIGNED_MATH(int64_t, uint64_t)
#define MH_CLAMP(T)                                                                            \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                              \
  inline T fma(T x, T y, T z) { return T(__builtin_fmaf(float(x), float(y), float(z))); }      \
  inline T mix(T x, T y, T a) { return x + (y - x) * a; }                                      \
  inline T step(T edge, T x) { return x < edge ? T(0.0f) : T(1.0f); }                          \
  inline bool isnan(T x) { return x != x; }                                                    \
  inline bool isinf(T x) { return __builtin_isinf(float(x)); }                                 \
  inline bool isfinite(T x) { return __builtin_isfinite(float(x)); }                           \
  inline bool signbit(T x) { return __builtin_signbit(float(x)); }                             \
  inline T ldexp(T x, int e) { return T(__builtin_ldexpf(float(x), e)); }
MH_CLAMP(float) MH_CLAMP(half) MH_CLAMP(bfloat)
#define MH_VEC(N)                                                                              \
  template <typename T> inline vec<T, N> clamp(vec<T, N> x, vec<T, N> lo, vec<T, N> hi) {       \
    return min(max(x, lo), hi);                                                                \
  }                                                                                            \
  template <typename T> inline vec<T, N> fma(vec<T, N> x, vec<T, N> y, vec<T, N> z) {           \
    vec<T, N> r;                                                                               \
    for (int i = 0; i < N; i++) r[i] = fma(x[i], y[i], z[i]);                                  \
    return r;                                                                                  \
  }                                                                                            \
  template <typename T> inline T dot(vec<T, N> x, vec<T, N> y) {                                \
    T r = x[0] * y[0];                                                                         \
    for (int i = 1; i < N; i++) r += x[i] * y[i];                                              \
    return r;                                                                                  \
  }                                                                                            \
  template <typename T> inline T length(vec<T, N> x) { return sqrt(dot(x, x)); }                \
  template <typename T> inline bool any(vec<T, N> x) {                                          \
    for (int i = 0; i < N; i++) if (x[i]) return true;                                         \
    return false;                                                                              \
  }                                                                                            \
  template <typename T> inline bool all(vec<T, N> x) {                                          \
    for (int i = 0; i < N; i++) if (!x[i]) return false;                                       \
    return true;                                                                               \
  }                                                                                            \
  template <typename T, typename C>                                                            \
  inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {                              \
    for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];                                     \
    return a;                                                                                  \
  }
MH_EACH_VEC(MH_VEC)
#undef MH_VEC
template <typename T> inline T min3(T x, T y, T z) { return min(x, min(y, z)); }
template <typename T> inline T max3(T x, T y, T z) { return max(x, max(y, z)); }
template <typename T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <typename T> inline T divide(T a, T b) { return a / b; }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }

}  // namespace metal

using namespace metal;
#define MH_NAMED_VECS(T)                                                                       \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                          \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                          \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MH_NAMED_VECS(float) MH_NAMED_VECS(half) MH_NAMED_VECS(bfloat) MH_NAMED_VECS(int)
MH_NAMED_VECS(uint) MH_NAMED_VECS(short) MH_NAMED_VECS(ushort) MH_NAMED_VECS(char)
MH_NAMED_VECS(uchar) MH_NAMED_VECS(long) MH_NAMED_VECS(ulong)
#pragma clang diagnostic pop

#include "msl_threads.h"

// clang has no constructor call with several arguments for its vectors, hence macros; a name
// without parentheses stays the type.
#define float2(...) metal::make_vec<float, 2>(__VA_ARGS__)
#define float3(...) metal::make_vec<float, 3>(__VA_ARGS__)
#define float4(...) metal::make_vec<float, 4>(__VA_ARGS__)
#define half2(...) metal::make_vec<half, 2>(__VA_ARGS__)
#define half3(...) metal::make_vec<half, 3>(__VA_ARGS__)
#define half4(...) metal::make_vec<half, 4>(__VA_ARGS__)
#define bfloat2(...) metal::make_vec<bfloat, 2>(__VA_ARGS__)
#define bfloat3(...) metal::make_vec<bfloat, 3>(__VA_ARGS__)
#define bfloat4(...) metal::make_vec<bfloat, 4>(__VA_ARGS__)
#define int2(...) metal::make_vec<int, 2>(__VA_ARGS__)
#define int3(...) metal::make_vec<int, 3>(__VA_ARGS__)
#define int4(...) metal::make_vec<int, 4>(__VA_ARGS__)
#define uint2(...) metal::make_vec<uint, 2>(__VA_ARGS__)
#define uint3(...) metal::make_vec<uint, 3>(__VA_ARGS__)
#define uint4(...) metal::make_vec<uint, 4>(__VA_ARGS__)
#define short2(...) metal::make_vec<short, 2>(__VA_ARGS__)
#define short3(...) metal::make_vec<short, 3>(__VA_ARGS__)
#define short4(...) metal::make_vec<short, 4>(__VA_ARGS__)
#define ushort2(...) metal::make_vec<ushort, 2>(__VA_ARGS__)
#define ushort3(...) metal::make_vec<ushort, 3>(__VA_ARGS__)
#define ushort4(...) metal::make_vec<ushort, 4>(__VA_ARGS__)
#define char2(...) metal::make_vec<char, 2>(__VA_ARGS__)
#define char3(...) metal::make_vec<char, 3>(__VA_ARGS__)
#define char4(...) metal::make_vec<char, 4>(__VA_ARGS__)
#define uchar2(...) metal::make_vec<uchar, 2>(__VA_ARGS__)
#define uchar3(...) metal::make_vec<uchar, 3>(__VA_ARGS__)
#define uchar4(...) metal::make_vec<uchar, 4>(__VA_ARGS__)
#define long2(...) metal::make_vec<long, 2>(__VA_ARGS__)
#define long3(...) metal::make_vec<long, 3>(__VA_ARGS__)
#define long4(...) metal::make_vec<long, 4>(__VA_ARGS__)
#define ulong2(...) metal::make_vec<ulong, 2>(__VA_ARGS__)
#define ulong3(...) metal::make_vec<ulong, 3>(__VA_ARGS__)
#define ulong4(...) metal::make_vec<ulong, 4>(__VA_ARGS__)
