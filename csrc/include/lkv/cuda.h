#pragma once

#include <cstddef>

#include "lkv/params.h"
#include "lkv/soft_topk.h"

// The CUDA launchers: asynchronous on the caller's stream and current device, capturable, no allocation and no
// synchronisation. They return what cudaLaunchKernelEx and friends return; cudaSuccess is 0.

struct CUstream_st;

namespace lkv::cuda {

using Stream = CUstream_st*;
using Status = int;

const char* describe(Status status);

// Bytes on the host, and where they go on the device. They travel as kernel arguments: no pinned memory, no blocking
// copy, and safe under capture.
struct Upload {
  const void* host;
  void* device;
  size_t bytes;
};
Status upload(Upload bytes, Stream stream);

// `tables`: uploaded by the same launch; the spans and what follows may read them.
Status spans(const SpansParams& p, const Upload& tables, Stream stream);

// `longest` bounds the valid length of every segment. Scratch: device bytes, any content, 16-byte aligned.
size_t select_scratch(int64_t rows, int64_t longest);
Status select(const SelectParams& p, int64_t longest, void* scratch, Stream stream);

// `behind_select`: launched with programmatic dependent launch right behind the select that sets p.ready.
Status gather(const GatherParams& p, bool behind_select, Stream stream);

// A select and a gather that starts beside it. p.ready must be g.ready, not nullptr.
Status evict(const SelectParams& p, const GatherParams& g, int64_t longest, void* scratch, Stream stream);

// Scratch: device bytes, any content, 16-byte aligned.
size_t compact_scratch(int64_t total, int64_t payloads);
Status compact(const CompactParams& p, void* scratch, Stream stream);

Status append(const AppendParams& p, Stream stream);

// Scratch: device bytes, any content, 16-byte aligned.
size_t attend_scratch(const AttendParams& p);
Status attend(const AttendParams& p, void* scratch, Stream stream);

// Scores of float64 are not supported.
Status soft_topk(const SoftTopkParams& p, Stream stream);
Status soft_topk_grad(const SoftTopkGradParams& p, Stream stream);

}  // namespace lkv::cuda
