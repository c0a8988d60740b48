// A small harness of our own: a framework from a package could not be linked into a cross build,
// and the tests need only names, counted failures, and the running case when a guard page is hit.
#pragma once

#include <cstdint>
#include <string>

namespace sep_attn::tests {

struct Options {
  int64_t every = 1;  // run only every so many cases: for builds that are slow
};

// Tests register themselves by name; main.cpp runs them.
struct Registration {
  Registration(const char* name, void (*run)(const Options&));
};

#define SEP_ATTN_TEST(name)                                                      \
  static void name(const ::sep_attn::tests::Options&);                           \
  static const ::sep_attn::tests::Registration name##_registration(#name, name); \
  static void name([[maybe_unused]] const ::sep_attn::tests::Options& options)

// What runs at the moment; printed with a failure, and when the process dies.
void set_running(const std::string& description);

void fail(const std::string& message);
inline void check(bool holds, const std::string& message) {
  if (!holds) fail(message);
}

}  // namespace sep_attn::tests
