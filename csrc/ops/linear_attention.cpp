// torch.ops.nefkern_native.linear_attention and its backward. Arguments come checked from
// nefkern.ops; shapes are checked again because a wrong one would be read out of bounds.
#include "cpu/linear_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "ops/large_empty.h"

namespace {

using nefkern::cpu::AttentionType;
using nefkern::cpu::FeatureMap;
using nefkern::cpu::HeadsView;
using nefkern::cpu::LinearAttentionArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) fits = fits && x.size(i++) == size;
  STD_TORCH_CHECK(fits, "linear_attention: shapes do not fit together");
}

AttentionType type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "linear_attention: expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return AttentionType::kFloat32;
  return type == ScalarType::Half ? AttentionType::kFloat16 : AttentionType::kBFloat16;
}

Tensor with_adjacent_channels(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

HeadsView view(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// [B, H, tokens, channels], stored token-major.
Tensor empty_token_major(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                         int64_t channels) {
  return torch::stable::transpose(
      nefkern::large_empty(like, {batch, tokens, heads, channels}, like.scalar_type()), 1, 2);
}

// The inputs with adjacent channels (copies where they were not), and views of them.
struct Inputs {
  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& mask_,
         const std::string& feature_map, double eps)
      : q(with_adjacent_channels(q_)),
        k(with_adjacent_channels(k_)),
        v(with_adjacent_channels(v_)) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "linear_attention: expected four dimensions");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "linear_attention: expected one dtype");
    STD_TORCH_CHECK(feature_map == "elu" || feature_map == "softmax",
                    "linear_attention: unknown feature map");
    args.type = type_of(q);
    args.feature_map = feature_map == "elu" ? FeatureMap::kElu : FeatureMap::kSoftmax;
    args.batch = q.size(0);
    args.heads = q.size(1);
    args.queries = q.size(2);
    args.keys = v.size(2);
    args.channels = q.size(3);
    args.value_channels = v.size(3);
    check_shape(k, {args.batch, args.heads, args.keys, args.channels});
    check_shape(v, {args.batch, args.heads, args.keys, args.value_channels});
    args.q = view(q);
    args.k = view(k);
    args.v = view(v);
    args.eps = static_cast<float>(eps);
    if (mask_) {
      STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool, "linear_attention: bool mask");
      check_shape(*mask_, {args.batch, args.keys});
      mask = torch::stable::contiguous(*mask_);
      args.mask = mask->const_data_ptr<bool>();
    }
  }

  Tensor q, k, v;
  std::optional<Tensor> mask;
  LinearAttentionArgs args{};
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v,
                                                    const std::optional<Tensor>& mask,
                                                    const std::string& feature_map, double eps) {
  Inputs inputs(q, k, v, mask, feature_map, eps);
  LinearAttentionArgs& args = inputs.args;
  Tensor out = empty_token_major(q, args.batch, args.heads, args.queries, args.value_channels);
  Tensor state = torch::stable::new_empty(
      q, {args.batch, args.heads, args.channels, args.value_channels}, ScalarType::Float);
  Tensor stats =
      torch::stable::new_empty(q, {args.batch, args.heads, 2, args.channels}, ScalarType::Float);
  args.out = view(out);
  args.state = state.mutable_data_ptr<float>();
  args.stats = stats.mutable_data_ptr<float>();
  nefkern::cpu::linear_attention_for(nefkern::cpu::best_isa())(args);
  return {out, state, stats};
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& mask, const Tensor& state, const Tensor& stats,
    const std::string& feature_map, double eps) {
  const Inputs inputs(q, k, v, mask, feature_map, eps);
  nefkern::cpu::LinearAttentionBackwardArgs args{};
  args.forward = inputs.args;
  LinearAttentionArgs& forward = args.forward;
  check_shape(grad, {forward.batch, forward.heads, forward.queries, forward.value_channels});
  check_shape(state, {forward.batch, forward.heads, forward.channels, forward.value_channels});
  check_shape(stats, {forward.batch, forward.heads, 2, forward.channels});
  STD_TORCH_CHECK(grad.scalar_type() == q.scalar_type() &&
                      state.scalar_type() == ScalarType::Float &&
                      stats.scalar_type() == ScalarType::Float,
                  "linear_attention_backward: expected grad in q's dtype, float32 state and stats");
  const Tensor own_grad = with_adjacent_channels(grad);
  const Tensor own_state = torch::stable::contiguous(state);
  const Tensor own_stats = torch::stable::contiguous(stats);
  // The kernel only reads them here.
  forward.state = const_cast<float*>(own_state.const_data_ptr<float>());
  forward.stats = const_cast<float*>(own_stats.const_data_ptr<float>());
  args.grad = view(own_grad);

  const auto like = [&](const Tensor& x) {
    return empty_token_major(x, x.size(0), x.size(1), x.size(2), x.size(3));
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  args.dq = view(dq);
  args.dk = view(dk);
  args.dv = view(dv);
  nefkern::cpu::linear_attention_backward_for(nefkern::cpu::best_isa())(args);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nefkern_native, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, str feature_map, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask,"
      " Tensor state, Tensor stats, str feature_map, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(nefkern_native, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
}
