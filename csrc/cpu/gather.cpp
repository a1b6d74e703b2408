#include <algorithm>
#include <cstring>

#include "lkv/cpu.h"
#include "row_kernels.h"
#include "units.h"

namespace lkv::cpu {
namespace {

// Bytes of output that one thread takes at a time, and that are worth a thread of their own.
constexpr int64_t kTile = 512 << 10;
constexpr int64_t kGrain = 32 << 10;

// Outputs that would not stay in the cache anyway.
constexpr int64_t kStreamed = 16 << 20;

// Destination rows [begin, end) of one row set, or of none (row < 0).
struct Segment {
  int64_t row, begin, end;
};

// The rooms around destination row j. Whatever cu_seqlens holds, the bisection ends on an i with
// cu_seqlens[i - 1] <= j < cu_seqlens[i], so the segment is never empty and its row set exists.
Segment segment_at(const GatherParams& p, int64_t rows, int64_t j, int64_t end) {
  const int32_t* next = std::upper_bound(p.cu_seqlens, p.cu_seqlens + rows + 1, j);
  const int64_t i = next - p.cu_seqlens;
  if (i == 0) return {-1, j, std::min<int64_t>(end, *next)};
  if (i > rows) return {-1, j, end};
  return {i - 1, j, std::min<int64_t>(end, *next)};
}

class Gather {
 public:
  explicit Gather(const GatherParams& p) : p_(p), kernels_(row_kernels()), rows_(p.source.rows()) {
    for (int64_t i = 0; i < p.payloads; ++i) bytes_ += p.row_bytes[i];
  }

  int64_t row_bytes() const { return bytes_; }

  void tile(int64_t begin, int64_t end) const {
    while (begin < end) {
      const Segment segment = segment_at(p_, rows_, begin, end);
      if (segment.row < 0) {
        clear(segment);
      } else {
        move(segment);
      }
      begin = segment.end;
    }
    if (p_.warm) kernels_.fence();
  }

 private:
  char* output(int64_t payload, int64_t j) const { return p_.outputs[payload] + j * p_.row_bytes[payload]; }

  void clear(const Segment& s) const {
    for (int64_t payload = 0; payload < p_.payloads; ++payload) {
      std::memset(output(payload, s.begin), 0, static_cast<size_t>((s.end - s.begin) * p_.row_bytes[payload]));
    }
  }

  void move(const Segment& s) const {
    const RowSet set = row_set(p_.source, s.row);
    for (int64_t payload = 0; payload < p_.payloads; ++payload) {
      const int64_t bytes = p_.row_bytes[payload];
      if (bytes == 0) continue;
      const Strided& input = p_.inputs[payload * p_.source.layers + set.layer];
      const CopyRows copy = streamed(payload) ? kernels_.stream_rows(bytes) : kernels_.copy_rows(bytes);
      copy({output(payload, s.begin), bytes, set.at(input, 0), input.token, p_.positions + s.begin, s.end - s.begin,
            set.limit, bytes});
    }
  }

  bool streamed(int64_t payload) const {
    const auto address = reinterpret_cast<uintptr_t>(p_.outputs[payload]);
    return p_.warm && p_.total * bytes_ >= kStreamed && p_.row_bytes[payload] % 64 == 0 && address % 64 == 0;
  }

  const GatherParams& p_;
  const RowKernels& kernels_;
  int64_t rows_, bytes_ = 0;
};

}  // namespace

void gather(const GatherParams& p, const Threads& threads) {
  const Gather gather(p);
  if (p.total == 0 || gather.row_bytes() == 0) return;
  const int64_t work = p.total * gather.row_bytes();
  const int64_t workers = useful_workers(threads, p.total, work, kGrain);
  const int64_t tile = std::max<int64_t>(1, std::min(kTile, work / (4 * workers)) / gather.row_bytes());
  const int64_t units = (p.total + tile - 1) / tile;
  // Handed out from as many stretches as there are workers: two that meet in one fresh huge page would both clear it.
  const int64_t stretch = (units + workers - 1) / workers;
  for_each_unit(threads, workers, stretch * workers, [&](int64_t turn, int64_t) {
    const int64_t begin = (turn % workers * stretch + turn / workers) * tile;
    gather.tile(begin, std::min(p.total, begin + tile));
  });
}

}  // namespace lkv::cpu
