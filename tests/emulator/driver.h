// The main program of an emulated test: arrays in from files, kernels in every thread order, arrays
// out. Called as `program case folder [name=number ...]`; see emulated.py, the other end.
#pragma once

#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace nefkern::emulator {

class Case {
 public:
  Case(std::string folder, std::map<std::string, double> numbers)
      : folder_(std::move(folder)), numbers_(std::move(numbers)) {}
  ~Case() {
    if (nefkern_race_forget) nefkern_race_forget(false);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  double real(const std::string& name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) throw std::invalid_argument("no number " + name);
    return found->second;
  }
  int64_t number(const std::string& name) const { return static_cast<int64_t>(real(name)); }

  // The array in <name>.in, or null if there is none; `shift` elements off the aligned address.
  template <class T>
  const T* input(const std::string& name, size_t shift = 0) {
    std::ifstream file(folder_ + "/" + name + ".in", std::ios::binary);
    if (!file) return nullptr;
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    T* memory = allocate<T>(bytes.size() / sizeof(T) + shift) + shift;
    if (!bytes.empty()) std::memcpy(memory, bytes.data(), bytes.size());
    return memory;
  }

  // Uninitialised memory of `count` elements.
  template <class T>
  T* workspace(size_t count) {
    return allocate<T>(count);
  }

  // The same, written to <name>.out at the end.
  template <class T>
  T* output(const std::string& name, size_t count, size_t shift = 0) {
    T* memory = allocate<T>(count + shift) + shift;
    outputs_.push_back({name, reinterpret_cast<const char*>(memory), count * sizeof(T)});
    return memory;
  }

  std::map<std::string, std::string> results() const {
    std::map<std::string, std::string> found;
    for (const Output& one : outputs_) found[one.name] = std::string(one.memory, one.bytes);
    return found;
  }

 private:
  struct Output {
    std::string name;
    const char* memory;
    size_t bytes;
  };

  // Exactly as long as asked for, so that AddressSanitizer sees both ends; poisoned.
  template <class T>
  T* allocate(size_t count) {
    constexpr size_t kAlignment = 256;  // as cudaMalloc
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, count * sizeof(T))) throw std::bad_alloc();
    std::memset(memory, 0xff, count * sizeof(T));
    memories_.emplace_back(memory, &std::free);
    if (nefkern_race_track)
      nefkern_race_track(memory, count * sizeof(T), std::min<size_t>(sizeof(T), 4), false);
    return static_cast<T*>(memory);
  }

  std::string folder_;
  std::map<std::string, double> numbers_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memories_;
  std::vector<Output> outputs_;
};

using Cases = std::map<std::string, void (*)(Case&)>;

// Runs the case named on the command line in one order after another; all must agree bit for bit.
inline int run_cases(int argc, char** argv, const Cases& cases) {
  struct Run {
    const char* name;
    Settings settings;
  };
  std::vector<Run> runs{{"forward", {Order::kForward, 1}},
                        {"reverse", {Order::kReverse, 1}},
                        {"random", {Order::kRandom, 1}},
                        {"random", {Order::kRandom, 2}}};
  if (argc < 3 || !cases.count(argv[1])) return std::fprintf(stderr, "no such case\n"), 2;
  std::map<std::string, double> numbers;
  for (int i = 3; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals), value = argument.substr(equals + 1);
    if (name == "order")
      std::erase_if(runs, [&](const Run& run) { return run.name != value; });
    else
      numbers[name] = std::stod(value);
  }
  std::map<std::string, std::string> first;
  for (const Run& run : runs) try {
      settings() = run.settings;
      Case one(argv[2], numbers);
      cases.at(argv[1])(one);
      const auto results = one.results();
      if (&run == &runs.front()) first = results;
      for (const auto& [name, bytes] : results)
        if (bytes != first[name]) throw Failure(name + " depends on the order of threads");
    } catch (const Failure& failure) {
      return std::fprintf(stderr, "FAILURE (%s order): %s\n", run.name, failure.what()), 1;
    }
  for (const auto& [name, bytes] : first)
    std::ofstream(std::string(argv[2]) + "/" + name + ".out", std::ios::binary) << bytes;
  return 0;
}

}  // namespace nefkern::emulator
