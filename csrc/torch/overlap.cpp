#include "overlap.h"

#include <algorithm>
#include <cstdlib>

namespace lkv::torch_ops {

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

// The axes of a tensor in bytes, coefficients 0 .. size - 1, times `sign`.
void add_terms(std::vector<Term>& terms, const Tensor& t, int64_t sign) {
  const int64_t element = static_cast<int64_t>(t.element_size());
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    const int64_t stride = strides[i] * element, reach = sizes[i] - 1;
    auto same = std::find_if(terms.begin(), terms.end(), [&](const Term& term) { return term.stride == stride; });
    if (same == terms.end()) same = terms.insert(terms.end(), Term{stride, 0, 0});
    (sign > 0 ? same->high : same->low) += sign * reach;
  }
}

bool search(std::vector<Term> terms, int64_t offset, int64_t below, int64_t above, bool zero_is_excluded) {
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
  return Search{std::move(terms), below, above}.solve(0, offset, zero_is_excluded);
}

}  // namespace

bool overlaps_itself(const Tensor& t) {
  if (t.numel() == 0) return false;
  const int64_t element = static_cast<int64_t>(t.element_size());
  std::vector<Term> terms;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    if (strides[i] == 0) return true;
    terms.push_back({strides[i] * element, 1 - sizes[i], sizes[i] - 1});
  }
  return search(std::move(terms), 0, -element, element, true);
}

bool overlap(const Tensor& a, const Tensor& b) {
  const Extent x = extent_of(a), y = extent_of(b);
  if (x.begin == x.end || y.begin == y.end || x.end <= y.begin || y.end <= x.begin) return false;
  std::vector<Term> terms;
  add_terms(terms, a, 1);
  add_terms(terms, b, -1);
  std::erase_if(terms, [](const Term& term) { return term.stride == 0; });
  return search(std::move(terms), x.begin - y.begin, -static_cast<int64_t>(a.element_size()),
                static_cast<int64_t>(b.element_size()), false);
}

void check_disjoint(const std::vector<Named>& written, const std::vector<Named>& read) {
  for (size_t i = 0; i < written.size(); ++i) {
    check_value(!overlaps_itself(written[i].tensor), "expected ", written[i].name,
                " with memory of its own for every element, got overlapping strides");
    for (size_t j = 0; j < i; ++j)
      check_value(!overlap(written[i].tensor, written[j].tensor), "expected ", written[j].name, " and ",
                  written[i].name, " without common memory, got overlapping tensors");
    for (const Named& r : read)
      check_value(!overlap(written[i].tensor, r.tensor), "expected ", written[i].name, " and ", r.name,
                  " without common memory, got overlapping tensors");
  }
}

}  // namespace lkv::torch_ops
