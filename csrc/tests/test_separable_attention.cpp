#include <cmath>
#include <limits>

#include "cases.h"
#include "kernel_calls.h"

namespace sep_attn::tests {
namespace {

MaybeTensor input_if(Type type, const Sizes& sizes, const Layout& layout, Edge edge,
                     const Values& values) {
  if (!given(values)) return std::nullopt;
  return Tensor::input(type, sizes, layout, edge, values);
}

MaybeTensor result_if(bool wanted, Type type, const Sizes& sizes, const Layout& layout, Edge edge) {
  if (!wanted) return std::nullopt;
  return Tensor::result(type, sizes, layout, edge);
}

// Another number of tokens in slices of the same kind.
Shape draw_prev_shape(Random& random, Shape shape) {
  if (random.chance(0.5)) shape.height += shape.patch_h * random.below(2);
  shape.width = shape.patch_w * (1 + random.below(2 * shape.width / shape.patch_w));
  return shape;
}

void check_layer(Random& random, const Shape& shape, Type type) {
  const Layout x_layout =
      random.chance(0.9) ? random.pick(kTokenLayouts) : kExpandedLayouts[random.below(2)];
  const Layout out_layout =
      random.chance(0.7) && x_layout.expanded == 0 ? x_layout : random.pick(kTokenLayouts);
  const Layout grad_layout =
      random.chance(0.6) ? out_layout
                         : random.pick(random.chance(0.5) ? kTokenLayouts : kExpandedLayouts);
  const Layout value_layout = random.pick(kValueLayouts);
  const Layout weight_layout = random.pick(kMatrixLayouts);
  const Layout bias_layout = random.pick(kVectorLayouts);
  const Type sums = accumulation(type);
  const Threads threads = draw_threads(random);
  const int64_t D = shape.channels;

  LayerProblem p;
  p.shape = p.prev_shape = shape;
  p.relu = random.chance(0.7);
  const bool cross = random.chance(0.35), bias = random.chance(0.8);
  if (cross) p.prev_shape = draw_prev_shape(random, shape);
  const auto expand = [&](const Values& values) {
    return repeat_expanded(values, value_layout, shape.batch);
  };
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  p.x = repeat_expanded(random.normals(shape.tokens() * D, 1, type), x_layout, shape.batch);
  p.qkv_weight = random.normals((1 + 2 * D) * D, scale, type);
  p.out_weight = random.normals(D * D, scale, type);
  if (bias) p.qkv_bias = random.normals(1 + 2 * D, 1, type);
  if (bias) p.out_bias = random.normals(D, 1, type);
  p.mask = expand(draw_mask(random, p.prev_shape));
  p.dropout_scale = expand(draw_dropout(random, p.prev_shape, type));
  p.grad_out =
      repeat_expanded(random.normals(shape.tokens() * D, 1, type), grad_layout, shape.batch);
  if (random.chance(0.5)) {
    p.grad_weights = expand(random.normals(p.prev_shape.tokens(), 1, sums));
  }
  if (cross) {
    p.x_prev =
        repeat_expanded(random.normals(p.prev_shape.tokens() * D, 1, type), x_layout, shape.batch);
    for (int64_t t = 0; given(p.mask) && x_layout.expanded == 0 && t < p.prev_shape.tokens(); ++t) {
      if (p.mask[t] == 0 || !random.chance(0.5)) continue;
      p.x_prev[t * D + random.below(D)] = std::numeric_limits<double>::quiet_NaN();
    }
  }
  const bool want_all = random.chance(0.6);
  const auto want = [&] { return want_all || random.chance(0.5); };
  const bool want_x = want(), want_prev = want() && cross, want_qkv_weight = want(),
             want_qkv_bias = want(), want_out_weight = want(), want_out_bias = want();
  const bool want_saved = random.chance(0.7), keep_packed = random.chance(0.5);
  const bool keep_values = type == sums && D % 16 == 0 && random.chance(0.8);

  const std::string description =
      std::string(name_of(type)) + ", " + describe(shape) + ", x " + x_layout.name + ", out " +
      out_layout.name + ", grad_out " + grad_layout.name + ", weights " + weight_layout.name +
      (cross ? ", x_prev with " + std::to_string(p.prev_shape.height) + " x " +
                   std::to_string(p.prev_shape.width) + " tokens"
             : "") +
      (bias ? "" : ", no bias") + (p.relu ? ", relu" : ", identity") +
      (given(p.mask) ? ", mask " : ", ") + (given(p.dropout_scale) ? "and dropout " : "") +
      value_layout.name + (given(p.grad_weights) ? ", grad_weights" : "") +
      (want_all ? ", " : ", some gradients, ") + (want_saved ? "" : "nothing saved, ") +
      (keep_packed ? "packed weights kept, " : "") + (keep_values ? "values kept, " : "") +
      describe(threads);
  with_solutions(p, type, [&](const auto& exact, const auto& plain) {
    on_every_instruction_set(description, [&](Edge edge) {
      const Sizes tokens = token_sizes(shape), prev_tokens = token_sizes(p.prev_shape),
                  values = value_sizes(p.prev_shape), qkv_sizes = {1 + 2 * D, D},
                  statistics = {shape.slices(), 2 * D + 1};
      const Layout dense = contiguous(1), dense_matrix = contiguous(2),
                   dense_values = contiguous(3);
      // The first call packs the weights, the second finds them packed.
      std::vector<unsigned char> packed(keep_packed ? packed_weights_bytes(kernel_type(type), D)
                                                    : 0);
      const LayerTensors t = {
          shape,
          p.prev_shape,
          p.relu ? Activation::kRelu : Activation::kIdentity,
          Tensor::input(type, tokens, x_layout, edge, p.x),
          input_if(type, prev_tokens, x_layout, edge, p.x_prev),
          Tensor::input(type, qkv_sizes, weight_layout, edge, p.qkv_weight),
          input_if(type, {1 + 2 * D}, bias_layout, edge, p.qkv_bias),
          Tensor::input(type, {D, D}, weight_layout, edge, p.out_weight),
          input_if(type, {D}, bias_layout, edge, p.out_bias),
          input_if(Type::kBool, values, value_layout, edge, p.mask),
          input_if(sums, values, value_layout, edge, p.dropout_scale),
          Tensor::result(type, tokens, out_layout, edge),
          result_if(want_saved, sums, values, dense_values, edge),
          result_if(want_saved, sums, statistics, dense_matrix, edge),
          result_if(keep_values, sums, {kept_values(shape)}, dense, edge),
          &packed,
          Tensor::input(type, tokens, grad_layout, edge, p.grad_out),
          input_if(sums, values, value_layout, edge, p.grad_weights),
          Tensor::input(sums, values, dense_values, edge, to_values(exact.weights)),
          Tensor::input(sums, statistics, dense_matrix, edge, to_values(exact.statistics)),
          result_if(want_x, type, tokens, out_layout, edge),
          result_if(want_prev, type, prev_tokens, out_layout, edge),
          result_if(want_qkv_weight, type, qkv_sizes, dense_matrix, edge),
          result_if(want_qkv_bias, type, {1 + 2 * D}, dense, edge),
          result_if(want_out_weight, type, {D, D}, dense_matrix, edge),
          result_if(want_out_bias, type, {D}, dense, edge)};
      call_layer(t, threads);
      const Values first_out = t.out.values();
      if (keep_packed) call_layer(t, threads);
      check(same_bits(first_out, t.out.values()), "kept weights give another result");
      call_layer_backward(t, threads);
      std::vector<Values> results;
      const auto check_result = [&](const char* name, const Tensor& result, const auto& expected,
                                    const auto& in_plain) {
        check_close(name, result, type, expected, in_plain);
        results.push_back(result.values());
      };
      check_result("out", t.out, exact.out, plain.out);
      const auto check_wanted = [&](const char* name, const MaybeTensor& result,
                                    const auto& expected, const auto& in_plain) {
        if (result) check_result(name, *result, expected, in_plain);
      };
      check_wanted("weights", t.weights, exact.weights, plain.weights);
      check_wanted("statistics", t.statistics, exact.statistics, plain.statistics);
      check_wanted("grad_x", t.grad_x, exact.grad_x, plain.grad_x);
      check_wanted("grad_x_prev", t.grad_x_prev, exact.grad_x_prev, plain.grad_x_prev);
      check_wanted("grad_qkv_weight", t.grad_qkv_weight, exact.grad_qkv_weight,
                   plain.grad_qkv_weight);
      check_wanted("grad_qkv_bias", t.grad_qkv_bias, exact.grad_qkv_bias, plain.grad_qkv_bias);
      check_wanted("grad_out_weight", t.grad_out_weight, exact.grad_out_weight,
                   plain.grad_out_weight);
      check_wanted("grad_out_bias", t.grad_out_bias, exact.grad_out_bias, plain.grad_out_bias);
      return results;
    });
  });
}

void check_layers(const Options& options, Type type) {
  // The last ones: several segments of a slice's softmax, several tiles a thread, many panels, and
  // fewer tokens than channels.
  for_each_size(options,
                {{700, 70}, {1100, 33}, {300, 130}, {40, 200}, {60, 192}, {120, 160}, {400, 64}},
                [&](Random& random, int64_t tokens, int64_t channels) {
                  check_layer(random, draw_shape(random, tokens, channels), type);
                });
  Random random(1);
  check_layer(random, {0, 4, 6, 8, 2, 3}, type);
}

SEP_ATTN_TEST(separable_attention_float32) { check_layers(options, Type::kFloat32); }
SEP_ATTN_TEST(separable_attention_float64) { check_layers(options, Type::kFloat64); }
SEP_ATTN_TEST(separable_attention_bfloat16) { check_layers(options, Type::kBFloat16); }
SEP_ATTN_TEST(separable_attention_float16) { check_layers(options, Type::kFloat16); }

}  // namespace
}  // namespace sep_attn::tests
