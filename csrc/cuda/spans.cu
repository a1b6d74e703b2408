#include <cstring>

#include "block_scan.cuh"
#include "launch.h"
#include "lkv/segments.h"
#include "tuning.h"

// The first launch of an eviction, by one block:
//   1. Let the kernels behind start; they wait for this grid before they read what it writes.
//   2. Write the tables of the call, and the budgets if they came from the host, to device memory. They are an argument
//      of the launch; what does not fit into 4 KB goes ahead in launches of its own.
//   3. For as many segments at a time as it has threads: each thread computes the size of one span, a scan over the
//      block adds up those before it, and the thread writes length, offset and a cleared flag (the rules are in
//      lkv/segments.h).
//   4. Write the end of the last span and, summed over the block, the rows that were cut.

namespace lkv::cuda {
namespace {

// Bytes that travel as an argument of a launch. All arguments together have 4 KB.
constexpr uint32_t kChunkWords = 216;

struct Chunk {
  uint4 words[kChunkWords];
  char* out;
  uint32_t bytes;
};

// By the threads of one block. After a barrier they may read the bytes.
__device__ __forceinline__ void write_chunk(const Chunk& chunk) {
  uint32_t copied = 0;
  if (reinterpret_cast<uintptr_t>(chunk.out) % sizeof(uint4) == 0) {
    copied = chunk.bytes / sizeof(uint4) * sizeof(uint4);
    for (uint32_t i = threadIdx.x; i < copied / sizeof(uint4); i += blockDim.x) {
      reinterpret_cast<uint4*>(chunk.out)[i] = chunk.words[i];
    }
  }
  const char* in = reinterpret_cast<const char*>(chunk.words);
  for (uint32_t i = copied + threadIdx.x; i < chunk.bytes; i += blockDim.x) chunk.out[i] = in[i];
}

// Takes the first chunk off what is left.
Chunk take_chunk(Upload& left) {
  Chunk chunk;
  chunk.out = static_cast<char*>(left.device);
  chunk.bytes = static_cast<uint32_t>(std::min(left.bytes, sizeof chunk.words));
  std::memcpy(chunk.words, left.host, chunk.bytes);
  left = {static_cast<const char*>(left.host) + chunk.bytes, chunk.out + chunk.bytes, left.bytes - chunk.bytes};
  return chunk;
}

constexpr int kUploadBlock = 256;
constexpr int kFewRows = 128;  // for which a small block is enough, whose barriers are short

__global__ void __launch_bounds__(kUploadBlock) upload_kernel(const LKV_GRID_CONSTANT Chunk chunk) {
  write_chunk(chunk);
}

Status upload_chunk(const Chunk& chunk, Stream stream) {
  return launch(upload_kernel, {.blocks = 1, .block = kUploadBlock}, stream, chunk);
}

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
    SpanSize size = {};
    if (row < rows) size = span_size_of(p, row);
    int64_t sum;
    const int64_t before = carry + scan->exclusive(size.span, sum);
    if (row < rows) cut += write_span(p, row, size, before);
    carry += sum;
  }
  int64_t overflow;
  scan->exclusive(cut, overflow);
  if (threadIdx.x == 0) write_end(p, carry, overflow);
}

template <int kBlock>
Status run(const SpansParams& p, const Chunk& tables, Stream stream) {
  const Grid grid = {.blocks = 1, .block = kBlock, .shared = sizeof(BlockScan<int64_t, kBlock>)};
  return launch(spans_kernel<kBlock>, grid, stream, p, tables);
}

}  // namespace

Status upload(Upload bytes, Stream stream) {
  Status status = cudaSuccess;
  while (bytes.bytes > 0 && status == cudaSuccess) status = upload_chunk(take_chunk(bytes), stream);
  return status;
}

Status spans(const SpansParams& p, Upload tables, Stream stream, const Tuning& tuning) {
  static_assert(sizeof(SpansParams) + sizeof(Chunk) <= 4096);
  Chunk last = take_chunk(tables);
  while (tables.bytes > 0) {
    const Status status = upload_chunk(last, stream);
    if (status != cudaSuccess) return status;
    last = take_chunk(tables);
  }
  const auto go = [&]<int kBlock> { return run<kBlock>(p, last, stream); };
  return p.source.rows() <= kFewRows ? with_block<kFewRows>(tuning, go) : with_block<512>(tuning, go);
}

Status spans(const SpansParams& p, const Upload& tables, Stream stream) {
  return spans(p, tables, stream, {});
}

const char* describe(Status status) {
  if (status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is older than the CUDA runtime in this library: update it to the version that "
           "lkv_ext.build_info()['cuda_driver'] names, or build lkv_ext with a toolkit of the driver's version";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace lkv::cuda
