#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "lkv/floats.h"
#include "lkv/segments.h"
#include "units.h"

// Attention over a ragged cache on the CPU, in spans or in pages. A unit of work is a tile of queries of one segment
// times a piece of its rows, so that one long head does not set the time:
//   1. Convert the queries of the tile to float32 and scale them.
//   2. A query of the first piece begins its running softmax at its sink, if it sees any row.
//   3. The row kernels run over the piece, 64 rows at a time: logits, their exponentials relative to the highest so
//      far, and the weighted sum of V. Rows in pages are copied first where 64 of them do not lie side by side.
//   4. The thread that finishes the last piece of a tile merges all of them in order and writes the result. It depends
//      on the shape alone, not on threads.

namespace lkv::cpu {
namespace {

constexpr int64_t kQueryTile = 64;
constexpr int64_t kPieceRows = 1024;  // at least
constexpr int64_t kPieces = 256;      // of all tiles together, about

// Multiply-adds below which another thread is not worth waking.
constexpr int64_t kGrain = 256 << 10;

constexpr float kNever = -std::numeric_limits<float>::infinity();

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t stride_of(int64_t dim) {
  return divide_up(dim, kAttendStep) * kAttendStep;
}

int64_t bytes_of(ScoreType type) {
  return type == ScoreType::f32 ? 4 : 2;
}

// Rows in equal steps.
struct Stretch {
  const char *k, *v;
  int64_t k_step, v_step, rows;
};

// The result of one unit: highest, sum and acc of every query of its tile.
struct Partial {
  float *highest, *sum, *acc;
};

class Attention {
 public:
  // `pages`: nullptr where rows lie in spans.
  Attention(const AttendParams& p, const Pages* pages)
      : p_(p),
        pages_(pages),
        segments_(p.batch * p.heads),
        queries_(p.group * p.queries),
        acc_stride_(stride_of(p.dim_v)) {
    if (segments_ == 0 || queries_ == 0) return;
    k_bytes_ = p.dim * bytes_of(p.k_type);
    v_bytes_ = p.dim_v * bytes_of(p.v_type);
    tile_ = std::min(queries_, kQueryTile);
    tiles_ = divide_up(queries_, tile_);
    const int64_t most = std::max<int64_t>(1, kPieces / (segments_ * tiles_));
    piece_ = divide_up(std::max(kPieceRows, divide_up(p.longest, most)), kAttendRows) * kAttendRows;
    pieces_ = std::max<int64_t>(1, divide_up(p.longest, piece_));
    partials_.reset(new float[static_cast<size_t>(units() * partial_size())]);
    // Read once, as these tensors may be written to meanwhile.
    spans_.reserve(static_cast<size_t>(segments_));
    for (int64_t row = 0; row < segments_; ++row)
      spans_.push_back(pages == nullptr ? attended_span(p, row) : paged_span(row));
    left_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(segments_ * tiles_));
    for (int64_t i = 0; i < segments_ * tiles_; ++i) left_[i] = pieces_of(length_of(i / tiles_));
    if (p.sinks != nullptr) with_type(p.sinks_type, [&]<ScoreType type>() { load_sinks<type>(); });
  }

  int64_t units() const { return segments_ * tiles_ * pieces_; }

  int64_t work() const {
    int64_t rows = 0;
    for (const Span& span : spans_) rows += span.length;
    return rows * queries_ * (p_.dim + p_.dim_v);
  }

  void run(int64_t unit) {
    const int64_t tile = unit / pieces_, piece = unit % pieces_, row = tile / tiles_;
    const int64_t pieces = pieces_of(length_of(row));
    if (piece >= pieces) return;
    attend(row, tile % tiles_ * tile_, piece, partial(unit));
    if (left_[tile].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(row, tile % tiles_ * tile_, tile, pieces);
  }

 private:
  Span paged_span(int64_t row) const {
    const int64_t length = pages_->count == 0 ? 0 : clamp(p_.lengths[row], 0, p_.longest);
    return {0, length, length};
  }

  int64_t page_of(int64_t row, int64_t token) const {
    const int64_t id = pages_->id(0, row / p_.heads, row % p_.heads, token >> pages_->shift);
    return clamp(id, 0, pages_->count - 1);
  }

  // Rows of a segment from a token on, `most` at most: those that lie side by side, where they fill whole tiles, or a
  // tile that is copied. Every id is read once, as tables may be written to meanwhile.
  Stretch rows_from(int64_t row, int64_t token, int64_t most, char* copy) const {
    if (pages_ == nullptr) {
      const int64_t at = begin_of(row) + token;
      return {p_.k.data + at * p_.k.token, p_.v.data + at * p_.v.token, p_.k.token, p_.v.token, most};
    }
    const int64_t page = int64_t{1} << pages_->shift, first = page_of(row, token), skipped = token & (page - 1);
    const bool adjacent = p_.k.batch == page * p_.k.token && p_.v.batch == page * p_.v.token;
    int64_t rows = page - skipped;
    for (int64_t next = first + 1; adjacent && rows < most && page_of(row, token + rows) == next; ++next) rows += page;
    rows = rows < most ? rows / kAttendRows * kAttendRows : most;
    const auto at = [&](const Strided& pool, int64_t id, int64_t i) {
      return pool.data + id * pool.batch + i * pool.token;
    };
    if (rows > 0) return {at(p_.k, first, skipped), at(p_.v, first, skipped), p_.k.token, p_.v.token, rows};
    rows = std::min(kAttendRows, most);
    char *k = copy, *v = copy + kAttendRows * k_bytes_;
    for (int64_t done = 0, begin = skipped, id = first; done < rows; begin = 0) {
      const int64_t count = std::min(page - begin, rows - done);
      copy_rows(k + done * k_bytes_, at(p_.k, id, begin), count, k_bytes_, p_.k.token);
      copy_rows(v + done * v_bytes_, at(p_.v, id, begin), count, v_bytes_, p_.v.token);
      done += count;
      if (done < rows) id = page_of(row, token + done);
    }
    return {k, v, k_bytes_, v_bytes_, rows};
  }

  static void copy_rows(char* to, const char* from, int64_t count, int64_t bytes, int64_t step) {
    if (step == bytes) {
      std::memcpy(to, from, static_cast<size_t>(count * bytes));
      return;
    }
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * bytes, from + i * step, static_cast<size_t>(bytes));
  }

  int64_t begin_of(int64_t row) const { return spans_[row].begin; }
  int64_t length_of(int64_t row) const { return spans_[row].length; }
  int64_t pieces_of(int64_t length) const { return std::max<int64_t>(1, divide_up(length, piece_)); }
  int64_t partial_size() const { return tile_ * (2 + acc_stride_); }
  Partial partial(int64_t unit) const {
    float* at = partials_.get() + unit * partial_size();
    return {at, at + tile_, at + 2 * tile_};
  }

  template <class F>
  static void with_type(ScoreType type, F&& f) {
    switch (type) {
      case ScoreType::f32:
        return f.template operator()<ScoreType::f32>();
      case ScoreType::f16:
        return f.template operator()<ScoreType::f16>();
      case ScoreType::bf16:
        return f.template operator()<ScoreType::bf16>();
    }
  }

  template <ScoreType type>
  void load_sinks() {
    const auto* from = static_cast<const typename ScoreTraits<type>::Bits*>(p_.sinks);
    for (int64_t head = 0; head < p_.heads * p_.group; ++head) sinks_.push_back(to_float<type>(from[head]));
  }

  // Query i of a segment is head i % group of the group at token i / group: neighbours see about the same rows.
  int64_t head_of(int64_t row, int64_t i) const { return row % p_.heads * p_.group + i % p_.group; }

  template <ScoreType type>
  void load_query(int64_t row, int64_t i, float* to) const {
    const char* from =
        p_.q.data + row / p_.heads * p_.q.batch + head_of(row, i) * p_.q.head + i / p_.group * p_.q.token;
    typename ScoreTraits<type>::Bits bits;
    for (int64_t d = 0; d < p_.dim; ++d) {
      std::memcpy(&bits, from + d * static_cast<int64_t>(sizeof(bits)), sizeof(bits));
      to[d] = to_float<type>(bits) * p_.scale;
    }
    std::fill(to + p_.dim, to + stride_of(p_.dim), 0.0f);
  }

  template <ScoreType type>
  void store(int64_t row, int64_t i, const float* from) const {
    char* to =
        p_.out.data + row / p_.heads * p_.out.batch + head_of(row, i) * p_.out.head + i / p_.group * p_.out.token;
    for (int64_t d = 0; d < p_.dim_v; ++d) {
      const auto bits = from_float<type>(from[d]);
      std::memcpy(to + d * static_cast<int64_t>(sizeof(bits)), &bits, sizeof(bits));
    }
  }

  void attend(int64_t row, int64_t query, int64_t piece, const Partial& to) const {
    const int64_t count = std::min(tile_, queries_ - query), stride = stride_of(p_.dim);
    const int64_t length = length_of(row), first = piece * piece_, rows = clamp(length - first, 0, piece_);
    std::fill_n(to.acc, count * acc_stride_, 0.0f);
    std::vector<float> queries(static_cast<size_t>(count * stride));
    int64_t visible[kQueryTile];
    with_type(p_.type, [&]<ScoreType type>() {
      for (int64_t i = 0; i < count; ++i) load_query<type>(row, query + i, queries.data() + i * stride);
    });
    for (int64_t i = 0; i < count; ++i) {
      const int64_t behind = p_.causal ? p_.queries - 1 - (query + i) / p_.group : 0;
      visible[i] = length - behind - first;
      // The running softmax begins at the sink, if there are rows behind it.
      const bool sinks = !sinks_.empty() && piece == 0 && visible[i] > 0;
      to.highest[i] = sinks ? sinks_[head_of(row, query + i)] : kNever;
      to.sum[i] = to.highest[i] == kNever ? 0.0f : 1.0f;
    }
    const int64_t last = clamp(*std::max_element(visible, visible + count), 0, rows);
    std::unique_ptr<char[]> copy;
    if (pages_ != nullptr) copy.reset(new char[static_cast<size_t>(kAttendRows * (k_bytes_ + v_bytes_))]);
    for (int64_t done = 0; done < last;) {
      const Stretch x = rows_from(row, first + done, last - done, copy.get());
      row_kernels().attend({queries.data(), count, stride, visible, p_.k_type, p_.v_type, x.k, x.v, x.k_step, x.v_step,
                            x.rows, p_.dim, p_.dim_v, p_.softcap, to.highest, to.sum, to.acc, acc_stride_});
      done += x.rows;
      for (int64_t i = 0; i < count; ++i) visible[i] -= x.rows;
    }
  }

  void merge(int64_t row, int64_t query, int64_t tile, int64_t pieces) const {
    const Partial into = partial(tile * pieces_);
    for (int64_t i = 0; i < std::min(tile_, queries_ - query); ++i) {
      float highest = into.highest[i];
      for (int64_t piece = 1; piece < pieces; ++piece)
        highest = std::max(highest, partial(tile * pieces_ + piece).highest[i]);
      float* acc = into.acc + i * acc_stride_;
      float sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Partial part = partial(tile * pieces_ + piece);
        const float scale = highest == part.highest[i] ? 1.0f : std::exp(part.highest[i] - highest);
        const float* more = part.acc + i * acc_stride_;
        sum += scale * part.sum[i];
        for (int64_t d = 0; d < p_.dim_v; ++d) acc[d] = (piece > 0 ? acc[d] : 0.0f) + scale * more[d];
      }
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      for (int64_t d = 0; d < p_.dim_v; ++d) acc[d] *= inverse;
      with_type(p_.type, [&]<ScoreType type>() { store<type>(row, query + i, acc); });
    }
  }

  const AttendParams& p_;
  const Pages* pages_;
  int64_t segments_, queries_, acc_stride_;
  int64_t k_bytes_ = 0, v_bytes_ = 0;  // of a row
  int64_t tile_ = 1, tiles_ = 0, piece_ = 1, pieces_ = 0;
  std::vector<Span> spans_;  // of each segment
  std::unique_ptr<float[]> partials_;
  std::vector<float> sinks_;                // of every query head; empty: none
  std::vector<std::atomic<int64_t>> left_;  // pieces of each tile that are not done
};

void run(const AttendParams& p, const Pages* pages, const Threads& threads) {
  Attention attention(p, pages);
  const int64_t workers = useful_workers(threads, attention.units(), attention.work(), kGrain);
  for_each_unit(threads, workers, attention.units(), [&](int64_t unit, int64_t) { attention.run(unit); });
}

}  // namespace

void attend(const AttendParams& p, const Threads& threads) {
  run(p, nullptr, threads);
}

void attend_paged(const AttendParams& p, const Pages& pages, const Threads& threads) {
  run(p, &pages, threads);
}

}  // namespace lkv::cpu
