// The part of CUDA's device language, and of what MLX's CUDA backend puts before a custom kernel,
// that kernel texts use here. What is missing is a compile error, never a guess.
#pragma once
#include "memory.h"
#include "numbers.h"
#include "simd.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

typedef half __half;
typedef bfloat __nv_bfloat16;
inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return __half(f); }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }

struct dim3 { unsigned x, y, z; };
namespace emulator {
inline dim3 three(const unsigned* v) { return dim3{v[0], v[1], v[2]}; }
}
#define threadIdx emulator::three(emulator::thread_now->local)
#define blockIdx emulator::three(emulator::launch_now.group)
#define blockDim emulator::three(emulator::launch_now.group_size)
#define gridDim emulator::three(emulator::launch_now.groups)
constexpr int warpSize = 32;

extern "C" {
float expf(float);
float exp2f(float);
float logf(float);
float log2f(float);
float log1pf(float);
float sqrtf(float);
float tanhf(float);
float powf(float, float);
float fmaf(float, float, float);
float floorf(float);
float ceilf(float);
float rintf(float);
float fabsf(float);
float fminf(float, float);
float fmaxf(float, float);
float copysignf(float, float);
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
inline bool isfinite(float x) { return __builtin_isfinite(x) != 0; }
#define EMULATOR_ORDERED(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_ORDERED(int) EMULATOR_ORDERED(unsigned)
EMULATOR_ORDERED(long) EMULATOR_ORDERED(unsigned long)
#undef EMULATOR_ORDERED
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline unsigned __float_as_uint(float f) { return emulator::bits<unsigned>(f); }
inline int __float_as_int(float f) { return emulator::bits<int>(f); }
inline float __uint_as_float(unsigned u) { return emulator::bits<float>(u); }
inline float __int_as_float(int i) { return emulator::bits<float>(i); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Every lane of a whole warp takes part; a mask that names fewer is refused.
namespace emulator {
inline void whole_warp(unsigned mask, const char* operation, int line) {
  if (mask != 0xffffffffu) fail("%s (line %d): a mask of fewer than 32 lanes", operation, line);
  const unsigned* size = launch_now.this_size;
  const unsigned threads = size[0] * size[1] * size[2];
  if (thread_now->simd_group * 32 + 32 > threads)
    fail("%s (line %d) names a lane that is not there", operation, line);
}
}  // namespace emulator
#define EMULATOR_LINE int line = __builtin_LINE()
#define EMULATOR_WIDTH \
  static_assert(sizeof(T) <= 8, "a shuffled value has at most 64 bits"); \
  if (width != 32) emulator::fail("line %d: a shuffle over fewer than 32 lanes", line)
template <class T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, EMULATOR_LINE) {
  EMULATOR_WIDTH;
  emulator::whole_warp(mask, "__shfl_sync", line);
  return emulator::shuffle(v, unsigned(lane) % 32u, "__shfl_sync", line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, EMULATOR_LINE) {
  EMULATOR_WIDTH;
  emulator::whole_warp(mask, "__shfl_xor_sync", line);
  const unsigned lane = emulator::thread_now->lane;
  return emulator::shuffle(v, lane ^ unsigned(lanes), "__shfl_xor_sync", line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMULATOR_LINE) {
  EMULATOR_WIDTH;
  emulator::whole_warp(mask, "__shfl_down_sync", line);
  const unsigned lane = emulator::thread_now->lane;
  return emulator::shuffle(v, lane + delta < 32 ? lane + delta : lane, "__shfl_down_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int v, EMULATOR_LINE) {
  emulator::whole_warp(mask, "__ballot_sync", line);
  const unsigned mine = v ? 1u << emulator::thread_now->lane : 0u;
  return emulator::reduce(mine, "__ballot_sync", line, true, [](unsigned a, unsigned b) {
    return a | b;
  });
}
inline int __any_sync(unsigned mask, int v, EMULATOR_LINE) {
  return __ballot_sync(mask, v, line) != 0u;
}
inline int __all_sync(unsigned mask, int v, EMULATOR_LINE) {
  return __ballot_sync(mask, v, line) == 0xffffffffu;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_LINE) {
  emulator::whole_warp(mask, "__syncwarp", line);
  const char nothing = 0;
  emulator::exchange(&nothing, 1, "__syncwarp", line);
}
inline void __syncthreads(EMULATOR_LINE) { emulator::barrier("__syncthreads", line); }

// One operating-system thread runs every fiber, so a plain update is atomic.
template <emulator::Space S, class T, class V>
inline T atomicAdd(const emulator::Pointer<S, T>& p, V value) {
  p.require_written();
  const T old = *p.checked();
  *p.checked() = T(old + T(value));
  return old;
}

namespace cuda::std {
template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
}  // namespace cuda::std
namespace cooperative_groups {
struct Grid {
  uint64_t thread_rank() const {
    const unsigned* p = emulator::thread_now->position;
    const unsigned* n = emulator::launch_now.grid;
    return p[0] + uint64_t(n[0]) * (p[1] + uint64_t(n[1]) * p[2]);
  }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

// How MLX hands over the shape and the strides of an input: by value, 10 at most.
namespace mlx::core::cu {
template <class T> struct PerAxis {
  T values[10];
  explicit PerAxis(const emulator::Buffer& buffer) : values{} {
    const uint64_t most = sizeof(values);
    __builtin_memcpy(values, buffer.data, buffer.bytes < most ? buffer.bytes : most);
  }
  T operator[](int axis) const { return values[axis]; }
  const T* data() const { return values; }
};
using Shape = PerAxis<int32_t>;
using Strides = PerAxis<int64_t>;
}  // namespace mlx::core::cu
