#include "lkv/cuda.h"
#include "tuning.h"

// The launchers for a caller that knows C structs alone. Everything goes to one stream, as an engine would do it.

namespace {

using namespace lkv;
constexpr cuda::Stream stream = nullptr;

}  // namespace

extern "C" {

// So that the mirrors of the structs on the other side cannot drift unnoticed.
void driver_sizes(int64_t* sizes) {
  const size_t all[] = {sizeof(Strided),
                        sizeof(RowInts),
                        sizeof(Source),
                        sizeof(Pages),
                        sizeof(SpansParams),
                        sizeof(SelectParams),
                        sizeof(GatherParams),
                        sizeof(CompactParams),
                        sizeof(AppendParams),
                        sizeof(AttendParams),
                        sizeof(SoftTopkParams),
                        sizeof(SoftTopkGradParams),
                        sizeof(cuda::Tuning)};
  for (size_t size : all) *sizes++ = static_cast<int64_t>(size);
}

int driver_upload(const void* host, void* device, size_t bytes) {
  return cuda::upload({host, device, bytes}, stream);
}

int driver_spans(const SpansParams* p, const void* host, void* device, size_t bytes, const cuda::Tuning* tuning) {
  return cuda::spans(*p, {host, device, bytes}, stream, *tuning);
}

size_t driver_select_scratch(int64_t rows, int64_t longest, const cuda::Tuning* tuning) {
  return cuda::select_scratch(rows, longest, *tuning);
}

int driver_select(const SelectParams* p, int64_t longest, void* scratch, const cuda::Tuning* tuning) {
  return cuda::select(*p, longest, scratch, stream, *tuning);
}

int driver_gather(const GatherParams* p, int behind_select, const cuda::Tuning* tuning) {
  return cuda::gather(*p, behind_select != 0, stream, *tuning);
}

int driver_evict(const SelectParams* p, const GatherParams* g, int64_t longest, void* scratch,
                 const cuda::Tuning* tuning) {
  return cuda::evict(*p, *g, longest, scratch, stream, *tuning);
}

size_t driver_compact_scratch(int64_t total, int64_t payloads, const cuda::Tuning* tuning) {
  return cuda::compact_scratch(total, payloads, *tuning);
}

int driver_compact(const CompactParams* p, void* scratch, const cuda::Tuning* tuning) {
  return cuda::compact(*p, scratch, stream, *tuning);
}

int driver_append(const AppendParams* p, const cuda::Tuning* tuning) {
  return cuda::append(*p, stream, *tuning);
}

size_t driver_attend_scratch(const AttendParams* p, const cuda::Tuning* tuning) {
  return cuda::attend_scratch(*p, *tuning);
}

int driver_attend(const AttendParams* p, void* scratch, const cuda::Tuning* tuning) {
  return cuda::attend(*p, scratch, stream, *tuning);
}

int driver_soft_topk(const SoftTopkParams* p, const cuda::Tuning* tuning) {
  return cuda::soft_topk(*p, stream, *tuning);
}

int driver_soft_topk_grad(const SoftTopkGradParams* p, const cuda::Tuning* tuning) {
  return cuda::soft_topk_grad(*p, stream, *tuning);
}

const char* driver_describe(int status) {
  return cuda::describe(status);
}
}
