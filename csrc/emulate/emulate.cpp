// emulate.cpp: fibers and their scheduler; emulate.h says what they stand for.
#include "emulate.h"

#include <memory>
#include <mutex>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace halfbyte::emulate {

Place place;

namespace {

constexpr size_t kStack = 64 * 1024;

#if defined(__x86_64__)
// A switch without the system calls of swapcontext, which would be most of the time: the registers that a call
// must keep go onto the old stack and come from the new one.
struct Context {
  void* stack = nullptr;
};

extern "C" void halfbyte_emulate_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden halfbyte_emulate_switch
.globl halfbyte_emulate_switch
.type halfbyte_emulate_switch, @function
halfbyte_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size halfbyte_emulate_switch, . - halfbyte_emulate_switch
)");

void prepare(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // the alignment that a function finds after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack = top;
}

void switch_to(Context& from, Context& to) { halfbyte_emulate_switch(&from.stack, to.stack); }
#else
using Context = ucontext_t;

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
  Context context;
  dim3 thread;
  bool live;
  uint64_t block_arrivals, warp_arrivals;
  uint64_t slot;  // what it gives in a shuffle
};

std::mutex running;
std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char[]>> stacks;
size_t current, count;
Context scheduler;
const std::function<void()>* body;

void yield() { switch_to(fibers[current].context, scheduler); }

void entry() {
  (*body)();
  fibers[current].live = false;
  yield();
}

// Whether all live fibers of [first, end) have come as far as `arrivals`.
bool arrived(uint64_t Fiber::* arrivals, size_t first, size_t end, uint64_t goal) {
  for (size_t i = first; i < end; ++i) {
    if (fibers[i].live && fibers[i].*arrivals < goal) return false;
  }
  return true;
}

void barrier(uint64_t Fiber::* arrivals, size_t first, size_t end) {
  const uint64_t goal = ++(fibers[current].*arrivals);
  while (!arrived(arrivals, first, end, goal)) yield();
}

void run_block(dim3 size) {
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    prepare(fiber.context, stacks[i].get(), entry);
    fiber.thread = dim3(static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                        static_cast<unsigned>(i / size.x / size.y));
    fiber.live = true;
    fiber.block_arrivals = fiber.warp_arrivals = 0;
  }
  bool any = true;
  while (any) {
    any = false;
    for (current = 0; current < count; ++current) {
      if (!fibers[current].live) continue;
      any = true;
      place.thread = fibers[current].thread;
      switch_to(scheduler, fibers[current].context);
    }
  }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t, void*, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(running);
  count = static_cast<size_t>(block.x) * block.y * block.z;
  if (fibers.size() < count) fibers.resize(count);
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  body = &kernel;
  place.block_size = block;
  place.grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        place.block = dim3(x, y, z);
        run_block(block);
      }
    }
  }
}

void block_barrier() { barrier(&Fiber::block_arrivals, 0, count); }

uint64_t exchange_xor(uint64_t value, int mask) {
  const size_t first = current / HALFBYTE_WARP * HALFBYTE_WARP;
  const size_t end = first + HALFBYTE_WARP < count ? first + HALFBYTE_WARP : count;
  fibers[current].slot = value;
  barrier(&Fiber::warp_arrivals, first, end);
  const uint64_t got = fibers[first + ((current - first) ^ static_cast<size_t>(mask))].slot;
  barrier(&Fiber::warp_arrivals, first, end);
  return got;
}

}  // namespace halfbyte::emulate
