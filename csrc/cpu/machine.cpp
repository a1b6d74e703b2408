#include <cstdlib>
#include <stdexcept>
#include <string>

#include "lkv/cpu.h"
#include "row_kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// What this machine offers: instruction sets and huge pages.

namespace lkv::cpu {
namespace {

struct Choice {
  const RowKernels* kernels;
  bool available;
};

// Best first.
template <class Visit>
void for_each_choice(Visit&& visit) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  visit(Choice{&avx512_kernels, avx512});
  visit(Choice{&avx2_kernels, avx2});
#endif
  visit(Choice{&portable_kernels, true});
}

const RowKernels& choose(const char* wanted) {
  const bool any = wanted == nullptr || *wanted == '\0';
  const RowKernels* chosen = nullptr;
  std::string names;
  for_each_choice([&](Choice choice) {
    if (!choice.available) return;
    names += names.empty() ? "" : ", ";
    names += choice.kernels->name;
    if (chosen == nullptr && (any || choice.kernels->name == std::string(wanted))) chosen = choice.kernels;
  });
  if (chosen == nullptr) {
    throw std::runtime_error("lkv_ext: LKV_CPU_ISA=" + std::string(wanted) + " is not available here (" + names + ")");
  }
  return *chosen;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose(std::getenv("LKV_CPU_ISA"));
  return chosen;
}

const char* isa() {
  return row_kernels().name;
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr int64_t kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace lkv::cpu
