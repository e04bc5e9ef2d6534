// Metal's words as declarations with clang's real address spaces: enough to check a kernel text,
// not to run it. lint.py puts this before the text.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
typedef decltype(sizeof(0)) size_t;
typedef signed char int8_t;
typedef unsigned char uchar, uint8_t;
typedef short int16_t;
typedef unsigned short ushort, uint16_t;
typedef int int32_t;
typedef unsigned int uint, uint32_t;
typedef long int64_t;
typedef unsigned long ulong, uint64_t;
typedef _Float16 half, float16_t;
typedef __bf16 bfloat, bfloat16_t;
struct uint2 { uint x, y; };
struct uint3 { uint x, y, z; };
namespace metal {
template <class T> struct atomic { T value; };
enum memory_order { memory_order_relaxed };
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
float exp(float); float exp2(float); float log(float); float log2(float); float sqrt(float);
float rsqrt(float); float tanh(float); float fabs(float); float abs(float); float floor(float);
float rint(float); float fma(float, float, float); float pow(float, float);
bool isnan(float); bool isinf(float); bool isfinite(float);
float fmin(float, float); float fmax(float, float);
float min(float, float); int min(int, int); uint min(uint, uint);
float max(float, float); int max(int, int); uint max(uint, uint);
uint popcount(uint); uint ctz(uint); uint clz(uint);
namespace precise { using metal::exp; using metal::log; using metal::sqrt; using metal::tanh; }
namespace fast { using metal::exp; using metal::log; using metal::sqrt; using metal::tanh; }
template <class T> T select(T, T, bool);
template <class T> T simd_sum(T);
template <class T> T simd_product(T);
template <class T> T simd_max(T);
template <class T> T simd_min(T);
uint simd_or(uint); uint simd_and(uint); uint simd_xor(uint);
bool simd_any(bool); bool simd_all(bool);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_shuffle_up(T, ushort);
template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_broadcast(T, ushort);
template <class T> T simd_prefix_exclusive_sum(T);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T, class V> T atomic_fetch_add_explicit(device atomic<T>*, V, memory_order);
template <class T, class V> T atomic_fetch_max_explicit(device atomic<T>*, V, memory_order);
template <class T, class V> void atomic_store_explicit(device atomic<T>*, V, memory_order);
template <class T> T atomic_load_explicit(const device atomic<T>*, memory_order);
}
template <class To, class From> To as_type(From);
using namespace metal;
float log1p(float);
size_t ceildiv(size_t, size_t);
