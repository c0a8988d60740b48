// What all tests share: shapes, layouts, the rule for "right", and a run on every instruction set.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"
#include "threads.h"

namespace sep_attn::tests {

// ---- Cases ----

// Dimensions: 0 batch, 1 height, 2 width, 3 channels.
inline const std::vector<Layout> kTokenLayouts = {
    {"rows", {0, 1, 2, 3}},
    {"channels first", {0, 3, 1, 2}},
    {"rows with gaps", {0, 1, 2, 3}, 1, 3},
    {"channels first with gaps", {0, 3, 1, 2}, 1, 5},
    {"height and width transposed", {0, 2, 1, 3}},
    {"channels first, transposed", {0, 3, 2, 1}},
    {"every other element", {0, 1, 2, 3}, 2, 3},
    {"channels first, every other element", {0, 3, 1, 2}, 2, 1},
    {"images between tokens", {1, 2, 0, 3}},
    {"channels outermost", {3, 0, 1, 2}},
};
// What an input may be besides.
inline const std::vector<Layout> kExpandedLayouts = {
    {"one image for all", {0, 1, 2, 3}, 1, 0, 1},
    {"channels first, one image for all", {0, 3, 1, 2}, 1, 0, 1},
    {"one value for all", {0, 1, 2, 3}, 1, 0, 4},
};
inline const std::vector<Layout> kValueLayouts = {
    // of one value a token
    {"contiguous", {0, 1, 2}},
    {"contiguous", {0, 1, 2}},
    {"every other value", {0, 1, 2}, 2, 1},
    {"transposed values", {0, 2, 1}},
    {"one image's values for all", {0, 1, 2}, 1, 0, 1},
};
inline const std::vector<Layout> kMatrixLayouts = {
    {"rows", {0, 1}},
    {"rows", {0, 1}},
    {"columns", {1, 0}},
    {"rows with gaps", {0, 1}, 1, 3},
    {"every other element", {0, 1}, 2, 1},
};
inline const std::vector<Layout> kVectorLayouts = {{"dense", {0}}, {"every other value", {0}, 2}};

// Every image (or every element) equal, as a layout that expands asks for.
inline Values repeat_expanded(Values values, const Layout& layout, int64_t images) {
  if (layout.expanded == 0 || values.empty()) return values;
  const std::size_t period = layout.expanded == 1 ? values.size() / images : 1;
  for (std::size_t i = period; i < values.size(); ++i) values[i] = values[i - period];
  return values;
}

// N tokens or so a slice in one of the ways that tokens form slices.
inline Shape draw_shape(Random& random, int64_t tokens, int64_t channels) {
  const int64_t batch = 1 + random.below(3);
  switch (random.below(3)) {
    case 0:  // [B, N, D]
      return {batch, 1, tokens, channels, 1, 1};
    case 1: {  // [B, D, P, N]
      const int64_t patch = 1 + random.below(4);
      return {batch, patch, tokens, channels, patch, 1};
    }
    default: {  // [B, D, H, W]
      const int64_t patch_h = 1 + random.below(3), patch_w = 1 + random.below(3);
      const int64_t rows = 1 + random.below(tokens < 3 ? tokens : 3);
      return {batch,    rows * patch_h, (tokens + rows - 1) / rows * patch_w,
              channels, patch_h,        patch_w};
    }
  }
}

inline std::string describe(const Shape& s) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  return "batch " + text(s.batch) + ", " + text(s.height) + " x " + text(s.width) + " tokens of " +
         text(s.channels) + " channels, patch " + text(s.patch_h) + " x " + text(s.patch_w);
}

inline Sizes token_sizes(const Shape& s) { return {s.batch, s.height, s.width, s.channels}; }
inline Sizes value_sizes(const Shape& s) { return {s.batch, s.height, s.width}; }

// None, some tokens, a whole image, all tokens.
inline Values draw_mask(Random& random, const Shape& shape) {
  const int64_t kind = random.below(6);
  if (kind < 2) return {};
  Values mask;
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    const bool first_image = t < shape.height * shape.width;
    mask.push_back(kind == 5 || (kind == 4 && first_image) || random.chance(0.4) ? 1 : 0);
  }
  return mask;
}

inline Values draw_dropout(Random& random, const Shape& shape, Type type) {
  if (!random.chance(0.4)) return {};
  Values scale;
  for (int64_t t = 0; t < shape.tokens(); ++t) {
    scale.push_back(random.chance(0.3) ? 0 : rounded(accumulation(type), 1 / 0.7));
  }
  return scale;
}

inline Threads draw_threads(Random& random) {
  return random.pick(std::vector<Threads>{
      {1, true}, {1, true}, {2, true}, {3, true}, {4, true}, {3, false}, {7, false}, {16, false}});
}

// Ragged against every vector width (2 to 16 lanes), panel (4 to 32 columns) and tile (up to 112
// tokens), and single ones.
inline const std::vector<int64_t> kTokenCounts = {1,  2,  3,  5,  8,  13,  14,  16,
                                                  17, 31, 49, 64, 65, 112, 113, 150};
inline const std::vector<int64_t> kChannelCounts = {1,  2,  3,  5,  7,  8,  9,  15,
                                                    16, 17, 31, 32, 33, 47, 64, 65};

// Calls run(random, tokens, channels) for every pair of counts, then for `more`, each from a seed
// of its own.
template <typename Run>
void for_each_size(const Options& options, const std::vector<std::pair<int64_t, int64_t>>& more,
                   Run run) {
  std::vector<std::pair<int64_t, int64_t>> sizes;
  for (int64_t tokens : kTokenCounts) {
    for (int64_t channels : kChannelCounts) sizes.emplace_back(tokens, channels);
  }
  sizes.insert(sizes.end(), more.begin(), more.end());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (i % options.every != 0) continue;
    Random random(i);
    run(random, sizes[i].first, sizes[i].second);
  }
}

// ---- The rule ----

// The largest difference, in units of the oracle where that is above 1.
template <typename Result, typename Exact>
double distance(const Result& result, const Exact& exact) {
  double largest = 0, scale = 1;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double expected = static_cast<double>(exact[i]);
    const double difference = std::fabs(static_cast<double>(result[i] - exact[i]));
    if (!(difference <= largest)) largest = difference;  // takes NaN
    if (std::isnan(largest)) return largest;
    scale = std::fmax(scale, std::fabs(expected));
  }
  return largest / scale;
}

// At most twice as far from the oracle as the plain program in the type of the kernel's sums, plus
// 1e-5 (1e-13 in double), plus twice the rounding of a result stored in half precision.
template <typename Exact, typename Plain>
void check_close(const char* name, const Tensor& result, Type storage, const Exact& exact,
                 const Plain& plain) {
  const Values values = result.values();
  if (values.size() != exact.size()) return fail(std::string(name) + " has another size");
  const double error = distance(values, exact);
  double allowed = 2 * distance(plain, exact) + (storage == Type::kFloat64 ? 1e-13 : 1e-5);
  if (result.type() != accumulation(storage)) allowed += 2 * rounding_error(result.type());
  check(error <= allowed, std::string(name) + ": off by " + std::to_string(error) + ", allowed " +
                              std::to_string(allowed));
  check(result.gaps_intact(), std::string(name) + ": wrote between its elements");
}

// Calls use(exact, plain) with both solutions of a problem.
template <typename Problem, typename Use>
void with_solutions(const Problem& problem, Type type, Use use) {
  if (type == Type::kFloat64) {
    use(solve<long double>(problem), solve<double>(problem));
  } else {
    use(solve<double>(problem), solve<float>(problem));
  }
}

inline bool same_bits(const Values& a, const Values& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// Calls run(edge), which returns its results, on every instruction set of this machine and for both
// edges; the results of both must be the same bits.
template <typename Run>
void on_every_instruction_set(const std::string& description, Run run) {
  const std::string best = capability();
  for (const std::string& name : capabilities()) {
    set_capability(name);
    std::vector<Values> results[2];
    for (Edge edge : {Edge::kBefore, Edge::kAfter}) {
      set_running(name + ", " + description);
      results[edge == Edge::kAfter] = run(edge);
    }
    for (std::size_t i = 0; i < results[0].size(); ++i) {
      check(same_bits(results[0][i], results[1][i]),
            "result " + std::to_string(i) + " differs from one run to the next");
    }
  }
  set_capability(best);
}

}  // namespace sep_attn::tests
