#include <cstring>

#include "lkv/cpu.h"
#include "lkv/segments.h"
#include "units.h"

// New rows behind the rows in use. A unit of work is one segment: appended_of says how many rows fit and where they go;
// they are copied payload by payload, then their positions and the new length are written.

namespace lkv::cpu {
namespace {

// Bytes below which another thread is not worth waking.
constexpr int64_t kGrain = 256 << 10;

void append_segment(const AppendParams& p, int64_t row) {
  const Appended added = appended_of(p, row);
  for (int64_t payload = 0; payload < p.payloads; ++payload) {
    const Strided& input = p.inputs[payload];
    const int64_t bytes = p.row_bytes[payload];
    const char* from =
        input.data + row / p.heads * input.batch + row % p.heads * input.head + added.token * input.token;
    char* to = p.outputs[payload] + added.first * bytes;
    for (int64_t i = 0; i < added.rows; ++i)
      std::memcpy(to + i * bytes, from + i * input.token, static_cast<size_t>(bytes));
  }
  for (int64_t i = 0; i < added.rows; ++i)
    p.positions[added.first + i] = static_cast<int32_t>(p.position + added.token + i);
  p.lengths[row] = static_cast<int32_t>(added.length);
}

}  // namespace

void append(const AppendParams& p, const Threads& threads) {
  const int64_t rows = p.batch * p.heads;
  int64_t bytes = 0;
  for (int64_t i = 0; i < p.payloads; ++i) bytes += p.row_bytes[i];
  const int64_t workers = useful_workers(threads, rows, rows * p.count * bytes, kGrain);
  for_each_unit(threads, workers, rows, [&](int64_t row, int64_t) { append_segment(p, row); });
}

}  // namespace lkv::cpu
