#include <algorithm>
#include <cstring>

#include "lkv/cpu.h"
#include "units.h"

namespace lkv::cpu {
namespace {

// Bytes that are worth a thread of their own.
constexpr int64_t kGrain = 256 << 10;

void append_segment(const AppendParams& p, int64_t row) {
  const int64_t b = row / p.heads, h = row % p.heads;
  const int64_t begin = clamp(p.cu_seqlens[row], 0, p.tokens);
  const int64_t end = clamp(p.cu_seqlens[row + 1], begin, p.tokens);
  const int64_t first = begin + clamp(p.lengths[row], 0, end - begin);
  const int64_t skipped = p.count - clamp(p.valid.at(0, b, h), 0, p.count);
  const int64_t added = std::min(p.count - skipped, end - first);
  for (int64_t payload = 0; payload < p.payloads; ++payload) {
    const Strided& input = p.inputs[payload];
    const int64_t bytes = p.row_bytes[payload];
    const char* from = input.data + b * input.batch + h * input.head + skipped * input.token;
    char* to = p.outputs[payload] + first * bytes;
    for (int64_t i = 0; i < added; ++i) std::memcpy(to + i * bytes, from + i * input.token, static_cast<size_t>(bytes));
  }
  for (int64_t i = 0; i < added; ++i) p.positions[first + i] = static_cast<int32_t>(p.position + skipped + i);
  p.lengths[row] = static_cast<int32_t>(first + added - begin);
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
