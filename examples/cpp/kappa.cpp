// nefkern's kernels without PyTorch. On the processor: kappa x of a ring of nodes. On a GPU, where
// CUDA kernels are built and a device is there: neighbours of random points, their graph kernel,
// and kappa x again.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/spmm.h"

#if defined(NEFKERN_HAS_CUDA)
#include <cuda_runtime_api.h>

#include <random>

#include "cuda/kappa.h"
#include "cuda/knn.h"
#include "cuda/spmm.h"
#endif

namespace {

// A ring: every node has its two neighbours with weight 1/2, so that kappa 1 = 1.
bool on_the_processor() {
  constexpr int64_t kNodes = 1000, kColumns = 8;
  std::vector<int64_t> offsets(kNodes + 1);
  std::vector<int32_t> columns;
  for (int64_t i = 0; i < kNodes; ++i) {
    const auto before = static_cast<int32_t>((i + kNodes - 1) % kNodes);
    const auto after = static_cast<int32_t>((i + 1) % kNodes);
    columns.push_back(std::min(before, after));
    columns.push_back(std::max(before, after));
    offsets[i + 1] = static_cast<int64_t>(columns.size());
  }
  const std::vector<float> values(columns.size(), 0.5f), x(kNodes * kColumns, 1.0f);
  std::vector<float> y(x.size());
  const nefkern::cpu::SpmmArgs args{
      .num_nodes = kNodes,
      .num_columns = kColumns,
      .row_offsets = offsets.data(),
      .columns = columns.data(),
      .values = values.data(),
      .x = x.data(),
      .y = y.data(),
      .x_storage = nefkern::cpu::Storage::kFloat32,
      .y_storage = nefkern::cpu::Storage::kFloat32,
  };
  const nefkern::cpu::Isa isa = nefkern::cpu::best_isa();
  bool right = nefkern::cpu::spmm_for(isa)(args);
  for (const float value : y) right = right && value == 1.0f;
  std::printf("processor (%s): kappa 1 of a ring is %s\n", nefkern::cpu::isa_name(isa),
              right ? "1" : "wrong");
  return right;
}

#if defined(NEFKERN_HAS_CUDA)

using namespace nefkern::cuda;

void check(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", step, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory that lives and dies on a stream.
template <class T>
class OnGpu {
 public:
  OnGpu(int64_t count, cudaStream_t stream) : count_(count), stream_(stream) {
    check(cudaMallocAsync(&memory_, count * sizeof(T), stream), "allocation");
  }
  ~OnGpu() { cudaFreeAsync(memory_, stream_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

  T* data() { return static_cast<T*>(memory_); }
  void copy_from(const std::vector<T>& host) {
    check(cudaMemcpyAsync(memory_, host.data(), count_ * sizeof(T), cudaMemcpyDefault, stream_),
          "copy");
  }
  std::vector<T> to_host() {
    std::vector<T> host(count_);
    check(cudaMemcpyAsync(host.data(), memory_, count_ * sizeof(T), cudaMemcpyDefault, stream_),
          "copy");
    check(cudaStreamSynchronize(stream_), "synchronisation");
    return host;
  }

 private:
  int64_t count_;
  cudaStream_t stream_;
  void* memory_ = nullptr;
};

struct Neighbours {
  Neighbours(int64_t n, int64_t k, cudaStream_t stream)
      : k(k), values(n * k, stream), indices(n * k, stream) {}
  NeighbourLists lists(bool weighted) {
    return {.indices = indices.data(),
            .wide_indices = false,
            .size = k,
            .weights = weighted ? values.data() : nullptr,
            .clamp_min = 0};
  }
  int64_t k;
  OnGpu<float> values;
  OnGpu<int32_t> indices;
};

// The k nearest of n points; `points` [n, channels].
void find(OnGpu<float>& points, int64_t n, int64_t channels, bool euclidean, Neighbours& found,
          cudaStream_t stream) {
  const int64_t offsets[] = {0, n};
  KnnArgs args{};
  args.features = points.data();
  args.n = n;
  args.channels = channels;
  args.offsets = offsets;
  args.segments = 1;
  args.k = found.k;
  args.metric =
      euclidean ? nefkern::cuda::KnnMetric::kEuclidean : nefkern::cuda::KnnMetric::kCosine;
  args.values = found.values.data();
  args.indices = found.indices.data();
  OnGpu<char> workspace(static_cast<int64_t>(knn_workspace(args)), stream);
  check(knn(args, workspace.data(), stream), "knn");
}

bool on_a_gpu() {
  constexpr int64_t kNodes = 2000, kChannels = 64, kColumns = 16;
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  bool right = true;
  {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<float> numbers(kNodes * kChannels);
    for (float& number : numbers) number = normal(random);
    OnGpu<float> points(kNodes * kChannels, stream);
    points.copy_from(numbers);
    Neighbours similar(kNodes, 20, stream), near(kNodes, 5, stream);
    find(points, kNodes, kChannels, false, similar, stream);
    find(points, kNodes, kChannels, true, near, stream);

    KappaArgs graph{};
    graph.num_nodes = kNodes;
    graph.features = similar.lists(true);
    graph.pixels = near.lists(false);
    graph.alpha = 0.3f;
    size_t bytes = 0;
    check(kappa_bytes(graph, &bytes), "kappa_bytes");
    OnGpu<char> workspace(static_cast<int64_t>(bytes), stream);
    OnGpu<int64_t> offsets(kNodes + 1, stream);
    graph.workspace = workspace.data();
    graph.row_offsets = offsets.data();
    int64_t nnz = 0;
    check(kappa_count(graph, &nnz, stream), "kappa_count");
    OnGpu<int32_t> columns(nnz, stream);
    OnGpu<float> values(nnz, stream), x(kNodes * kColumns, stream), y(kNodes * kColumns, stream);
    graph.columns = columns.data();
    graph.values = values.data();
    check(kappa_fill(graph, stream), "kappa_fill");

    x.copy_from(std::vector<float>(kNodes * kColumns, 1.0f));
    SpmmArgs product{.num_nodes = kNodes,
                     .num_columns = kColumns,
                     .nnz = nnz,
                     .row_offsets = offsets.data(),
                     .columns = columns.data(),
                     .values = values.data(),
                     .x = x.data(),
                     .x_stride = kColumns,
                     .y = y.data(),
                     .x_storage = Storage::kFloat32,
                     .y_storage = Storage::kFloat32,
                     .workspace = nullptr};
    OnGpu<char> sums(static_cast<int64_t>(spmm_workspace(product)) + 1, stream);
    product.workspace = sums.data();
    check(spmm(product, stream), "spmm");
    const std::vector<int64_t> begin = offsets.to_host();
    const std::vector<float> value = values.to_host(), result = y.to_host();
    for (int64_t i = 0; i < kNodes; ++i) {
      double sum = 0;
      for (int64_t e = begin[i]; e < begin[i + 1]; ++e) sum += value[e];
      right = right && std::fabs(result[i * kColumns] - sum) <= 1e-5 * sum;
    }
    std::printf("GPU: kappa of %lld points has %lld entries; kappa 1 is %s\n",
                static_cast<long long>(kNodes), static_cast<long long>(nnz),
                right ? "the sum of its rows" : "wrong");
  }
  check(cudaStreamDestroy(stream), "stream");
  return right;
}

#endif

}  // namespace

int main() {
  bool right = on_the_processor();
#if defined(NEFKERN_HAS_CUDA)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0)
    right = on_a_gpu() && right;
  else
    std::printf("GPU: none here\n");
#else
  std::printf("GPU: nefkern was built without CUDA kernels\n");
#endif
  return right ? 0 : 1;
}
