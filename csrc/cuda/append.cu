#include "launch.h"
#include "lkv/segments.h"
#include "rows_copy.cuh"
#include "tuning.h"

// New rows behind the rows in use, one block per segment: all threads work out how many rows fit and where they go
// (appended_of), copy them payload by payload, write their positions, and after a barrier one thread writes the length.

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 256;

template <int kBlock>
__device__ __forceinline__ void append_rows(const AppendParams& p, int64_t row, const Appended& added) {
  for (int64_t payload = 0; payload < p.payloads; ++payload) {
    const Strided& input = p.inputs[payload];
    const int64_t row_bytes = p.row_bytes[payload];
    const char* from =
        input.data + row / p.heads * input.batch + row % p.heads * input.head + added.token * input.token;
    char* to = p.outputs[payload] + added.first * row_bytes;
    const uint32_t bits = low_bits(from) | low_bits(to) | static_cast<uint32_t>(input.token | row_bytes);
    with_vector(bits, [&](auto vector) {
      copy_rows<decltype(vector), kBlock>([&](int64_t i) { return from + i * input.token; },
                                          [&](int64_t i) { return to + i * row_bytes; }, row_bytes, added.rows,
                                          threadIdx.x);
    });
  }
  for (int64_t i = threadIdx.x; i < added.rows; i += kBlock) {
    p.positions[added.first + i] = static_cast<int32_t>(p.position + added.token + i);
  }
}

// A block per segment: no other block reads the length that it changes.
template <int kBlock>
__global__ void __launch_bounds__(kBlock) append_kernel(const LKV_GRID_CONSTANT AppendParams p) {
  const int64_t rows = p.batch * p.heads;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Appended added = appended_of(p, row);
    append_rows<kBlock>(p, row, added);
    block_sync();  // all threads have read the length
    if (threadIdx.x == 0) p.lengths[row] = static_cast<int32_t>(added.length);
  }
}

template <int kBlock>
Status run(const AppendParams& p, Stream stream) {
  return launch(append_kernel<kBlock>, {.blocks = std::min(p.batch * p.heads, kMaxBlocks), .block = kBlock}, stream, p);
}

}  // namespace

Status append(const AppendParams& p, Stream stream, const Tuning& tuning) {
  return with_block<kProductionBlock>(tuning, [&]<int kBlock> { return run<kBlock>(p, stream); });
}

Status append(const AppendParams& p, Stream stream) {
  return append(p, stream, {});
}

}  // namespace lkv::cuda
