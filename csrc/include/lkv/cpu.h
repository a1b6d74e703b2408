#pragma once

#include <type_traits>

#include "lkv/params.h"
#include "lkv/soft_topk.h"

// The CPU kernels. They own no threads: the caller lends its own.

namespace lkv::cpu {

// body(context, begin, end) for disjoint ranges that cover [0, n), each of at least `grain` items but the last.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(void* pool, int64_t n, int64_t grain, Body body, void* context);
  void* pool;
  int64_t count;  // how many threads may run at once

  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& f) const {
    if (n <= grain || count <= 1) {
      if (n > 0) f(int64_t{0}, n);
      return;
    }
    run(
        pool, n, grain,
        [](void* c, int64_t begin, int64_t end) { (*static_cast<std::remove_reference_t<F>*>(c))(begin, end); }, &f);
  }
};

void spans(const SpansParams& p);
void select(const SelectParams& p, const Threads& threads);
void gather(const GatherParams& p, const Threads& threads);
// select, then gather, in one parallel region: a segment moves as soon as its positions are known. `ready` is ours.
void evict(SelectParams select, GatherParams gather, const Threads& threads);
void compact(const CompactParams& p, const Threads& threads);
void append(const AppendParams& p, const Threads& threads);
void attend(const AttendParams& p, const Threads& threads);
// Rows in pages of one head each: k and v of p are pools, `batch` from one page to the next, and its tokens and
// cu_seqlens are not read. A table has pages for `longest` rows. The result is that of the same rows in spans, bit for
// bit, where `longest` is the same.
void attend_paged(const AttendParams& p, const Pages& pages, const Threads& threads);
void soft_topk(const SoftTopkParams& p, const Threads& threads);
void soft_topk_grad(const SoftTopkGradParams& p, const Threads& threads);

// Requests huge pages for a large output that has not been touched yet; a hint to the system, never an error.
void advise_huge_pages(void* data, int64_t bytes);

// "avx512", "avx2" or "portable": the best this machine runs, or the one that LKV_CPU_ISA names.
const char* isa();

}  // namespace lkv::cpu
