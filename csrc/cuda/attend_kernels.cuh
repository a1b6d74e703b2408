#pragma once

#include "attend_tile.cuh"

// Attention over a ragged cache. A block takes one unit: a tile of queries, a piece of the rows, a slice of the columns
// of V (attend_shared.cuh).
//   1. Find the queries and how many rows of the piece each sees; stage them in float32, scaled.
//   2. The first piece begins the running softmax at the sink of each query that sees a row.
//   3. For every tile of rows: stage K chunk by chunk, and let each thread multiply one row with all queries.
//   4. Each warp turns the logits of some queries into weights relative to the highest logit so far.
//   5. Stage V, and let teams of threads add up weighted rows in registers, rescaled to the highest logit.
//   6. Add up the teams. One piece: write the result. Several: write partial sums; a second kernel merges the pieces of
//      each query in order.

namespace lkv::cuda {

struct Unit {
  uint32_t row, piece, tile, slice;
};

__device__ __forceinline__ Unit unit_of_block(const AttendPlan& plan) {
  const auto slices = static_cast<uint32_t>(plan.slices), tiles = static_cast<uint32_t>(plan.tiles);
  const auto pieces = static_cast<uint32_t>(plan.pieces);
  const uint32_t piece = blockIdx.x / slices / tiles;
  return {piece / pieces, piece % pieces, blockIdx.x / slices % tiles, blockIdx.x % slices};
}

__device__ __forceinline__ int smaller(int64_t a, int b) {
  return a < b ? static_cast<int>(a) : b;
}

// The queries of the tile, where they are and what they see of the piece that ends at row `end`.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void find_queries(AttendShared<type, kBlock>* shared, const AttendParams& p, const Unit& u,
                                             int64_t length, int64_t end) {
  if (threadIdx.x < kQueries) {
    const int q = threadIdx.x;
    const int64_t i = int64_t{u.tile} * kQueries + q;
    const bool exists = i < p.group * p.queries;
    const int64_t behind = p.causal ? p.queries - 1 - i / p.group : 0;
    shared->query[q] = exists ? query_at(p, p.q, u.row, i) : nullptr;
    shared->out[q] = exists ? query_at(p, p.out, u.row, i) : nullptr;
    shared->end[q] = exists ? static_cast<int>(clamp(length - behind, 0, end)) : 0;
  }
  block_sync();
}

// One more row of the first piece, for the queries that see any.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void find_sinks(AttendShared<type, kBlock>* shared, const AttendParams& p, const Unit& u) {
  if (threadIdx.x >= kQueries) return;
  const int q = threadIdx.x;
  shared->sink[q] = kNever;
  if (p.sinks == nullptr || u.piece > 0 || shared->end[q] == 0) return;
  shared->sink[q] = load_float(p.sinks_type, p.sinks, query_head(p, u.row, int64_t{u.tile} * kQueries + q));
}

// Adds up the sums of the teams and writes the result, or the partial result of a piece.
template <ScoreType type, int kBlock>
__device__ __forceinline__ void finish(AttendShared<type, kBlock>* shared, Softmax<kBlock>& softmax,
                                       const Accumulators& mine, ScoreType of_out, const AttendParams& p,
                                       const AttendPlan& plan, const Unit& u) {
  find_sinks(shared, p, u);
  block_sync();  // sums lie where the tile was
#pragma unroll
  for (int i = 0; i < softmax.kMine; ++i) {
    const int q = warp_id() + i * softmax.kWarps;
    shared->factor[q] = softmax.add_row(i, shared->sink[q]);
    shared->highest[q] = softmax.highest[i];
    shared->sum[q] = softmax.sum[i];
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunksPerSlice; ++chunk) {
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        shared->sums[mine.team()][mine.query() + i][chunk * kChunk + mine.column() + c] = mine.acc[chunk][i][c];
      }
    }
  }
  block_sync();
  AttendPartial* partial = plan.pieces > 1 ? &plan.partials[blockIdx.x] : nullptr;
  if (partial != nullptr && threadIdx.x < kQueries) {
    partial->highest[threadIdx.x] = shared->highest[threadIdx.x];
    partial->sum[threadIdx.x] = shared->sum[threadIdx.x];
  }
  const int columns = smaller(p.dim_v - int64_t{u.slice} * kSlice, kSlice);
  for (int i = threadIdx.x; i < kQueries * kSlice; i += kBlock) {
    const int q = i / kSlice, column = i % kSlice;
    if (shared->out[q] == nullptr || column >= columns) continue;
    float acc = 0;
#pragma unroll
    for (int team = 0; team < kBlock / kTeam; ++team) acc += shared->sums[team][q][column];
    acc *= shared->factor[q];
    if (partial != nullptr) {
      partial->acc[q][column] = acc;
    } else {
      store_float(of_out, shared->out[q], int64_t{u.slice} * kSlice + column,
                  shared->sum[q] == 0 ? 0.0f : acc / shared->sum[q]);
    }
  }
}

// `type`: of all tensors, unless they are mixed.
template <ScoreType type, int kBlock, bool kMixed>
__global__ void __launch_bounds__(kBlock, kMixed ? 3 : 4)
    attend_kernel(const LKV_GRID_CONSTANT AttendParams p, const LKV_GRID_CONSTANT AttendPlan plan) {
  const ScoreType of_q = kMixed ? p.type : type;
  auto* shared = dyn_smem<AttendShared<type, kBlock>>();
  const Unit u = unit_of_block(plan);
  const Span span = attended_span(p, u.row);
  if (u.piece >= plan.pieces_of(span.length)) return;
  const auto begin = static_cast<int>(u.piece * plan.piece_rows);  // lengths are int32
  find_queries(shared, p, u, span.length, clamp(begin + plan.piece_rows, 0, span.length));
  int end = 0;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) end = shared->end[q] > end ? shared->end[q] : end;

  const bool resident = p.dim <= kResident * kChunk;
  const int64_t v_first = int64_t{u.slice} * kSlice;
  Softmax<kBlock> softmax;
  softmax.reset();
  Accumulators mine = {};
  for (int first = begin; first < end; first += kBlock) {
    const int rows = smaller(end - first, kBlock);
    const char* k = p.k.data + (span.begin + first) * p.k.token;
    const char* v = p.v.data + (span.begin + first) * p.v.token;
    float logits[kQueries] = {};
    for (int64_t at = 0; at < p.dim; at += kChunk) {
      const int slot = resident ? static_cast<int>(at / kChunk) : 0, columns = smaller(p.dim - at, kChunk);
      stage_rows<kMixed>(shared, p.k_type, k, p.k.token, at, rows, columns);
      if (!resident || first == begin) stage_queries(shared, of_q, p, at, slot);
      block_sync();
      if (static_cast<int>(threadIdx.x) < rows) add_dots(shared, slot, columns, logits);
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      if (p.softcap > 0) logits[q] = p.softcap * tanhf(logits[q] / p.softcap);
      shared->weights[q][threadIdx.x] = logits[q];
    }
    block_sync();
    softmax.add(shared, first);
#pragma unroll
    for (int chunk = 0; chunk < kChunksPerSlice; ++chunk) {
      const int64_t at = v_first + chunk * kChunk;
      if (at >= p.dim_v) break;
      stage_rows<kMixed>(shared, p.v_type, v, p.v.token, at, rows, smaller(p.dim_v - at, kChunk));
      block_sync();
      if (chunk == 0) mine.scale(shared->factor);
      mine.add(shared, chunk, rows);
    }
  }
  finish(shared, softmax, mine, of_q, p, plan, u);
}

// The pieces of one query in their order, a thread per column.
template <ScoreType type, int kBlock>
__global__ void __launch_bounds__(kBlock)
    attend_merge_kernel(const LKV_GRID_CONSTANT AttendParams p, const LKV_GRID_CONSTANT AttendPlan plan) {
  const int64_t queries = p.group * p.queries, slice = blockIdx.x % plan.slices;
  const int64_t i = blockIdx.x / plan.slices % queries, row = blockIdx.x / plan.slices / queries;
  const int64_t pieces = plan.pieces_of(attended_span(p, row).length);
  const AttendPartial* first = &plan.partials[plan.unit(row, 0, i / kQueries, slice)];
  const int64_t step = plan.unit(0, 1, 0, 0);
  const int q = static_cast<int>(i % kQueries);
  float highest = kNever;
  for (int64_t piece = 0; piece < pieces; ++piece) highest = fmaxf(highest, first[piece * step].highest[q]);
  const int columns = smaller(p.dim_v - slice * kSlice, kSlice);
  for (int column = threadIdx.x; column < columns; column += kBlock) {
    float sum = 0, acc = 0;
#pragma unroll 4
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const AttendPartial& part = first[piece * step];
      const float factor = part.highest[q] == highest ? 1.0f : expf(part.highest[q] - highest);
      sum = fmaf(factor, part.sum[q], sum);
      acc = fmaf(factor, part.acc[q][column], acc);
    }
    store_float(type, query_at(p, p.out, row, i), slice * kSlice + column, sum == 0 ? 0.0f : acc / sum);
  }
}

}  // namespace lkv::cuda
