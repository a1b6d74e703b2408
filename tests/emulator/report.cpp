#include <unistd.h>

#include <cstdio>
#include <map>

#include "scheduler.h"

// What a person needs to see when a kernel is stuck: which threads of which block wait where.

namespace emulator {
namespace {

std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text += (text.empty() ? "" : ",") + std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

std::string state(const Thread& thread, const Thread* current) {
  if (thread.done) return "exited";
  if (&thread == current) return "running";
  if (thread.waits_at == nullptr) return "runnable";
  return std::string(thread.waits_at) + " at " + thread.where.file_name() + ":" + std::to_string(thread.where.line());
}

}  // namespace

std::string Scheduler::report() const {
  std::string text;
  for (const auto& grid : grids_) {
    const std::string name = "  grid " + std::to_string(grid->ordinal);
    if (grid->clusters.empty()) text += name + ": not started\n";
    for (const auto& cluster : grid->clusters) {
      for (const auto& block : cluster->blocks) {
        std::map<std::string, std::vector<unsigned>> groups;
        for (const Thread& thread : block->threads) groups[state(thread, current_)].push_back(thread.index);
        const uint3 b = block->index;
        const std::string where =
            " block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
        for (const auto& [what, threads] : groups) {
          text += name + where + " threads " + ranges(threads) + ": " + what + "\n";
        }
      }
    }
  }
  return text;
}

void Scheduler::fail(const std::string& what) const {
  const std::string text = "lkv emulator: " + what + "\n" + report();
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
  std::abort();
}

}  // namespace emulator
