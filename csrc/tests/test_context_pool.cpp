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

void check_pool(Random& random, const Shape& shape, Type type) {
  const Layout x_layout =
      random.chance(0.9) ? random.pick(kTokenLayouts) : kExpandedLayouts[random.below(2)];
  const Layout grad_layout =
      random.chance(0.7) && x_layout.expanded == 0 ? x_layout : random.pick(kTokenLayouts);
  const Layout value_layout = random.pick(kValueLayouts);
  const Layout pooled_layout = random.pick(kMatrixLayouts);
  const Type scores_type =
      random.pick(std::vector<Type>(std::begin(kFloatingTypes), std::end(kFloatingTypes)));
  const Type sums = accumulation(type);
  const double spread = random.pick(std::vector<double>{1, 1, 1, 30, 0, 1e4});
  const Threads threads = draw_threads(random);
  const auto expand = [&](const Values& values) {
    return repeat_expanded(values, value_layout, shape.batch);
  };
  PoolProblem p;
  p.shape = shape;
  const int64_t elements = shape.tokens() * shape.channels;
  p.x = repeat_expanded(random.normals(elements, 1, type), x_layout, shape.batch);
  p.scores = expand(random.normals(shape.tokens(), spread, scores_type));
  // float64 scores of float32 tokens are read as float32
  for (double& score : p.scores) score = rounded(sums, score);
  p.mask = expand(draw_mask(random, shape));
  p.dropout_scale = expand(draw_dropout(random, shape, type));
  p.grad_pooled = random.normals(shape.slices() * shape.channels, 1, sums);
  if (random.chance(0.5)) p.grad_weight_sum = random.normals(shape.slices(), 1, sums);
  if (random.chance(0.5)) p.grad_weights = expand(random.normals(shape.tokens(), 1, sums));
  for (int64_t t = 0; given(p.mask) && x_layout.expanded == 0 && t < shape.tokens(); ++t) {
    if (p.mask[t] == 0 || !random.chance(0.5)) continue;
    p.x[t * shape.channels + random.below(shape.channels)] =
        std::numeric_limits<double>::quiet_NaN();
  }

  const std::string description =
      std::string(name_of(type)) + ", " + describe(shape) + ", x " + x_layout.name + ", grad_x " +
      grad_layout.name + ", scores " + name_of(scores_type) + " " + value_layout.name + " times " +
      std::to_string(spread) + (given(p.mask) ? ", mask" : "") +
      (given(p.dropout_scale) ? ", dropout" : "") + ", grad_pooled " + pooled_layout.name +
      (given(p.grad_weight_sum) ? ", grad_weight_sum" : "") +
      (given(p.grad_weights) ? ", grad_weights, " : ", ") + describe(threads);
  with_solutions(p, type, [&](const auto& exact, const auto& plain) {
    on_every_instruction_set(description, [&](Edge edge) {
      const Sizes tokens = token_sizes(shape), values = value_sizes(shape),
                  per_slice = {shape.slices(), shape.channels};
      const Layout dense = contiguous(1), dense_matrix = contiguous(2),
                   dense_values = contiguous(3);
      const PoolTensors t = {
          shape,
          Tensor::input(type, tokens, x_layout, edge, p.x),
          Tensor::input(scores_type, values, value_layout, edge, p.scores),
          input_if(Type::kBool, values, value_layout, edge, p.mask),
          input_if(sums, values, value_layout, edge, p.dropout_scale),
          Tensor::result(sums, per_slice, dense_matrix, edge),
          Tensor::result(sums, {shape.slices()}, dense, edge),
          Tensor::result(sums, values, dense_values, edge),
          Tensor::input(sums, per_slice, pooled_layout, edge, p.grad_pooled),
          input_if(sums, {shape.slices()}, random.pick(kVectorLayouts), edge, p.grad_weight_sum),
          input_if(sums, values, value_layout, edge, p.grad_weights),
          Tensor::input(sums, per_slice, dense_matrix, edge, to_values(exact.pooled)),
          Tensor::input(sums, {shape.slices()}, dense, edge, to_values(exact.weight_sum)),
          Tensor::input(sums, values, dense_values, edge, to_values(exact.weights)),
          Tensor::result(type, tokens, grad_layout, edge),
          Tensor::result(sums, values, dense_values, edge)};
      call_pool(t, threads);
      call_pool_backward(t, threads);
      check_close("pooled", t.pooled, type, exact.pooled, plain.pooled);
      check_close("weight_sum", t.weight_sum, type, exact.weight_sum, plain.weight_sum);
      check_close("weights", t.weights, type, exact.weights, plain.weights);
      check_close("grad_x", t.grad_x, type, exact.grad_x, plain.grad_x);
      check_close("grad_scores", t.grad_scores, type, exact.grad_scores, plain.grad_scores);
      return std::vector<Values>{t.pooled.values(), t.weight_sum.values(), t.weights.values(),
                                 t.grad_x.values(), t.grad_scores.values()};
    });
  });
}

SEP_ATTN_TEST(context_pool) {
  for (Type type : kFloatingTypes) {
    // The last ones: several segments a slice, and sizes that more than one thread shares.
    for_each_size(options, {{600, 70}, {1100, 33}, {70, 1100}},
                  [&](Random& random, int64_t tokens, int64_t channels) {
                    check_pool(random, draw_shape(random, tokens, channels), type);
                  });
    Random random(1);
    check_pool(random, {0, 4, 6, 8, 2, 3}, type);
  }
}

}  // namespace
}  // namespace sep_attn::tests
