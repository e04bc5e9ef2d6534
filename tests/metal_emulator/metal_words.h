// The part of Metal's standard library, and of what MLX puts before a custom kernel, that kernel
// texts use here. What is missing is a compile error, never a guess.
#pragma once
#include "memory.h"
#include "numbers.h"
#include "simd.h"

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

#define thread
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()

template <class T> struct Vector2 { T x, y; };
template <class T> struct Vector3 {
  T x, y, z;
  T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
};
template <class T> struct Vector4 { T x, y, z, w; };
typedef Vector2<uint> uint2;
typedef Vector3<uint> uint3;
typedef Vector4<uint> uint4;
typedef Vector2<int> int2;
typedef Vector4<int> int4;
typedef Vector2<float> float2;
typedef Vector3<float> float3;
typedef Vector4<float> float4;

template <class To, class From> inline To as_type(From from) { return emulator::bits<To>(from); }

namespace metal {

template <class T> struct atomic { T value; };
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
typedef atomic<float> atomic_float;
enum memory_order { memory_order_relaxed };
enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };

#define EMULATOR_ORDERED(T)                              \
  inline T min(T a, T b) { return b < a ? b : a; }       \
  inline T max(T a, T b) { return a < b ? b : a; }       \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
EMULATOR_ORDERED(int) EMULATOR_ORDERED(uint) EMULATOR_ORDERED(short) EMULATOR_ORDERED(ushort)
EMULATOR_ORDERED(long) EMULATOR_ORDERED(ulong)
#undef EMULATOR_ORDERED
// The larger of two floats is the number where the other is NaN.
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return fmin(a, b); }
inline float max(float a, float b) { return fmax(a, b); }
inline float clamp(float x, float low, float high) { return fmin(fmax(x, low), high); }
// Without these a bfloat would silently take the overload of another type.
bfloat min(bfloat, bfloat) = delete;
bfloat max(bfloat, bfloat) = delete;
inline half min(half a, half b) { return half(fmin(float(a), float(b))); }
inline half max(half a, half b) { return half(fmax(float(a), float(b))); }

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
inline bool isfinite(float x) { return __builtin_isfinite(x) != 0; }
inline bool signbit(float x) { return __builtin_signbit(x) != 0; }
inline float exp(float x) { return __builtin_expf(x); }
inline float exp2(float x) { return __builtin_exp2f(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float log2(float x) { return __builtin_log2f(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
template <class T> inline T select(T no, T yes, bool choose) { return choose ? yes : no; }
namespace precise {
using metal::exp;
using metal::log;
using metal::sqrt;
using metal::tanh;
}  // namespace precise
namespace fast {
using metal::exp;
using metal::log;
using metal::sqrt;
using metal::tanh;
}  // namespace fast
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32u; }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32u; }

#define EMULATOR_LINE int line = __builtin_LINE()
#define EMULATOR_NUMBER                                                            \
  static_assert(sizeof(T) <= 4, "SIMD functions of Metal take no 64-bit values"); \
  static_assert(!emulator::same<T, bool>::value, "SIMD functions of Metal take no bool")
template <class T> inline T simd_sum(T v, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::reduce(v, "simd_sum", line, true, [](T a, T b) { return T(a + b); });
}
template <class T> inline T simd_product(T v, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::reduce(v, "simd_product", line, true, [](T a, T b) { return T(a * b); });
}
template <class T> inline T simd_max(T v, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::reduce(v, "simd_max", line, false, [](T a, T b) { return a < b ? b : a; });
}
template <class T> inline T simd_min(T v, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::reduce(v, "simd_min", line, false, [](T a, T b) { return b < a ? b : a; });
}
inline uint simd_or(uint v, EMULATOR_LINE) {
  return emulator::reduce(v, "simd_or", line, true, [](uint a, uint b) { return a | b; });
}
inline uint simd_and(uint v, EMULATOR_LINE) {
  return emulator::reduce(v, "simd_and", line, true, [](uint a, uint b) { return a & b; });
}
inline uint simd_xor(uint v, EMULATOR_LINE) {
  return emulator::reduce(v, "simd_xor", line, true, [](uint a, uint b) { return a ^ b; });
}
inline bool simd_any(bool v, EMULATOR_LINE) {
  return emulator::reduce(v, "simd_any", line, true, [](bool a, bool b) { return a || b; });
}
inline bool simd_all(bool v, EMULATOR_LINE) {
  return emulator::reduce(v, "simd_all", line, true, [](bool a, bool b) { return a && b; });
}
template <class T> inline T simd_shuffle(T v, ushort lane, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::shuffle(v, lane, "simd_shuffle", line);
}
// Every lane must name the same source lane.
template <class T> inline T simd_broadcast(T v, ushort lane, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  const emulator::Lanes named = emulator::exchange(&lane, sizeof(lane), "simd_broadcast", line);
  for (unsigned i = 0; i < 32; ++i)
    if (((named.present >> i) & 1u) && emulator::value_of<ushort>(named, i) != lane)
      emulator::fail("lanes name different sources in simd_broadcast (line %d)", line);
  return emulator::shuffle(v, lane, "simd_broadcast", line);
}
template <class T> inline T simd_shuffle_xor(T v, ushort mask, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  return emulator::shuffle(v, emulator::thread_now->lane ^ mask, "simd_shuffle_xor", line);
}
// Lanes whose source would lie beyond the group keep their own value.
template <class T> inline T simd_shuffle_down(T v, ushort delta, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  const unsigned lane = emulator::thread_now->lane;
  return emulator::shuffle(v, lane + delta < 32 ? lane + delta : lane, "simd_shuffle_down", line);
}
template <class T> inline T simd_shuffle_up(T v, ushort delta, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  const unsigned lane = emulator::thread_now->lane;
  return emulator::shuffle(v, lane >= delta ? lane - delta : lane, "simd_shuffle_up", line);
}
template <class T> inline T simd_prefix_exclusive_sum(T v, EMULATOR_LINE) {
  EMULATOR_NUMBER;
  const emulator::Lanes lanes =
      emulator::exchange(&v, sizeof(T), "simd_prefix_exclusive_sum", line);
  T sum = T(0);
  for (unsigned i = 0; i < emulator::thread_now->lane; ++i)
    if ((lanes.present >> i) & 1u) sum = T(sum + emulator::value_of<T>(lanes, i));
  return sum;
}
inline void threadgroup_barrier(mem_flags, EMULATOR_LINE) {
  emulator::barrier("threadgroup_barrier", line);
}
inline void simdgroup_barrier(mem_flags, EMULATOR_LINE) {
  const char nothing = 0;
  emulator::exchange(&nothing, 1, "simdgroup_barrier", line);
}

// One operating-system thread runs every fiber and switches at SIMD calls and barriers only, so
// a plain update is atomic.
template <emulator::Space S, class T> using Atomic = emulator::Pointer<S, atomic<T>>;
template <emulator::Space S, class T>
inline T atomic_load_explicit(const Atomic<S, T>& p, memory_order) {
  p.require_written();
  return p.checked()->value;
}
template <emulator::Space S, class T, class V>
inline void atomic_store_explicit(const Atomic<S, T>& p, V value, memory_order) {
  p.checked()->value = T(value);
  p.mark_written();
}
#define EMULATOR_ATOMIC(name, update)                                     \
  template <emulator::Space S, class T, class V>                          \
  inline T name(const Atomic<S, T>& p, V given, memory_order order) {     \
    const T old = atomic_load_explicit(p, order);                         \
    const T value = T(given);                                             \
    atomic_store_explicit(p, update, order);                              \
    return old;                                                           \
  }
EMULATOR_ATOMIC(atomic_fetch_add_explicit, T(old + value))
EMULATOR_ATOMIC(atomic_fetch_sub_explicit, T(old - value))
EMULATOR_ATOMIC(atomic_fetch_max_explicit, old < value ? value : old)
EMULATOR_ATOMIC(atomic_fetch_min_explicit, value < old ? value : old)
EMULATOR_ATOMIC(atomic_fetch_or_explicit, T(old | value))
EMULATOR_ATOMIC(atomic_exchange_explicit, value)
#undef EMULATOR_ATOMIC

}  // namespace metal

using namespace metal;

// What MLX's own headers put before every custom kernel.
typedef half float16_t;
typedef bfloat bfloat16_t;
inline size_t ceildiv(size_t n, size_t m) { return (n + m - 1) / m; }
inline float log1p(float x) {
  const float y = 1.0f + x;
  return y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}

// The attributes a kernel may ask for.
namespace emulator {
inline uint3 three(const unsigned* v) { return uint3{v[0], v[1], v[2]}; }
inline uint product(const unsigned* v) { return v[0] * v[1] * v[2]; }
inline uint index_in_group() {
  const unsigned* p = thread_now->local;
  const unsigned* size = launch_now.this_size;
  return p[0] + size[0] * (p[1] + size[1] * p[2]);
}
}  // namespace emulator
