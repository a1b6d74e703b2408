#include "lkv/cuda.h"

// The launchers in a library without CUDA kernels. It registers no op for CUDA tensors, so nothing gets here; what does
// fails like any launch.

namespace lkv::cuda {

namespace {

constexpr Status kNoKernels = 1;

}  // namespace

const char* describe(Status) {
  return "this build has no CUDA kernels";
}

size_t select_scratch(int64_t, int64_t) {
  return 0;
}

size_t compact_scratch(int64_t, int64_t) {
  return 0;
}

size_t attend_scratch(const AttendParams&) {
  return 0;
}

Status upload(Upload, Stream) {
  return kNoKernels;
}

Status spans(const SpansParams&, const Upload&, Stream) {
  return kNoKernels;
}

Status select(const SelectParams&, int64_t, void*, Stream) {
  return kNoKernels;
}

Status gather(const GatherParams&, bool, Stream) {
  return kNoKernels;
}

Status evict(const SelectParams&, const GatherParams&, int64_t, void*, Stream) {
  return kNoKernels;
}

Status compact(const CompactParams&, void*, Stream) {
  return kNoKernels;
}

Status append(const AppendParams&, Stream) {
  return kNoKernels;
}

Status attend(const AttendParams&, void*, Stream) {
  return kNoKernels;
}

Status soft_topk(const SoftTopkParams&, Stream) {
  return kNoKernels;
}

Status soft_topk_grad(const SoftTopkGradParams&, Stream) {
  return kNoKernels;
}

}  // namespace lkv::cuda
