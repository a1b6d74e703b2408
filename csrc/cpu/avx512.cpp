#if defined(__x86_64__)

#include <immintrin.h>

#include "row_kernels_impl.h"

namespace lkv::cpu {
namespace {

struct Avx512 {
  using Vec = __m512i;
  static constexpr int width = 16;
  static constexpr int64_t block = 64;

  static Vec set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Vec load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Vec load(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  }
  static void store(uint32_t* p, Vec v) { _mm512_storeu_si512(p, v); }

  static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  static Vec shift_right(Vec v, int bits) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
  static Vec fill_sign(Vec v) { return _mm512_srai_epi32(v, 31); }

  using Lanes = __mmask16;
  struct Inside {
    Vec first, count;
    explicit Inside(Arc arc) : first(set(arc.first)), count(set(arc.count)) {}
    Lanes operator()(Vec x) const { return _mm512_cmplt_epu32_mask(sub(x, first), count); }
  };
  static Vec choose(Lanes lanes, Vec yes, Vec no) { return _mm512_mask_mov_epi32(no, lanes, yes); }
  // Through a general register: GCC 12 may spill a mask register as 16 bits and count 32 of them.
  static uint32_t bits(Lanes lanes) {
    uint32_t mask = lanes;
    asm("" : "+r"(mask));
    return mask;
  }
  static Vec count(Vec counts, Lanes lanes) { return _mm512_mask_sub_epi32(counts, lanes, counts, set(~0u)); }
  static int64_t total(Vec v) {
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_srli_epi64(v, 32), v & _mm512_set1_epi64(0xffffffff)));
  }

  // In register first: the form that compresses into memory is microcoded on Zen 4.
  static void compress(uint32_t* p, Vec v, uint32_t mask) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v));
  }
  static void number(uint32_t* p, Vec base, uint32_t mask) {
    compress(p, add(base, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)), mask);
  }

  using Floats = __m512;
  static constexpr int chunks = 4;

  static Floats fset(float x) { return _mm512_set1_ps(x); }
  static Floats fload(const float* p) { return _mm512_loadu_ps(p); }
  static void fstore(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static Floats from_bf16(const uint16_t* p) { return _mm512_castsi512_ps(load(p)); }
  static Floats from_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fadd(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats fsub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats fmul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fdiv(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats inverse(Floats x) { return _mm512_rcp14_ps(x); }
  static Floats fmax(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats fmin(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static float sum(Floats x) { return _mm512_reduce_add_ps(x); }
  static float highest(Floats x) { return _mm512_reduce_max_ps(x); }
  static Floats scale_by_exponent(Floats x, Floats n) {
    return _mm512_castsi512_ps(add(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
  static Floats zero_below(Floats x, Floats a, Floats b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
  }
  static Floats where_below(Floats a, Floats b, Floats x, Floats y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
  }
  static Floats mantissa(Floats x, Floats& exponent) {
    const Vec bits = _mm512_castps_si512(x), n = _mm512_srai_epi32(sub(bits, set(kRootHalf)), 23);
    exponent = _mm512_cvtepi32_ps(n);
    return _mm512_castsi512_ps(sub(bits, _mm512_slli_epi32(n, 23)));
  }
  static Floats copy_sign(Floats x, Floats sign) {
    return _mm512_or_ps(x, _mm512_and_ps(sign, _mm512_castsi512_ps(set(0x80000000u))));
  }

  static void copy_block(char* to, const char* from) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }
  static void stream_block(char* to, const char* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace

constinit const RowKernels avx512_kernels = make_row_kernels<Avx512>("avx512");

}  // namespace lkv::cpu

#endif
