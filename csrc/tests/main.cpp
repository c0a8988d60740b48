// Runs the tests named on the command line, or all: kernel_tests [--every K] [NAME ...]
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "memory.h"

#ifdef SEP_ATTN_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

namespace sep_attn::tests {
namespace {

struct Test {
  const char* name;
  void (*run)(const Options&);
};

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

int64_t failures = 0, cases = 0;
char running[1024];  // a fixed place: read when the process dies

void print_running() {
  const char* parts[] = {"\nwhile running ", running, "\n"};
  for (const char* part : parts) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) return;
  }
}

#ifndef SEP_ATTN_SANITIZED
void on_fault(int signal) {
  const char text[] = "\nFAILED: access outside a tensor, or a write to an input";
  if (write(STDERR_FILENO, text, sizeof(text) - 1) >= 0) print_running();
  _exit(128 + signal);
}
#endif

}  // namespace

Registration::Registration(const char* name, void (*run)(const Options&)) {
  all_tests().push_back({name, run});
}

void set_running(const std::string& description) {
  ++cases;
  std::snprintf(running, sizeof(running), "%s", description.c_str());
}

void fail(const std::string& message) {
  if (++failures <= 20) std::printf("FAILED %s: %s\n", running, message.c_str());
}

int run_tests(int argc, char** argv) {
#ifdef SEP_ATTN_SANITIZED
  __sanitizer_set_death_callback(print_running);
#else
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
#endif
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--every") == 0 && i + 1 < argc) {
      options.every = std::atoll(argv[++i]);
      if (options.every < 1) options.every = 1;
    } else {
      names.emplace_back(argv[i]);
    }
  }
  for (const std::string& name : names) {
    bool known = false;
    for (const Test& test : all_tests()) known = known || name == test.name;
    if (known) continue;
    std::printf("no test is named %s; there are:", name.c_str());
    for (const Test& test : all_tests()) std::printf(" %s", test.name);
    std::printf("\n");
    return 2;
  }
  for (const Test& test : all_tests()) {
    bool wanted = names.empty();
    for (const std::string& name : names) wanted = wanted || name == test.name;
    if (!wanted) continue;
    const int64_t cases_before = cases, failures_before = failures;
    test.run(options);
    std::printf("%s: %lld runs, %lld failures\n", test.name,
                static_cast<long long>(cases - cases_before),
                static_cast<long long>(failures - failures_before));
    if (cases == cases_before) fail(std::string(test.name) + " ran nothing");
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace sep_attn::tests

int main(int argc, char** argv) { return sep_attn::tests::run_tests(argc, argv); }
