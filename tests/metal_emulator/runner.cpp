// The child process: loads compiled kernels and runs one launch per request.
//
// Requests come in on descriptor 0 and answers go out on descriptor 1; child.py is the other end.
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>

#include <array>
#include <map>

#include "scheduler.h"

namespace emulator {
Thread* thread_now;
Launch launch_now;
}  // namespace emulator

using namespace emulator;

namespace {

typedef void (*Entry)(const Buffer*);
struct Kernel {
  Entry entry;
  SharedMemory shared;
};

Kernel* kernel;
const Buffer* buffers;

void answer_all(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes) {
    const ssize_t n = write(1, at, bytes);
    if (n <= 0) _exit(2);
    at += n;
    bytes -= size_t(n);
  }
}

void take(void* data, size_t bytes) {
  char* at = static_cast<char*>(data);
  while (bytes) {
    const ssize_t n = read(0, at, bytes);
    if (n <= 0) _exit(0);  // the other end is closed
    at += n;
    bytes -= size_t(n);
  }
}
uint32_t take_number() {
  uint32_t n;
  take(&n, 4);
  return n;
}

Kernel* load(const std::string& path) {
  static std::map<std::string, Kernel> loaded;
  auto found = loaded.find(path);
  if (found != loaded.end()) return &found->second;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) report(std::string("cannot load the compiled kernel: ") + dlerror());
  Kernel fresh{reinterpret_cast<Entry>(dlsym(library, "kernel_entry")), {}};
  if (!fresh.entry) report("the compiled kernel has no kernel_entry");
  return &(loaded[path] = fresh);
}

// How many elements of an output were never written, and the first of them.
std::array<uint64_t, 2> unwritten_of(const Buffer& buffer, uint32_t element) {
  std::array<uint64_t, 2> found{0, 0};
  if (!buffer.written) return found;
  for (uint64_t i = buffer.bytes / element; i-- > 0;)
    if (!buffer.written[i]) found = {found[0] + 1, i};
  return found;
}

void serve_one() {
  std::string path(take_number(), '\0');
  take(path.data(), path.size());
  uint32_t head[10];  // grid, threadgroup, whole groups, order, seed, number of buffers
  take(head, sizeof head);
  const unsigned count = head[9];
  std::vector<Buffer> given(count);
  std::vector<char> is_output(count);
  std::vector<uint32_t> elements(count);
  for (unsigned i = 0; i < count; ++i) {
    const uint32_t output = take_number();  // 0 input, 1 uninitialised output, 2 filled output
    const uint32_t element = take_number();
    uint64_t bytes;
    take(&bytes, 8);
    is_output[i] = output != 0;
    elements[i] = element;
    given[i].bytes = bytes;
    given[i].data = malloc(bytes ? bytes : 1);
    given[i].written = output == 1 ? static_cast<unsigned char*>(calloc(bytes / element + 1, 1))
                                   : nullptr;
    if (output == 1) memset(given[i].data, poison, bytes);
    else take(given[i].data, bytes);
  }
  kernel = load(path);
  buffers = given.data();
  simd_calls = 0;
  run_launch(kernel->shared, head, head + 3, head[6] != 0, Order(head[7]), head[8]);
  const uint32_t status = 0;
  answer_all(&status, 4);
  answer_all(&simd_calls, 8);
  for (unsigned i = 0; i < count; ++i) {
    if (is_output[i]) {
      answer_all(given[i].data, given[i].bytes);
      answer_all(unwritten_of(given[i], elements[i]).data(), 16);
    }
  }
  for (auto& b : given) {
    free(b.data);
    free(b.written);
  }
}

}  // namespace

namespace emulator {

[[noreturn]] void report(const std::string& text) {
  const uint32_t status = 1, length = uint32_t(text.size());
  answer_all(&status, 4);
  answer_all(&length, 4);
  answer_all(text.data(), length);
  _exit(0);
}

Lanes exchange(const void* value, unsigned bytes, const char* operation, int line) {
  SimdGroup& simd = groups[running->thread.simd_group];
  memcpy(simd.given[running->thread.lane], value, bytes);
  running->place = Place{operation, line, call_path()};
  running->state = State::at_simd;
  back_to_scheduler();
  return Lanes{simd.seen, simd.present, simd.order};
}

void barrier(const char* operation, int line) {
  running->place = Place{operation, line, call_path()};
  running->state = State::at_barrier;
  back_to_scheduler();
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[64];
  const unsigned* t = thread_now->local;
  snprintf(where, sizeof where, ": thread (%u, %u, %u)", t[0], t[1], t[2]);
  report(std::string(text) + where + group_now());
}

void poison_each_group(void* data, uint64_t bytes) {
  kernel->shared.emplace_back(data, bytes);
  memset(data, poison, bytes);
}

}  // namespace emulator

// Ends the process soon after its parent, also in the middle of an endless kernel.
void end_with_parent() {
  static const pid_t parent = getppid();
  struct sigaction look = {};
  look.sa_handler = [](int) {
    if (getppid() != parent) _exit(0);
  };
  look.sa_flags = SA_RESTART;
  sigaction(SIGALRM, &look, nullptr);
  const itimerval every = {{2, 0}, {2, 0}};
  setitimer(ITIMER_REAL, &every, nullptr);
}

int main() {
  end_with_parent();
  fiber_body = [] { kernel->entry(buffers); };
  for (;;) serve_one();
}
