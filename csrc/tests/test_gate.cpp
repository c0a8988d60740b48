#include "cases.h"
#include "kernel_calls.h"

namespace sep_attn::tests {
namespace {

void check_gate(Random& random, const Shape& shape, Type type) {
  const Layout v_layout = random.chance(0.9) ? random.pick(kTokenLayouts) : kExpandedLayouts[0];
  const Layout y_layout =
      random.chance(0.6) && v_layout.expanded == 0 ? v_layout : random.pick(kTokenLayouts);
  const Layout grad_layout =
      random.chance(0.6) ? y_layout
                         : random.pick(random.chance(0.5) ? kTokenLayouts : kExpandedLayouts);
  const Layout context_layout = random.pick(kMatrixLayouts);
  const Type context_type = random.chance(0.5) ? accumulation(type) : type;
  const Threads threads = draw_threads(random);
  GateProblem p;
  p.shape = shape;
  p.relu = random.chance(0.7);
  const int64_t elements = shape.tokens() * shape.channels;
  p.v = repeat_expanded(random.normals(elements, 1, type), v_layout, shape.batch);
  p.grad_y = repeat_expanded(random.normals(elements, 1, type), grad_layout, shape.batch);
  p.context = random.normals(shape.slices() * shape.channels, 1, context_type);
  if (elements > 0 && v_layout.expanded == 0) p.v[random.below(elements)] = 0;  // act'(0) is 0

  const std::string description =
      std::string(name_of(type)) + ", " + describe(shape) + ", v " + v_layout.name + ", y " +
      y_layout.name + ", grad_y " + grad_layout.name + ", context " + name_of(context_type) + " " +
      context_layout.name + (p.relu ? ", relu, " : ", identity, ") + describe(threads);
  with_solutions(p, type, [&](const auto& exact, const auto& plain) {
    on_every_instruction_set(description, [&](Edge edge) {
      const Sizes tokens = token_sizes(shape), per_slice = {shape.slices(), shape.channels};
      const GateTensors t = {
          shape,
          p.relu ? Activation::kRelu : Activation::kIdentity,
          Tensor::input(type, tokens, v_layout, edge, p.v),
          Tensor::input(context_type, per_slice, context_layout, edge, p.context),
          Tensor::input(type, tokens, grad_layout, edge, p.grad_y),
          Tensor::result(type, tokens, y_layout, edge),
          Tensor::result(type, tokens, y_layout, edge),
          Tensor::result(accumulation(type), per_slice, contiguous(2), edge)};
      call_gate(t, threads);
      call_gate_backward(t, threads);
      check_close("y", t.y, type, exact.y, plain.y);
      check_close("grad_v", t.grad_v, type, exact.grad_v, plain.grad_v);
      check_close("grad_context", t.grad_context, type, exact.grad_context, plain.grad_context);
      return std::vector<Values>{t.y.values(), t.grad_v.values(), t.grad_context.values()};
    });
  });
}

SEP_ATTN_TEST(gate) {
  for (Type type : kFloatingTypes) {
    // The last ones: several segments a slice, and sizes that more than one thread shares.
    for_each_size(options, {{600, 70}, {1100, 33}, {70, 1100}},
                  [&](Random& random, int64_t n, int64_t d) {
                    check_gate(random, draw_shape(random, n, d), type);
                  });
    Random random(1);
    check_gate(random, {0, 4, 6, 8, 2, 3}, type);
  }
}

}  // namespace
}  // namespace sep_attn::tests
