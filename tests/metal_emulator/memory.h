// Pointers that know their address space and their bounds.
//
// Metal keeps `device`, `constant` and `threadgroup` memory apart in the type; a C++ compiler
// without address spaces does not. So text.py rewrites `const device float* x` to
// `Pointer<Space::device, const float> x`: two spaces do not convert into each other or into a
// raw pointer, and every access is checked.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace emulator {

enum class Space { device, constant, threadgroup };

template <Space S, class T> class Pointer;

// One element that may be written: remembers that it was.
template <Space S, class T> class Cell {
 public:
  Cell(T* at, unsigned char* written, const Pointer<S, T>& from)
      : at_(at), written_(written), from_(from) {}
  operator T() const {
    from_.require_written();
    return *at_;
  }
  T operator=(T value) const {
    if (written_) *written_ = 1;
    return *at_ = value;
  }
  T operator=(const Cell& other) const { return *this = T(other); }
  template <class U> T operator+=(U v) const { return *this = T(T(*this) + v); }
  template <class U> T operator-=(U v) const { return *this = T(T(*this) - v); }
  template <class U> T operator*=(U v) const { return *this = T(T(*this) * v); }
  template <class U> T operator/=(U v) const { return *this = T(T(*this) / v); }
  template <class U> T operator|=(U v) const { return *this = T(T(*this) | v); }
  template <class U> T operator&=(U v) const { return *this = T(T(*this) & v); }
  template <class U> T operator^=(U v) const { return *this = T(T(*this) ^ v); }
  T operator++() const { return *this += T(1); }
  Pointer<S, T> operator&() const { return from_; }

 private:
  T* at_;
  unsigned char* written_;
  Pointer<S, T> from_;
};

template <Space S, class T> class Pointer {
 public:
  // A whole buffer; T must be the element that the runner was told of.
  Pointer(const Buffer& buffer, const char* name)
      : at_(static_cast<T*>(buffer.data)), first_(at_), count_(buffer.bytes / sizeof(T)),
        written_(buffer.written), name_(name) {}
  Pointer(T* at, T* first, uint64_t count, unsigned char* written, const char* name)
      : at_(at), first_(first), count_(count), written_(written), name_(name) {}
  // From a pointer that may write, in the same space.
  template <class U, class = typename only_if<same<const U, T>::value>::type>
  Pointer(const Pointer<S, U>& o)
      : at_(o.at_), first_(o.first_), count_(o.count_), written_(o.written_), name_(o.name_) {}

  template <class I> decltype(auto) operator[](I i) const { return (*this + i).element(); }
  decltype(auto) operator*() const { return element(); }
  template <class I> Pointer operator+(I i) const {
    static_assert(static_cast<I>(1) / 2 == 0, "an index is an integer");
    return {at_ + static_cast<int64_t>(i), first_, count_, written_, name_};
  }
  template <class I> Pointer& operator+=(I i) { return *this = *this + i; }
  Pointer& operator++() { return *this += 1; }

  T* checked() const {
    const long long i = index_of(at_);
    if (i < 0 || static_cast<uint64_t>(i) >= count_)
      fail("%s[%lld] is out of bounds: %s has %llu elements", name_, i, name_,
           static_cast<unsigned long long>(count_));
    return at_;
  }
  void mark_written() const {
    if (written_) written_[index_of(at_)] = 1;
  }
  void require_written() const {
    if (written_ && !written_[index_of(checked())])
      fail("%s[%lld] is read before it is written", name_, index_of(at_));
  }
  const char* name() const { return name_; }
  long long index_of(const T* at) const {
    return (reinterpret_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(first_)) /
           static_cast<intptr_t>(sizeof(T));
  }

 private:
  template <class U> struct Access {
    static Cell<S, U> of(const Pointer<S, U>& p) {
      U* at = p.checked();
      return {at, p.written_ ? p.written_ + p.index_of(at) : nullptr, p};
    }
  };
  template <class U> struct Access<const U> {
    static const U& of(const Pointer<S, const U>& p) {
      p.require_written();
      return *p.checked();
    }
  };
  template <Space, class> friend class Pointer;
  decltype(auto) element() const { return Access<T>::of(*this); }

  T* at_;
  T* first_;
  uint64_t count_;
  unsigned char* written_;
  const char* name_;
};

// `const constant int& x`: a value that is only read.
template <Space S, class T> class Reference {
 public:
  Reference(const Buffer& buffer, const char*) : at_(static_cast<T*>(buffer.data)) {}
  operator T&() const { return *at_; }

 private:
  T* at_;
};

// `threadgroup float part[32]`: shared by the threadgroup, poisoned when each group starts.
template <class T, unsigned N, unsigned... More> class SharedArray {
 public:
  explicit SharedArray(const char* name) : name_(name) { poison_each_group(data_, sizeof(data_)); }
  template <class I> decltype(auto) operator[](I i) {
    return Pointer<Space::threadgroup, T>(data_, data_, N, nullptr, name_)[i];
  }
  operator Pointer<Space::threadgroup, T>() { return {data_, data_, N, nullptr, name_}; }

 private:
  T data_[N];
  const char* name_;
};
template <class T, unsigned N, unsigned M> class SharedArray<T, N, M> {
 public:
  explicit SharedArray(const char* name) : name_(name) { poison_each_group(data_, sizeof(data_)); }
  template <class I> Pointer<Space::threadgroup, T> operator[](I i) {
    if (static_cast<uint64_t>(i) >= N)
      fail("%s[%lld] is out of bounds: %s has %u rows", name_, static_cast<long long>(i), name_, N);
    return {data_[i], data_[i], M, nullptr, name_};
  }

 private:
  T data_[N][M];
  const char* name_;
};

}  // namespace emulator
