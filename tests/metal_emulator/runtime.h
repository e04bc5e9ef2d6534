// What the text of one kernel sees of the process that runs it.
//
// runner.cpp defines everything declared here and loads compiled kernels as shared libraries.
// This header includes next to nothing, because it is parsed once for every kernel text.
#pragma once
#include <stdint.h>

namespace emulator {

// Where the running thread stands. `lane` counts inside its SIMD group (warp) of 32.
struct Thread {
  unsigned position[3];  // in the grid
  unsigned local[3];     // in its threadgroup (block)
  unsigned lane;
  unsigned simd_group;
};

// The shape of the launch, and the threadgroup that is running.
struct Launch {
  unsigned grid[3];       // threads
  unsigned groups[3];     // threadgroups
  unsigned group_size[3]; // threads of a whole threadgroup
  unsigned group[3];      // position of the running threadgroup
  unsigned this_size[3];  // its threads; an edge group of Metal may hold fewer
};

// One input or output as the runner holds it.
struct Buffer {
  void* data;
  uint64_t bytes;
  unsigned char* written;  // one flag per element of an uninitialised output, else null
};

// What every lane of a SIMD group handed in at the same call.
constexpr unsigned slot_bytes = 8;
struct Lanes {
  const unsigned char (*slots)[slot_bytes];
  unsigned present;            // bit l: lane l exists and took part
  const unsigned char* order;  // the order in which a reduction visits the lanes
};

extern Thread* thread_now;
extern Launch launch_now;

// Waits until all lanes of the SIMD group stand at this very call, then hands over their values.
Lanes exchange(const void* value, unsigned bytes, const char* operation, int line);
// Waits until all threads of the threadgroup stand at this very barrier.
void barrier(const char* operation, int line);
// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Has `bytes` at `data` filled with poison at the start of every threadgroup.
void poison_each_group(void* data, uint64_t bytes);

}  // namespace emulator
