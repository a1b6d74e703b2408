#pragma once

#include <cstring>

#include "lkv/keys.h"

// Arithmetic on floats over a vector type S, one file per instruction set, internal linkage as in key_kernels_impl.h.
//
// S: Floats of `width` 32-bit lanes; fset, fload, fstore, fload of 16-bit types (from_bf16, from_f16), fma, fadd, fsub,
// fmul, fdiv, inverse (within 4e-4 of it), fmin and fmax (the second operand where one is NaN), sum and highest over
// lanes, scale_by_exponent, zero_below, where_below (of a < b), copy_sign, and mantissa: of a normal number above 0, in
// [sqrt(1/2), sqrt(2)), and exponent.

namespace lkv::cpu {
namespace {

constexpr uint32_t kRootHalf = 0x3f3504f3;  // the bits of sqrt(1/2)

template <ScoreType type>
struct Elements {
  using Item = typename ScoreTraits<type>::Bits;
  template <class S>
  static auto load(const Item* p) {
    if constexpr (type == ScoreType::f32) {
      return S::fload(reinterpret_cast<const float*>(p));
    } else if constexpr (type == ScoreType::f16) {
      return S::from_f16(p);
    } else {
      return S::from_bf16(p);
    }
  }
};

constexpr float kExp[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// e^x = scale * (1 + part) for |x| <= 88: scale = 2^n, and part = e^r - 1 with |r| <= ln 2 / 2 by the polynomial of
// Cephes' expf.
template <class S>
struct Exponential {
  typename S::Floats scale, part;

  explicit Exponential(typename S::Floats x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const auto shifted = S::fma(x, S::fset(1.44269504088896341f), S::fset(kRound));
    const auto n = S::fadd(shifted, S::fset(-kRound));
    auto r = S::fma(n, S::fset(-0.693359375f), x);
    r = S::fma(n, S::fset(2.12194440e-4f), r);
    auto p = S::fset(1.9875691500e-4f);
    for (const float c : kExp) p = S::fma(p, r, S::fset(c));
    part = S::fma(p, S::fmul(r, r), r);
    scale = S::scale_by_exponent(S::fset(1.0f), shifted);
  }

  auto value() const { return S::fma(scale, part, scale); }
};

constexpr float kPower[] = {1.326472663e-3f, 9.671512959e-3f, 5.550733748e-2f, 2.402224208e-1f, 6.931469776e-1f, 1.0f};
constexpr float kRoughPower[] = {5.500858e-2f, 2.4221037e-1f, 6.932829e-1f, 1.0f};

template <class S, size_t terms>
auto polynomial(typename S::Floats x, const float (&c)[terms]) {
  auto p = S::fset(c[0]);
  for (size_t i = 1; i < terms; ++i) p = S::fma(p, x, S::fset(c[i]));
  return p;
}

// 2^x within 2 ulp, or 1e-4 of it, by the polynomial of least relative error, for x of at least -126, below which it is
// 2^-126; infinity for x above 126 (as 2^128, where the exponent of 1 is that of infinity) and for NaN. Rough ones end
// at 2^40. So nothing that is made of them is subnormal, which would cost a hundred cycles.
template <class S, bool rough = false>
auto power_of_two(typename S::Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = S::fmax(S::fmin(x, S::fset(rough ? 40.0f : 128.0f)), S::fset(-126.0f));
  if constexpr (!rough) x = S::where_below(S::fset(126.0f), x, S::fset(128.0f), x);
  const auto shifted = S::fadd(x, S::fset(kRound));
  const auto r = S::fsub(x, S::fadd(shifted, S::fset(-kRound)));
  if constexpr (rough) return S::scale_by_exponent(polynomial<S>(r, kRoughPower), shifted);
  return S::scale_by_exponent(polynomial<S>(r, kPower), shifted);
}

// e^x for x <= 0 within 2 ulp.
template <class S>
auto exp_negative(typename S::Floats x) {
  x = S::fmax(S::fset(-88.0f), x);
  return S::zero_below(Exponential<S>(x).value(), x, S::fset(-87.33f));
}

constexpr float kLog[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                          -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};

// The natural logarithm of a normal number above 0 within 2 ulp, by the polynomial of Cephes' logf.
template <class S>
auto log_normal(typename S::Floats x) {
  typename S::Floats exponent;
  const auto f = S::fadd(S::mantissa(x, exponent), S::fset(-1.0f));
  auto p = S::fset(7.0376836292e-2f);
  for (const float c : kLog) p = S::fma(p, f, S::fset(c));
  const auto square = S::fmul(f, f);
  p = S::fmul(S::fmul(p, f), square);
  p = S::fma(exponent, S::fset(-2.12194440e-4f), p);
  p = S::fma(square, S::fset(-0.5f), p);
  return S::fma(exponent, S::fset(0.693359375f), S::fadd(f, p));
}

// The whole vectors of a row, then what is left of it, filled up with zeros.
template <class S, class E>
auto load_chunk(const typename E::Item* row, int64_t at, int64_t size) {
  if (at + S::width <= size) return E::template load<S>(row + at);
  typename E::Item rest[S::width] = {};
  memcpy(rest, row + at, static_cast<size_t>(size - at) * sizeof(rest[0]));
  return E::template load<S>(rest);
}

}  // namespace
}  // namespace lkv::cpu
