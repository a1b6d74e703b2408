// Evicts rows of K and V in the buffers of an engine: one layer, B sequences, H KV heads, L tokens, D numbers a row.

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

}  // namespace

int main() {
  constexpr int64_t B = 2, H = 2, L = 1000, D = 64, R = B * H;
  const std::vector<int32_t> budgets = {100, 300};  // one for each head, the same in both sequences
  std::vector<float> k(R * L * D), v(k.size()), scores(R * L);
  std::iota(k.begin(), k.end(), 0.0f);
  for (int64_t i = 0; i < R * L; ++i) scores[i] = static_cast<float>(i * 7919 % 1009);

  // Tables of one layer: where a token of (b, h) lies, in bytes.
  const int64_t tokens[] = {L}, row_bytes[] = {D * sizeof(float), D * sizeof(float)};
  const auto dense = [](std::vector<float>& x, int64_t row) {
    const int64_t token = row * sizeof(float);
    return lkv::Strided{reinterpret_cast<char*>(x.data()), H * L * token, L * token, token};
  };
  const lkv::Strided inputs[] = {dense(k, D), dense(v, D)}, score_rows[] = {dense(scores, 1)};
  const lkv::Source source{
      .layers = 1, .batch = B, .heads = H, .tokens = tokens, .lengths = {.fallback = L}, .starts = {}};

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
                  {run, nullptr, 2});

  for (int64_t row = 0; row < R; ++row) {
    const int32_t begin = cu_seqlens[row], last = begin + lengths[row] - 1;
    std::printf("segment %d: %d of %d rows, positions %d to %d, K of the first begins with %g\n", int(row),
                lengths[row], int(L), positions[begin], positions[last], kept_k[begin * D]);
  }
  return overflow;
}
