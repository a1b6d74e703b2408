#include "launch.h"
#include "rows_copy.cuh"
#include "span.cuh"
#include "tuning.h"

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 256;

// The rows of one segment that fit: where they go, and which token is the first of them.
struct Added {
  int64_t first, rows, token;
};

template <int kBlock>
__device__ __forceinline__ void append_rows(const AppendParams& p, int64_t row, const Added& added) {
  for (int64_t payload = 0; payload < p.payloads; ++payload) {
    const Strided& input = p.inputs[payload];
    const int64_t row_bytes = p.row_bytes[payload];
    const char* from =
        input.data + row / p.heads * input.batch + row % p.heads * input.head + added.token * input.token;
    char* to = p.outputs[payload] + added.first * row_bytes;
    const uint32_t bits = low_bits(from) | low_bits(to) | static_cast<uint32_t>(input.token | row_bytes);
    with_vector(bits, [&](auto vector) {
      copy_rows<decltype(vector), kBlock>([&](int64_t i) { return from + i * input.token; }, to, row_bytes, added.rows,
                                          threadIdx.x);
    });
  }
  for (int64_t i = threadIdx.x; i < added.rows; i += kBlock) {
    p.positions[added.first + i] = static_cast<int32_t>(p.position + added.token + i);
  }
}

// A block per segment: nobody else reads the length that it changes.
template <int kBlock>
__global__ void __launch_bounds__(kBlock) append_kernel(const LKV_GRID_CONSTANT AppendParams p) {
  const int64_t rows = p.batch * p.heads;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Span span = span_of(p.cu_seqlens, p.lengths, p.tokens, row);
    const int64_t valid = clamp(p.valid.at(0, row / p.heads, row % p.heads), 0, p.count);
    const int64_t fit = clamp(valid, 0, span.size - span.length);
    append_rows<kBlock>(p, row, {span.begin + span.length, fit, p.count - valid});
    block_sync();  // all threads have read the length
    if (threadIdx.x == 0) p.lengths[row] = static_cast<int32_t>(span.length + fit);
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
