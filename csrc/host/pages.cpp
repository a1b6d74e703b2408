#include <bit>

#include "problem.h"

namespace lkv::host {

Pages read_table(const Named& pool, const Named& table, int64_t batch, int64_t heads, Device device) {
  const Array& ids = table.array;
  check_device(table, device);
  const bool per_head = ids.rank == 3;
  check_type(ids.element == Element::i32 || ids.element == Element::i64, "expected ", table.name,
             " of dtype int32 or int64, got ", describe_dtype(ids));
  check_value((ids.rank == 2 || per_head) && ids.sizes[0] == batch && (!per_head || ids.sizes[1] == heads), "expected ",
              table.name, " of shape [B, M] or [B, H, M] with [B, H] = ", Shape{batch, heads}, ", got ", ids.shape());
  const int64_t most = ids.sizes[ids.rank - 1];
  check_value(most <= 1 || ids.stride(ids.rank - 1) == ids.itemsize, "expected ", table.name,
              " contiguous in the last axis, got strides ", Shape(ids.strides, ids.strides + ids.rank), " for shape ",
              ids.shape());
  const auto step = [&](int64_t i) { return ids.stride(i) / ids.itemsize; };
  Pages pages = {ids.data, 0, step(0), per_head ? step(1) : 0, 0, 0, ids.element == Element::i64, per_head, nullptr};
  const int64_t axis = per_head ? 1 : 2;
  if (pool.array.rank <= axis) return pages;  // refused with all others of its kind
  const int64_t page = pool.array.sizes[axis];
  pages.count = pool.array.sizes[0];
  check_value(page > 0 && std::has_single_bit(static_cast<uint64_t>(page)),
              "expected pages of a power of two of rows, got ", pool.name, " of shape ", pool.array.shape());
  pages.shift = std::countr_zero(static_cast<uint64_t>(page));
  return pages;
}

void Problem::read_pages(const Arrays& pools, const Arrays& ids) {
  check_value(!pools.empty() && pools.size() % layers == 0, "expected one pool per layer for every kind of rows, got ",
              pools.size(), " pools for ", layers, " layers");
  const size_t kinds = pools.size() / layers;
  check_value(!ids.empty() && ids.size() <= kinds,
              "expected tables for all kinds of pools, or for the last of them, got ", ids.size(), " for ", kinds,
              " kinds");
  const size_t sharing = kinds - (ids.size() - 1);
  std::vector<Strided> rows;
  std::vector<int64_t> bytes;
  for (size_t i = 0; i < pools.size(); ++i) {
    const size_t kind = i / layers, table = kind < sharing ? 0 : kind - sharing + 1, owner = table == 0 ? 0 : kind;
    const Array &array = pools[i], &head = pools[kind * layers];
    const Named pool{array, {"payload", static_cast<int64_t>(i)}};
    const bool is_head = i % layers == 0;
    check_device(pool, device);
    if (is_head && kind != owner) pages.push_back(pages[owner]);
    if (is_head && kind == owner)
      pages.push_back(read_table(pool, {ids[table], table_name(table)}, batch, heads, device));
    const Pages& of = pages[kind];
    const int64_t axis = of.per_head ? 1 : 2, page = int64_t{1} << of.shift;
    check_value(array.rank > axis && (of.per_head || array.sizes[1] == heads), "expected ", pool.name, " of shape ",
                of.per_head ? "[P, page, ...], as every head has a table of its own"
                            : "[P, H, page, ...], as the heads share a table",
                ", with H = ", heads, ", got ", array.shape());
    check_value(array.sizes[0] == of.count && array.sizes[axis] == page, "expected ", pool.name, " with ", of.count,
                " pages of ", page, " rows as in ", Name("payload", static_cast<int64_t>(owner * layers)), ", got ",
                array.shape());
    if (is_head && kind == owner) {
      const int64_t most = ids[table].sizes[ids[table].rank - 1];
      check_value(longest <= most << of.shift, "expected scores of at most ", most << of.shift, " tokens, as ",
                  table_name(table), " have ", most, " pages of ", page, ", got ", longest);
    }
    const RowLayout layout = row_layout(pool, axis);
    if (is_head) {
      payloads.push_back({layout.trailing, array.dtype, array.itemsize, layout.row_bytes});
      bytes.push_back(layout.row_bytes);
    } else {
      check_value(layout.trailing == payloads.back().trailing, "expected ", pool.name,
                  " with rows like those of the first layer, ", head.shape(), ", got ", array.shape());
      check_type(array.dtype == head.dtype, "expected ", pool.name, " of the dtype of the first layer");
    }
    rows.push_back(layout.strided);
  }
  own_tables = ids.size() - 1;
  inputs = tables.add(rows);
  row_bytes = tables.add(bytes);
}

int64_t Problem::free_counts() const {
  int64_t count = 0;
  for (size_t kind = 0; kind < pages.size(); ++kind)
    if (counts_pages(kind)) count += batch * (pages[kind].per_head ? heads : 1);
  return count;
}

void Problem::count_free_pages(int32_t* free) {
  for (size_t kind = 0; kind < pages.size(); ++kind) {
    if (!counts_pages(kind)) continue;
    pages[kind].free = free;
    free += batch * (pages[kind].per_head ? heads : 1);
  }
  pages_table = tables.add(pages);
}

}  // namespace lkv::host
