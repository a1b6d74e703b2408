#include "launch.h"

namespace lkv::torch_ops {

namespace {

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace

host::IndexPointers pointers(const Tensor* index, bool count_overflow) {
  return {data<int32_t>(index[0]), data<int32_t>(index[1]), data<int32_t>(index[2]),
          count_overflow ? data<int32_t>(index[3]) : nullptr};
}

Launch::Launch(host::Problem& problem, const Tensor* outputs, const Tensor& like, bool selects)
    : problem_(problem), like_(like) {
  std::vector<char*> targets;
  for (size_t p = 0; outputs && p < problem.payloads.size(); ++p) targets.push_back(data<char>(outputs[p]));
  outputs_ = problem.tables.add(targets);
  tables_ = problem.tables.data();
  if (!runs_cuda(problem.device)) return;
  cuda_.emplace(problem.device);
  const int64_t tables = static_cast<int64_t>(problem.tables.size());
  const int64_t flags = selects ? round_up(problem.rows() * sizeof(uint32_t), 16) : 0;
  const int64_t scratch = selects ? cuda::select_scratch(problem.rows(), problem.longest) : 0;
  memory_ = empty_bytes(tables + flags + scratch, like);
  char* memory = data<char>(*memory_);
  tables_ = memory;
  ready_ = selects ? reinterpret_cast<uint32_t*>(memory + tables) : nullptr;
  scratch_ = memory + tables + flags;
  if (!selects) cuda_->check(cuda::upload(upload(), cuda_->stream()), "upload");  // otherwise with the spans
}

cuda::Upload Launch::upload() const {
  return {problem_.tables.data(), data<char>(*memory_), problem_.tables.size()};
}

void Launch::select(const host::Sizes& sizes, const host::IndexPointers& out) {
  const host::Params params(problem_, tables_);
  const SelectParams select = params.select(sizes, out, nullptr);
  make_spans(params.spans(sizes, out, nullptr));
  if (cuda_) {
    cuda_->check(cuda::select(select, problem_.longest, scratch_, cuda_->stream()), "select");
    return;
  }
  cpu::select(select, torch_threads());
}

void Launch::evict(const host::Sizes& sizes, const host::IndexPointers& out, bool warm) {
  const host::Params params(problem_, tables_);
  const SelectParams select = params.select(sizes, out, ready_);
  const GatherParams gather = params.gather(outputs_, out.positions, out.cu_seqlens, sizes.total, ready_, warm);
  make_spans(params.spans(sizes, out, ready_));
  if (cuda_) {
    cuda_->check(cuda::evict(select, gather, problem_.longest, scratch_, cuda_->stream()), "evict");
    return;
  }
  cpu::evict(select, gather, torch_threads());
}

void Launch::gather(const int32_t* positions, const int32_t* cu_seqlens, int64_t total) {
  const GatherParams gather =
      host::Params(problem_, tables_).gather(outputs_, positions, cu_seqlens, total, nullptr, /*warm=*/false);
  if (cuda_) {
    cuda_->check(cuda::gather(gather, /*behind_select=*/false, cuda_->stream()), "gather");
    return;
  }
  cpu::gather(gather, torch_threads());
}

void Launch::compact(const host::Sizes& sizes, const host::IndexPointers& index, int32_t* filled) {
  const CompactParams compact = host::Params(problem_, tables_).compact(sizes, index, filled);
  if (cuda_) {
    const size_t flags = compact.filled != nullptr ? 0 : cuda::compact_scratch(compact.total, compact.payloads);
    flags_ = empty_bytes(static_cast<int64_t>(flags), like_);
    cuda_->check(cuda::compact(compact, data<void>(*flags_), cuda_->stream()), "compact");
    return;
  }
  cpu::compact(compact, torch_threads());
}

AppendParams Launch::append_params(const host::IntTable& valid) const {
  return host::Params(problem_, tables_).append(outputs_, valid);
}

void Launch::append(const AppendParams& append) {
  if (cuda_) {
    cuda_->check(cuda::append(append, cuda_->stream()), "append");
    return;
  }
  cpu::append(append, torch_threads());
}

void Launch::make_spans(const SpansParams& spans) {
  if (cuda_) {
    cuda_->check(cuda::spans(spans, upload(), cuda_->stream()), "spans");
    return;
  }
  cpu::spans(spans);
}

}  // namespace lkv::torch_ops
