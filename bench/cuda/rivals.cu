// What else a CUDA programmer could put together, for the benchmark alone: CUB's top-k with the positions sorted, and a
// compaction with one block per head. Raw pointers and a stream; bench/rivals_cuda.py compiles and loads it.
//
// CUB's batched top-k came with CCCL 3.5, for rows that one block holds; since 3.6 clusters take longer ones. Older
// headers still give the mover.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <cub/version.cuh>

#if __has_include(<cub/device/device_batched_topk.cuh>)
#include <cub/device/device_batched_topk.cuh>
#include <cub/device/device_topk.cuh>
#include <cuda/argument>
#include <cuda/iterator>
#define RIVALS_TOPK 1
#else
#define RIVALS_TOPK 0
#endif

#define RIVALS_API extern "C" __attribute__((visibility("default")))

namespace rivals {

// bench/rivals_cuda.py passes an array of int64 in place of either: every field has 8 bytes.
struct Selection {
  const void* scores;           // [rows, length]
  const int32_t* budgets;       // [rows], device
  const int32_t* offsets;       // [rows], device: where each row's positions begin
  const int32_t* host_budgets;  // the same two on the host
  const int32_t* host_offsets;
  int32_t* unordered;  // [total]
  int32_t* positions;  // [total]: row * length + position, ascending
  int64_t rows, length, total;
  int64_t dtype;    // 0 fp32, 1 fp16, 2 bf16
  int64_t batched;  // 1: all rows in one call, 0: a call for each
};

struct Move {
  const uint4* source[2];    // [rows, length, vectors]
  uint4* target[2];          // packed, or the source
  const int32_t* positions;  // within each row
  const int32_t* offsets;    // [rows + 1]
  int64_t rows, length, vectors;
  int64_t in_place;
};

constexpr int64_t kOneBlock = 8192;  // keys of 32 bits and positions that CUB fits into a block's shared memory
#if __has_include(<cub/agent/agent_batched_topk_cluster.cuh>)
constexpr int64_t kLongest = int64_t{1} << 21;
#else
constexpr int64_t kLongest = RIVALS_TOPK ? kOneBlock : 0;
#endif

#if RIVALS_TOPK

template <class Key>
struct KeysOf {
  const Key* scores;
  int64_t length;
  __host__ __device__ const Key* operator()(int64_t row) const { return scores + row * length; }
};

struct PositionsOf {
  int64_t length;
  __host__ __device__ auto operator()(int64_t row) const {
    return cuda::make_counting_iterator(static_cast<int32_t>(row * length));
  }
};

struct SpanOf {
  int32_t* out;
  const int32_t* offsets;
  __host__ __device__ int32_t* operator()(int64_t row) const { return out + offsets[row]; }
};

template <class Function>
auto each_row(Function function) {
  return cuda::make_transform_iterator(cuda::make_counting_iterator(int64_t{0}), function);
}

// The weakest guarantees of CUB, so its fastest kernels: any of a tie, in any order.
auto environment(cudaStream_t stream) {
  namespace execution = cuda::execution;
  return cuda::std::execution::env{cuda::stream_ref{stream}, execution::require(execution::determinism::not_guaranteed,
                                                                                execution::tie_break::unspecified,
                                                                                execution::output_ordering::unsorted)};
}

template <int64_t kMost, class Key>
cudaError_t batched_topk(void* scratch, size_t& bytes, const Selection& s, cudaStream_t stream) {
  const auto length = cuda::args::immediate{s.length, cuda::args::bounds<int64_t{1}, kMost>()};
  const auto budgets = cuda::args::deferred_sequence{s.budgets, cuda::args::bounds<int32_t{0}, int32_t{kMost}>()};
  return cub::DeviceBatchedTopK::MaxPairs(
      scratch, bytes, each_row(KeysOf<Key>{static_cast<const Key*>(s.scores), s.length}),
      cuda::make_constant_iterator(cuda::discard_iterator{}), each_row(PositionsOf{s.length}),
      each_row(SpanOf{s.unordered, s.offsets}), length, budgets, cuda::args::immediate{s.rows}, environment(stream));
}

// Calls on one stream run after each other: they share the scratch.
template <class Key>
cudaError_t row_topk(void* scratch, size_t& bytes, const Selection& s, cudaStream_t stream) {
  const KeysOf<Key> keys{static_cast<const Key*>(s.scores), s.length};
  const PositionsOf positions{s.length};
  size_t most = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    size_t needed = bytes;
    if (const cudaError_t error = cub::DeviceTopK::MaxPairs(
            scratch, needed, keys(row), cuda::discard_iterator{}, positions(row), s.unordered + s.host_offsets[row],
            static_cast<int32_t>(s.length), s.host_budgets[row], environment(stream))) {
      return error;
    }
    most = std::max(most, needed);
  }
  if (scratch == nullptr) bytes = most;
  return cudaSuccess;
}

template <class Key>
cudaError_t topk(void* scratch, size_t& bytes, const Selection& s, cudaStream_t stream) {
  if (!s.batched) return row_topk<Key>(scratch, bytes, s, stream);
  if (s.length <= kOneBlock) return batched_topk<kOneBlock, Key>(scratch, bytes, s, stream);
  if (s.length <= kLongest) return batched_topk<kLongest, Key>(scratch, bytes, s, stream);
  return cudaErrorInvalidValue;
}

cudaError_t topk(void* scratch, size_t& bytes, const Selection& s, cudaStream_t stream) {
  if (s.dtype == 0) return topk<float>(scratch, bytes, s, stream);
  if (s.dtype == 1) return topk<__half>(scratch, bytes, s, stream);
  if (s.dtype == 2) return topk<__nv_bfloat16>(scratch, bytes, s, stream);
  return cudaErrorInvalidValue;
}

#else

cudaError_t topk(void*, size_t&, const Selection&, cudaStream_t) {
  return cudaErrorNotSupported;
}

#endif

// One radix sort for all rows: a position carries its row in front, and rows lie after each other already. It looks at
// the bits in use alone.
cudaError_t sort(void* scratch, size_t& bytes, const Selection& s, cudaStream_t stream) {
  int bits = 1;
  while (bits < 31 && s.rows * s.length > int64_t{1} << bits) ++bits;
  return cub::DeviceRadixSort::SortKeys(scratch, bytes, s.unordered, s.positions, s.total, 0, bits, stream);
}

constexpr int kTile = 16;
constexpr int64_t kMostVectors = 64;

// A tile is loaded whole before any of it is stored: in place, its own stores would reach rows still to be loaded.
__global__ void one_block_per_head(const Move m) {
  const int64_t row = blockIdx.y, vectors = m.vectors, begin = m.offsets[row], keep = m.offsets[row + 1] - begin;
  const uint4* source = m.source[blockIdx.x] + row * m.length * vectors + threadIdx.x;
  uint4* target = m.target[blockIdx.x] + (m.in_place ? row * m.length : begin) * vectors + threadIdx.x;
  for (int64_t tile = 0; tile < keep; tile += kTile) {
    const int64_t to = tile + threadIdx.y;
    uint4 moved{};
    if (to < keep) moved = source[m.positions[begin + to] * vectors];
    __syncthreads();
    if (to < keep) target[to * vectors] = moved;
  }
}

}  // namespace rivals

RIVALS_API int rivals_cub_version() {
  return CUB_VERSION;
}

// The longest row that the batched top-k takes; 0: these headers have no top-k.
RIVALS_API int64_t rivals_longest() {
  return rivals::kLongest;
}

RIVALS_API const char* rivals_error(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// With scratch null it only sets `bytes` to what is needed.
RIVALS_API int rivals_select(const rivals::Selection* selection, void* scratch, size_t* bytes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  size_t for_topk = *bytes, for_sort = *bytes;
  if (const cudaError_t error = rivals::topk(scratch, for_topk, *selection, on)) return error;
  if (const cudaError_t error = rivals::sort(scratch, for_sort, *selection, on)) return error;
  if (scratch == nullptr) *bytes = std::max(for_topk, for_sort);
  return cudaSuccess;
}

RIVALS_API int rivals_move(const rivals::Move* move, void* stream) {
  if (move->vectors < 1 || move->vectors > rivals::kMostVectors || move->rows > 65535) return cudaErrorInvalidValue;
  const dim3 grid(2, static_cast<unsigned>(move->rows)), block(static_cast<unsigned>(move->vectors), rivals::kTile);
  rivals::one_block_per_head<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(*move);
  return cudaGetLastError();
}
