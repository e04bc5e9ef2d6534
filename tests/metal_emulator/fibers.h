// One fiber per GPU thread, all in one operating-system thread.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "runtime.h"

namespace emulator {

constexpr size_t stack_bytes = 256 * 1024;
enum class State { ready, at_simd, at_barrier, left };

// A place in the kernel. `path`, the calls that led there, tells places apart; the rest is for
// the message.
struct Place {
  const char* operation;
  int line;
  uint64_t path;
  bool operator==(const Place& other) const { return path == other.path; }
};

struct Fiber {
  Thread thread;
  State state;
  Place place;
  char* stack;
#ifdef EMULATOR_SANITIZED
  ucontext_t context;
#else
  jmp_buf context;
#endif
  bool started = false;
};

inline Fiber* running;
inline void (*fiber_body)();  // runs the kernel once, as the running thread

// setjmp and longjmp save no signal mask and so cost no system call; the sanitizers only know
// swapcontext.
inline ucontext_t scheduler_context;
#ifndef EMULATOR_SANITIZED
inline jmp_buf scheduler;
#endif

inline void back_to_scheduler() {
#ifdef EMULATOR_SANITIZED
  swapcontext(&running->context, &scheduler_context);
#else
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
#endif
}

inline void fiber_main() {
  for (;;) {  // one turn per threadgroup; the stack is used again
    fiber_body();
    running->state = State::left;
    back_to_scheduler();
  }
}

inline void start(Fiber* fiber) {
  ucontext_t first;
  getcontext(&first);
  first.uc_stack.ss_sp = fiber->stack;
  first.uc_stack.ss_size = stack_bytes;
  first.uc_link = nullptr;
  makecontext(&first, fiber_main, 0);
  fiber->started = true;
#ifdef EMULATOR_SANITIZED
  fiber->context = first;
  swapcontext(&scheduler_context, &fiber->context);
#else
  swapcontext(&scheduler_context, &first);
#endif
}

inline void resume(Fiber* fiber) {
  running = fiber;
  thread_now = &fiber->thread;
#ifdef EMULATOR_SANITIZED
  if (!fiber->started) start(fiber);
  else swapcontext(&scheduler_context, &fiber->context);
#else
  if (_setjmp(scheduler) == 0) {
    if (!fiber->started) start(fiber);
    else _longjmp(fiber->context, 1);
  }
#endif
}

// The return addresses from here to the start of the fiber, as one number: two calls of a helper
// are two places, also where the SIMD call stands on the same line of the helper.
inline uint64_t call_path() {
  uint64_t path = 0;
  char* frame = static_cast<char*>(__builtin_frame_address(0));
  const char* end = running->stack + stack_bytes;
  while (frame >= running->stack && frame + 16 <= end) {
    path = (path ^ *reinterpret_cast<uint64_t*>(frame + 8)) * 0x9E3779B97F4A7C15ull;
    char* next = *reinterpret_cast<char**>(frame);
    if (next <= frame) break;
    frame = next;
  }
  return path;
}

}  // namespace emulator
