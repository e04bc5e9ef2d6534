// SIMD-group functions over `exchange`: what metal_words.h and cuda_words.h name each in its way.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace emulator {

template <class T> inline T value_of(const Lanes& lanes, unsigned lane) {
  T value;
  __builtin_memcpy(&value, lanes.slots[lane], sizeof(T));
  return value;
}

template <class T> inline bool is_nan(T value) { return value != value; }

// Reduces as a tree over the lanes that take part, in the order the launch asks for: the order
// of a GPU is not specified, so no result may hang on it.
template <class T, class F>
inline T reduce(T value, const char* operation, int line, bool takes_nan, F join) {
  if (!takes_nan && is_nan(value)) fail("%s of a NaN (line %d): not specified", operation, line);
  const Lanes lanes = exchange(&value, sizeof(T), operation, line);
  T tree[32];
  unsigned count = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((lanes.present >> lanes.order[i]) & 1u) tree[count++] = value_of<T>(lanes, lanes.order[i]);
  for (; count > 1; count = (count + 1) / 2) {
    for (unsigned i = 0; i + 1 < count; i += 2) tree[i / 2] = join(tree[i], tree[i + 1]);
    if (count % 2) tree[count / 2] = tree[count - 1];
  }
  return tree[0];
}

// The value of lane `source`, which must exist.
template <class T> inline T shuffle(T value, unsigned source, const char* operation, int line) {
  const Lanes lanes = exchange(&value, sizeof(T), operation, line);
  if (source >= 32 || !((lanes.present >> source) & 1u))
    fail("%s (line %d) reads lane %u, which is not there", operation, line, source);
  return value_of<T>(lanes, source);
}

}  // namespace emulator
