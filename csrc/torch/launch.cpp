#include "launch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace lkv::torch_ops {

namespace {

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

Launch::Launch(Problem& problem, const Tensors& outputs, bool selects) : problem_(problem) {
  std::vector<char*> pointers;
  for (const Tensor& out : outputs) pointers.push_back(data<char>(out));
  outputs_ = problem.tables.add(pointers);
  tables_ = problem.tables.data();
#ifdef LKV_WITH_CUDA
  if (!runs_cuda(problem.device)) return;
  cuda_.emplace(problem.device);
  const int64_t tables = static_cast<int64_t>(problem.tables.size());
  const int64_t flags = selects ? round_up(problem.rows() * sizeof(uint32_t), 16) : 0;
  const int64_t scratch = selects ? cuda::select_scratch(problem.rows(), problem.longest) : 0;
  memory_ = empty({tables + flags + scratch}, aoti_torch_dtype_uint8(), problem.device);
  char* memory = data<char>(*memory_);
  tables_ = memory;
  ready_ = selects ? reinterpret_cast<uint32_t*>(memory + tables) : nullptr;
  scratch_ = memory + tables + flags;
  cuda_->check(cuda::upload(problem.tables.data(), memory, problem.tables.size(), cuda_->stream()), "upload");
#else
  (void)selects;
#endif
}

Source Launch::source() const {
  return {problem_.layers,     problem_.batch,
          problem_.heads,      table<const int64_t>(problem_.tokens),
          problem_.cu_seqlens, problem_.lengths.at(tables_),
          problem_.starts.at(tables_)};
}

void Launch::select(const Sizes& sizes, const Index& out, bool gathers) {
  RoomsParams rooms{};
  rooms.source = source();
  rooms.budgets = problem_.budgets.at(tables_);
  rooms.max_budget = sizes.max_budget < 0 ? INT64_MAX : sizes.max_budget;
  rooms.reserve = sizes.reserve;
  rooms.align = sizes.align;
  rooms.padded = std::max<int64_t>(sizes.padded, 0);
  rooms.total = sizes.total;
  rooms.lengths = data<int32_t>(out.lengths);
  rooms.cu_seqlens = data<int32_t>(out.cu_seqlens);
  rooms.overflow = out.overflow.numel() ? data<int32_t>(out.overflow) : nullptr;
  rooms.ready = gathers ? ready_ : nullptr;

  SelectParams select{};
  select.source = rooms.source;
  select.scores = table<const Strided>(problem_.scores);
  select.type = problem_.score_type;
  select.sink = sizes.sink;
  select.window = sizes.window;
  select.lengths = rooms.lengths;
  select.cu_seqlens = rooms.cu_seqlens;
  select.total = sizes.total;
  select.positions = data<int32_t>(out.positions);
  select.ready = rooms.ready;
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
  GatherParams gather{};
  gather.source = source();
  gather.payloads = static_cast<int64_t>(problem_.payloads.size());
  gather.inputs = table<const Strided>(problem_.inputs);
  gather.outputs = table<char* const>(outputs_);
  gather.row_bytes = table<const int64_t>(problem_.row_bytes);
  gather.positions = data<int32_t>(positions);
  gather.cu_seqlens = data<int32_t>(cu_seqlens);
  gather.total = positions.numel();
  gather.ready = behind_select ? ready_ : nullptr;
  gather.warm = warm;
#ifdef LKV_WITH_CUDA
  if (cuda_) {
    cuda_->check(cuda::gather(gather, behind_select, cuda_->stream()), "gather");
    return;
  }
#endif
  cpu::gather(gather, torch_threads());
}

void Launch::compact(const Index& index) {
  CompactParams compact{};
  compact.source = source();
  compact.payloads = static_cast<int64_t>(problem_.payloads.size());
  compact.payload = table<const Strided>(problem_.inputs);
  compact.row_bytes = table<const int64_t>(problem_.row_bytes);
  compact.positions = data<int32_t>(index.positions);
  compact.lengths = data<int32_t>(index.lengths);
  compact.cu_seqlens = data<int32_t>(index.cu_seqlens);
#ifdef LKV_WITH_CUDA
  if (cuda_) {
    cuda_->check(cuda::compact(compact, cuda_->stream()), "compact");
    return;
  }
#endif
  cpu::compact(compact, torch_threads());
}

}  // namespace lkv::torch_ops
