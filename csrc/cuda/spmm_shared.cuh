// Rows beside each other that share their entries' rows of x: neighbouring patches have most of
// their neighbours in common. A block finds the different columns of its 32 rows, brings each of
// these rows of x into shared memory once, and a warp multiplies what is there by four rows of
// kappa at a time: what it reads serves all of the four that have an entry there.
#pragma once

#include "cuda/bitmap.cuh"
#include "cuda/spmm_long.cuh"

namespace nefkern::cuda {
namespace {

constexpr int kRowsAWarp = 4, kLanesARow = kWarp / kRowsAWarp;
constexpr int kSharedRows = kWarps * kRowsAWarp;  // of kappa, a block's
constexpr int kBatch = 16;                        // rows of x that are worked on, and on their way
constexpr int kMaxDistinct = 4096;                // different columns of a block's rows

// The block's dynamic shared memory.
template <int kVectors>
struct SharedRows {
  uint4 (*staged)[kBatch][kVectors * kWarp];  // [2], rows of x
  float4 (*weights)[kBatch];                  // [kWarps], of a warp's four rows
  Bitmap bitmap;                              // of the columns of the block's rows
  uint16_t* nodes;                            // [kMaxDistinct], the columns that are
};

template <int kVectors>
constexpr size_t kStagedBytes = 2 * sizeof(uint4[kBatch][kVectors * kWarp]);
constexpr size_t kWeightBytes = sizeof(float4[kWarps][kBatch]);

template <int kVectors>
size_t shared_rows_bytes(int words) {
  return kStagedBytes<kVectors> + kWeightBytes + bitmap_bytes(words) +
         kMaxDistinct * sizeof(uint16_t);
}

template <int kVectors>
__device__ __forceinline__ SharedRows<kVectors> shared_rows(int words) {
  unsigned char* memory = dynamic_shared<unsigned char>();
  SharedRows<kVectors> shared;
  shared.staged = reinterpret_cast<uint4(*)[kBatch][kVectors * kWarp]>(memory);
  memory += kStagedBytes<kVectors>;
  shared.weights = reinterpret_cast<float4(*)[kBatch]>(memory);
  memory += kWeightBytes;
  shared.bitmap = bitmap_at(memory, words);
  shared.nodes = shared.bitmap.before + words;
  return shared;
}

// The extent of a row that this way takes: long ones have blocks of their own.
__device__ __forceinline__ Extent short_extent(const SpmmArgs& args, int64_t row) {
  const Extent extent = extent_of(args, row);
  return is_long(extent) ? Extent{0, 0} : extent;
}

// Marks the columns of the warp's rows. Returns whether they ascend and are nodes.
__device__ __forceinline__ bool mark_columns(const SpmmArgs& args, int64_t first_row,
                                             const Bitmap& bitmap) {
  bool ascend = true;
  for (int r = 0; r < kRowsAWarp; ++r) {
    const Extent extent = short_extent(args, first_row + r);
    for (int64_t entry = extent.begin + lane_id(); entry < extent.end; entry += kWarp) {
      const int node = __ldg(args.columns + entry);
      const int previous = entry == extent.begin ? -1 : __ldg(args.columns + entry - 1);
      const bool is_node = node >= 0 && node < args.num_nodes;
      ascend = ascend && is_node && previous < node;
      if (is_node) mark(bitmap, node);
    }
  }
  return ascend;
}

// The marked columns, ascending: a lane a bit.
__device__ __forceinline__ void list_columns(const Bitmap& bitmap, uint16_t* nodes) {
  const int lane = lane_id();
  for (int word = threadIdx.x / kWarp; word < bitmap.words; word += kWarps) {
    const uint32_t bits = bitmap.present[word];
    if (bits >> lane & 1)
      nodes[bitmap.before[word] + __popc(bits & lanes_below(lane))] =
          static_cast<uint16_t>(word * kWordBits + lane);
  }
  __syncthreads();
}

// Starts the copies of a batch of rows of x.
template <class X, int kVectors>
__device__ __forceinline__ void stage_batch(const SpmmArgs& args, const uint16_t* nodes, int count,
                                            int64_t tile,
                                            uint4 (&staged)[kBatch][kVectors * kWarp]) {
  constexpr int kLoads = kVectors * kWarp;
  const X* x = static_cast<const X*>(args.x);
  for (int i = threadIdx.x; i < count * kLoads; i += kWarps * kWarp) {
    const int64_t column = tile + i % kLoads * kWidth<X>;
    const bool there = column < args.num_columns;
    cp_async_16(&staged[i / kLoads][i % kLoads],
                x + nodes[i / kLoads] * args.x_stride + (there ? column : 0), there);
  }
  cp_async_commit();
}

// A row's entries in their order, eight lanes a row.
struct Cursor {
  int64_t next, end;
  int node;  // of this lane's entry next + lane % kLanesARow; kNoNode beyond the end
  float value;

  static constexpr int kNoNode = -1;

  __device__ __forceinline__ void load(const SpmmArgs& args) {
    const int64_t entry = next + lane_id() % kLanesARow;
    const bool there = entry < end;
    node = there ? __ldg(args.columns + entry) : kNoNode;
    value = there ? __ldg(args.values + entry) : 0;
  }
};

// Moves the cursor over the entries in a batch that begins at place `first` of the columns present:
// their values go to `weights`. Returns a bit a place that its row has an entry for.
__device__ __forceinline__ unsigned take_batch(const SpmmArgs& args, const Bitmap& bitmap,
                                               int first, float4* weights, Cursor& cursor) {
  const int lane = lane_id(), row = lane / kLanesARow;
  unsigned taken = 0;
  for (bool more = true; more;) {
    const int place = cursor.node < 0 ? kBatch : place_of(bitmap, cursor.node) - first;
    const bool inside = place < kBatch;
    if (inside) reinterpret_cast<float*>(&weights[place])[row] = cursor.value;
    unsigned bits = inside ? 1u << place : 0;
    for (int distance = 1; distance < kLanesARow; distance *= 2)
      bits |= __shfl_xor_sync(kAllLanes, bits, distance);
    taken |= bits;
    const int count = __popc(bits);
    cursor.next += count;
    if (count) cursor.load(args);
    more = __any_sync(kAllLanes, count == kLanesARow);
  }
  return taken;
}

// The batch's rows of x times the values of the warp's four rows, where they have any.
template <class X, int kVectors>
__device__ __forceinline__ void add_batch(const uint4 (&staged)[kBatch][kVectors * kWarp],
                                          const float4* weights, unsigned taken,
                                          Sum<X, kVectors> (&sum)[kRowsAWarp]) {
  unsigned of_row[kRowsAWarp], any = 0;
#pragma unroll
  for (int r = 0; r < kRowsAWarp; ++r) {
    of_row[r] = __shfl_sync(kAllLanes, taken, r * kLanesARow);
    any |= of_row[r];
  }
  for (; any; any &= any - 1) {
    const int place = __ffs(any) - 1;
    const float4 packed = weights[place];
    const float weight[kRowsAWarp] = {packed.x, packed.y, packed.z, packed.w};
    uint4 row[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) row[v] = staged[place][v * kWarp + lane_id()];
#pragma unroll
    for (int r = 0; r < kRowsAWarp; ++r)
      if (of_row[r] >> place & 1) add_product<X, kVectors>(weight[r], row, sum[r]);
  }
}

// kSharedRows rows of y, a tile of their columns, if their entries are such that it pays: what this
// returns is the same in every thread, and depends on the graph alone.
template <class X, class Y, int kVectors>
__device__ __forceinline__ bool add_shared_rows(const SpmmArgs& args, int64_t first_row,
                                                const Columns<X, kVectors>& columns, int64_t tile,
                                                int words) {
  const SharedRows<kVectors> shared = shared_rows<kVectors>(words);
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const int64_t own_row = first_row + warp * kRowsAWarp;
  clear<kWarps * kWarp>(shared.bitmap);
  const int entries = static_cast<int>(__reduce_add_sync(
      kAllLanes, static_cast<unsigned>(short_extent(args, first_row + lane).size())));
  __syncthreads();
  const bool ascend = mark_columns(args, own_row, shared.bitmap);
  if (!__syncthreads_and(ascend)) return false;
  const int distinct = count_marked<kWarps * kWarp>(shared.bitmap);
  if (distinct > kMaxDistinct || 2 * distinct > entries) return false;
  list_columns(shared.bitmap, shared.nodes);

  const auto stage = [&](int first, int half) {
    stage_batch<X, kVectors>(args, shared.nodes + first, min(kBatch, distinct - first), tile,
                             shared.staged[half]);
  };
  const Extent extent = short_extent(args, own_row + lane / kLanesARow);
  Cursor cursor{extent.begin, extent.end, Cursor::kNoNode, 0};
  cursor.load(args);
  Sum<X, kVectors> sum[kRowsAWarp] = {};
  stage(0, 0);
  for (int first = 0, half = 0; first < distinct; first += kBatch, half ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this half has arrived for all, and all are done with the other one
    if (first + kBatch < distinct) stage(first + kBatch, half ^ 1);
    const unsigned taken = take_batch(args, shared.bitmap, first, shared.weights[warp], cursor);
    __syncwarp();
    add_batch<X, kVectors>(shared.staged[half], shared.weights[warp], taken, sum);
  }
#pragma unroll
  for (int r = 0; r < kRowsAWarp; ++r)
    if (own_row + r < args.num_nodes && !is_long(extent_of(args, own_row + r)))
      store_row<X, Y, kVectors, true>(args, row_of_y<Y>(args, own_row + r), columns, sum[r]);
  return true;
}

}  // namespace
}  // namespace nefkern::cuda
