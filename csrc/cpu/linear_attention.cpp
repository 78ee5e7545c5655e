#include "cpu/linear_attention.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace nefkern::cpu::NEFKERN_ISA {
namespace {

// Tokens worked on at a time: their features and values stay in the first-level cache beside the
// [D, E] state.
constexpr int64_t kTile = 32;

using Args = LinearAttentionArgs;
using BackwardArgs = LinearAttentionBackwardArgs;

// ---- sizes, memory ----

// Channels as they lie in the workspace: rows padded to whole vectors.
struct Sizes {
  explicit Sizes(const Args& args)
      : d(args.channels),
        e(args.value_channels),
        d_pad(round_up(d)),
        e_pad(round_up(e)),
        state(d * e_pad) {}
  int64_t d, e, d_pad, e_pad;
  int64_t state;  // floats of a padded [D, E] state
};

// Tokens are summed in blocks whose bounds depend on their number only, never on the threads, and
// the blocks' sums are added in order.
struct Blocks {
  explicit Blocks(int64_t n) : tokens(n) {
    const int64_t size = n / 64 > 512 ? n / 64 : 512;
    count = n ? (n + size - 1) / size : 0;
  }
  int64_t begin(int64_t block) const { return part_begin(tokens, count, block); }
  int64_t tokens, count;
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 127) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  return Buffer(static_cast<float*>(memory));
}

// Hands out consecutive pieces of a buffer, each aligned as Vec.
class Carver {
 public:
  explicit Carver(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += round_up(floats);
    return piece;
  }

 private:
  float* next_;
};

// Calls f(piece, workspace of `floats`) for every piece, on all threads.
template <class F>
void with_workspace(int64_t pieces, int64_t floats, const F& f) {
  if (pieces <= 0) return;
  const int64_t threads = num_threads(), workers = threads < pieces ? threads : pieces;
  const Buffer memory = allocate(workers * floats);
  for_each_piece(pieces, workers,
                 [&](int64_t piece, int64_t worker) { f(piece, memory.get() + worker * floats); });
}

void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <class T>
T* head_of(const HeadsView& x, const Args& args, int64_t head) {
  return static_cast<T*>(x.data) + head / args.heads * x.batch_stride +
         head % args.heads * x.head_stride;
}

// ---- products of small matrices ----

// c [R, V vectors] = or += Σ_p a(r, p) b[p], with a(r, p) = a[r·lda + p], or a[p·lda + r] if
// kTransposed. The R·V sums stay in registers.
template <int R, int V, bool kTransposed, bool kAdd>
inline __attribute__((always_inline)) void register_tile(int64_t depth, const float* a, int64_t lda,
                                                         const float* b, int64_t ldb, float* c,
                                                         int64_t ldc) {
  Vec total[R][V] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vec row[V];
    for (int j = 0; j < V; ++j) row[j] = load(b + p * ldb + j * kLanes);
    for (int i = 0; i < R; ++i) {
      const Vec factor = broadcast(kTransposed ? a[p * lda + i] : a[i * lda + p]);
      for (int j = 0; j < V; ++j) total[i][j] = fma(factor, row[j], total[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store(to, kAdd ? load(to) + total[i][j] : total[i][j]);
    }
}

// Register tiles of R rows down a panel of V vectors, then what is left by halves of R.
template <int R, int V, bool kTransposed, bool kAdd>
void panel(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
           float* c, int64_t ldc) {
  int64_t i = 0;
  const int64_t step = kTransposed ? 1 : lda;
  for (; i + R <= rows; i += R)
    register_tile<R, V, kTransposed, kAdd>(depth, a + i * step, lda, b, ldb, c + i * ldc, ldc);
  if constexpr (R > 1)
    if (i < rows)
      panel<R / 2, V, kTransposed, kAdd>(rows - i, depth, a + i * step, lda, b, ldb, c + i * ldc,
                                         ldc);
}

// c [rows, columns] = or += a b, b [depth, columns]; columns is a whole number of vectors.
template <bool kTransposed, bool kAdd>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda,
              const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int kRows = kLanes == 16 ? 8 : 4;
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    panel<kRows, 2, kTransposed, kAdd>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
  if (j < columns) panel<kRows, 1, kTransposed, kAdd>(rows, depth, a, lda, b + j, ldb, c + j, ldc);
}

// to [columns, rows padded] = from [rows, columns] transposed, the padding 0.
void transpose(const float* from, int64_t ld, int64_t rows, int64_t columns, float* to,
               int64_t rows_pad) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * rows_pad + i] = from[i * ld + j];
    fill(to + j * rows_pad + rows, rows_pad - rows, 0);
  }
}

// ---- rows of tokens ----

// The next tokens of a block that count, at most kTile.
struct Tokens {
  int64_t count = 0;
  int64_t index[kTile];
  // Moves `next` behind the last token taken.
  bool take(const bool* mask, int64_t& next, int64_t end) {
    for (count = 0; next < end && count < kTile; ++next)
      if (!mask || mask[next]) index[count++] = next;
    return count > 0;
  }
};

// Heads lie side by side in a token, so that a head's next row is often a page away, where the
// processor does not prefetch by itself: ask for the row one tile ahead.
template <class T>
inline void prefetch(const T* row, int64_t stride, int64_t n) {
  const char* next = reinterpret_cast<const char*>(row + kTile * stride);
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(next + byte);
}

template <class T>
void read_rows(const T* from, int64_t stride, const Tokens& tokens, int64_t n, int64_t n_pad,
               float* to) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* row = from + tokens.index[t] * stride;
    prefetch(row, stride, n);
    for (int64_t j = 0; j < n_pad; j += kLanes) store(to + t * n_pad + j, load(row + j, n - j));
  }
}

template <class T>
void write_rows(const float* from, int64_t n_pad, const Tokens& tokens, int64_t n, T* to,
                int64_t stride) {
  for (int64_t t = 0; t < tokens.count; ++t)
    for (int64_t j = 0; j < n; j += kLanes)
      store(to + tokens.index[t] * stride + j, load(from + t * n_pad + j), n - j);
}

inline Vec elu1(Vec x) {
  const Vec e = exp_nonpositive(min(Vec{}, x));
  return x > Vec{} ? x + 1.f : e;
}

// φ(q) over its divisor for one token; returns the divisor's reciprocal, 0 for a divisor of 0.
template <FeatureMap kMap, class T>
float query_features(const T* q, const Sizes& sizes, const float* z, float eps, float* phi) {
  Vec total = {};
  Vec largest = broadcast(-INFINITY);
  if constexpr (kMap == FeatureMap::kSoftmax) {
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes)
      largest = max(largest, load(q + j, sizes.d - j, -INFINITY));
    largest = broadcast(max(largest));
  }
  for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
    Vec x;
    if constexpr (kMap == FeatureMap::kSoftmax) {
      x = exp_nonpositive(load(q + j, sizes.d - j, -INFINITY) - largest);
      total = total + x;
    } else {
      x = elu1(load(q + j, sizes.d - j));
      total = fma(x, load(z + j), total);
    }
    store(phi + j, x);
  }
  float divisor = sum(total);
  if constexpr (kMap == FeatureMap::kSoftmax)
    divisor *= std::sqrt(static_cast<float>(sizes.d));
  else
    divisor += eps;
  const float reciprocal = divisor == 0 ? 0 : 1 / divisor;
  for (int64_t j = 0; j < sizes.d_pad; j += kLanes) store(phi + j, load(phi + j) * reciprocal);
  return reciprocal;
}

// φ(k) for a tile of tokens: elu + 1, or exp(k − shift)·scale.
template <FeatureMap kMap, class T>
void key_features(const T* k, int64_t stride, const Tokens& tokens, const Sizes& sizes,
                  const float* shift, const float* scale, float* phi) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const T* row = k + tokens.index[t] * stride;
    prefetch(row, stride, sizes.d);
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
      const Vec x = load(row + j, sizes.d - j);
      if constexpr (kMap == FeatureMap::kSoftmax)
        store(phi + t * sizes.d_pad + j, exp_nonpositive(x - load(shift + j)) * load(scale + j));
      else
        store(phi + t * sizes.d_pad + j, elu1(x));
    }
  }
}

template <class T>
void largest_keys(const T* k, int64_t stride, const bool* mask, int64_t begin, int64_t end,
                  const Sizes& sizes, float* largest) {
  fill(largest, sizes.d_pad, -INFINITY);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = k + n * stride;
    prefetch(row, stride, sizes.d);
    if (!mask || mask[n])
      for (int64_t j = 0; j < sizes.d_pad; j += kLanes)
        store(largest + j, max(load(largest + j), load(row + j, sizes.d - j)));
  }
  for (int64_t j = 0; j < sizes.d_pad; ++j)
    if (largest[j] == -INFINITY) largest[j] = 0;  // no key counts: exp(−inf − 0) = 0
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
  const T* k = head_of<const T>(args.k, args, head);
  const T* v = head_of<const T>(args.v, args, head);
  const bool* mask = args.mask ? args.mask + head / args.heads * args.keys : nullptr;
  Carver carve(workspace);
  float* phi = carve.take(kTile * sizes.d_pad);
  float* values = carve.take(kTile * sizes.e_pad);
  float* one = carve.take(sizes.d_pad);
  fill(one, sizes.d_pad, 1);
  fill(result.shift, KeyBlock::floats(sizes), 0);
  if constexpr (kMap == FeatureMap::kSoftmax)
    largest_keys(k, args.k.token_stride, mask, begin, end, sizes, result.shift);

  Tokens tokens;
  while (tokens.take(mask, begin, end)) {
    key_features<kMap>(k, args.k.token_stride, tokens, sizes, result.shift, one, phi);
    read_rows(v, args.v.token_stride, tokens, sizes.e, sizes.e_pad, values);
    for (int64_t j = 0; j < sizes.d_pad; j += kLanes) {
      Vec total = {};
      for (int64_t t = 0; t < tokens.count; ++t) total = total + load(phi + t * sizes.d_pad + j);
      store(result.total + j, load(result.total + j) + total);
    }
    multiply<true, true>(sizes.d, sizes.e_pad, tokens.count, phi, sizes.d_pad, values, sizes.e_pad,
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
    fill(state + i * sizes.e, sizes.e, 0);
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
  const T* q = head_of<const T>(args.q, args, head);
  T* out = head_of<T>(args.out, args, head);
  Carver carve(workspace);
  float* state = carve.take(sizes.state);
  float* z = carve.take(sizes.d_pad);
  float* phi = carve.take(kTile * sizes.d_pad);
  float* result = carve.take(kTile * sizes.e_pad);
  read_state(args, sizes, head, state, z);

  Tokens tokens;
  while (tokens.take(nullptr, begin, end)) {
    for (int64_t t = 0; t < tokens.count; ++t) {
      const T* row = q + tokens.index[t] * args.q.token_stride;
      prefetch(row, args.q.token_stride, sizes.d);
      query_features<kMap>(row, sizes, z, args.eps, phi + t * sizes.d_pad);
    }
    multiply<false, false>(tokens.count, sizes.e_pad, sizes.d, phi, sizes.d_pad, state, sizes.e_pad,
                           result, sizes.e_pad);
    write_rows(result, sizes.e_pad, tokens, sizes.e, out, args.out.token_stride);
  }
}

template <FeatureMap kMap, class T>
void forward(const Args& args) {
  const Sizes sizes(args);
  const Blocks keys(args.keys), queries(args.queries);
  const int64_t heads = args.batch * args.heads, floats = KeyBlock::floats(sizes);
  const Buffer blocks = allocate(heads * keys.count * floats);

  const int64_t tile_floats = kTile * (sizes.d_pad + sizes.e_pad);
  with_workspace(heads * keys.count, tile_floats + sizes.d_pad, [&](int64_t piece, float* memory) {
    const int64_t block = piece % keys.count;
    sum_keys<kMap, T>(args, sizes, piece / keys.count, keys.begin(block), keys.begin(block + 1),
                      KeyBlock(blocks.get() + piece * floats, sizes), memory);
  });
  parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      merge_keys<kMap>(args, sizes, head, blocks.get() + head * keys.count * floats, keys.count);
  });
  with_workspace(heads * queries.count, tile_floats + round_up(sizes.state) + sizes.d_pad,
                 [&](int64_t piece, float* memory) {
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
  const Args& forward = args.forward;
  const T* q = head_of<const T>(forward.q, forward, head);
  const T* grad = head_of<const T>(args.grad, forward, head);
  T* dq = head_of<T>(args.dq, forward, head);
  Carver carve(workspace);
  float* state = carve.take(sizes.state);
  float* state_t = carve.take(sizes.e * sizes.d_pad);
  float* z = carve.take(sizes.d_pad);
  float* phi = carve.take(kTile * sizes.d_pad);
  float* g = carve.take(kTile * sizes.d_pad);
  float* values = carve.take(kTile * sizes.e_pad);
  read_state(forward, sizes, head, state, z);
  transpose(state, sizes.e_pad, sizes.d, sizes.e, state_t, sizes.d_pad);
  fill(dstate, sizes.state, 0);
  fill(dz, sizes.d_pad, 0);
  const float root = std::sqrt(static_cast<float>(sizes.d));

  Tokens tokens;
  while (tokens.take(nullptr, begin, end)) {
    float reciprocal[kTile];
    for (int64_t t = 0; t < tokens.count; ++t) {
      const T* row = q + tokens.index[t] * forward.q.token_stride;
      prefetch(row, forward.q.token_stride, sizes.d);
      reciprocal[t] = query_features<kMap>(row, sizes, z, forward.eps, phi + t * sizes.d_pad);
    }
    read_rows(grad, args.grad.token_stride, tokens, sizes.e, sizes.e_pad, values);
    multiply<false, false>(tokens.count, sizes.d_pad, sizes.e, values, sizes.e_pad, state_t,
                           sizes.d_pad, g, sizes.d_pad);
    multiply<true, true>(sizes.d, sizes.e_pad, tokens.count, phi, sizes.d_pad, values, sizes.e_pad,
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
          store(dq_t + j, f * (load(g_t + j) - inner * root), sizes.d - j);
        } else {
          const Vec slope = min(f, broadcast(reciprocal[t]));  // φ'(q)·r = min(φ, 1)·r
          if (j < sizes.d)
            store(dq_t + j, slope * (load(g_t + j) - inner * load(z + j)), sizes.d - j);
          store(dz + j, load(dz + j) - inner * f);
        }
      }
    }
  }
}

// What the keys of a head need: dS, its transpose, and the shift that dφ(k) gets (dz, or for
// "softmax" −rowsum(S dS)).
struct StateGradient {
  StateGradient(float* memory, const Sizes& sizes)
      : dstate(memory),
        dstate_t(dstate + round_up(sizes.state)),
        shift(dstate_t + sizes.e * sizes.d_pad) {}
  static int64_t floats(const Sizes& sizes) {
    return round_up(sizes.state) + sizes.e * sizes.d_pad + sizes.d_pad;
  }
  float *dstate, *dstate_t, *shift;
};

template <FeatureMap kMap>
void merge_state_gradients(const Args& args, const Sizes& sizes, int64_t head, const float* blocks,
                           int64_t count, StateGradient result) {
  const int64_t floats = sizes.state + sizes.d_pad;
  fill(result.dstate, sizes.state, 0);
  fill(result.shift, sizes.d_pad, 0);
  for (int64_t block = 0; block < count; ++block) {
    const float* one = blocks + block * floats;
    for (int64_t i = 0; i < sizes.state; ++i) result.dstate[i] += one[i];
    for (int64_t i = 0; i < sizes.d_pad; ++i) result.shift[i] += one[sizes.state + i];
  }
  transpose(result.dstate, sizes.e_pad, sizes.d, sizes.e, result.dstate_t, sizes.d_pad);
  if constexpr (kMap == FeatureMap::kSoftmax) {
    const float* state = args.state + head * sizes.d * sizes.e;
    for (int64_t i = 0; i < sizes.d; ++i) {
      Vec product = {};
      for (int64_t j = 0; j < sizes.e; j += kLanes)
        product = fma(load(state + i * sizes.e + j, sizes.e - j),
                      load(result.dstate + i * sizes.e_pad + j), product);
      result.shift[i] = -sum(product);
    }
  }
}

template <class T>
void zero_masked(const bool* mask, int64_t begin, int64_t end, int64_t n, T* to, int64_t stride) {
  for (int64_t token = begin; token < end; ++token)
    if (!mask[token])
      for (int64_t j = 0; j < n; j += kLanes) store(to + token * stride + j, Vec{}, n - j);
}

template <FeatureMap kMap, class T>
void key_gradients(const BackwardArgs& args, const Sizes& sizes, int64_t head, int64_t begin,
                   int64_t end, StateGradient gradient, float* workspace) {
  const Args& forward = args.forward;
  const T* k = head_of<const T>(forward.k, forward, head);
  const T* v = head_of<const T>(forward.v, forward, head);
  T* dk = head_of<T>(args.dk, forward, head);
  T* dv = head_of<T>(args.dv, forward, head);
  const bool* mask = forward.mask ? forward.mask + head / forward.heads * forward.keys : nullptr;
  Carver carve(workspace);
  float* phi = carve.take(kTile * sizes.d_pad);
  float* g = carve.take(kTile * sizes.d_pad);
  float* values = carve.take(kTile * sizes.e_pad);
  float* result = carve.take(kTile * sizes.e_pad);
  float* shift = carve.take(sizes.d_pad);
  float* scale = carve.take(sizes.d_pad);
  const float* stats = forward.stats + 2 * head * sizes.d;
  for (int64_t i = 0; i < sizes.d_pad; ++i) {
    shift[i] = i < sizes.d ? stats[i] : 0;
    scale[i] = i < sizes.d && stats[sizes.d + i] != 0 ? 1 / stats[sizes.d + i] : 0;
  }
  if (mask) {
    zero_masked(mask, begin, end, sizes.d, dk, args.dk.token_stride);
    zero_masked(mask, begin, end, sizes.e, dv, args.dv.token_stride);
  }

  Tokens tokens;
  while (tokens.take(mask, begin, end)) {
    key_features<kMap>(k, forward.k.token_stride, tokens, sizes, shift, scale, phi);
    read_rows(v, forward.v.token_stride, tokens, sizes.e, sizes.e_pad, values);
    multiply<false, false>(tokens.count, sizes.d_pad, sizes.e, values, sizes.e_pad,
                           gradient.dstate_t, sizes.d_pad, g, sizes.d_pad);
    multiply<false, false>(tokens.count, sizes.e_pad, sizes.d, phi, sizes.d_pad, gradient.dstate,
                           sizes.e_pad, result, sizes.e_pad);
    write_rows(result, sizes.e_pad, tokens, sizes.e, dv, args.dv.token_stride);
    for (int64_t t = 0; t < tokens.count; ++t)
      for (int64_t j = 0; j < sizes.d; j += kLanes) {
        const Vec f = load(phi + t * sizes.d_pad + j);
        const Vec slope = kMap == FeatureMap::kSoftmax ? f : min(f, broadcast(1));
        store(dk + tokens.index[t] * args.dk.token_stride + j,
              slope * (load(g + t * sizes.d_pad + j) + load(gradient.shift + j)), sizes.d - j);
      }
  }
}

template <FeatureMap kMap, class T>
void backward(const BackwardArgs& args) {
  const Args& forward = args.forward;
  const Sizes sizes(forward);
  const Blocks keys(forward.keys), queries(forward.queries);
  const int64_t heads = forward.batch * forward.heads;
  const int64_t block_floats = sizes.state + sizes.d_pad;
  const int64_t gradient_floats = StateGradient::floats(sizes);
  const Buffer blocks = allocate(heads * queries.count * block_floats);
  const Buffer gradients = allocate(heads * gradient_floats);
  const auto gradient = [&](int64_t head) {
    return StateGradient(gradients.get() + head * gradient_floats, sizes);
  };

  const int64_t query_floats = round_up(sizes.state) + sizes.e * sizes.d_pad + sizes.d_pad +
                               kTile * (2 * sizes.d_pad + sizes.e_pad);
  with_workspace(heads * queries.count, query_floats, [&](int64_t piece, float* memory) {
    const int64_t block = piece % queries.count;
    float* result = blocks.get() + piece * block_floats;
    query_gradients<kMap, T>(args, sizes, piece / queries.count, queries.begin(block),
                             queries.begin(block + 1), result, result + sizes.state, memory);
  });
  parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      merge_state_gradients<kMap>(forward, sizes, head,
                                  blocks.get() + head * queries.count * block_floats, queries.count,
                                  gradient(head));
  });
  const int64_t key_floats = kTile * 2 * (sizes.d_pad + sizes.e_pad) + 2 * sizes.d_pad;
  with_workspace(heads * keys.count, key_floats, [&](int64_t piece, float* memory) {
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
