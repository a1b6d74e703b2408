#include "params.h"

namespace lkv::host {

Source Params::source() const {
  return {problem_.layers,
          problem_.batch,
          problem_.heads,
          table<const int64_t>(problem_.tokens),
          problem_.cu_seqlens,
          problem_.lengths.at(tables_),
          problem_.starts.at(tables_)};
}

SpansParams Params::spans(const Sizes& sizes, const IndexPointers& out, uint32_t* ready) const {
  SpansParams spans{};
  spans.source = source();
  spans.budgets = problem_.budgets.at(tables_);
  spans.max_budget = sizes.max_budget;
  spans.page = std::max<int64_t>(1, sizes.back);
  spans.reserve = sizes.reserve;
  spans.align = sizes.align;
  spans.padded = sizes.padded;
  spans.total = sizes.total;
  spans.lengths = out.lengths;
  spans.cu_seqlens = out.cu_seqlens;
  spans.overflow = out.overflow;
  spans.ready = ready;
  return spans;
}

SelectParams Params::select(const Sizes& sizes, const IndexPointers& out, uint32_t* ready) const {
  SelectParams select{};
  select.source = source();
  select.scores = table<const Strided>(problem_.scores);
  select.type = problem_.score_type;
  select.sink = sizes.sink;
  select.window = sizes.window;
  select.lengths = out.lengths;
  select.cu_seqlens = out.cu_seqlens;
  select.total = sizes.total;
  select.positions = out.positions;
  select.ready = ready;
  return select;
}

GatherParams Params::gather(size_t outputs, const int32_t* positions, const int32_t* cu_seqlens, int64_t total,
                            const uint32_t* ready, bool warm) const {
  GatherParams gather{};
  gather.source = source();
  gather.payloads = static_cast<int64_t>(problem_.payloads.size());
  gather.inputs = table<const Strided>(problem_.inputs);
  gather.outputs = table<char* const>(outputs);
  gather.row_bytes = table<const int64_t>(problem_.row_bytes);
  gather.positions = positions;
  gather.cu_seqlens = cu_seqlens;
  gather.total = total;
  gather.ready = ready;
  gather.warm = warm;
  return gather;
}

CompactParams Params::compact(const Sizes& sizes, const IndexPointers& index, int32_t* filled) const {
  CompactParams compact{};
  compact.source = source();
  compact.pages = problem_.pages.empty() ? nullptr : table<const Pages>(problem_.pages_table);
  compact.to_back = sizes.back > 0;
  compact.total = sizes.total;
  compact.payloads = static_cast<int64_t>(problem_.payloads.size());
  compact.payload = table<const Strided>(problem_.inputs);
  compact.row_bytes = table<const int64_t>(problem_.row_bytes);
  compact.positions = index.positions;
  compact.lengths = index.lengths;
  compact.cu_seqlens = index.cu_seqlens;
  compact.filled = sizes.any_order ? filled : nullptr;
  return compact;
}

AppendParams Params::append(size_t outputs, const IntTable& valid) const {
  AppendParams append{};
  append.batch = problem_.batch;
  append.heads = problem_.heads;
  append.count = problem_.longest;
  append.valid = valid.at(tables_);
  append.payloads = static_cast<int64_t>(problem_.payloads.size());
  append.inputs = table<const Strided>(problem_.inputs);
  append.outputs = table<char* const>(outputs);
  append.row_bytes = table<const int64_t>(problem_.row_bytes);
  return append;
}

}  // namespace lkv::host
