#include "cpu/threads.h"

#include <atomic>
#include <stdexcept>
#include <thread>

#include "cpu/kernels.h"
#include "cpu/tensors.h"

namespace bert_fast::cpu {

namespace {

// Who takes part is known when all shares of the region have come, however many threads brought
// them: inside another region one thread brings them all.
class Team {
 public:
  explicit Team(int64_t shares) : shares_(shares) {}

  // Returns the index of a new member, who brings this many shares, when all have come.
  int64_t enter(int64_t shares) {
    const int64_t index = size_.fetch_add(1);
    if (come_.fetch_add(shares) + shares == shares_) signal();
    wait_until([&] { return come_.load() == shares_; });
    return index;
  }

  int64_t size() const { return size_.load(std::memory_order_relaxed); }

  // Until all members have called it.
  void wait() {
    const uint32_t round = round_.load();
    if (waiting_.fetch_add(1) + 1 == size()) {
      waiting_.store(0);
      round_.store(round + 1);
      signal();
    } else {
      wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

  // Members that wait for one who has failed would do so for ever.
  void fail() {
    failed_.store(true);
    signal();
  }

 private:
  // After each change that somebody may wait for.
  void signal() {
    signal_.fetch_add(1);
    signal_.notify_all();
  }

  template <class F>
  void wait_until(const F& done) {
    constexpr int kAwake = 4096;  // 50 to 200 microseconds, as long as `pause` takes
    constexpr int kPatient = 256;  // then whoever else wants to run may, and at last it sleeps
    for (int i = 0;; ++i) {
      const uint32_t seen = signal_.load();  // before the look: what comes after it wakes
      if (done()) return;
      if (failed_.load()) throw std::runtime_error("bert_fast.cpu: another thread failed");
      if (i < kAwake) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else if (i < kAwake + kPatient) {
        std::this_thread::yield();
      } else {
        signal_.wait(seen);
      }
    }
  }

  const int64_t shares_;
  alignas(64) std::atomic<int64_t> come_{0}, size_{0};
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<bool> failed_{false};
};

struct Member {
  Team* team = nullptr;
  int64_t index = 0;
};

thread_local Member member;

// The caller is a member of a team while this lives.
struct Membership {
  const Member before = member;
  Membership(Team& team, int64_t shares) { member = {&team, team.enter(shares)}; }
  ~Membership() { member = before; }
  Membership(const Membership&) = delete;
};

}  // namespace

int64_t thread_count() {
  return member.team ? member.team->size() : torch::stable::get_num_threads();
}

void run_parallel(int64_t n, int64_t grain, void (*call)(int64_t, int64_t, void*), void* context) {
  if (member.team) {
    const int64_t most = (n + grain - 1) / grain, size = member.team->size();
    const int64_t shares = most < size ? most : size, i = member.index;
    if (i < shares) call(n * i / shares, n * (i + 1) / shares, context);
    return member.team->wait();
  }
  // One thread's worth of work (every call of a small model) skips the round trip through torch.
  if (n <= grain) {
    if (n > 0) call(0, n, context);
    return;
  }
  require(torch_parallel_for(0, n, grain, call, context) == 0, "cpu: a parallel section failed");
}

void run_as_team(void (*call)(void*), void* context) {
  const int64_t shares = thread_count();
  if (shares == 1 || member.team) return call(context);
  Team team(shares);
  struct Job {
    Team& team;
    void (*call)(void*);
    void* context;
  } job{team, call, context};
  run_parallel(
      shares, 1,
      [](int64_t begin, int64_t end, void* p) {
        Job& job = *static_cast<Job*>(p);
        const Membership membership(job.team, end - begin);
        try {
          job.call(job.context);
        } catch (...) {
          job.team.fail();
          throw;
        }
      },
      &job);
}

void run_each_alone(int64_t threads, void (*call)(void*), void* context) {
  struct Job {
    void (*call)(void*);
    void* context;
  } job{call, context};
  run_parallel(
      threads, 1,
      [](int64_t begin, int64_t end, void* p) {
        const Job& job = *static_cast<Job*>(p);
        Team alone(1);
        const Membership membership(alone, 1);
        for (int64_t i = begin; i < end; ++i) job.call(job.context);
      },
      &job);
}

}  // namespace bert_fast::cpu
