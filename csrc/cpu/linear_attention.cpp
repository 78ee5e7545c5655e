#include "cpu/linear_attention.h"

#include <cmath>

#include "cpu/linear_attention_features.h"
#include "cpu/linear_attention_memory.h"
#include "cpu/linear_attention_products.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

using Args = LinearAttentionArgs;
using BackwardArgs = LinearAttentionBackwardArgs;

template <class T>
T* head_of(const HeadsView& x, const Args& args, int64_t head) {
  return static_cast<T*>(x.data) + head / args.heads * x.batch_stride +
         head % args.heads * x.head_stride;
}

// ---- forward ----

// What one block of keys adds to its head.
struct KeyBlock {
  KeyBlock(float* memory, const Sizes& sizes)
      : shift(memory), total(memory + sizes.d_pad), state(memory + 2 * sizes.d_pad) {}
  static int64_t floats(const Sizes& sizes) { return 2 * sizes.d_pad + sizes.state; }
  float *shift, *total, *state;
};

template <FeatureMap kMap, class T>
void sum_keys(const Args& args, const Sizes& sizes, int64_t head, int64_t begin, int64_t end,
              KeyBlock result, float* workspace) {
  using F = Factor<T>;
  const T* k = head_of<const T>(args.k, args, head);
  const T* v = head_of<const T>(args.v, args, head);
  const bool* mask = args.mask ? args.mask + head / args.heads * args.keys : nullptr;
  Carver carve(workspace);
  float* phi = carve.take(kTile * sizes.d_pad);
  F* phi_factor = carve.take<F>(kTile * sizes.d_pad);
  F* values = carve.take<F>(kTile * sizes.e_pad);
  F* values_factor = carve.take<F>(kTile * sizes.e_pad);
  float* one = carve.take(sizes.d_pad);
  fill(one, sizes.d_pad, 1.f);
  fill(result.shift, KeyBlock::floats(sizes), 0.f);
  if constexpr (kMap == FeatureMap::kSoftmax)
    largest_keys(k, args.k.token_stride, mask, begin, end, sizes, result.shift);

  Tokens tokens;
  const Stream next[] = {{k, args.k.token_stride, sizes.d}, {v, args.v.token_stride, sizes.e}};
  while (tokens.take(mask, begin, end)) {
    key_features<kMap, F>(k, args.k.token_stride, tokens, sizes, result.shift, one, next, phi);
    read_rows(v, args.v.token_stride, tokens, sizes.e, sizes.e_pad, values);
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
      Vec total = {};
      for (int64_t t = 0; t < tokens.count; ++t) total = total + load(phi + t * sizes.d_pad + j);
      store(result.total + j, load(result.total + j) + total);
    }
    multiply<true, true>(sizes.d, sizes.e_pad, steps<F>(tokens.count),
                         over_rows(phi, tokens.count, sizes.d_pad, phi_factor), sizes.d_pad,
                         over_rows(values, tokens.count, sizes.e_pad, values_factor), sizes.e_pad,
                         result.state, sizes.e_pad);
  }
}

// Adds a head's blocks, brought to the largest shift, into its state and stats.
template <FeatureMap kMap>
void merge_keys(const Args& args, const Sizes& sizes, int64_t head, const float* blocks,
                int64_t count) {
  float* state = args.state + head * sizes.d * sizes.e;
  float* shift = args.stats + head * 2 * sizes.d;
  float* total = shift + sizes.d;
  for (int64_t i = 0; i < sizes.d; ++i) {
    float largest = count ? -INFINITY : 0;
    for (int64_t block = 0; block < count; ++block) {
      const float own = blocks[block * KeyBlock::floats(sizes) + i];
      // A block without a valid key has sum 0, and shift 0 that must not count.
      const float own_total = blocks[block * KeyBlock::floats(sizes) + sizes.d_pad + i];
      if (own_total != 0 && !(own <= largest)) largest = own;
    }
    if (largest == -INFINITY) largest = 0;
    shift[i] = largest;
    total[i] = 0;
    fill(state + i * sizes.e, sizes.e, 0.f);
    for (int64_t block = 0; block < count; ++block) {
      const KeyBlock one(const_cast<float*>(blocks) + block * KeyBlock::floats(sizes), sizes);
      if (one.total[i] == 0) continue;
      const float weight = kMap == FeatureMap::kSoftmax ? std::exp(one.shift[i] - largest) : 1;
      total[i] += weight * one.total[i];
      for (int64_t j = 0; j < sizes.e; ++j)
        state[i * sizes.e + j] += weight * one.state[i * sizes.e_pad + j];
    }
    if (kMap == FeatureMap::kSoftmax && total[i] != 0)
      for (int64_t j = 0; j < sizes.e; ++j) state[i * sizes.e + j] /= total[i];
  }
}

// The state with padded rows, and the sums z of φ(k), padded by zeros.
void read_state(const Args& args, const Sizes& sizes, int64_t head, float* state, float* z) {
  const float* from = args.state + head * sizes.d * sizes.e;
  for (int64_t i = 0; i < sizes.d; ++i)
    for (int64_t j = 0; j < sizes.e_pad; j += kLanes)
      store(state + i * sizes.e_pad + j, load(from + i * sizes.e + j, sizes.e - j));
  const float* sums = args.stats + (2 * head + 1) * sizes.d;
  for (int64_t j = 0; j < sizes.d_pad; j += kLanes) store(z + j, load(sums + j, sizes.d - j));
}

template <FeatureMap kMap, class T>
void answer_queries(const Args& args, const Sizes& sizes, int64_t head, int64_t begin, int64_t end,
                    float* workspace) {
  using F = Factor<T>;
  const T* q = head_of<const T>(args.q, args, head);
  T* out = head_of<T>(args.out, args, head);
  Carver carve(workspace);
  float* state = carve.take(sizes.state);
  F* state_factor = carve.take<F>(sizes.d_pad * sizes.e_pad);
  float* z = carve.take(sizes.d_pad);
  float* phi = carve.take(kTile * sizes.d_pad);
  F* phi_factor = carve.take<F>(kTile * sizes.d_pad);
  float* result = carve.take(kTile * sizes.e_pad);
  read_state(args, sizes, head, state, z);
  const F* right = over_rows(state, sizes.d, sizes.e_pad, state_factor);

  Tokens tokens;
  const Stream next[] = {{q, args.q.token_stride, sizes.d}, {out, args.out.token_stride, sizes.e}};
  while (tokens.take(nullptr, begin, end)) {
    float reciprocal[kTile];
    query_features<kMap, F>(q, args.q.token_stride, tokens, sizes, z, args.eps, next, phi,
                            reciprocal);
    // Where φ is rounded, its largest channel is exactly 1 as long as it is not divided.
    if constexpr (!kPaired<F>) scale_rows(reciprocal, tokens.count, sizes.d_pad, phi);
    multiply<false, false>(tokens.count, sizes.e_pad, steps<F>(sizes.d),
                           over_columns(phi, tokens.count, sizes.d_pad, phi_factor),
                           row_stride<F>(sizes.d_pad), right, sizes.e_pad, result, sizes.e_pad);
    if constexpr (kPaired<F>) scale_rows(reciprocal, tokens.count, sizes.e_pad, result);
    write_rows(result, sizes.e_pad, tokens, sizes.e, out, args.out.token_stride);
  }
}

template <FeatureMap kMap, class T>
void forward(const Args& args) {
  const Sizes sizes(args);
  const Blocks keys(args.keys), queries(args.queries);
  const int64_t heads = args.batch * args.heads, floats = KeyBlock::floats(sizes);
  const Buffer blocks = allocate(heads * keys.count * floats);

  with_workspace(heads * keys.count, sizes.workspace(), [&](int64_t piece, float* memory) {
    const int64_t block = piece % keys.count;
    sum_keys<kMap, T>(args, sizes, piece / keys.count, keys.begin(block), keys.begin(block + 1),
                      KeyBlock(blocks.get() + piece * floats, sizes), memory);
  });
  parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      merge_keys<kMap>(args, sizes, head, blocks.get() + head * keys.count * floats, keys.count);
  });
  with_workspace(heads * queries.count, sizes.workspace(), [&](int64_t piece, float* memory) {
    const int64_t block = piece % queries.count;
    answer_queries<kMap, T>(args, sizes, piece / queries.count, queries.begin(block),
                            queries.begin(block + 1), memory);
  });
}

// ---- backward ----

// Gradients of the state and of z ("elu") from one block of queries; and dq.
template <FeatureMap kMap, class T>
void query_gradients(const BackwardArgs& args, const Sizes& sizes, int64_t head, int64_t begin,
                     int64_t end, float* dstate, float* dz, float* workspace) {
  using F = Factor<T>;
  const Args& forward = args.forward;
  const T* q = head_of<const T>(forward.q, forward, head);
  const T* grad = head_of<const T>(args.grad, forward, head);
  T* dq = head_of<T>(args.dq, forward, head);
  Carver carve(workspace);
  float* state = carve.take(sizes.state);
  F* state_factor = carve.take<F>(sizes.d_pad * sizes.e_pad);
  F* state_t = carve.take<F>(sizes.e_pad * sizes.d_pad);
  float* z = carve.take(sizes.d_pad);
  float* phi = carve.take(kTile * sizes.d_pad);
  F* phi_factor = carve.take<F>(kTile * sizes.d_pad);
  float* g = carve.take(kTile * sizes.d_pad);
  F* values = carve.take<F>(kTile * sizes.e_pad);
  F* values_factor = carve.take<F>(kTile * sizes.e_pad);
  read_state(forward, sizes, head, state, z);
  transpose(over_columns(state, sizes.d, sizes.e_pad, state_factor), row_stride<F>(sizes.e_pad),
            sizes.d, steps<F>(sizes.e), state_t, sizes.d_pad);
  fill(dstate, sizes.state, 0.f);
  fill(dz, sizes.d_pad, 0.f);
  const float root = std::sqrt(static_cast<float>(sizes.d));

  Tokens tokens;
  const Stream next[] = {{q, forward.q.token_stride, sizes.d},
                         {grad, args.grad.token_stride, sizes.e},
                         {dq, args.dq.token_stride, sizes.d}};
  while (tokens.take(nullptr, begin, end)) {
    float reciprocal[kTile];
    query_features<kMap, float>(q, forward.q.token_stride, tokens, sizes, z, forward.eps, next, phi,
                                reciprocal);
    scale_rows(reciprocal, tokens.count, sizes.d_pad, phi);
    read_rows(grad, args.grad.token_stride, tokens, sizes.e, sizes.e_pad, values);
    multiply<false, false>(tokens.count, sizes.d_pad, steps<F>(sizes.e), values,
                           row_stride<F>(sizes.e_pad), state_t, sizes.d_pad, g, sizes.d_pad);
    multiply<true, true>(sizes.d, sizes.e_pad, steps<F>(tokens.count),
                         over_rows(phi, tokens.count, sizes.d_pad, phi_factor), sizes.d_pad,
                         over_rows(values, tokens.count, sizes.e_pad, values_factor), sizes.e_pad,
                         dstate, sizes.e_pad);
    for (int64_t t = 0; t < tokens.count; ++t) {
      const float* phi_t = phi + t * sizes.d_pad;
      const float* g_t = g + t * sizes.d_pad;
      T* dq_t = dq + tokens.index[t] * args.dq.token_stride;
      Vec product = {};
      for (int64_t j = 0; j < sizes.d_pad; j += kLanes)
        product = fma(load(phi_t + j), load(g_t + j), product);
      const Vec inner = broadcast(sum(product));
      for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
        const Vec f = load(phi_t + j);
        if constexpr (kMap == FeatureMap::kSoftmax) {
          write(dq_t + j, f * (load(g_t + j) - inner * root), sizes.d - j);
        } else {
          const Vec slope = min(f, broadcast(reciprocal[t]));  // φ'(q)·r = min(φ, 1)·r
          if (j < sizes.d)
            write(dq_t + j, slope * (load(g_t + j) - inner * load(z + j)), sizes.d - j);
          store(dz + j, load(dz + j) - inner * f);
        }
      }
    }
  }
}

// What the keys of a head need: dS, its transpose as a factor, and the shift that dφ(k) gets (dz,
// or for "softmax" −rowsum(S dS)).
template <class F>
struct StateGradient {
  StateGradient(float* memory, const Sizes& sizes)
      : dstate(memory),
        dstate_t(reinterpret_cast<F*>(memory + sizes.state)),
        shift(memory + sizes.state + sizes.e * sizes.d_pad) {}
  static int64_t floats(const Sizes& sizes) {
    return sizes.state + sizes.e * sizes.d_pad + sizes.d_pad;
  }
  float* dstate;
  F* dstate_t;
  float* shift;
};

// φ(k) = exp(k − shift)·scale, scale = 1/z (0 where no key counts).
inline float key_scale(float total) { return total != 0 ? 1 / total : 0; }

template <FeatureMap kMap, class F>
void merge_state_gradients(const Args& args, const Sizes& sizes, int64_t head, const float* blocks,
                           int64_t count, StateGradient<F> result, float* workspace) {
  const int64_t floats = sizes.state + sizes.d_pad;
  fill(result.dstate, sizes.state, 0.f);
  fill(result.shift, sizes.d_pad, 0.f);
  for (int64_t block = 0; block < count; ++block) {
    const float* one = blocks + block * floats;
    for (int64_t i = 0; i < sizes.state; ++i) result.dstate[i] += one[i];
    for (int64_t i = 0; i < sizes.d_pad; ++i) result.shift[i] += one[sizes.state + i];
  }
  if constexpr (kMap == FeatureMap::kSoftmax) {
    const float* state = args.state + head * sizes.d * sizes.e;
    for (int64_t i = 0; i < sizes.d; ++i) {
      float* row = result.dstate + i * sizes.e_pad;
      // Where φ(k) is rounded, the largest exp(k − shift) is exactly 1 as long as it is not scaled:
      // dS takes the scale instead. The shift is that of the dS which products see.
      if constexpr (kPaired<F>) {
        const float scale = key_scale(args.stats[(2 * head + 1) * sizes.d + i]);
        for (int64_t j = 0; j < sizes.e_pad; ++j) row[j] *= scale;
      }
      Vec product = {};
      for (int64_t j = 0; j < sizes.e; j += kLanes)
        product =
            fma(load(state + i * sizes.e + j, sizes.e - j), as_factor<F>(load(row + j)), product);
      result.shift[i] = -sum(product);
    }
  }
  transpose(over_columns(result.dstate, sizes.d, sizes.e_pad, Carver(workspace).take<F>(0)),
            row_stride<F>(sizes.e_pad), sizes.d, steps<F>(sizes.e), result.dstate_t, sizes.d_pad);
}

template <class T>
void zero_masked(const bool* mask, int64_t begin, int64_t end, int64_t n, T* to, int64_t stride) {
  for (int64_t token = begin; token < end; ++token)
    if (!mask[token])
      for (int64_t j = 0; j < n; j += kLanes) write(to + token * stride + j, Vec{}, n - j);
}

template <FeatureMap kMap, class T>
void key_gradients(const BackwardArgs& args, const Sizes& sizes, int64_t head, int64_t begin,
                   int64_t end, StateGradient<Factor<T>> gradient, float* workspace) {
  using F = Factor<T>;
  const Args& forward = args.forward;
  const T* k = head_of<const T>(forward.k, forward, head);
  const T* v = head_of<const T>(forward.v, forward, head);
  T* dk = head_of<T>(args.dk, forward, head);
  T* dv = head_of<T>(args.dv, forward, head);
  const bool* mask = forward.mask ? forward.mask + head / forward.heads * forward.keys : nullptr;
  Carver carve(workspace);
  F* dstate_factor = carve.take<F>(sizes.d_pad * sizes.e_pad);
  float* phi = carve.take(kTile * sizes.d_pad);
  F* phi_factor = carve.take<F>(kTile * sizes.d_pad);
  float* g = carve.take(kTile * sizes.d_pad);
  F* values = carve.take<F>(kTile * sizes.e_pad);
  float* result = carve.take(kTile * sizes.e_pad);
  float* shift = carve.take(sizes.d_pad);
  float* scale = carve.take(sizes.d_pad);
  const float* stats = forward.stats + 2 * head * sizes.d;
  for (int64_t i = 0; i < sizes.d_pad; ++i) {
    shift[i] = i < sizes.d ? stats[i] : 0;
    scale[i] = i >= sizes.d ? 0 : kPaired<F> ? 1 : key_scale(stats[sizes.d + i]);
  }
  if (mask) {
    zero_masked(mask, begin, end, sizes.d, dk, args.dk.token_stride);
    zero_masked(mask, begin, end, sizes.e, dv, args.dv.token_stride);
  }
  const F* dstate = over_rows(gradient.dstate, sizes.d, sizes.e_pad, dstate_factor);

  Tokens tokens;
  const Stream next[] = {{k, forward.k.token_stride, sizes.d},
                         {v, forward.v.token_stride, sizes.e},
                         {dk, args.dk.token_stride, sizes.d},
                         {dv, args.dv.token_stride, sizes.e}};
  while (tokens.take(mask, begin, end)) {
    key_features<kMap, float>(k, forward.k.token_stride, tokens, sizes, shift, scale, next, phi);
    read_rows(v, forward.v.token_stride, tokens, sizes.e, sizes.e_pad, values);
    multiply<false, false>(tokens.count, sizes.d_pad, steps<F>(sizes.e), values,
                           row_stride<F>(sizes.e_pad), gradient.dstate_t, sizes.d_pad, g,
                           sizes.d_pad);
    multiply<false, false>(tokens.count, sizes.e_pad, steps<F>(sizes.d),
                           over_columns(phi, tokens.count, sizes.d_pad, phi_factor),
                           row_stride<F>(sizes.d_pad), dstate, sizes.e_pad, result, sizes.e_pad);
    write_rows(result, sizes.e_pad, tokens, sizes.e, dv, args.dv.token_stride);
    for (int64_t t = 0; t < tokens.count; ++t) {
      const float* phi_t = phi + t * sizes.d_pad;
      const float* g_t = g + t * sizes.d_pad;
      T* dk_t = dk + tokens.index[t] * args.dk.token_stride;
      for (int64_t j = 0; j < sizes.d; j += kLanes) {
        const Vec f = load(phi_t + j);
        const Vec slope = kMap == FeatureMap::kSoftmax ? f : min(f, broadcast(1));
        write(dk_t + j, slope * (load(g_t + j) + load(gradient.shift + j)), sizes.d - j);
      }
    }
  }
}

template <FeatureMap kMap, class T>
void backward(const BackwardArgs& args) {
  using F = Factor<T>;
  const Args& forward = args.forward;
  const Sizes sizes(forward);
  const Blocks keys(forward.keys), queries(forward.queries);
  const int64_t heads = forward.batch * forward.heads;
  const int64_t block_floats = sizes.state + sizes.d_pad;
  const int64_t gradient_floats = StateGradient<F>::floats(sizes);
  const Buffer blocks = allocate(heads * queries.count * block_floats);
  const Buffer gradients = allocate(heads * gradient_floats);
  const auto gradient = [&](int64_t head) {
    return StateGradient<F>(gradients.get() + head * gradient_floats, sizes);
  };

  with_workspace(heads * queries.count, sizes.workspace(), [&](int64_t piece, float* memory) {
    const int64_t block = piece % queries.count;
    float* result = blocks.get() + piece * block_floats;
    query_gradients<kMap, T>(args, sizes, piece / queries.count, queries.begin(block),
                             queries.begin(block + 1), result, result + sizes.state, memory);
  });
  with_workspace(heads, sizes.workspace(), [&](int64_t head, float* memory) {
    merge_state_gradients<kMap, F>(forward, sizes, head,
                                   blocks.get() + head * queries.count * block_floats,
                                   queries.count, gradient(head), memory);
  });
  with_workspace(heads * keys.count, sizes.workspace(), [&](int64_t piece, float* memory) {
    const int64_t head = piece / keys.count, block = piece % keys.count;
    key_gradients<kMap, T>(args, sizes, head, keys.begin(block), keys.begin(block + 1),
                           gradient(head), memory);
  });
}

// Calls f with the element type and feature map as types.
template <class F>
void for_types(const Args& args, const F& f) {
  const auto with_map = [&](auto element) {
    if (args.feature_map == FeatureMap::kElu)
      f.template operator()<FeatureMap::kElu>(element);
    else
      f.template operator()<FeatureMap::kSoftmax>(element);
  };
  if (args.type == AttentionType::kFloat32) return with_map(float());
  if (args.type == AttentionType::kFloat16) return with_map(Half());
  with_map(BFloat16());
}

}  // namespace

void linear_attention(const LinearAttentionArgs& args) {
  for_types(args, [&]<FeatureMap kMap>(auto element) { forward<kMap, decltype(element)>(args); });
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args) {
  for_types(args.forward,
            [&]<FeatureMap kMap>(auto element) { backward<kMap, decltype(element)>(args); });
}

}  // namespace nefkern::cpu::NEFKERN_ISA
