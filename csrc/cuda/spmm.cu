// One warp a row of y; the rows of x that it needs stream by in loads of 16 bytes a lane, several
// in flight, since what limits this is the way of x's rows from the L2 cache. A row with very many
// entries would keep one warp busy long after all others: it is left to its whole block.
#include "cuda/half.cuh"
#include "cuda/launches.h"
#include "cuda/spmm.h"
#include "cuda/warp.cuh"

namespace nefkern::cuda {
namespace {

constexpr int kWarps = 8;        // a block's, and its rows
constexpr int64_t kHeavy = 512;  // entries, from which on a row is the whole block's
// Entries whose loads are issued before the first is used; element by element they are many anyway.
template <bool kAligned>
constexpr int kInFlight = kAligned ? 4 : 1;

// One 16-byte load's elements of X as floats.
template <class X>
constexpr int kWidth = 16 / sizeof(X);

__device__ __forceinline__ void unpack(const uint4& words, float (&out)[4], float) {
  out[0] = __uint_as_float(words.x);
  out[1] = __uint_as_float(words.y);
  out[2] = __uint_as_float(words.z);
  out[3] = __uint_as_float(words.w);
}

template <class Half>
__device__ __forceinline__ void unpack(const uint4& words, float (&out)[8], Half) {
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(Half{static_cast<uint16_t>(word[i] & 0xffff)});
    out[2 * i + 1] = to_float(Half{static_cast<uint16_t>(word[i] >> 16)});
  }
}

// The extent of a row that the offsets give, whatever they are.
struct Extent {
  int64_t begin, end;
  __device__ __forceinline__ int64_t size() const { return end - begin; }
};

__device__ __forceinline__ Extent extent_of(const SpmmArgs& args, int64_t row) {
  if (row >= args.num_nodes) return {0, 0};
  const int64_t begin = args.row_offsets[row], end = args.row_offsets[row + 1];
  if (begin < 0 || begin > end || end > args.nnz) return {0, 0};
  return {begin, end};
}

// A lane's part of a row of y: kVectors times kWidth columns, a warp's width apart.
template <class X, int kVectors>
struct Columns {
  int64_t first;  // of the first vector
  int step;       // to the next

  __device__ __forceinline__ int64_t of(int vector) const { return first + vector * step; }
};

template <class X, bool kAligned>
__device__ __forceinline__ uint4 load(const X* row, int64_t column, int64_t num_columns) {
  if constexpr (kAligned) {
    return column < num_columns ? __ldg(reinterpret_cast<const uint4*>(row + column)) : uint4{};
  } else {
    constexpr int kBits = 8 * sizeof(X), kElementsAWord = 32 / kBits;
    unsigned word[4] = {};
#pragma unroll
    for (int i = 0; i < kWidth<X>; ++i)
      if (column + i < num_columns)
        word[i / kElementsAWord] |= bits_of(row[column + i]) << (i % kElementsAWord * kBits);
    return {word[0], word[1], word[2], word[3]};
  }
}

// Adds the entries [begin, end) to the warp's sums. The lanes form groups that take an entry each:
// a narrow x is read by many groups, a wide one by a single group of 32 lanes.
template <class X, int kVectors, bool kAligned>
__device__ __forceinline__ void add_entries(const SpmmArgs& args, Extent entries,
                                            const Columns<X, kVectors>& columns, int lanes_a_group,
                                            float (&sum)[kVectors][kWidth<X>]) {
  const X* x = static_cast<const X*>(args.x);
  const int lane = lane_id(), groups = kWarp / lanes_a_group, group = lane / lanes_a_group;
  for (int64_t first = entries.begin; first < entries.end; first += kWarp) {
    const bool mine = first + lane < entries.end;
    int node = mine ? __ldg(args.columns + first + lane) : -1;
    if (node >= args.num_nodes) node = -1;
    const float value = mine && node >= 0 ? __ldg(args.values + first + lane) : 0;
    const int count = static_cast<int>(min(entries.end - first, static_cast<int64_t>(kWarp)));
#pragma unroll 1
    for (int done = 0; done < count; done += kInFlight<kAligned> * groups) {
      uint4 loaded[kInFlight<kAligned>][kVectors];
      float weight[kInFlight<kAligned>];
#pragma unroll
      for (int i = 0; i < kInFlight<kAligned>; ++i) {
        // Beyond the chunk's end the lane wraps around, and its entry is none of this step's.
        const int entry = done + i * groups + group;
        const int from = __shfl_sync(kAllLanes, node, entry % kWarp);
        const bool there = entry < count && from >= 0;
        weight[i] = __shfl_sync(kAllLanes, value, entry % kWarp);
        if (!there) weight[i] = 0;
        const X* row = x + (there ? from : 0) * args.x_stride;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          loaded[i][v] = there ? load<X, kAligned>(row, columns.of(v), args.num_columns) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kInFlight<kAligned>; ++i)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float element[kWidth<X>];
          unpack(loaded[i][v], element, X{});
#pragma unroll
          for (int c = 0; c < kWidth<X>; ++c)
            sum[v][c] = __fmaf_rn(weight[i], element[c], sum[v][c]);
        }
    }
  }
  for (int distance = lanes_a_group; distance < kWarp; distance *= 2)
    for (int v = 0; v < kVectors; ++v)
      for (int c = 0; c < kWidth<X>; ++c)
        sum[v][c] += __shfl_xor_sync(kAllLanes, sum[v][c], distance);
}

template <class X, class Y, int kVectors, bool kAligned>
__device__ __forceinline__ void store_row(const SpmmArgs& args, int64_t row,
                                          const Columns<X, kVectors>& columns,
                                          const float (&sum)[kVectors][kWidth<X>]) {
  struct alignas(16) Packed {
    Y element[kWidth<X>];
  };
  Y* y = static_cast<Y*>(args.y) + row * args.num_columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = columns.of(v);
    if (kAligned) {
      Packed packed;
      for (int c = 0; c < kWidth<X>; ++c) packed.element[c] = from_float<Y>(sum[v][c]);
      if (column < args.num_columns) *reinterpret_cast<Packed*>(y + column) = packed;
    } else {
      for (int c = 0; c < kWidth<X>; ++c)
        if (column + c < args.num_columns) y[column + c] = from_float<Y>(sum[v][c]);
    }
  }
}

template <class X, int kVectors>
struct Partials {
  float sum[kWarps][kVectors * kWidth<X>][kWarp];
};

template <class X, int kVectors>
constexpr int64_t kTileColumns = int64_t{kVectors} * kWarp * kWidth<X>;

// kWarps rows and kTileColumns columns, all rows' blocks of one tile of columns after another: what
// of x is in the cache stays of use. All in the grid's x: y has no room for many columns.
template <class X, class Y, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    spmm_rows(const SpmmArgs args, int lanes_a_group, unsigned row_blocks) {
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x / row_blocks * kTileColumns<X, kVectors>;
  const Columns<X, kVectors> columns{tile + lane % lanes_a_group * kWidth<X>, kWarp * kWidth<X>};
  const int64_t first_row = int64_t{blockIdx.x % row_blocks} * kWarps, row = first_row + warp;
  const bool writes = lane < lanes_a_group;
  const Extent own = extent_of(args, row);
  const bool is_heavy = own.size() >= kHeavy;
  if (!is_heavy) {
    float sum[kVectors][kWidth<X>] = {};
    add_entries<X, kVectors, kAligned>(args, own, columns, lanes_a_group, sum);
    if (writes && row < args.num_nodes)
      store_row<X, Y, kVectors, kAligned>(args, row, columns, sum);
  }
  if (!__syncthreads_or(is_heavy)) return;

  auto& partial = block_shared<Partials<X, kVectors>>().sum;
  for (int64_t heavy = first_row; heavy < first_row + kWarps; ++heavy) {
    const Extent all = extent_of(args, heavy);
    if (all.size() < kHeavy) continue;
    const int64_t share = (all.size() + kWarps - 1) / kWarps;
    const int64_t begin = min(all.begin + warp * share, all.end);
    float sum[kVectors][kWidth<X>] = {};
    add_entries<X, kVectors, kAligned>(args, {begin, min(begin + share, all.end)}, columns,
                                       lanes_a_group, sum);
    for (int v = 0; v < kVectors; ++v)
      for (int c = 0; c < kWidth<X>; ++c) partial[warp][v * kWidth<X> + c][lane] = sum[v][c];
    __syncthreads();
    if (warp == 0 && writes) {
      for (int other = 1; other < kWarps; ++other)
        for (int v = 0; v < kVectors; ++v)
          for (int c = 0; c < kWidth<X>; ++c) sum[v][c] += partial[other][v * kWidth<X> + c][lane];
      store_row<X, Y, kVectors, kAligned>(args, heavy, columns, sum);
    }
    __syncthreads();
  }
}

template <class X, class Y, int kVectors, bool kAligned>
cudaError_t launch_rows(const SpmmArgs& args, cudaStream_t stream) {
  int lanes_a_group = 1;
  while (lanes_a_group < kWarp && lanes_a_group * kWidth<X> < args.num_columns) lanes_a_group *= 2;
  const int64_t row_blocks = tiles(args.num_nodes, kWarps);
  const int64_t column_tiles = tiles(args.num_columns, kTileColumns<X, kVectors>);
  Launches launch(stream);
  launch(spmm_rows<X, Y, kVectors, kAligned>, row_blocks * column_tiles, kWarps * kWarp, 0, args,
         lanes_a_group, static_cast<unsigned>(row_blocks));
  return launch.error();
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class X, class Y>
cudaError_t spmm_typed(const SpmmArgs& args, cudaStream_t stream) {
  constexpr int kLoad = kWidth<X>;
  const bool aligned = is_aligned(args.x) && is_aligned(args.y) && args.x_stride % kLoad == 0 &&
                       args.num_columns % kLoad == 0;
  if (!aligned) return launch_rows<X, Y, 1, false>(args, stream);
  if (args.num_columns <= kWarp * kLoad) return launch_rows<X, Y, 1, true>(args, stream);
  return launch_rows<X, Y, 2, true>(args, stream);
}

}  // namespace

cudaError_t spmm(const SpmmArgs& args, cudaStream_t stream) {
  if (args.num_nodes < 0 || args.num_nodes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const bool wide = args.y_storage == Storage::kFloat32;
  switch (args.x_storage) {
    case Storage::kFloat32:
      return spmm_typed<float, float>(args, stream);
    case Storage::kFloat16:
      return wide ? spmm_typed<Half, float>(args, stream) : spmm_typed<Half, Half>(args, stream);
    default:
      return wide ? spmm_typed<BFloat16, float>(args, stream)
                  : spmm_typed<BFloat16, BFloat16>(args, stream);
  }
}

}  // namespace nefkern::cuda
