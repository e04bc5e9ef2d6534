// 16-bit floats, and what both languages need of them.
//
// A half or bfloat is only made by an explicit cast, and its arithmetic rounds after every
// operation, as it does on a GPU.
#pragma once
#include <stdint.h>

using size_t = decltype(sizeof(0));

namespace emulator {

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bfloat(float f) {
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline float bfloat_to_float(uint16_t b) { return bits<float>(uint32_t(b) << 16); }

// Round to nearest even, with subnormals; from 65520 on the result is infinity.
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x33000001u) return uint16_t(sign);
  const int exponent = int(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int shift = exponent < -14 ? -1 - exponent : 13;
  const uint32_t base = exponent < -14 ? 0u : uint32_t(exponent + 14) << 10;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t middle = 1u << (shift - 1);
  uint32_t kept = mantissa >> shift;
  if (rest > middle || (rest == middle && (kept & 1u))) ++kept;
  return uint16_t(sign | (base + kept));
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31u) return bits<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0u) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

template <class T> struct is_integer { static constexpr bool value = false; };
#define EMULATOR_INTEGER(T) \
  template <> struct is_integer<T> { static constexpr bool value = true; };
EMULATOR_INTEGER(bool) EMULATOR_INTEGER(signed char) EMULATOR_INTEGER(unsigned char)
EMULATOR_INTEGER(short) EMULATOR_INTEGER(unsigned short) EMULATOR_INTEGER(int)
EMULATOR_INTEGER(unsigned) EMULATOR_INTEGER(long) EMULATOR_INTEGER(unsigned long)
template <bool, class T = void> struct only_if {};
template <class T> struct only_if<true, T> { using type = T; };
template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

}  // namespace emulator

// Integer operands are refused: Metal makes them 16-bit floats, CUDA finds them ambiguous.
#define EMULATOR_FLOAT16(name, encode, decode)                                              \
  struct name {                                                                             \
    uint16_t raw;                                                                           \
    name() = default;                                                                       \
    explicit name(float f) : raw(emulator::encode(f)) {}                                    \
    operator float() const { return emulator::decode(raw); }                                \
  };                                                                                        \
  inline name operator-(name a) { return name(-float(a)); }                                 \
  EMULATOR_OPERATOR(name, +) EMULATOR_OPERATOR(name, -)                                     \
  EMULATOR_OPERATOR(name, *) EMULATOR_OPERATOR(name, /)
#define EMULATOR_OPERATOR(name, op)                                                         \
  inline name operator op(name a, name b) { return name(float(a) op float(b)); }            \
  template <class I, class = typename emulator::only_if<emulator::is_integer<I>::value>::type> \
  name operator op(name, I) = delete;                                                       \
  template <class I, class = typename emulator::only_if<emulator::is_integer<I>::value>::type> \
  name operator op(I, name) = delete;
EMULATOR_FLOAT16(half, float_to_half, half_to_float)
EMULATOR_FLOAT16(bfloat, float_to_bfloat, bfloat_to_float)
#undef EMULATOR_FLOAT16
#undef EMULATOR_OPERATOR
