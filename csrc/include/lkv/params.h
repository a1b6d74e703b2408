#pragma once

#include <cstdint>

#include "lkv/keys.h"

// The arguments of the kernels: plain structs of raw pointers and sizes, no torch and no Python.
//
// A *segment* is the rows of one (layer, sequence, KV head), and counts as row = (layer * batch + b) * heads + h of R =
// layers * batch * heads. Its *span* is the rows plus the slack that it owns in a packed buffer.
// All pointers, the tables too, live where the kernel runs (host memory for lkv::cpu, device memory for lkv::cuda).
// Values read through them are clamped, never trusted to be in range.

namespace lkv {

// The tokens of one tensor of one layer: token t of (b, h) begins at data + b * batch + h * head + t * token bytes.
// Ragged tensors have batch = head = 0 and count t from the start of the tensor.
struct Strided {
  char* data;
  int64_t batch, head, token;
};

// One integer per segment, broadcast by zero strides (in elements) over layers, sequences or heads.
struct RowInts {
  const void* data;  // nullptr: `fallback` everywhere
  int64_t layer, batch, head;
  int64_t fallback;
  bool wide;  // int64 when true, else int32

  LKV_HD int64_t at(int64_t n, int64_t b, int64_t h) const {
    if (data == nullptr) return fallback;
    const int64_t i = n * layer + b * batch + h * head;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// The segments an op reads. Dense: [layer][b, h, L]. Ragged: one layer of rows one after the other in [T].
struct Source {
  int64_t layers, batch, heads;
  const int64_t* tokens;      // [layers] L of each layer; ragged: tokens[0] = T
  const int32_t* cu_seqlens;  // ragged: [R + 1] where each segment begins in T; dense: nullptr
  RowInts lengths, starts;    // the valid range [starts, starts + lengths) of each segment (ragged: starts = 0)

  LKV_HD int64_t rows() const { return layers * batch * heads; }
  LKV_HD int64_t layer_of(int64_t row) const { return quotient(row, batch * heads); }

  // For counts of segments, which are below 2^31: a division of 64 bits is a call on a GPU.
  LKV_HD static int64_t quotient(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }
};

LKV_HD int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Where the tokens of a segment lie in pools of pages: token t of (layer, b, h) is row t % page of page ids[t / page],
// and the strides of a pool are those of Strided, with `batch` from one page to the next.
struct Pages {
  const void* tables;          // ids
  int64_t layer, batch, head;  // in elements, from one table to the next; 0 where it is shared
  int64_t count;               // pages of a pool: an id is in [0, count)
  int32_t shift;               // a page has 1 << shift rows
  bool wide;                   // ids are int64 when true, else int32
  bool per_head;               // whether every head has a table of its own
  int32_t* free;  // out: of each table, [batch] or [batch * heads], how many pages at its end, or, where rows move to
                  // the back, at its beginning, no layer and head needs any more; nullptr: not counted

  LKV_HD int64_t id(int64_t n, int64_t b, int64_t h, int64_t i) const {
    const int64_t at = n * layer + b * batch + h * head + i;
    return wide ? static_cast<const int64_t*>(tables)[at] : static_cast<const int32_t*>(tables)[at];
  }
};

// How many rows each segment keeps and where its span begins in the output.
// keep = min(clamp(budget, 0, length), max_budget), and so many more that length - keep is a multiple of `page`;
// span = keep + reserve rounded up to align, or `padded` for all.
// Spans end at `total`: begin = min(sum of the spans before, total), and keep and span are cut to total - begin.
struct SpansParams {
  Source source;
  RowInts budgets;
  int64_t max_budget = -1;  // negative: none
  int64_t page = 1;
  int64_t reserve = 0, align = 1;
  int64_t padded = -1;  // C of a padded output; negative: packed
  int64_t total;        // rows allocated in the output
  int32_t* lengths;     // out [R]: rows kept
  int32_t* cu_seqlens;  // out [R + 1]: where the spans begin
  int32_t* overflow;    // out [1]: rows cut by max_budget, C or total; may be nullptr
  uint32_t* ready;      // out [R]: flags to clear for a select that follows; may be nullptr
};

// The rows to keep, ascending, at positions[cu_seqlens[row] + i]; -1 in the slack of the spans and after the last span.
// A segment keeps its first min(sink, keep) and last min(window, rest) valid rows, and the best of those between by
// (score, lower position).
struct SelectParams {
  Source source;
  const Strided* scores;  // [layers]
  ScoreType type;
  int64_t sink, window;
  const int32_t* lengths;     // [R] rows kept, at most the valid length of each segment
  const int32_t* cu_seqlens;  // [R + 1]
  int64_t total;
  int32_t* positions;  // out [total]
  uint32_t* ready;     // out [R]: set once the positions of a segment (its slack too) are written; may be nullptr
};

// Output row j of segment r (cu_seqlens[r] <= j < cu_seqlens[r + 1]) is row positions[j] of r in each payload;
// zeros where the position is outside [0, limit), and after the last span.
struct GatherParams {
  Source source;  // lengths and starts are not used
  int64_t payloads;
  const Strided* inputs;      // [payloads * layers], payload-major
  char* const* outputs;       // [payloads] contiguous rows
  const int64_t* row_bytes;   // [payloads]
  const int32_t* positions;   // [total]
  const int32_t* cu_seqlens;  // [R + 1]
  int64_t total;
  const uint32_t* ready;  // [R]: wait for the flag of a segment before reading its positions; may be nullptr
  bool warm;              // the outputs' memory has been touched before (CPU: non-temporal stores pay off)
};

// In place: row positions[cu_seqlens[r] + i] of segment r moves to row i of r, or, `to_back`, to row end - lengths[r] +
// i, where `end` is the end of its valid range, for i < lengths[r]. Positions ascend, so no row is overwritten before
// it was read if rows move in order, to the back the last one first; bytes of different columns never meet. A position
// outside of the segment, and a page outside of the pool, moves nothing.
// With `filled`, in any order: kept rows that lie where kept rows go stay there, and the others fill the holes between
// them, the one that is farthest away in the first hole (`to_back`: in the last). What moves is never overwritten.
struct CompactParams {
  Source source;
  const Pages* pages;  // [payloads]; nullptr: there are none, and payloads are laid out as the source says
  bool to_back;
  int64_t total;  // rows of `positions`
  int64_t payloads;
  const Strided* payload;    // [payloads * layers], payload-major; read and written
  const int64_t* row_bytes;  // [payloads]
  const int32_t* positions;  // [total]
  const int32_t* lengths;
  const int32_t* cu_seqlens;
  int32_t* filled;  // out [total]: positions by the rows where they are now; nullptr: in order
};

// New tokens at the end of every segment of a ragged cache [T, ...]: of token i of `count`, the row of (b, h) goes to
// row cu_seqlens[r] + lengths[r] + i, and `positions` there becomes position + i. Sequences padded on the left take
// only their last `valid` tokens. Rows that do not fit in their span are dropped; lengths count those that did.
struct AppendParams {
  int64_t batch, heads, count;
  RowInts valid;  // per segment, in [0, count]
  int64_t payloads;
  const Strided* inputs;      // [payloads] [B, H, count, ...]
  char* const* outputs;       // [payloads] contiguous rows [T, ...]
  const int64_t* row_bytes;   // [payloads]
  int64_t tokens;             // T
  const int32_t* cu_seqlens;  // [R + 1] spans
  int32_t* lengths;           // in and out [R]: rows in use of each span
  int32_t* positions;         // out [T]
  int64_t position;
};

// Attention of queries [B, Hq, q_len, D] over a ragged cache: query heads [h * group, (h + 1) * group) read the rows
// [cu_seqlens[r], cu_seqlens[r] + lengths[r]) of segment r = b * heads + h. Causal: the last q_len rows are those of
// the queries themselves, query i sees all but the last q_len - 1 - i. A query that sees no row gets zeros. logit =
// scale * (q . k), then softcap * tanh(logit / softcap) where softcap > 0. The sink of a query head is the logit of one
// more row, whose value is zero. Sums are float32.
struct AttendParams {
  int64_t batch, heads, group, queries, dim, dim_v;
  ScoreType type;  // of q and out
  ScoreType k_type, v_type;
  Strided q, out;             // [B, Hq, q_len, ...]: `head` steps over query heads
  Strided k, v;               // [T, ...]
  int64_t tokens;             // T
  const int32_t* cu_seqlens;  // [R + 1]
  const int32_t* lengths;     // [R]
  int64_t longest;            // bounds lengths
  bool causal;
  float scale, softcap;
  const void* sinks;  // [Hq], contiguous; may be nullptr
  ScoreType sinks_type;
};

}  // namespace lkv
