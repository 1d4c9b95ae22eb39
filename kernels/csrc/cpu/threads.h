// Teams: threads that go through many parallel sections together.
#pragma once

#include <cstdint>

namespace bert_fast::cpu {

void run_as_team(void (*call)(void*), void* context);

// Every member calls f(). Where f reaches `run_parallel`, each does its share and waits, awake, for
// the others; all else f does, all do, so it may write only to what is its own. A section in torch's
// own way costs more where threads are put to sleep after each: so they are while a process has more
// OpenMP threads than processors, those of another library or of another Python thread included.
// Needs a pool that runs all shares of a section at once, as OpenMP does.
template <class F>
void as_team(const F& f) {
  run_as_team([](void* p) { (*static_cast<const F*>(p))(); }, const_cast<F*>(&f));
}

void run_each_alone(int64_t threads, void (*call)(void*), void* context);

// So many threads call f(), and every parallel section in it is the caller's own.
template <class F>
void each_alone(int64_t threads, const F& f) {
  run_each_alone(
      threads, [](void* p) { (*static_cast<const F*>(p))(); }, const_cast<F*>(&f));
}

}  // namespace bert_fast::cpu
