#include <algorithm>
#include <cstdlib>

#include "array.h"

namespace lkv::host {

namespace {

// A term c * stride of a sum, c any integer in [low, high].
struct Term {
  int64_t stride, low, high;
};

// Looks for coefficients with `below < offset + sum of terms < above`, the largest strides first: the window that the
// smaller ones can still reach leaves few coefficients to try when strides nest.
struct Search {
  std::vector<Term> terms;
  int64_t below, above;
  int steps_left = 1 << 16;

  bool solve(size_t i, int64_t offset, bool zero_is_excluded) {
    if (--steps_left < 0) return true;
    if (i == terms.size()) return below < offset && offset < above && !zero_is_excluded;
    int64_t low = 0, high = 0;
    for (size_t j = i + 1; j < terms.size(); ++j) {
      low += terms[j].low * terms[j].stride;
      high += terms[j].high * terms[j].stride;
    }
    const Term& term = terms[i];
    const auto ceil_div = [](int64_t a, int64_t b) { return a / b + (a % b > 0); };
    const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
    const int64_t first = std::max(term.low, ceil_div(below + 1 - offset - high, term.stride));
    const int64_t last = std::min(term.high, floor_div(above - 1 - offset - low, term.stride));
    for (int64_t c = first; c <= last; ++c)
      if (solve(i + 1, offset + c * term.stride, zero_is_excluded && c == 0)) return true;
    return false;
  }
};

// The axes of an array in bytes, coefficients 0 .. size - 1, times `sign`. A negative stride is a positive one with
// negative coefficients.
void add_terms(std::vector<Term>& terms, const Array& a, int64_t sign) {
  for (int64_t i = 0; i < a.rank; ++i) {
    if (a.sizes[i] == 1 || a.stride(i) == 0) continue;
    const int64_t stride = std::abs(a.stride(i));
    auto same = std::find_if(terms.begin(), terms.end(), [&](const Term& term) { return term.stride == stride; });
    if (same == terms.end()) same = terms.insert(terms.end(), Term{stride, 0, 0});
    const int64_t reach = (a.stride(i) < 0 ? -sign : sign) * (a.sizes[i] - 1);
    (reach > 0 ? same->high : same->low) += reach;
  }
}

// First and one-past-last byte that an array touches.
struct Extent {
  const char *begin, *end;
};

Extent extent_of(const Array& a) {
  if (a.numel() == 0) return {nullptr, nullptr};
  Extent extent{a.data, a.data + a.itemsize};
  for (int64_t i = 0; i < a.rank; ++i) {
    const int64_t reach = (a.sizes[i] - 1) * a.stride(i);
    (reach > 0 ? extent.end : extent.begin) += reach;
  }
  return extent;
}

bool search(std::vector<Term> terms, int64_t offset, int64_t below, int64_t above, bool zero_is_excluded) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
  return Search{std::move(terms), below, above}.solve(0, offset, zero_is_excluded);
}

}  // namespace

bool overlaps_itself(const Array& a) {
  if (a.numel() == 0) return false;
  std::vector<Term> terms;
  for (int64_t i = 0; i < a.rank; ++i) {
    if (a.sizes[i] == 1) continue;
    if (a.stride(i) == 0) return true;
    terms.push_back({std::abs(a.stride(i)), 1 - a.sizes[i], a.sizes[i] - 1});
  }
  return search(std::move(terms), 0, -a.itemsize, a.itemsize, true);
}

bool overlap(const Array& a, const Array& b) {
  const Extent x = extent_of(a), y = extent_of(b);
  if (x.begin == x.end || y.begin == y.end || x.end <= y.begin || y.end <= x.begin) return false;
  std::vector<Term> terms;
  add_terms(terms, a, 1);
  add_terms(terms, b, -1);
  return search(std::move(terms), a.data - b.data, -a.itemsize, b.itemsize, false);
}

void check_disjoint(const std::vector<Named>& written, const std::vector<Named>& read) {
  for (size_t i = 0; i < written.size(); ++i) {
    check_value(!overlaps_itself(written[i].array), "expected ", written[i].name,
                " with memory of its own for every element, got overlapping strides");
    for (size_t j = 0; j < i; ++j)
      check_value(!overlap(written[i].array, written[j].array), "expected ", written[j].name, " and ", written[i].name,
                  " without common memory, got overlapping tensors");
    for (const Named& r : read)
      check_value(!overlap(written[i].array, r.array), "expected ", written[i].name, " and ", r.name,
                  " without common memory, got overlapping tensors");
  }
}

}  // namespace lkv::host
