// Rows of very many entries, hubs of the graph: one block would work on such a row long after all
// others are done, so it is taken in pieces, each by a block of its own.
//
// Nobody tells the host which rows are long. But their pieces are as long as a chunk of the
// entries' array, so that piece p of a row that begins in chunk c belongs to chunk c + p: no chunk
// has more than two, the one where a row goes on and the one where another begins.
#pragma once

#include "cuda/spmm_entries.cuh"

namespace nefkern::cuda {
namespace {

constexpr int64_t kPiece = 2048;  // entries; a longer row is long
constexpr int kPiecesAChunk = 2;

struct Piece {
  int64_t row, number;  // the first of a row is its piece 0
  int64_t chunk;
};

__device__ __forceinline__ bool is_long(const Extent& extent) { return extent.size() > kPiece; }

inline int64_t chunks_of(const SpmmArgs& args) {
  return args.nnz > kPiece ? tiles(args.nnz, kPiece) : 0;
}
// Each warp of such a block looks at a chunk; neighbouring chunks are different blocks', since a
// long row has many of them.
inline int64_t blocks_of_chunks(const SpmmArgs& args) { return tiles(chunks_of(args), kWarps); }

// The pieces of a chunk, by a warp; a row of -1 where there is none.
__device__ __forceinline__ void find_pieces(const SpmmArgs& args, int64_t chunk,
                                            Piece (&found)[kPiecesAChunk]) {
  const int64_t begin = chunk * kPiece, end = min(begin + kPiece, args.nnz);
  const int64_t entries[kPiecesAChunk] = {begin, end - 1};
  for (int i = 0; i < kPiecesAChunk; ++i) {
    found[i] = {-1, 0, chunk};
    if (begin >= end) continue;
    const int64_t row =
        range_of(args.num_nodes, entries[i], [&](int64_t i) { return args.row_offsets[i]; });
    const Extent extent = extent_of(args, row);
    const bool other = i == 0 || row != found[0].row;
    if (!is_long(extent) || extent.begin >= end || extent.end <= begin || !other) continue;
    const int64_t number = chunk - extent.begin / kPiece;
    if (number >= 0 && extent.begin + number * kPiece < extent.end) found[i].row = row;
    found[i].number = number;
  }
}

__device__ __forceinline__ Extent extent_of(const Piece& piece, const Extent& row) {
  const int64_t begin = row.begin + piece.number * kPiece;
  return {begin, min(begin + kPiece, row.end)};
}

// Where the sums of a piece are kept: piece 0 apart, since its chunk may have another row's.
__device__ __forceinline__ float* sums_of(const SpmmArgs& args, int64_t chunk, int64_t number) {
  return static_cast<float*>(args.workspace) +
         (kPiecesAChunk * chunk + (number == 0)) * args.num_columns;
}

struct Found {
  Piece piece[kWarps][kPiecesAChunk];
};

// Sums of the pieces of `block`'s chunks; `blocks` look at them all.
template <class X, int kVectors, bool kAligned>
__device__ __forceinline__ void add_pieces(const SpmmArgs& args, int64_t block, int64_t blocks,
                                           const Columns<X, kVectors>& columns, int lanes_a_group,
                                           Partials<X, kVectors>& partial) {
  Found& all = block_shared<Found>();
  const int warp = threadIdx.x / kWarp;
  Piece own[kPiecesAChunk];
  find_pieces(args, block + warp * blocks, own);
  if (lane_id() == 0)
    for (int i = 0; i < kPiecesAChunk; ++i) all.piece[warp][i] = own[i];
  if (!__syncthreads_or(own[0].row >= 0 || own[1].row >= 0)) return;
  for (int i = 0; i < kWarps * kPiecesAChunk; ++i) {
    const Piece piece = all.piece[i / kPiecesAChunk][i % kPiecesAChunk];
    if (piece.row < 0) continue;
    float sum[kVectors][kWidth<X>] = {};
    add_entries_by_block<X, kVectors, kAligned>(args, extent_of(piece, extent_of(args, piece.row)),
                                                columns, lanes_a_group, partial, sum);
    if (warp == 0 && lane_id() < lanes_a_group)
      store_row<X, float, kVectors, false>(args, sums_of(args, piece.chunk, piece.number), columns,
                                           sum);
  }
}

// Adds up the pieces of every long row: a warp a chunk, that of the row's first piece.
template <class Y>
__global__ void __launch_bounds__(kWarps* kWarp) join_pieces(const SpmmArgs args, int64_t chunks) {
  const int64_t chunk = global_warp();
  if (chunk >= chunks) return;
  Piece found[kPiecesAChunk];
  find_pieces(args, chunk, found);
  for (const Piece& piece : found) {
    if (piece.row < 0 || piece.number != 0) continue;
    const Extent row = extent_of(args, piece.row);
    const int64_t pieces = (row.size() + kPiece - 1) / kPiece;
    for (int64_t column = lane_id(); column < args.num_columns; column += kWarp) {
      float sum = 0;
      for (int64_t number = 0; number < pieces; ++number)
        sum += sums_of(args, chunk + number, number)[column];
      row_of_y<Y>(args, piece.row)[column] = from_float<Y>(sum);
    }
  }
}

template <class Y>
void join(Launches& launch, const SpmmArgs& args) {
  launch(join_pieces<Y>, blocks_of_chunks(args), kWarps * kWarp, 0, args, chunks_of(args));
}

}  // namespace
}  // namespace nefkern::cuda
