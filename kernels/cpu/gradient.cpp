// The gradient of autoq::linear in C++: through Python it would cost every call microseconds, also where none is wanted.
#include "gradient.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace autoq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor below_autograd(const Tensor& x, const Tensor& head, const OptionalTensor& bias, int64_t n) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("autoq::linear", "").typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t)>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, head, bias, n);
}

class LinearGradient : public torch::autograd::Function<LinearGradient> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& head,
                        const OptionalTensor& bias, int64_t n) {
    ctx->save_for_backward({head});
    ctx->saved_data["k"] = x.size(-1);
    ctx->saved_data["x"] = static_cast<int64_t>(x.scalar_type());
    ctx->saved_data["bias"] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    return below_autograd(x, head, bias, n);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    static const auto weight = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("autoq::dequantize", "")
                                   .typed<Tensor(const Tensor&, int64_t, int64_t)>();
    const c10::impl::ExcludeDispatchKeyGuard in_float(c10::autocast_dispatch_keyset);
    const Tensor gradient = gradients[0].to(at::kFloat);
    const int64_t n = gradient.size(-1), k = ctx->saved_data["k"].toInt();
    Tensor x_gradient, bias_gradient;
    if (ctx->needs_input_grad(0)) {
      const auto x_type = static_cast<at::ScalarType>(ctx->saved_data["x"].toInt());
      x_gradient = at::matmul(gradient, weight.call(ctx->get_saved_variables()[0], n, k)).to(x_type);
    }
    const int64_t bias_type = ctx->saved_data["bias"].toInt();
    if (bias_type >= 0 && ctx->needs_input_grad(2)) {
      bias_gradient = gradient.reshape({-1, n}).sum(0).to(static_cast<at::ScalarType>(bias_type));
    }
    return {x_gradient, Tensor(), bias_gradient, Tensor()};
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& head, const OptionalTensor& bias, int64_t n) {
  const auto wanted = [](const Tensor& t) {
    return (t.requires_grad() && at::GradMode::is_enabled()) || t._fw_grad(/*level=*/0).defined();
  };
  if (wanted(x) || (bias && wanted(*bias))) return LinearGradient::apply(x, head, bias, n);
  return below_autograd(x, head, bias, n);
}

}  // namespace

void register_gradient() {
  static const auto* library = [] {
    auto* made = new torch::Library(torch::Library::IMPL, "autoq", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__);
    made->impl("linear", TORCH_FN(linear_autograd));
    return made;
  }();
  (void)library;
}

}  // namespace autoq
