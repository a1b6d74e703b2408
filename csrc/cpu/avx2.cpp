#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>

#include "row_kernels_impl.h"

namespace lkv::cpu {
namespace {

// For each mask of eight lanes, the lanes that are set, packed to the front: one byte per lane.
struct PackTable {
  uint64_t lanes[256];
  constexpr PackTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int at = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask] |= static_cast<uint64_t>(lane) << 8 * at++;
      }
    }
  }
};

constexpr PackTable kPack;

struct Avx2 {
  using Vec = __m256i;
  static constexpr int width = 8;
  static constexpr int64_t block = 32;

  static Vec set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Vec load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vec*>(p)); }
  static Vec load(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
  }
  static void store(uint32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<Vec*>(p), v); }

  static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static Vec shift_right(Vec v, int bits) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
  static Vec fill_sign(Vec v) { return _mm256_srai_epi32(v, 31); }

  using Lanes = Vec;
  struct Inside {
    Vec first, count;
    // The comparison is signed: 2^31 more on both sides.
    explicit Inside(Arc arc) : first(set(arc.first ^ 0x80000000u)), count(set(arc.count ^ 0x80000000u)) {}
    Lanes operator()(Vec x) const { return _mm256_cmpgt_epi32(count, sub(x, first)); }
  };
  static Vec choose(Lanes lanes, Vec yes, Vec no) { return _mm256_blendv_epi8(no, yes, lanes); }
  static uint32_t bits(Lanes lanes) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes))); }
  static Vec count(Vec counts, Lanes lanes) { return sub(counts, lanes); }
  static int64_t total(Vec v) {
    uint32_t lanes[width];
    store(lanes, v);
    int64_t sum = 0;
    for (const uint32_t lane : lanes) sum += lane;
    return sum;
  }

  static Vec packed(uint32_t mask) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kPack.lanes[mask])));
  }
  static void compress(uint32_t* p, Vec v, uint32_t mask) { store(p, _mm256_permutevar8x32_epi32(v, packed(mask))); }
  static void number(uint32_t* p, Vec base, uint32_t mask) { store(p, add(base, packed(mask))); }

  using Floats = __m256;
  static constexpr int chunks = 2;

  static Floats fset(float x) { return _mm256_set1_ps(x); }
  static Floats fload(const float* p) { return _mm256_loadu_ps(p); }
  static void fstore(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  static Floats from_bf16(const uint16_t* p) { return _mm256_castsi256_ps(load(p)); }
  static Floats from_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fadd(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats fsub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats fmul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fdiv(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats inverse(Floats x) { return _mm256_rcp_ps(x); }
  static Floats fmax(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats fmin(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static float sum(Floats x) {
    return fold(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  static float highest(Floats x) {
    return fold(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  }
  static Floats scale_by_exponent(Floats x, Floats n) {
    return _mm256_castsi256_ps(add(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
  static Floats zero_below(Floats x, Floats a, Floats b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), x); }
  static Floats where_below(Floats a, Floats b, Floats x, Floats y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static Floats mantissa(Floats x, Floats& exponent) {
    const Vec bits = _mm256_castps_si256(x), n = _mm256_srai_epi32(sub(bits, set(kRootHalf)), 23);
    exponent = _mm256_cvtepi32_ps(n);
    return _mm256_castsi256_ps(sub(bits, _mm256_slli_epi32(n, 23)));
  }
  static Floats copy_sign(Floats x, Floats sign) {
    return _mm256_or_ps(x, _mm256_and_ps(sign, _mm256_castsi256_ps(set(0x80000000u))));
  }
  template <class F>
  static float fold(Floats x, F f) {
    __m128 half = f(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = f(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(f(half, _mm_movehdup_ps(half)));
  }

  static void copy_block(char* to, const char* from) {
    store(reinterpret_cast<uint32_t*>(to), load(reinterpret_cast<const uint32_t*>(from)));
  }
  static void stream_block(char* to, const char* from) {
    _mm256_stream_si256(reinterpret_cast<Vec*>(to), load(reinterpret_cast<const uint32_t*>(from)));
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace

constinit const RowKernels avx2_kernels = make_row_kernels<Avx2>("avx2");

}  // namespace lkv::cpu

#endif
