#include "launch.h"

namespace lkv::torch_ops {

namespace {

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

[[maybe_unused]] int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

host::IndexPointers pointers(const Index& index) {
  return {data<int32_t>(index.positions), data<int32_t>(index.lengths), data<int32_t>(index.cu_seqlens),
          index.overflow.numel() ? data<int32_t>(index.overflow) : nullptr};
}

}  // namespace

Launch::Launch(host::Problem& problem, const Tensors& outputs, const Tensor& like, bool selects) : problem_(problem) {
  std::vector<char*> pointers;
  for (const Tensor& out : outputs) pointers.push_back(data<char>(out));
  outputs_ = problem.tables.add(pointers);
  tables_ = problem.tables.data();
#ifdef LKV_WITH_CUDA
  if (problem.device.kind != host::Device::cuda) return;
  cuda_.emplace(problem.device);
  const int64_t tables = static_cast<int64_t>(problem.tables.size());
  const int64_t flags = selects ? round_up(problem.rows() * sizeof(uint32_t), 16) : 0;
  const int64_t scratch = selects ? cuda::select_scratch(problem.rows(), problem.longest) : 0;
  memory_ = empty_bytes(tables + flags + scratch, like);
  char* memory = data<char>(*memory_);
  tables_ = memory;
  ready_ = selects ? reinterpret_cast<uint32_t*>(memory + tables) : nullptr;
  scratch_ = memory + tables + flags;
  cuda_->check(cuda::upload(problem.tables.data(), memory, problem.tables.size(), cuda_->stream()), "upload");
#else
  (void)like, (void)selects;
#endif
}

void Launch::select(const host::Sizes& sizes, const Index& out, bool gathers) {
  const host::Params params(problem_, tables_);
  uint32_t* ready = gathers ? ready_ : nullptr;
  const RoomsParams rooms = params.rooms(sizes, pointers(out), ready);
  const SelectParams select = params.select(sizes, pointers(out), ready);
#ifdef LKV_WITH_CUDA
  if (cuda_) {
    cuda_->check(cuda::rooms(rooms, cuda_->stream()), "rooms");
    cuda_->check(cuda::select(select, problem_.longest, scratch_, cuda_->stream()), "select");
    return;
  }
#endif
  cpu::rooms(rooms);
  cpu::select(select, torch_threads());
}

void Launch::gather(const Tensor& positions, const Tensor& cu_seqlens, bool behind_select, bool warm) {
  const GatherParams gather = host::Params(problem_, tables_)
                                  .gather(outputs_, data<int32_t>(positions), data<int32_t>(cu_seqlens),
                                          positions.numel(), behind_select ? ready_ : nullptr, warm);
#ifdef LKV_WITH_CUDA
  if (cuda_) {
    cuda_->check(cuda::gather(gather, behind_select, cuda_->stream()), "gather");
    return;
  }
#endif
  cpu::gather(gather, torch_threads());
}

void Launch::compact(const Index& index) {
  const CompactParams compact = host::Params(problem_, tables_).compact(pointers(index));
#ifdef LKV_WITH_CUDA
  if (cuda_) {
    cuda_->check(cuda::compact(compact, cuda_->stream()), "compact");
    return;
  }
#endif
  cpu::compact(compact, torch_threads());
}

}  // namespace lkv::torch_ops
