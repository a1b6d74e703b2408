#include <cstdlib>
#include <stdexcept>
#include <string>

#include "lkv/cpu.h"
#include "row_kernels.h"

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

const RowKernels& choose(const char* asked) {
  const bool any = asked == nullptr || *asked == '\0';
  const RowKernels* chosen = nullptr;
  std::string names;
  for_each_choice([&](Choice choice) {
    if (!choice.available) return;
    names += names.empty() ? "" : ", ";
    names += choice.kernels->name;
    if (chosen == nullptr && (any || choice.kernels->name == std::string(asked))) chosen = choice.kernels;
  });
  if (chosen == nullptr) {
    throw std::runtime_error("lkv_ext: LKV_CPU_ISA=" + std::string(asked) + " is not available here (" + names + ")");
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

}  // namespace lkv::cpu
