// The oracle's derivatives against differences of its own results.
#include <cmath>

#include "cases.h"

namespace sep_attn::tests {
namespace {

// d loss / d input[i] by central differences, for every i, against `gradient`.
template <typename Problem, typename Loss, typename Gradient>
void check_gradient(const char* name, Problem problem, Values Problem::* input, Loss loss,
                    const Gradient& gradient) {
  const double step = 0x1p-12;  // of a smooth function in long double: an error of about 1e-7
  for (std::size_t i = 0; i < (problem.*input).size(); ++i) {
    const double value = (problem.*input)[i];
    (problem.*input)[i] = value + step;
    const long double above = loss(problem);
    (problem.*input)[i] = value - step;
    const long double below = loss(problem);
    (problem.*input)[i] = value;
    const long double slope = (above - below) / (2 * step);
    check(std::fabs(static_cast<double>(slope - gradient[i])) < 1e-5,
          std::string(name) + " has another slope than the oracle's gradient");
  }
}

long double dot(const Numbers<long double>& a, const Values& b) {
  long double sum = 0;
  for (std::size_t i = 0; i < b.size(); ++i) sum += a[i] * b[i];
  return sum;
}

SEP_ATTN_TEST(oracle_of_the_layer) {
  (void)options;
  for (int64_t seed = 0; seed < 4; ++seed) {
    const bool cross = seed % 2 == 1;
    Random random(seed);
    LayerProblem p;
    p.shape = p.prev_shape = {2, 2, 4, 3, 2, 1};
    if (cross) p.prev_shape.width = 5;
    p.relu = seed < 2;
    const auto draw = [&](int64_t count) { return random.normals(count, 1, Type::kFloat64); };
    p.x = draw(p.shape.tokens() * 3);
    if (cross) p.x_prev = draw(p.prev_shape.tokens() * 3);
    p.qkv_weight = draw(7 * 3);
    p.qkv_bias = draw(7);
    p.out_weight = draw(9);
    p.out_bias = draw(3);
    p.dropout_scale = Values(p.prev_shape.tokens(), 1.5);
    p.dropout_scale[3] = 0;
    p.mask = Values(p.prev_shape.tokens(), 0);
    p.mask[1] = 1;
    p.grad_out = draw(p.shape.tokens() * 3);
    p.grad_weights = draw(p.prev_shape.tokens());
    set_running("seed " + std::to_string(seed));
    const LayerAnswer<long double> a = solve<long double>(p);
    const auto loss = [](const LayerProblem& problem) {
      const LayerAnswer<long double> own = solve<long double>(problem);
      return dot(own.out, problem.grad_out) + dot(own.weights, problem.grad_weights);
    };
    check_gradient("x", p, &LayerProblem::x, loss, a.grad_x);
    check_gradient("x_prev", p, &LayerProblem::x_prev, loss, a.grad_x_prev);
    check_gradient("qkv_weight", p, &LayerProblem::qkv_weight, loss, a.grad_qkv_weight);
    check_gradient("qkv_bias", p, &LayerProblem::qkv_bias, loss, a.grad_qkv_bias);
    check_gradient("out_weight", p, &LayerProblem::out_weight, loss, a.grad_out_weight);
    check_gradient("out_bias", p, &LayerProblem::out_bias, loss, a.grad_out_bias);
  }
}

SEP_ATTN_TEST(oracle_of_pool_and_gate) {
  (void)options;
  Random random(0);
  const auto draw = [&](int64_t count) { return random.normals(count, 1, Type::kFloat64); };
  PoolProblem p;
  p.shape = {2, 2, 4, 3, 2, 1};
  p.x = draw(p.shape.tokens() * 3);
  p.scores = draw(p.shape.tokens());
  p.mask = Values(p.shape.tokens(), 0);
  p.mask[1] = 1;
  p.dropout_scale = Values(p.shape.tokens(), 1.5);
  p.grad_pooled = draw(p.shape.slices() * 3);
  p.grad_weight_sum = draw(p.shape.slices());
  p.grad_weights = draw(p.shape.tokens());
  set_running("pool");
  const PoolAnswer<long double> pool = solve<long double>(p);
  const auto pool_loss = [](const PoolProblem& problem) {
    const PoolAnswer<long double> own = solve<long double>(problem);
    return dot(own.pooled, problem.grad_pooled) + dot(own.weight_sum, problem.grad_weight_sum) +
           dot(own.weights, problem.grad_weights);
  };
  check_gradient("x", p, &PoolProblem::x, pool_loss, pool.grad_x);
  check_gradient("scores", p, &PoolProblem::scores, pool_loss, pool.grad_scores);

  GateProblem g;
  g.shape = p.shape;
  g.relu = true;
  g.v = draw(p.shape.tokens() * 3);
  g.context = draw(p.shape.slices() * 3);
  g.grad_y = draw(p.shape.tokens() * 3);
  set_running("gate");
  const GateAnswer<long double> gate = solve<long double>(g);
  const auto gate_loss = [](const GateProblem& problem) {
    return dot(solve<long double>(problem).y, problem.grad_y);
  };
  check_gradient("v", g, &GateProblem::v, gate_loss, gate.grad_v);
  check_gradient("context", g, &GateProblem::context, gate_loss, gate.grad_context);
}

}  // namespace
}  // namespace sep_attn::tests
