// SIMD groups in lock-step, threadgroups one after another.
//
// Fibers are switched only at SIMD calls and barriers: a SIMD group of 32 goes on when all its
// lanes stand at the same call, a threadgroup when all its threads stand at the same barrier. What
// can never go on is reported.
#pragma once
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace emulator {

constexpr unsigned width = 32;
constexpr unsigned char poison = 0xA5;
enum Order { forward, reverse, shuffled };

// Tells the other end what is wrong and ends the process.
[[noreturn]] void report(const std::string& text);

struct SimdGroup {
  unsigned char given[width][slot_bytes];
  unsigned char seen[width][slot_bytes];
  unsigned char order[width];
  unsigned present;
};

inline std::vector<Fiber*> fibers;
inline std::vector<SimdGroup> groups(1024 / width);
inline uint64_t simd_calls;
// The threadgroup memory of the kernel that runs.
typedef std::vector<std::pair<void*, uint64_t>> SharedMemory;

inline std::string standing(const Fiber* fiber) {
  char text[256];
  const Thread& t = fiber->thread;
  if (fiber->state == State::left)
    snprintf(text, sizeof text, "thread (%u, %u, %u), lane %u, has left the kernel", t.local[0],
             t.local[1], t.local[2], t.lane);
  else
    snprintf(text, sizeof text, "thread (%u, %u, %u), lane %u, waits at %s, line %d", t.local[0],
             t.local[1], t.local[2], t.lane, fiber->place.operation, fiber->place.line);
  return text;
}

inline std::string group_now() {
  char text[64];
  const unsigned* g = launch_now.group;
  snprintf(text, sizeof text, " [threadgroup (%u, %u, %u)]", g[0], g[1], g[2]);
  return text;
}

[[noreturn]] inline void fail_two(const char* what, const Fiber* a, const Fiber* b) {
  report(std::string(what) + ": " + standing(a) + "; " + standing(b) + group_now());
}

// Lets a SIMD group go on when all its lanes stand at one call. True where it went on.
inline bool release_simd(unsigned group, unsigned threads, Order order, std::mt19937& random) {
  const unsigned begin = group * width, end = std::min(begin + width, threads);
  Fiber* first = nullptr;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i]->state == State::at_simd && !first) first = fibers[i];
  if (!first) return false;
  for (unsigned i = begin; i < end; ++i) {
    Fiber* fiber = fibers[i];
    if (fiber->state == State::left)
      fail_two("divergence: a lane has left while others wait", fiber, first);
    if (fiber->state == State::at_barrier)
      fail_two("divergence: lanes of one SIMD group wait at a barrier and at a SIMD call", fiber,
               first);
    if (!(fiber->place == first->place))
      fail_two("divergence: lanes of one SIMD group wait at different SIMD calls", first, fiber);
  }
  SimdGroup& simd = groups[group];
  memcpy(simd.seen, simd.given, sizeof simd.seen);
  simd.present = 0;
  for (unsigned i = begin; i < end; ++i) {
    simd.present |= 1u << (i - begin);
    fibers[i]->state = State::ready;
  }
  // Neighbours first, or (the bits of the lane reversed) lanes 16 apart first, or at random.
  for (unsigned i = 0; i < width; ++i) {
    const unsigned bits = (i & 1) << 4 | (i & 2) << 2 | (i & 4) | (i & 8) >> 2 | i >> 4;
    simd.order[i] = static_cast<unsigned char>(order == reverse ? bits : i);
  }
  if (order == shuffled) std::shuffle(simd.order, simd.order + width, random);
  ++simd_calls;
  return true;
}

inline bool release_barrier(unsigned threads) {
  const Fiber* waiting = nullptr;
  const Fiber* other = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::at_barrier) waiting = fibers[i];
    else other = fibers[i];
  }
  if (!waiting) return false;
  if (other) fail_two("a barrier that not every thread reaches", waiting, other);
  for (unsigned i = 0; i < threads; ++i)
    if (!(fibers[i]->place == waiting->place))
      fail_two("threads wait at different barriers", fibers[i], waiting);
  for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::ready;
  return true;
}

inline void run_group(const SharedMemory& shared, Order order, std::mt19937& random) {
  const unsigned* size = launch_now.this_size;
  const unsigned threads = size[0] * size[1] * size[2];
  while (fibers.size() < threads) {
    Fiber* fiber = new Fiber;
    fiber->stack = static_cast<char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    // The lowest page is a guard: a stack that overflows crashes and touches no other fiber.
    if (fiber->stack == MAP_FAILED || mprotect(fiber->stack, 4096, PROT_NONE) != 0)
      report("no memory for the stacks of the fibers");
    fibers.push_back(fiber);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = fibers[i]->thread;
    fibers[i]->state = State::ready;
    t.lane = i % width;
    t.simd_group = i / width;
    t.local[0] = i % size[0];
    t.local[1] = i / size[0] % size[1];
    t.local[2] = i / size[0] / size[1];
    for (int d = 0; d < 3; ++d)
      t.position[d] = launch_now.group[d] * launch_now.group_size[d] + t.local[d];
  }
  for (const auto& [data, bytes] : shared) memset(data, poison, bytes);
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) turn[i] = order == reverse ? threads - 1 - i : i;
  for (;;) {
    if (order == shuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned i : turn)
      if (fibers[i]->state == State::ready) resume(fibers[i]);
    bool went_on = false;
    for (unsigned g = 0; g < (threads + width - 1) / width; ++g)
      went_on |= release_simd(g, threads, order, random);
    if (!went_on && !release_barrier(threads)) return;  // all have left
  }
}

inline void run_launch(const SharedMemory& shared, const uint32_t grid[3], const uint32_t group[3],
                       bool whole_groups, Order order, uint32_t seed) {
  std::mt19937 random(seed);
  Launch& l = launch_now;
  for (int d = 0; d < 3; ++d) {
    // Metal clips a threadgroup to the grid and its last group to the rest; CUDA runs whole blocks.
    l.group_size[d] = whole_groups ? group[d] : std::min(group[d], grid[d]);
    if (!grid[d] || !group[d]) report("a side of the grid or of the threadgroup is 0");
    l.groups[d] = (grid[d] + l.group_size[d] - 1) / l.group_size[d];
    l.grid[d] = whole_groups ? l.groups[d] * l.group_size[d] : grid[d];
  }
  if (uint64_t(l.group_size[0]) * l.group_size[1] * l.group_size[2] > 1024)
    report("a threadgroup of more than 1024 threads");
  for (unsigned z = 0; z < l.groups[2]; ++z)
    for (unsigned y = 0; y < l.groups[1]; ++y)
      for (unsigned x = 0; x < l.groups[0]; ++x) {
        const unsigned at[3] = {x, y, z};
        for (int d = 0; d < 3; ++d) {
          l.group[d] = at[d];
          l.this_size[d] = std::min(l.group_size[d], l.grid[d] - at[d] * l.group_size[d]);
        }
        run_group(shared, order, random);
      }
}

}  // namespace emulator
