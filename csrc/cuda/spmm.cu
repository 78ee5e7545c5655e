// One warp a row of y; the rows of x that it needs stream by in loads of 16 bytes a lane, several
// in flight, since what limits this is the way of x's rows from the L2 cache. Rows beside each
// other that have enough columns in common share these loads (spmm_shared.cuh). A row with many
// entries would keep one warp busy long after all others: it is left to its whole block, one with
// very many to several (spmm_long.cuh).
#include "cuda/spmm_shared.cuh"

namespace nefkern::cuda {
namespace {

constexpr int64_t kHeavy = 512;  // entries, from which on a row is the whole block's

// Rows first_row ... first_row + kWarps - 1, a warp each.
template <class X, class Y, int kVectors, bool kAligned>
__device__ __forceinline__ void gather_rows(const SpmmArgs& args, int64_t first_row,
                                            const Columns<X, kVectors>& columns, int lanes_a_group,
                                            Partials<X, kVectors>& partial) {
  const int lane = lane_id(), warp = threadIdx.x / kWarp;
  const bool writes = lane < lanes_a_group;
  const auto is_heavy = [](const Extent& row) { return row.size() >= kHeavy && !is_long(row); };
  const int64_t row = first_row + warp;
  const Extent own = extent_of(args, row);
  if (own.size() < kHeavy) {
    float sum[kVectors][kWidth<X>] = {};
    add_entries<X, kVectors, kAligned>(args, own, columns, lanes_a_group, sum);
    if (writes && row < args.num_nodes)
      store_row<X, Y, kVectors, kAligned>(args, row_of_y<Y>(args, row), columns, sum);
  }
  if (!__syncthreads_or(is_heavy(own))) return;
  for (int64_t heavy = first_row; heavy < first_row + kWarps; ++heavy) {
    const Extent all = extent_of(args, heavy);
    if (!is_heavy(all)) continue;
    float sum[kVectors][kWidth<X>] = {};
    add_entries_by_block<X, kVectors, kAligned>(args, all, columns, lanes_a_group, partial, sum);
    if (warp == 0 && writes)
      store_row<X, Y, kVectors, kAligned>(args, row_of_y<Y>(args, heavy), columns, sum);
  }
}

// What a block does: `of_chunks` blocks of every tile of columns have pieces of long rows, the
// first of all to begin; the others have rows. All blocks of a tile one after another: what of x is
// in the cache stays of use. All in the grid's x: y has no room for many columns.
struct Plan {
  int64_t of_chunks, of_rows;

  __host__ __device__ __forceinline__ int64_t blocks() const { return of_chunks + of_rows; }
};

template <class X, int kVectors>
__device__ __forceinline__ Columns<X, kVectors> columns_of(int64_t tile, int lanes_a_group) {
  return {tile + lane_id() % lanes_a_group * kWidth<X>, kWarp * kWidth<X>};
}

// kWarps rows a block.
template <class X, class Y, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    spmm_rows(const SpmmArgs args, int lanes_a_group, const Plan plan) {
  auto& partial = block_shared<Partials<X, kVectors>>();
  const int64_t tile = blockIdx.x / plan.blocks() * kTileColumns<X, kVectors>;
  const int64_t block = blockIdx.x % plan.blocks();
  const Columns<X, kVectors> columns = columns_of<X, kVectors>(tile, lanes_a_group);
  if (block < plan.of_chunks)
    add_pieces<X, kVectors, kAligned>(args, block, plan.of_chunks, columns, lanes_a_group, partial);
  else
    gather_rows<X, Y, kVectors, kAligned>(args, (block - plan.of_chunks) * kWarps, columns,
                                          lanes_a_group, partial);
}

// Blocks that a multiprocessor has registers for: 32 sums a lane, or 64.
template <class X, int kVectors>
constexpr int kResident = kVectors * kWidth<X> <= 8 ? 3 : 2;

// kSharedRows rows a block, which share rows of x where that pays.
template <class X, class Y, int kVectors>
__global__ void __launch_bounds__(kWarps* kWarp, kResident<X, kVectors>)
    spmm_shared_rows(const SpmmArgs args, int words, const Plan plan) {
  static_assert(sizeof(Partials<X, kVectors>) <= kStagedBytes<kVectors>);
  auto& partial = *dynamic_shared<Partials<X, kVectors>>();  // once nothing is staged
  const int64_t tile = blockIdx.x / plan.blocks() * kTileColumns<X, kVectors>;
  const int64_t block = blockIdx.x % plan.blocks();
  const Columns<X, kVectors> columns = columns_of<X, kVectors>(tile, kWarp);
  if (block < plan.of_chunks)
    return add_pieces<X, kVectors, true>(args, block, plan.of_chunks, columns, kWarp, partial);
  const int64_t first_row = (block - plan.of_chunks) * kSharedRows;
  if (add_shared_rows<X, Y, kVectors>(args, first_row, columns, tile, words)) return;
  for (int row = 0; row < kSharedRows; row += kWarps)
    gather_rows<X, Y, kVectors, true>(args, first_row + row, columns, kWarp, partial);
}

template <class X, class Y, int kVectors, bool kAligned>
cudaError_t launch_rows(const SpmmArgs& args, cudaStream_t stream) {
  int lanes_a_group = 1;
  while (lanes_a_group < kWarp && lanes_a_group * kWidth<X> < args.num_columns) lanes_a_group *= 2;
  const int64_t column_tiles = tiles(args.num_columns, kTileColumns<X, kVectors>);
  Plan plan{blocks_of_chunks(args), tiles(args.num_nodes, kWarps)};
  Launches launch(stream);
  bool share = false;
  if constexpr (kAligned) {
    share = args.num_nodes <= kMaxBitmapNodes && lanes_a_group == kWarp;
    if (share) {
      plan.of_rows = tiles(args.num_nodes, kSharedRows);
      const int words = words_of(args.num_nodes);
      launch(spmm_shared_rows<X, Y, kVectors>, plan.blocks() * column_tiles, kWarps * kWarp,
             shared_rows_bytes<kVectors>(words), args, words, plan);
    }
  }
  if (!share)
    launch(spmm_rows<X, Y, kVectors, kAligned>, plan.blocks() * column_tiles, kWarps * kWarp, 0,
           args, lanes_a_group, plan);
  join<Y>(launch, args);
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

size_t spmm_workspace(const SpmmArgs& args) {
  return static_cast<size_t>(kPiecesAChunk * chunks_of(args) * args.num_columns) * sizeof(float);
}

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
