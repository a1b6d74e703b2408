#pragma once

#include "find_row.cuh"
#include "rows_copy.cuh"

// A gather by warps. A warp takes up to 16 rows of the output, whatever segments they belong to, so that skewed budgets
// balance. Once its block has read the tables and waited for the positions, it meets no barrier, so that a
// multiprocessor always has loads in flight:
//   1. Lane l finds the segment of row l % R, where the warp has R rows.
//   2. It waits until the positions of its block are there, and reads its own.
//   3. It works out where row l % R of payload l / R comes from and goes to.
//   4. All lanes move the rows of all payloads, spread over lanes by vectors of up to 16 bytes, and ask each other for
//      the addresses; several loads are in flight before the first store.

namespace lkv::cuda {

inline constexpr int kMostShift = 4;  // the logarithm of the most rows of a warp: K and V of 16 are one for each lane

// Tables of a call that a block reads once, into shared memory: they are a few lines of the L2 cache, and all warps of
// the device would wait for them.
inline constexpr int kTableRows = 1024;   // segments
inline constexpr int kTableInputs = 128;  // payloads of all layers

struct GatherTables {
  Strided inputs[kTableInputs];
  char* outputs[kTableInputs];
  int64_t row_bytes[kTableInputs];
  int64_t tokens[kTableInputs];
  int32_t cu_seqlens[kTableRows + 1];
};

inline bool fit_tables(const GatherParams& p) {
  const int64_t layers = p.source.layers;
  return layers <= kTableInputs && p.payloads * layers <= kTableInputs && p.source.rows() <= kTableRows;
}

template <class T>
__device__ __forceinline__ void copy_table(T* to, const T* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = load_relaxed(&from[i]);
}

// The same arguments with the tables in shared memory. All threads call it.
__device__ __forceinline__ GatherParams with_tables(const GatherParams& p, GatherTables* shared) {
  copy_table(shared->inputs, p.inputs, p.payloads * p.source.layers);
  copy_table(shared->outputs, p.outputs, p.payloads);
  copy_table(shared->row_bytes, p.row_bytes, p.payloads);
  copy_table(shared->tokens, p.source.tokens, p.source.layers);
  copy_table(shared->cu_seqlens, p.cu_seqlens, p.source.rows() + 1);
  block_sync();
  GatherParams q = p;
  q.inputs = shared->inputs;
  q.outputs = shared->outputs;
  q.row_bytes = shared->row_bytes;
  q.source.tokens = shared->tokens;
  q.cu_seqlens = shared->cu_seqlens;
  return q;
}

// Waits for the select of all segments of the output rows first .. end, by one warp.
__device__ __forceinline__ void wait_for_rows(const GatherParams& p, int64_t first, int64_t end) {
  const int64_t rows = p.source.rows();
  const int64_t last = warp_row_of(p.cu_seqlens, rows, end - 1);
  for (int64_t row = warp_row_of(p.cu_seqlens, rows, first) + lane_id(); row <= last; row += kWarp) {
    while (load_acquire(&p.ready[row]) == 0) spin_pause();
  }
}

// A row to move, of one lane.
struct RowMove {
  const char* from;  // nullptr: zeros
  char* to;          // nullptr: there is none
  int64_t bytes;
};

template <class T>
__device__ __forceinline__ T* of_lane(T* mine, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(mine), lane));
}

// Moves the rows of the lanes [begin, end), which have the same size.
template <class Vector>
__device__ __forceinline__ void move_rows(const RowMove& mine, int begin, int end) {
  constexpr int kLoads = sizeof(Vector) == sizeof(uint4) ? kInFlight : 2;  // of narrow vectors fewer: less code
  const int64_t vectors = __shfl_sync(kFullWarp, mine.bytes, begin) / static_cast<int64_t>(sizeof(Vector));
  const auto lanes = static_cast<int>(lanes_per_row(vectors, kWarp));
  const int shift = __popc(lanes - 1), step = kWarp >> shift;
  for (int64_t slice = 0; slice < vectors; slice += lanes) {
    const int64_t column = slice + (lane_id() & (lanes - 1));
    for (int base = begin; base < end; base += step * kLoads) {
      const int first = base + (lane_id() >> shift);
      Vector moved[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const char* from = of_lane(mine.from, first + k * step);
        const bool there = first + k * step < end && column < vectors && from != nullptr;
        moved[k] = there ? load_once(reinterpret_cast<const Vector*>(from) + column) : Vector{};
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        char* to = of_lane(mine.to, first + k * step);
        const bool there = first + k * step < end && column < vectors && to != nullptr;
        if (there) reinterpret_cast<Vector*>(to)[column] = moved[k];
      }
    }
  }
}

// The token that a row of the output comes from, in any payload; -1: zeros. What is counted in segments has 31 bits.
struct RowSource {
  uint32_t layer, b, h;
  int64_t token;
};

// Row `j` of the output, of payload `payload`: where it comes from and goes to.
__device__ __forceinline__ RowMove find_move(const GatherParams& p, const RowSource& source, uint32_t j,
                                             uint32_t payload) {
  if (payload >= p.payloads) return {nullptr, nullptr, 0};
  RowMove move = {nullptr, nullptr, load_relaxed(&p.row_bytes[payload])};
  if (j < p.total) move.to = load_relaxed(&p.outputs[payload]) + j * move.bytes;
  if (move.bytes > 0 && source.token >= 0) {
    const Strided input = load_relaxed(&p.inputs[payload * p.source.layers + source.layer]);
    move.from = input.data + source.b * input.batch + source.h * input.head + source.token * input.token;
  }
  return move;
}

// Rows first .. first + R of every payload, by one warp; R is 1 << shift. `wait()`: returns once positions may be read.
template <class Wait>
__device__ __forceinline__ void gather_rows(const GatherParams& p, uint32_t first, int shift, Wait&& wait) {
  const int rows = 1 << shift;
  const uint32_t group = kWarp >> shift;
  const uint32_t j = first + (lane_id() & (rows - 1));
  const int64_t row = first < p.total ? find_row(p, first, lane_id() & (rows - 1)) : -1;
  const Segment segment = row < 0 ? Segment{} : segment_of(p.source, row, RelaxedLoad{});
  wait();
  const int32_t position = row < 0 ? -1 : p.positions[j];
  const RowSource source = {static_cast<uint32_t>(segment.layer), static_cast<uint32_t>(segment.b),
                            static_cast<uint32_t>(segment.h),
                            position >= 0 && position < segment.limit ? segment.origin + position : -1};
  const auto payloads = static_cast<uint32_t>(p.payloads);
  for (uint32_t payload = 0; payload < payloads && first < p.total; payload += group) {
    const RowMove mine = find_move(p, source, j, payload + (lane_id() >> shift));
    const uint32_t bits =
        __reduce_or_sync(kFullWarp, low_bits(mine.from) | low_bits(mine.to) | static_cast<uint32_t>(mine.bytes));
    const uint32_t left = payloads - payload;
    const int end = static_cast<int>(left < group ? left : group) << shift;
    const int64_t bytes = __shfl_sync(kFullWarp, mine.bytes, 0);
    const bool same = __ballot_sync(kFullWarp, lane_id() < end && mine.bytes != bytes) == 0;
    with_vector(bits, [&](auto vector) {
      for (int begin = 0, batch = same ? end : rows; begin < end; begin += batch) {
        move_rows<decltype(vector)>(mine, begin, begin + batch);
      }
    });
  }
}

}  // namespace lkv::cuda
