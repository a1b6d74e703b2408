// Evicts rows of K and V in the buffers of an engine: one layer, B sequences, H KV heads, L tokens, D numbers a row.
// First out of dense buffers into packed ones, then in place in a pool of pages, whose free pages the engine takes
// back.

#include <lkv/cpu.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <thread>
#include <vector>

namespace {

// The kernels own no threads. Here every call starts two; an engine lends those of its pool.
void run(void*, int64_t n, int64_t grain, lkv::cpu::Threads::Body body, void* context) {
  const int64_t half = std::max(grain, n / 2);
  std::thread other(body, context, half, n);
  body(context, 0, half);
  other.join();
}

constexpr lkv::cpu::Threads kThreads{run, nullptr, 2};
constexpr int64_t B = 2, H = 2, L = 1000, D = 64, R = B * H;
const std::vector<int32_t> budgets = {100, 300};  // one for each head, the same in both sequences

// Tables of one layer: how many tokens there are, and where the row of one of (b, h) lies, in bytes.
const int64_t tokens[] = {L}, row_bytes[] = {D * sizeof(float), D * sizeof(float)};
const lkv::Source source{
    .layers = 1, .batch = B, .heads = H, .tokens = tokens, .lengths = {.fallback = L}, .starts = {}};

lkv::Strided dense(std::vector<float>& x, int64_t row) {
  const int64_t token = row * sizeof(float);
  return {reinterpret_cast<char*>(x.data()), H * L * token, L * token, token};
}

// From dense K and V into packed ones.
int32_t evict_dense(std::vector<float>& scores) {
  std::vector<float> k(R * L * D), v(k.size());
  std::iota(k.begin(), k.end(), 0.0f);
  const lkv::Strided inputs[] = {dense(k, D), dense(v, D)}, score_rows[] = {dense(scores, 1)};

  // How many rows each (sequence, head) keeps, and where they begin in the output.
  const int64_t total = B * (budgets[0] + budgets[1]);
  std::vector<int32_t> lengths(R), cu_seqlens(R + 1), positions(total);
  int32_t overflow = 0;
  lkv::cpu::spans({.source = source,
                   .budgets = {.data = budgets.data(), .head = 1},
                   .total = total,
                   .lengths = lengths.data(),
                   .cu_seqlens = cu_seqlens.data(),
                   .overflow = &overflow});

  // The best rows by score and the last 16, in order of position, and K and V moved.
  std::vector<float> kept_k(total * D), kept_v(total * D);
  char* const outputs[] = {reinterpret_cast<char*>(kept_k.data()), reinterpret_cast<char*>(kept_v.data())};
  lkv::cpu::evict({.source = source,
                   .scores = score_rows,
                   .type = lkv::ScoreType::f32,
                   .window = 16,
                   .lengths = lengths.data(),
                   .cu_seqlens = cu_seqlens.data(),
                   .total = total,
                   .positions = positions.data()},
                  {.source = source,
                   .payloads = 2,
                   .inputs = inputs,
                   .outputs = outputs,
                   .row_bytes = row_bytes,
                   .positions = positions.data(),
                   .cu_seqlens = cu_seqlens.data(),
                   .total = total},
                  kThreads);

  for (int64_t row = 0; row < R; ++row) {
    const int32_t begin = cu_seqlens[row], last = begin + lengths[row] - 1;
    std::printf("segment %d: %d of %d rows, positions %d to %d, K of the first begins with %g\n", int(row),
                lengths[row], int(L), positions[begin], positions[last], kept_k[begin * D]);
  }
  return overflow;
}

// In place, in a pool [P, 2, page, H, D] whose pages the table of each sequence names.
void evict_pool(std::vector<float>& scores) {
  constexpr int64_t kShift = 4, kPage = 1 << kShift, M = (L + kPage - 1) / kPage, P = B * M;
  std::vector<float> pool(P * 2 * kPage * H * D);
  std::iota(pool.begin(), pool.end(), 0.0f);
  std::vector<int32_t> tables(P);
  for (int64_t i = 0; i < P; ++i) tables[i] = static_cast<int32_t>(i * 37 % P);  // as pages come and go

  // K and V: views with a stride from page to page, where the others have one from sequence to sequence.
  constexpr int64_t kHead = D * sizeof(float), kToken = H * kHead, kHalf = kPage * kToken;
  char* const data = reinterpret_cast<char*>(pool.data());
  const lkv::Strided pools[] = {{data, 2 * kHalf, kHead, kToken}, {data + kHalf, 2 * kHalf, kHead, kToken}};
  const lkv::Strided score_rows[] = {dense(scores, 1)};

  // How many rows stay, which, and where they go: to the front of each sequence, in the pages that it has.
  const int64_t total = B * (budgets[0] + budgets[1]);
  std::vector<int32_t> lengths(R), cu_seqlens(R + 1), positions(total), free_pages(B);
  lkv::cpu::spans({.source = source,
                   .budgets = {.data = budgets.data(), .head = 1},
                   .total = total,
                   .lengths = lengths.data(),
                   .cu_seqlens = cu_seqlens.data()});
  lkv::cpu::select({.source = source,
                    .scores = score_rows,
                    .type = lkv::ScoreType::f32,
                    .window = 16,
                    .lengths = lengths.data(),
                    .cu_seqlens = cu_seqlens.data(),
                    .total = total,
                    .positions = positions.data()},
                   kThreads);
  // V lies in the pages of K; free pages are counted once.
  lkv::Pages pages[] = {{.tables = tables.data(), .batch = M, .count = P, .shift = kShift}, {}};
  pages[1] = pages[0];
  pages[0].free = free_pages.data();
  lkv::cpu::compact({.source = source,
                     .pages = pages,
                     .total = total,
                     .payloads = 2,
                     .payload = pools,
                     .row_bytes = row_bytes,
                     .positions = positions.data(),
                     .lengths = lengths.data(),
                     .cu_seqlens = cu_seqlens.data()},
                    kThreads);

  for (int64_t b = 0; b < B; ++b) {
    const float first = pool[tables[b * M] * 2 * kPage * H * D];  // K of the first row that head 0 keeps
    std::printf("sequence %d: %d of %d pages are free, K of the first row begins with %g\n", int(b), free_pages[b],
                int(M), first);
  }
}

}  // namespace

int main() {
  std::vector<float> scores(R * L);
  for (int64_t i = 0; i < R * L; ++i) scores[i] = static_cast<float>(i * 7919 % 1009);
  const int32_t overflow = evict_dense(scores);
  evict_pool(scores);
  return overflow;
}
