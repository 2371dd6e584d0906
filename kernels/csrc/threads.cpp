#include "threads.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

// Of the OpenMP runtime in the process, whose threads are those that torch computes on: a second team would take cores from
// them. Null where the process has none.
extern "C" {
void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

namespace {

struct Work {
  void (*fn)(void*, int, int);
  void* context;
  int threads;
  std::atomic<int> next{0};
};

void share_of_pool(Work& work) { work.fn(work.context, work.next.fetch_add(1), work.threads); }

void share_of_openmp(void* data) {
  const Work& work = *static_cast<Work*>(data);
  work.fn(work.context, omp_get_thread_num(), omp_get_num_threads());
}

// Threads of our own, which sleep between two runs. One run at a time.
class Pool {
 public:
  void run(Work& work) {
    std::lock_guard<std::mutex> turn(running_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < work.threads - 1) threads_.emplace_back([this] { serve(); }).detach();
      work_ = &work, left_ = wanted_ = work.threads - 1;
    }
    wake_.notify_all();
    share_of_pool(work);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      wanted_--;
      Work* work = work_;
      lock.unlock();
      share_of_pool(*work);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex running_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;
  int wanted_ = 0, left_ = 0;
};

}  // namespace

void give_way() { std::this_thread::yield(); }

void* scratch() {
  alignas(64) thread_local unsigned char memory[SCRATCH];
  return memory;
}

void run_team(int threads, void (*fn)(void*, int, int), void* context) {
  Work work{fn, context, threads};
  if (GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    GOMP_parallel(share_of_openmp, &work, unsigned(threads), 0);
    return;
  }
  static Pool* pool = new Pool;  // never destroyed: its threads outlive main
  pool->run(work);
}
