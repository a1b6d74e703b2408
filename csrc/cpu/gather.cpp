#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "lkv/segments.h"
#include "units.h"

// Gather on the CPU. A unit of work is a tile: consecutive rows of the output, up to 512 KiB of them, whatever segments
// they belong to, so that skewed budgets balance over threads. For each tile:
//   1. Find the segment of the next row by bisection of cu_seqlens.
//   2. Rows behind the last span become zeros.
//   3. If a select runs beside, wait for the flag of the segment.
//   4. For each payload, copy the rows at `positions` one after the other and prefetch those ahead; a position outside
//      of the segment gives zeros. Large outputs whose memory was touched before are written past the cache.
//   5. Go on with the next segment until the tile ends.

namespace lkv::cpu {
namespace {

// Bytes of output that a thread takes at a time, and below which another thread is not worth waking.
constexpr int64_t kTile = 512 << 10;
constexpr int64_t kGrain = 32 << 10;

// Destination rows [begin, end) of one segment, or of none (row < 0).
struct Run {
  int64_t row, begin, end;
};

// The rows from j on that belong to one segment. For any contents of cu_seqlens the bisection ends on an i with
// cu_seqlens[i - 1] <= j < cu_seqlens[i], so its segment exists, and the run is never empty.
Run run_at(const GatherParams& p, int64_t rows, int64_t j, int64_t end) {
  const int64_t i = std::upper_bound(p.cu_seqlens, p.cu_seqlens + rows + 1, j) - p.cu_seqlens;
  if (i > rows) return {-1, j, end};
  return {i - 1, j, clamp(p.cu_seqlens[i], j + 1, end)};  // clamped, as it may be another by now
}

int64_t bytes_of(const GatherParams& p) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < p.payloads; ++i) bytes += p.row_bytes[i];
  return bytes;
}

char* output(const GatherParams& p, int64_t payload, int64_t j) {
  return p.outputs[payload] + j * p.row_bytes[payload];
}

void clear(const GatherParams& p, const Run& s) {
  for (int64_t payload = 0; payload < p.payloads; ++payload) {
    const int64_t bytes = p.row_bytes[payload];
    if (bytes > 0) std::memset(output(p, payload, s.begin), 0, static_cast<size_t>((s.end - s.begin) * bytes));
  }
}

void wait_for(const uint32_t& ready) {
  while (std::atomic_ref(const_cast<uint32_t&>(ready)).load(std::memory_order_acquire) == 0) std::this_thread::yield();
}

}  // namespace

int64_t gather_workers(const GatherParams& p, const Threads& threads) {
  return useful_workers(threads, p.total, p.total * bytes_of(p), kGrain);
}

GatherUnits::GatherUnits(const GatherParams& p, int64_t workers) : p_(p), kernels_(row_kernels()), bytes_(bytes_of(p)) {
  if (p.total == 0 || bytes_ == 0) return;
  const int64_t work = p.total * bytes_;
  tile_ = std::max<int64_t>(1, std::min(kTile, work / (4 * workers)) / bytes_);
  count_ = (p.total + tile_ - 1) / tile_;
}

void GatherUnits::run(int64_t unit) const {
  int64_t begin = unit * tile_;
  const int64_t end = std::min(p_.total, begin + tile_);
  while (begin < end) {
    const Run run = run_at(p_, p_.source.rows(), begin, end);
    if (run.row < 0) {
      clear(p_, run);
    } else {
      if (p_.ready != nullptr) wait_for(p_.ready[run.row]);
      move(run.row, run.begin, run.end);
    }
    begin = run.end;
  }
  if (p_.warm) kernels_.fence();
}

void GatherUnits::move(int64_t row, int64_t begin, int64_t end) const {
  const Segment segment = segment_of(p_.source, row);
  for (int64_t payload = 0; payload < p_.payloads; ++payload) {
    const int64_t bytes = p_.row_bytes[payload];
    if (bytes == 0) continue;
    const Strided& input = p_.inputs[payload * p_.source.layers + segment.layer];
    const CopyRows copy = streamed(payload) ? kernels_.stream_rows(bytes) : kernels_.copy_rows(bytes);
    copy({output(p_, payload, begin), segment.at(input, 0), input.token, p_.positions + begin, end - begin,
          segment.limit, bytes});
  }
}

bool GatherUnits::streamed(int64_t payload) const {
  const auto address = reinterpret_cast<uintptr_t>(p_.outputs[payload]);
  return p_.warm && p_.total * bytes_ >= kStreamed && p_.row_bytes[payload] % 64 == 0 && address % 64 == 0;
}

void gather(const GatherParams& p, const Threads& threads) {
  const int64_t workers = gather_workers(p, threads);
  const GatherUnits units(p, workers);
  for_each_unit(threads, workers, units.count(), [&](int64_t unit, int64_t) { units.run(unit); });
}

}  // namespace lkv::cpu
