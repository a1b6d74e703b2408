#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Errors of the ops. The stable ABI carries every C++ exception to Python as a RuntimeError, so the message begins with
// the Python type it stands for; lkv_ext raises that type and puts the public names in (lkv_ext/ops/errors.py).

namespace lkv::host {

using Shape = std::vector<int64_t>;

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  return out << ']';
}

template <class... Parts>
[[noreturn]] void fail(const char* type, const Parts&... parts) {
  std::ostringstream text;
  text << type << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail("ValueError", parts...);
}

template <class... Parts>
void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail("TypeError", parts...);
}

}  // namespace lkv::host
