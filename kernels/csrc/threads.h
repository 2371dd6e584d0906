// Work shared by a team of threads.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
inline void relax() { asm volatile("yield"); }
#else
inline void relax() {}
#endif

void give_way();  // lets another thread have the core

// Calls fn(context, thread, threads) for every thread of the team, this one included, and returns when all are done. The
// team may be smaller than asked for. It is that of the OpenMP runtime in this process, torch's, where there is one.
void run_team(int threads, void (*fn)(void*, int, int), void* context);

// Memory of the calling thread, on a cache line, for whatever it computes next.
constexpr int64_t SCRATCH = 192 << 10;
void* scratch();

template <class Fn> void parallel(int threads, Fn fn) {
  if (threads <= 1) return fn(0, 1);
  run_team(threads, [](void* context, int thread, int count) { (*static_cast<Fn*>(context))(thread, count); }, &fn);
}

// Where the threads of a team wait for each other. They spin at first: a phase lasts microseconds.
class Barrier {
 public:
  void wait(int threads) {
    if (threads <= 1) return;
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) spins < 4000 ? relax() : give_way();
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

// Numbers 0, 1, 2, ... each handed out once: shares of work for whoever is free.
class Counter {
 public:
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
};
