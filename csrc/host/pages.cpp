#include <bit>

#include "problem.h"

namespace lkv::host {

void Problem::read_pages(const Arrays& pools, const Array& ids) {
  const Named table{ids, "tables"};
  check_device(table, device);
  const bool per_head = ids.rank == 3;
  check_type(ids.element == Element::i32 || ids.element == Element::i64,
             "expected tables of dtype int32 or int64, got ", describe_dtype(ids));
  check_value((ids.rank == 2 || per_head) && ids.sizes[0] == batch && (!per_head || ids.sizes[1] == heads),
              "expected tables of shape [B, M] or [B, H, M] with [B, H] = ", Shape{batch, heads}, ", got ",
              ids.shape());
  const int64_t most = ids.sizes[ids.rank - 1];
  check_value(most <= 1 || ids.stride(ids.rank - 1) == ids.itemsize,
              "expected tables contiguous in the last axis, got strides ", Shape(ids.strides, ids.strides + ids.rank),
              " for shape ", ids.shape());
  check_value(!pools.empty() && pools.size() % layers == 0, "expected one pool per layer for every kind of rows, got ",
              pools.size(), " pools for ", layers, " layers");

  const int64_t axis = per_head ? 1 : 2;
  const auto step = [&](int64_t i) { return ids.stride(i) / ids.itemsize; };
  pages = {ids.data, 0, step(0), per_head ? step(1) : 0, 0, 0, ids.element == Element::i64, per_head};
  int64_t page = -1;
  std::vector<Strided> rows;
  std::vector<int64_t> bytes;
  for (size_t i = 0; i < pools.size(); ++i) {
    const Array& array = pools[i];
    const Named pool{array, {"payload", static_cast<int64_t>(i)}};
    check_device(pool, device);
    check_value(array.rank > axis && (per_head || array.sizes[1] == heads), "expected ", pool.name, " of shape ",
                per_head ? "[P, page, ...], as every head has a table of its own"
                         : "[P, H, page, ...], as the heads share a table",
                ", with H = ", heads, ", got ", array.shape());
    if (i == 0) {
      pages.count = array.sizes[0];
      page = array.sizes[axis];
      check_value(page > 0 && std::has_single_bit(static_cast<uint64_t>(page)),
                  "expected pages of a power of two of rows, got ", pool.name, " of shape ", array.shape());
      pages.shift = std::countr_zero(static_cast<uint64_t>(page));
      check_value(longest <= most << pages.shift, "expected scores of at most ", most << pages.shift,
                  " tokens, as tables have ", most, " pages of ", page, ", got ", longest);
    }
    check_value(array.sizes[0] == pages.count && array.sizes[axis] == page, "expected ", pool.name, " with ",
                pages.count, " pages of ", page, " rows as in payload[0], got ", array.shape());
    const RowLayout layout = row_layout(pool, axis);
    const Array& head = pools[i - i % layers];
    if (i % layers == 0) {
      payloads.push_back({layout.trailing, array.dtype, array.itemsize, layout.row_bytes});
      bytes.push_back(layout.row_bytes);
    } else {
      check_value(layout.trailing == payloads.back().trailing, "expected ", pool.name,
                  " with rows like those of the first layer, ", head.shape(), ", got ", array.shape());
      check_type(array.dtype == head.dtype, "expected ", pool.name, " of the dtype of the first layer");
    }
    rows.push_back(layout.strided);
  }
  inputs = tables.add(rows);
  row_bytes = tables.add(bytes);
}

}  // namespace lkv::host
