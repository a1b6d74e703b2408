#include "block_scan.cuh"
#include "tuning.h"
#include "upload.cuh"

namespace lkv::cuda {
namespace {

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Wish {
  int64_t wanted;  // rows that the budget alone would keep
  int64_t keep;    // rows kept if the output does not end
  int64_t span;    // at most `total`, so that sums of spans stay in range
};

__device__ __forceinline__ Wish wish_of(const SpansParams& p, int64_t row) {
  const Segment segment = segment_of(p.source, row);
  Wish wish;
  wish.wanted = clamp(p.budgets.at(segment.layer, segment.b, segment.h), 0, segment.length);
  wish.keep = clamp(p.max_budget, 0, wish.wanted);
  if (p.padded > 0) {
    wish.keep = smaller(wish.keep, p.padded);
    wish.span = smaller(p.padded, p.total);
  } else {
    const int64_t used = wish.keep + smaller(p.reserve, p.total);
    wish.span = smaller((used + p.align - 1) / p.align * p.align, p.total);
  }
  return wish;
}

// One block walks all segments, carrying the sum of the spans so far. It first writes the tables that it and the
// kernels behind it read: a launch of their own would take longer.
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    spans_kernel(const LKV_GRID_CONSTANT SpansParams p, const LKV_GRID_CONSTANT Chunk tables) {
  trigger_dependents();
  write_chunk(tables);
  block_sync();
  auto* scan = dyn_smem<BlockScan<int64_t, kBlock>>();
  const int64_t rows = p.source.rows();
  int64_t carry = 0, cut = 0;
  for (int64_t base = 0; base < rows; base += kBlock) {
    const int64_t row = base + threadIdx.x;
    Wish wish = {};
    if (row < rows) wish = wish_of(p, row);
    int64_t sum;
    const int64_t before = carry + scan->exclusive(wish.span, sum);
    if (row < rows) {
      const int64_t begin = smaller(before, p.total);
      const int64_t keep = smaller(wish.keep, p.total - begin);
      cut += wish.wanted - keep;
      p.lengths[row] = static_cast<int32_t>(keep);
      p.cu_seqlens[row] = static_cast<int32_t>(begin);
      if (p.ready != nullptr) p.ready[row] = 0;
    }
    carry += sum;
  }
  int64_t overflow;
  scan->exclusive(cut, overflow);
  if (threadIdx.x == 0) {
    p.cu_seqlens[rows] = static_cast<int32_t>(smaller(carry, p.total));
    if (p.overflow != nullptr) *p.overflow = static_cast<int32_t>(smaller(overflow, INT32_MAX));
  }
}

template <int kBlock>
Status run(const SpansParams& p, const Chunk& tables, Stream stream) {
  const Grid grid = {.blocks = 1, .block = kBlock, .shared = sizeof(BlockScan<int64_t, kBlock>)};
  return launch(spans_kernel<kBlock>, grid, stream, p, tables);
}

}  // namespace

Status spans(const SpansParams& p, Upload tables, Stream stream, const Tuning& tuning) {
  static_assert(sizeof(SpansParams) + sizeof(Chunk) <= 4096);
  Chunk last = take_chunk(tables);
  while (tables.bytes > 0) {
    const Status status = upload_chunk(last, stream);
    if (status != cudaSuccess) return status;
    last = take_chunk(tables);
  }
  return with_block<512>(tuning, [&]<int kBlock> { return run<kBlock>(p, last, stream); });
}

Status spans(const SpansParams& p, const Upload& tables, Stream stream) {
  return spans(p, tables, stream, {});
}

}  // namespace lkv::cuda
