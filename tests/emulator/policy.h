#pragma once

#include <cstdint>
#include <string_view>

// Which runnable thread goes next: always the one of highest priority; a schedule is a rule for giving priorities.

namespace emulator {

// A small generator of its own, so that a seed means the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

enum class Schedule {
  in_order,          // earlier threads first
  reversed,          // later threads first
  warp_priority,     // random priority per warp, its lanes in order or reversed
  priority_changes,  // random priority per thread, changed at random points of the run (as in PCT)
};

class Policy {
 public:
  Policy() = default;
  Policy(Schedule schedule, uint64_t seed) : schedule_(schedule), random_(seed) {
    backwards_ = random_.next() & 1;
    period_ = uint64_t{4} << (3 * (random_.next() % 4));
  }

  // `sequence` counts threads in launch order; `warp_draw` is one random draw shared by a warp.
  uint64_t priority(uint64_t sequence, uint64_t warp_draw) {
    switch (schedule_) {
      case Schedule::in_order:
        return ~sequence;
      case Schedule::reversed:
        return sequence;
      case Schedule::warp_priority:
        return (warp_draw & ~uint64_t{31}) | ((backwards_ ? sequence : ~sequence) & 31);
      case Schedule::priority_changes:
        return random_.next();
    }
    return 0;
  }

  bool changes_here() { return schedule_ == Schedule::priority_changes && random_.next() % period_ == 0; }
  // Whether a spinning thread looks again after every published flag, or only once nothing else can run.
  bool wakes_spinning() const { return schedule_ != Schedule::in_order; }
  uint64_t draw() { return random_.next(); }

 private:
  Schedule schedule_ = Schedule::in_order;
  Random random_;
  bool backwards_ = false;
  uint64_t period_ = 4;
};

inline bool parse(std::string_view name, Schedule* schedule) {
  constexpr std::string_view names[] = {"in_order", "reversed", "warp_priority", "priority_changes"};
  for (int i = 0; i < 4; ++i) {
    if (names[i] == name) return *schedule = static_cast<Schedule>(i), true;
  }
  return false;
}

}  // namespace emulator
