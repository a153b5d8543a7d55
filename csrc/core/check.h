// Errors below torch: thrown, never exit. The text names file, line, and what was expected.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastpeft {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void throw_error(const char* file, int line, Args&&... args) {
  std::ostringstream text;
  (text << ... << args);
  text << " (" << file << ":" << line << ")";
  throw Error(text.str());
}

}  // namespace fastpeft

// FASTPEFT_CHECK(condition, text pieces...): throws fastpeft::Error when the condition is false.
#define FASTPEFT_CHECK(condition, ...) \
  (static_cast<bool>(condition) ? void() : ::fastpeft::throw_error(__FILE__, __LINE__, __VA_ARGS__))
