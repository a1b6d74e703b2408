#include <bit>
#include <cmath>

#include "lkv/floats.h"
#include "row_kernels_impl.h"

namespace lkv::cpu {
namespace {

// One lane: compressing is an unconditional store, so the loops have no branch to mispredict.
struct Portable {
  using Vec = uint32_t;
  static constexpr int width = 1;
  static constexpr int64_t block = 16;

  static Vec set(uint32_t x) { return x; }
  static Vec load(const uint32_t* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vec load(const uint16_t* p) {
    uint16_t half;
    memcpy(&half, p, sizeof(half));
    return static_cast<Vec>(half) << 16;
  }
  static void store(uint32_t* p, Vec v) { *p = v; }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec shift_right(Vec v, int bits) { return v >> bits; }
  static Vec fill_sign(Vec v) { return static_cast<Vec>(static_cast<int32_t>(v) >> 31); }

  using Lanes = uint32_t;
  struct Inside : Arc {
    explicit Inside(Arc arc) : Arc(arc) {}
    Lanes operator()(Vec x) const { return x - first < count; }
  };
  static Vec choose(Lanes lanes, Vec yes, Vec no) { return lanes ? yes : no; }
  static uint32_t bits(Lanes lanes) { return lanes; }
  static Vec count(Vec counts, Lanes lanes) { return counts + lanes; }
  static int64_t total(Vec v) { return v; }

  static void compress(uint32_t* p, Vec v, uint32_t) { *p = v; }
  static void number(uint32_t* p, Vec base, uint32_t) { *p = base; }

  using Floats = float;
  static constexpr int chunks = 1;

  static Floats fset(float x) { return x; }
  static Floats fload(const float* p) { return *p; }
  static void fstore(float* p, Floats x) { *p = x; }
  static Floats from_bf16(const uint16_t* p) { return to_float<ScoreType::bf16>(*p); }
  static Floats from_f16(const uint16_t* p) { return to_float<ScoreType::f16>(*p); }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats fadd(Floats a, Floats b) { return a + b; }
  static Floats fsub(Floats a, Floats b) { return a - b; }
  static Floats fmul(Floats a, Floats b) { return a * b; }
  static Floats fdiv(Floats a, Floats b) { return a / b; }
  static Floats inverse(Floats x) { return 1 / x; }
  static Floats fmax(Floats a, Floats b) { return a > b ? a : b; }
  static Floats fmin(Floats a, Floats b) { return a < b ? a : b; }
  static float sum(Floats x) { return x; }
  static float highest(Floats x) { return x; }
  static Floats scale_by_exponent(Floats x, Floats n) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) + (std::bit_cast<uint32_t>(n) << 23));
  }
  static Floats zero_below(Floats x, Floats a, Floats b) { return a < b ? 0.0f : x; }
  static Floats where_below(Floats a, Floats b, Floats x, Floats y) { return a < b ? x : y; }
  static Floats mantissa(Floats x, Floats& exponent) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), n = (bits - kRootHalf) >> 23;
    const int32_t signed_n = static_cast<int32_t>(bits - kRootHalf) >> 23;
    exponent = static_cast<float>(signed_n);
    return std::bit_cast<float>(bits - (n << 23));
  }
  static Floats copy_sign(Floats x, Floats sign) { return std::copysign(x, sign); }

  static void copy_block(char* to, const char* from) { memcpy(to, from, block); }
  static void stream_block(char* to, const char* from) { copy_block(to, from); }
  static void fence() {}
};

}  // namespace

constinit const RowKernels portable_kernels = make_row_kernels<Portable>("portable");

}  // namespace lkv::cpu
