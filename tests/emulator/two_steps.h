// Calls the two steps of an assembly as csrc/ops/cuda does.
#pragma once

#include "cuda/runtime.h"
#include "driver.h"

namespace nefkern::emulator {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw Failure("a launcher returned an error");
}

// Args has workspace, row_offsets, columns and values; `valid` comes out as int32 [1].
template <class Args, class Bytes, class Count, class Fill>
void assemble(Case& one, Args args, const Bytes& bytes_of, const Count& count, const Fill& fill) {
  size_t bytes = 0;
  check(bytes_of(args, &bytes));
  args.workspace = one.workspace<char>(bytes);
  args.row_offsets = one.output<int64_t>("row_offsets", args.num_nodes + 1);
  int64_t nnz = 0;
  check(count(args, &nnz, nullptr));
  *one.output<int32_t>("valid", 1) = nnz >= 0;
  args.columns = one.output<int32_t>("columns", nnz > 0 ? nnz : 0);
  args.values = one.output<float>("values", nnz > 0 ? nnz : 0);
  if (nnz >= 0) check(fill(args, nullptr));
}

// The same with `room` for entries, and nothing that the host reads between the steps.
template <class Args, class Bytes, class Count, class Fill>
void assemble_padded(Case& one, Args args, int64_t room, const Bytes& bytes_of, const Count& count,
                     const Fill& fill) {
  size_t bytes = 0;
  check(bytes_of(args, &bytes));
  args.workspace = one.workspace<char>(bytes);
  args.row_offsets = one.output<int64_t>("row_offsets", args.num_nodes + 1);
  *one.output<int32_t>("valid", 1) = 1;
  args.columns = one.output<int32_t>("columns", room);
  args.values = one.output<float>("values", room);
  check(count(args, nullptr, nullptr));
  check(fill(args, nullptr));
}

}  // namespace nefkern::emulator
