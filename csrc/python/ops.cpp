#include "ops.h"

#include "call_threads.h"
#include "host/params.h"

namespace lkv::python {

namespace {

Index new_index(const host::Problem& problem, const host::Sizes& sizes) {
  return {py::array_t<int32_t>(problem.output_shape(sizes.total, sizes.padded, {})),
          py::array_t<int32_t>(problem.lengths_shape()), py::array_t<int32_t>(problem.rows() + 1)};
}

host::IndexPointers pointers(const Index& index) {
  const auto data = [](const py::array& a) { return static_cast<int32_t*>(const_cast<void*>(a.data())); };
  return {data(index.positions), data(index.lengths), data(index.cu_seqlens), nullptr};
}

PyArrays new_outputs(const host::Problem& problem, const PyArrays& payload, int64_t total, int64_t padded) {
  PyArrays outputs;
  for (size_t p = 0; p < payload.size(); ++p) {
    py::array out = empty(payload[p].dtype(), problem.output_shape(total, padded, problem.payloads[p].trailing));
    cpu::advise_huge_pages(out.mutable_data(), out.nbytes());
    outputs.push_back(std::move(out));
  }
  return outputs;
}

// Runs the kernels of one call; what they read has been checked.
class Run {
 public:
  Run(host::Problem& problem, const host::Sizes& sizes, int64_t threads)
      : problem_(problem), sizes_(sizes), threads_(threads) {}

  void select(const host::IndexPointers& index) const {
    const host::Params params(problem_, problem_.tables.data());
    cpu::spans(params.spans(sizes_, index, nullptr));
    cpu::select(params.select(sizes_, index, nullptr), CallThreads(threads_, read()));
  }

  void evict(const std::vector<char*>& outputs, const host::IndexPointers& index, bool warm) const {
    const size_t table = problem_.tables.add(outputs);
    const host::Params params(problem_, problem_.tables.data());
    cpu::spans(params.spans(sizes_, index, nullptr));
    cpu::evict(params.select(sizes_, index, nullptr), gather_params(params, table, index, warm),
               CallThreads(threads_, read() + moved()));
  }

  void gather(const std::vector<char*>& outputs, const host::IndexPointers& index) const {
    const size_t table = problem_.tables.add(outputs);
    const host::Params params(problem_, problem_.tables.data());
    cpu::gather(gather_params(params, table, index, false), CallThreads(threads_, moved()));
  }

  // select, then compact.
  void evict_in_place(const host::IndexPointers& index) const {
    host::IndexPointers ascending = index;
    std::vector<int32_t> scratch(sizes_.any_order ? sizes_.total : 0);
    if (sizes_.any_order) ascending.positions = scratch.data();
    select(ascending);
    cpu::compact(host::Params(problem_, problem_.tables.data()).compact(sizes_, ascending, index.positions),
                 CallThreads(threads_, moved()));
  }

 private:
  GatherParams gather_params(const host::Params& params, size_t outputs, const host::IndexPointers& index,
                             bool warm) const {
    return params.gather(outputs, index.positions, index.cu_seqlens, sizes_.total, nullptr, warm);
  }

  // Bytes of scores, and of rows.
  int64_t read() const { return problem_.rows() * problem_.longest * static_cast<int64_t>(sizeof(float)); }
  int64_t moved() const {
    int64_t bytes = 0;
    for (const host::Payload& payload : problem_.payloads) bytes += payload.row_bytes;
    return sizes_.total * bytes;
  }

  host::Problem& problem_;
  const host::Sizes& sizes_;
  int64_t threads_;
};

std::vector<char*> data_of(const PyArrays& arrays) {
  std::vector<char*> data;
  for (const py::array& a : arrays) data.push_back(view(a).data);
  return data;
}

}  // namespace

Index select(const py::array& scores, const Request& request) {
  const host::Sizes sizes = request.sizes();
  host::Problem problem({}, {view(scores)}, request.layout());
  problem.read_sizes(sizes);
  Index index = new_index(problem, sizes);
  const host::IndexPointers results = pointers(index);
  const py::gil_scoped_release released;
  Run(problem, sizes, request.threads).select(results);
  return index;
}

PyArrays gather(const PyArrays& arrays, const Index& index, int64_t batch, int64_t heads,
                const OptionalArray& cu_seqlens, int64_t threads) {
  const auto offsets = cu_seqlens ? std::optional(view(*cu_seqlens)) : std::nullopt;
  host::Problem problem(view(arrays), {}, {1, batch, heads, offsets});
  host::Sizes sizes{};
  sizes.padded = problem.check_index(view(index.positions), view(index.cu_seqlens));
  sizes.total = index.positions.size();
  PyArrays out = new_outputs(problem, arrays, sizes.total, sizes.padded);
  const std::vector<char*> data = data_of(out);
  const host::IndexPointers rows = pointers(index);
  const py::gil_scoped_release released;
  Run(problem, sizes, threads).gather(data, rows);
  return out;
}

std::pair<PyArrays, Index> evict(const PyArrays& payload, const py::array& scores, const Request& request) {
  const host::Sizes sizes = request.sizes();
  host::Problem problem(view(payload), {view(scores)}, request.layout());
  problem.read_sizes(sizes);
  Index index = new_index(problem, sizes);
  PyArrays out = new_outputs(problem, payload, sizes.total, sizes.padded);
  const std::vector<char*> data = data_of(out);
  const host::IndexPointers results = pointers(index);
  {
    const py::gil_scoped_release released;
    Run(problem, sizes, request.threads).evict(data, results, false);
  }
  return {std::move(out), std::move(index)};
}

void evict_out(const PyArrays& out, const Index& index, const PyArrays& payload, const py::array& scores,
               const Request& request) {
  const host::Sizes sizes = request.sizes();
  const host::Arrays sources = view(payload), ranking = {view(scores)};
  host::Problem problem(sources, ranking, request.layout());
  problem.read_sizes(sizes);
  const host::Outputs outputs{view_writable(out, "out"), view_writable(index.positions, "out.positions"),
                              view_writable(index.lengths, "out.lengths"),
                              view_writable(index.cu_seqlens, "out.cu_seqlens"), std::nullopt};
  host::check_outputs(problem, sizes, outputs, sources, ranking);
  const std::vector<char*> data = data_of(out);
  const host::IndexPointers results = pointers(index);
  const py::gil_scoped_release released;
  Run(problem, sizes, request.threads).evict(data, results, true);
}

Index evict_in_place(const PyArrays& payload, const py::array& scores, const Request& request) {
  const host::Sizes sizes = request.sizes();
  const host::Arrays moved = view_writable(payload, "payload"), ranking = {view(scores)};
  host::Problem problem(moved, ranking, request.layout());
  problem.read_sizes(sizes);
  host::check_in_place(problem, sizes, moved, ranking);
  Index index = new_index(problem, sizes);
  const host::IndexPointers results = pointers(index);
  const py::gil_scoped_release released;
  Run(problem, sizes, request.threads).evict_in_place(results);
  return index;
}

std::pair<Index, py::array> evict_paged(const PyArrays& pools, const py::array& scores, const PyArrays& tables,
                                        const Request& request) {
  const host::Sizes sizes = request.sizes();
  const host::Arrays moved = view_writable(pools, "payload"), ranking = {view(scores)}, ids = view(tables);
  host::Problem problem({}, ranking, request.layout());
  problem.read_sizes(sizes);
  problem.read_pages(moved, ids);
  host::check_in_pages(problem, sizes, moved, ids, ranking);
  Index index = new_index(problem, sizes);
  py::array_t<int32_t> free(problem.free_counts());
  problem.count_free_pages(free.mutable_data());
  const host::IndexPointers results = pointers(index);
  {
    const py::gil_scoped_release released;
    Run(problem, sizes, request.threads).evict_in_place(results);
  }
  return {std::move(index), std::move(free)};
}

}  // namespace lkv::python
