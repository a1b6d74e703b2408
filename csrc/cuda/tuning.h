#pragma once

#include "lkv/cuda.h"

// The launchers with their choices made by the caller, so that tests reach every path with few threads and short rows.
// Results never depend on a tuning, but for the order that attend and soft_topk sum in.

namespace lkv::cuda {

struct Tuning {
  int block = 0;       // threads per block; 0: what each kernel is made for, and all that a build for a GPU has
  int cluster = 0;     // select, soft_topk: blocks per segment or row, a power of two up to 16; 0: chosen by size
  int splits = -1;     // select: independent blocks per segment, without clusters; 0: never; -1: chosen by size
  int resident = -1;   // select, soft_topk: the most keys a block keeps on chip; -1: as many as fit
  int registers = -1;  // select: 0: no keys in registers
  int pieces = 0;      // attend: the most pieces that the rows of a segment are split into; 0: chosen by size
  int tables = -1;     // gather: 0: none in shared memory
};

Status spans(const SpansParams& p, Upload tables, Stream stream, const Tuning& tuning);
size_t select_scratch(int64_t rows, int64_t longest, const Tuning& tuning);
Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream, const Tuning& tuning);
Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning);
Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, void* scratch, Stream stream,
             const Tuning& tuning);
size_t compact_scratch(int64_t total, int64_t payloads, const Tuning& tuning);
Status compact(const CompactParams& p, void* scratch, Stream stream, const Tuning& tuning);
Status append(const AppendParams& p, Stream stream, const Tuning& tuning);
size_t attend_scratch(const AttendParams& p, const Tuning& tuning);
Status attend(const AttendParams& p, void* scratch, Stream stream, const Tuning& tuning);
Status soft_topk(const SoftTopkParams& p, Stream stream, const Tuning& tuning);
Status soft_topk_grad(const SoftTopkGradParams& p, Stream stream, const Tuning& tuning);

}  // namespace lkv::cuda

#if defined(LKV_EMULATOR)
#include "emulator/blocks.h"
#else

namespace lkv::cuda {

// f of the threads per block, known at compile time.
template <int kBlock, class F>
auto with_block(const Tuning&, F&& f) {
  return f.template operator()<kBlock>();
}

}  // namespace lkv::cuda

#endif
