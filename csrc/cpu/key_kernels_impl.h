#pragma once

#include <cstring>

#include "row_kernels.h"

// Selection loops over a vector type S, included by one file per instruction set. Everything here has internal linkage:
// were it shared, the linker could pick the AVX-512 copy of an inline function for a machine without it.
//
// S: Vec of `width` 32-bit lanes with the bitwise operators; set, load (32-bit items, or 16-bit items into the top
// halves), store, add, sub, shift_right, fill_sign (arithmetic shift by 31), total (the sum of the lanes). Lanes, yes
// or no for each: Inside (made of an Arc, of a Vec: which lanes are in it), choose (where yes the first Vec), bits (a
// bit per lane), count (adds 1 where yes). compress and number pack, for the bits that are set, lanes of a vector or
// base + lane; both store a whole vector.

namespace lkv::cpu {
namespace {

// The numbers first, first + 1, ... `count` of them, in the circle of 32-bit numbers.
struct Arc {
  uint32_t first, count;
};

struct Keys {
  using Item = uint32_t;
  template <class S>
  static typename S::Vec load(const Item* items) {
    return S::load(items);
  }
  template <class S>
  static typename S::Vec line(const Item* items) {
    return S::load(items);
  }
  static Arc between(uint32_t low, uint32_t high) { return {low, high - low + 1}; }
};

// Scores lie on a *line* of 32-bit numbers that costs less to compute than their keys: NaN lies at both of its ends, -0
// just before 0, and the low bits that a 16-bit score lacks are ones where it is negative. Keys are an arc of it.
template <ScoreType type>
struct Scores {
  using Item = typename ScoreTraits<type>::Bits;
  static constexpr int unused = 32 - 8 * sizeof(Item);
  static constexpr uint32_t rest = (uint32_t{1} << unused) - 1, zero = 0x80000000u;
  static constexpr uint32_t highest = zero | uint32_t{ScoreTraits<type>::infinity} << unused;
  static constexpr uint32_t lowest = ~highest & ~rest;  // the key of -inf

  template <class S>
  static typename S::Vec line(const Item* items) {
    const auto x = S::load(items);
    return x ^ (S::fill_sign(x) | S::set(zero));
  }

  // lkv::ordered_key for a vector.
  template <class S>
  static typename S::Vec load(const Item* items) {
    return key<S>(line<S>(items));
  }
  template <class S>
  static typename S::Vec key(typename S::Vec line) {
    const typename S::Inside scores(between(1, highest)), zeros(between(zero, zero));
    const auto keys = S::choose(zeros(line), S::set(zero), line & S::set(~rest));
    return S::choose(scores(line), keys, S::set(0));
  }

  // The arc of the keys in [low, high], which are not all there are.
  static constexpr Arc between(uint32_t low, uint32_t high) {
    if (low > highest) return {0, 0};
    uint32_t first = (low + rest) & ~rest, last = high | rest;
    first = low == 0 ? highest + 1 : first == zero ? zero - 1 : first < lowest ? lowest : first;
    last = last < lowest || high == 0 ? lowest - 1 : last > highest ? highest : last == zero - 1 ? zero - 2 : last;
    return {first, last - first + 1};
  }
};

template <class Source>
constexpr Arc above(uint32_t key) {
  return key == 0xffffffffu ? Arc{0, 0} : Source::between(key + 1, 0xffffffffu);
}

constexpr uint32_t mask_of(int lanes) {
  return (1u << lanes) - 1;
}

// visit(items, lanes, i): a vector of items of which `lanes` exist, the first of them item i.
template <class S, class Item, class Visit>
void for_each_vector(const Item* items, int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + S::width <= n; i += S::width) visit(items + i, S::width, i);
  if (i < n) {
    Item rest[S::width] = {};
    memcpy(rest, items + i, static_cast<size_t>(n - i) * sizeof(rest[0]));
    visit(static_cast<const Item*>(rest), static_cast<int>(n - i), i);
  }
}

template <class S, class Source>
class Loops {
 public:
  static int64_t count_above(const void* items, int64_t n, uint32_t key) {
    const typename S::Inside inside(above<Source>(key));
    Count count;
    for_each(items, n,
             [&](const Item* x, int lanes, int64_t) { count.add(inside(Source::template line<S>(x)), lanes); });
    return count.value();
  }

  static void keys(const void* items, int64_t n, uint32_t* out) {
    for_each(items, n, [&](const Item* x, int, int64_t i) { S::store(out + i, Source::template load<S>(x)); });
  }

  static void histogram(const void* items, int64_t n, uint32_t low, int shift, uint32_t* bins) {
    const auto base = S::set(low);
    for_each(items, n, [&](const Item* x, int lanes, int64_t i) {
      uint32_t digits[S::width];
      S::store(digits, S::shift_right(S::sub(Source::template load<S>(x), base), shift));
      for (int lane = 0; lane < lanes; ++lane) ++bins[(i + lane) % kCopies * kBins + digits[lane]];
    });
  }

  static Collected collect(const void* items, int64_t n, uint32_t low, uint32_t high, uint32_t* out) {
    const typename S::Inside higher(above<Source>(high)), between(Source::between(low, high));
    Count count;
    int64_t found = 0;
    for_each(items, n, [&](const Item* x, int lanes, int64_t) {
      const auto line = Source::template line<S>(x);
      count.add(higher(line), lanes);
      const uint32_t inside = S::bits(between(line)) & mask_of(lanes);
      S::compress(out + found, line, inside);
      found += __builtin_popcount(inside);
    });
    make_keys(out, found, low, high);
    return {count.value(), found};
  }

  static Emitted emit(const void* items, int64_t n, uint32_t key, int64_t ties, int64_t position, int32_t* out,
                      int64_t space) {
    const typename S::Inside higher(above<Source>(key)), equal(Source::between(key, key));
    const auto step = S::set(S::width);
    auto base = S::set(static_cast<uint32_t>(position));
    Emitted done = {0, 0};
    for_each(items, n, [&](const Item* x, int lanes, int64_t) {
      const auto line = Source::template line<S>(x);
      uint32_t kept = S::bits(higher(line)) & mask_of(lanes);
      if (done.ties < ties) {
        const uint32_t tied = lowest_bits(S::bits(equal(line)) & mask_of(lanes), ties - done.ties);
        done.ties += __builtin_popcount(tied);
        kept |= tied;
      }
      int64_t count = __builtin_popcount(kept);
      if (done.count + S::width <= space) {
        S::number(reinterpret_cast<uint32_t*>(out + done.count), base, kept);
      } else if (count > 0) {
        uint32_t last[S::width];
        S::number(last, base, kept);
        count = count < space - done.count ? count : space - done.count;  // more only if the scores change meanwhile
        memcpy(out + done.count, last, static_cast<size_t>(count) * sizeof(last[0]));
      }
      done.count += count;
      base = S::add(base, step);
    });
    return done;
  }

 private:
  using Item = typename Source::Item;

  // Whole vectors are summed per lane, which saves a step to general registers for each.
  class Count {
   public:
    void add(typename S::Lanes yes, int lanes) {
      if (lanes == S::width) {
        whole_ = S::count(whole_, yes);
      } else {
        rest_ += __builtin_popcount(S::bits(yes) & mask_of(lanes));
      }
    }
    int64_t value() const { return S::total(whole_) + rest_; }

   private:
    typename S::Vec whole_ = S::set(0);
    int64_t rest_ = 0;
  };

  template <class Visit>
  static void for_each(const void* items, int64_t n, Visit&& visit) {
    for_each_vector<S>(static_cast<const Item*>(items), n, visit);
  }

  // From places on the line to keys, where they differ.
  static void make_keys(uint32_t* places, int64_t n, uint32_t low, uint32_t high) {
    if constexpr (!std::is_same_v<Source, Keys>) {
      if (Source::rest == 0 && low > 0 && !(low <= Source::zero && Source::zero <= high)) return;
      for_each_vector<S>(static_cast<const uint32_t*>(places), n, [&](const uint32_t* x, int lanes, int64_t i) {
        uint32_t keys[S::width];
        S::store(keys, Source::template key<S>(S::load(x)));
        memcpy(places + i, keys, static_cast<size_t>(lanes) * sizeof(keys[0]));
      });
    }
  }

  static uint32_t lowest_bits(uint32_t mask, int64_t count) {
    while (__builtin_popcount(mask) > count) mask ^= 0x80000000u >> __builtin_clz(mask);
    return mask;
  }
};

template <class S, ScoreType type>
constexpr ScoreKernels score_kernels() {
  using On = Loops<S, Scores<type>>;
  return {On::keys, On::histogram, On::collect, On::emit};
}

template <class S>
constexpr KeyKernels key_kernels() {
  using On = Loops<S, Keys>;
  return {On::count_above, On::histogram, On::collect};
}

}  // namespace
}  // namespace lkv::cpu
