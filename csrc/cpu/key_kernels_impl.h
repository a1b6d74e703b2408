#pragma once

#include <cstring>

#include "row_kernels.h"

// Selection loops over a vector type S, included by one file per instruction set. Everything here has internal linkage:
// were it shared, the linker could pick the AVX-512 copy of an inline function for a machine without it.
//
// S: Vec of `width` 32-bit lanes with the bitwise operators; set, iota, load (32-bit items, or 16-bit items into the
// top halves), store, add, sub, shift_right, fill_sign (arithmetic shift by 31), above and equal (unsigned, as a bit
// per lane), zero_where_equal, zero_where_above(v, a, b) for values below 2^31, compress (stores a whole vector).

namespace lkv::cpu {
namespace {

struct Keys {
  using Item = uint32_t;
  template <class S>
  static typename S::Vec load(const Item* items) {
    return S::load(items);
  }
};

// lkv::ordered_key for a vector.
template <ScoreType type>
struct Scores {
  using Item = typename ScoreTraits<type>::Bits;
  template <class S>
  static typename S::Vec load(const Item* items) {
    constexpr int unused = 32 - 8 * sizeof(Item);
    const auto sign = S::set(0x80000000u);
    const auto magnitude = S::set(0x7fffffffu >> unused << unused);
    auto x = S::load(items);
    x = S::zero_where_equal(x, x, sign);
    const auto key = x ^ ((S::fill_sign(x) & magnitude) | sign);
    return S::zero_where_above(key, x & magnitude, S::set(uint32_t{ScoreTraits<type>::infinity} << unused));
  }
};

// visit(keys, lanes, i): `lanes` keys of a vector exist, the first of them item i.
template <class S, class Source, class Visit>
void for_each_vector(const void* data, int64_t n, Visit&& visit) {
  const auto* items = static_cast<const typename Source::Item*>(data);
  int64_t i = 0;
  for (; i + S::width <= n; i += S::width) visit(Source::template load<S>(items + i), S::width, i);
  if (i < n) {
    typename Source::Item rest[S::width] = {};
    memcpy(rest, items + i, static_cast<size_t>(n - i) * sizeof(rest[0]));
    visit(Source::template load<S>(rest), static_cast<int>(n - i), i);
  }
}

constexpr uint32_t mask_of(int lanes) {
  return (1u << lanes) - 1;
}

template <class S, class Source>
int64_t count_above(const void* items, int64_t n, uint32_t key) {
  const auto pivot = S::set(key);
  int64_t count = 0;
  for_each_vector<S, Source>(items, n, [&](auto keys, int lanes, int64_t) {
    count += __builtin_popcount(S::above(keys, pivot) & mask_of(lanes));
  });
  return count;
}

template <class S, class Source>
void histogram(const void* items, int64_t n, uint32_t low, int shift, uint32_t* bins) {
  const auto base = S::set(low);
  for_each_vector<S, Source>(items, n, [&](auto keys, int lanes, int64_t i) {
    uint32_t digits[S::width];
    S::store(digits, S::shift_right(S::sub(keys, base), shift));
    for (int lane = 0; lane < lanes; ++lane) ++bins[(i + lane) % kCopies * kBins + digits[lane]];
  });
}

template <class S, class Source>
Collected collect(const void* items, int64_t n, uint32_t low, uint32_t high, uint32_t* out) {
  const auto base = S::set(low), range = S::set(high - low), top = S::set(high);
  Collected found = {0, 0};
  for_each_vector<S, Source>(items, n, [&](auto keys, int lanes, int64_t) {
    const uint32_t above = S::above(keys, top) & mask_of(lanes);
    const uint32_t inside = ~S::above(S::sub(keys, base), range) & mask_of(lanes);
    S::compress(out + found.inside, keys, inside);
    found.above += __builtin_popcount(above);
    found.inside += __builtin_popcount(inside);
  });
  return found;
}

inline uint32_t lowest_bits(uint32_t mask, int64_t count) {
  while (__builtin_popcount(mask) > count) mask ^= 0x80000000u >> __builtin_clz(mask);
  return mask;
}

template <class S, class Source>
Emitted emit(const void* items, int64_t n, uint32_t key, int64_t ties, int64_t position, int32_t* out, int64_t space) {
  const auto pivot = S::set(key);
  Emitted done = {0, 0};
  for_each_vector<S, Source>(items, n, [&](auto keys, int lanes, int64_t i) {
    uint32_t kept = S::above(keys, pivot) & mask_of(lanes);
    if (done.ties < ties) {
      const uint32_t tied = lowest_bits(S::equal(keys, pivot) & mask_of(lanes), ties - done.ties);
      done.ties += __builtin_popcount(tied);
      kept |= tied;
    }
    int64_t count = __builtin_popcount(kept);
    const auto positions = S::add(S::set(static_cast<uint32_t>(position + i)), S::iota());
    if (done.count + S::width <= space) {
      S::compress(reinterpret_cast<uint32_t*>(out + done.count), positions, kept);
    } else if (count > 0) {
      uint32_t last[S::width];
      S::compress(last, positions, kept);
      count = count < space - done.count ? count : space - done.count;  // more only of scores that somebody changes
      memcpy(out + done.count, last, static_cast<size_t>(count) * sizeof(last[0]));
    }
    done.count += count;
  });
  return done;
}

template <class S, class Source>
constexpr KeyKernels key_kernels() {
  return {count_above<S, Source>, histogram<S, Source>, collect<S, Source>, emit<S, Source>};
}

}  // namespace
}  // namespace lkv::cpu
