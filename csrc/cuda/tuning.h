#pragma once

#include "lkv/cuda.h"

// The launchers with their choices made by the caller, so that tests reach every path with few threads and short rows.
// Results never depend on a tuning, but for the order that attend and soft_topk sum in.

namespace lkv::cuda {

inline constexpr int kTestBlock = 64;

struct Tuning {
  int block = 0;  // threads per block: kTestBlock, or 0 for what each kernel is made for
  int cluster =
      0;  // select, soft_topk: blocks per row (set) in one cluster, a power of two up to 16; 0: chosen by size
  int splits = -1;    // select: independent blocks per row set, without clusters; 0: never; -1: chosen by size
  int resident = -1;  // select, soft_topk: the most keys a block keeps on chip; -1: as many as fit
  int pieces = 0;     // attend: the most pieces that the rows of a row set are split into; 0: chosen by size
};

Status rooms(const RoomsParams& p, Stream stream, const Tuning& tuning);
size_t select_scratch(int64_t rows, int64_t longest, const Tuning& tuning);
Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream, const Tuning& tuning);
Status gather(const GatherParams& p, bool behind_select, Stream stream, const Tuning& tuning);
Status compact(const CompactParams& p, Stream stream, const Tuning& tuning);
Status append(const AppendParams& p, Stream stream, const Tuning& tuning);
size_t attend_scratch(const AttendParams& p, const Tuning& tuning);
Status attend(const AttendParams& p, void* scratch, Stream stream, const Tuning& tuning);
Status soft_topk(const SoftTopkParams& p, Stream stream, const Tuning& tuning);
Status soft_topk_grad(const SoftTopkGradParams& p, Stream stream, const Tuning& tuning);

}  // namespace lkv::cuda
