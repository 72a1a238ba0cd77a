// Measures the sizes of the expert kernels on a GPU and keeps those that beat
// what is built in. README.md tells how to use it.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "engine/moe_kernel_file.h"
#include "ops/moe/moe.h"
#include "tests/bench/bench.h"
#include "tests/bench/moe_inputs.h"
#include "tools/tune/moe_kernel_header.h"

namespace tenon {
namespace {

// A choice has to be this much faster than the one built in, twice.
constexpr double kGain = 0.98;
// One whose estimate is this much slower is not measured.
constexpr double kHopeless = 1.15;

struct Flags {
  std::string out;      // JSON
  std::string header;   // ops/moe/moe_kernel_table.h
  std::string in;       // JSON, instead of measuring
  std::string seconds;  // after which nothing more is measured
};

[[noreturn]] void Exit(int code, const std::string& message) {
  std::fprintf(stderr, "tune: %s\n", message.c_str());
  std::exit(code);
}

std::string Describe(const MoeWgmmaTile& tile) {
  return StrCat(tile.token_tile, "x", tile.row_warpgroups, "x",
                tile.blocks_per_sm);
}

std::vector<MoeKernelRow>& RowsOf(MoeKernelFile* file, DType weights) {
  switch (weights) {
    case DType::kFloat32:
      return file->float32;
    case DType::kFloat8E4M3:
      return file->float8;
    default:
      return file->float16;
  }
}

// Finds the best sizes for one shape, dtype and number of tokens.
class Search {
 public:
  Search(bench::Bench* b, MoeGpu gpu, const testing::ModelShape& shape,
         const bench::MoeFormat& format, int64_t tokens,
         const std::vector<bench::MoeWeights>& layers)
      : b_(*b), tensors_(b->device()), format_(format) {
    calls_ = bench::MakeMoeCalls(b_, &tensors_, shape, tokens,
                                 bench::Routing::kUniform, format, layers);
    what_.tokens = tokens;
    bench::CountMoe(shape, format, calls_.experts, &what_);
    result_.slots_per_expert =
        static_cast<double>(tokens * shape.top_k) / shape.num_experts;
    base_ = ChooseMoeKernel(gpu, nullptr,
                            {format.dtype, shape.hidden, shape.intermediate,
                             result_.slots_per_expert});
  }

  MoeMeasurement Run() {
    const double base_us = Time("built in", base_);
    MoeKernelConfig best = base_;
    double best_us = base_us;
    const auto consider = [&](const MoeKernelConfig& config) {
      if (config == base_ || Estimate(config) > kHopeless * base_us) return;
      const double us = Time("candidate", config);
      if (us < best_us) {
        best_us = us;
        best = config;
      }
    };
    if (UsesWgmma()) {
      for (const MoeWgmmaTile& tile : kMoeWgmmaTiles) {
        MoeKernelConfig config = base_;
        config.gate_up = tile;
        consider(config);
      }
      const MoeKernelConfig with_gate_up = best;
      for (const MoeWgmmaTile& tile : kMoeWgmmaTiles) {
        MoeKernelConfig config = with_gate_up;
        if (config.down == tile) continue;
        config.down = tile;
        consider(config);
      }
    } else {
      for (int32_t rows : kMoeMmaTileRows) {
        if (!HasMoeMmaTile(format_.dtype, rows)) continue;
        MoeKernelConfig config = base_;
        config.mma_tile_rows = rows;
        consider(config);
      }
    }
    if (Confirmed(best, best_us, base_us)) result_.better = best;
    return result_;
  }

 private:
  // As the backend chooses for tensors like these.
  bool UsesWgmma() const {
    return b_.info().compute_capability == 90 &&
           format_.dtype != DType::kFloat32;
  }

  // Measured again, one right after the other.
  bool Confirmed(const MoeKernelConfig& best, double best_us, double base_us) {
    if (best_us >= kGain * base_us) return false;
    const double base_again = Time("built in, again", base_);
    return Time("best, again", best) < kGain * base_again;
  }

  double Time(const char* name, const MoeKernelConfig& config) {
    what_.op = name;
    what_.note = UsesWgmma() ? StrCat("gate_up ", Describe(config.gate_up),
                                      ", down ", Describe(config.down))
                             : StrCat("tiles of ", config.mma_tile_rows);
    WithTable(config, [&](const std::function<Status(int)>& call) {
      b_.Run(what_, calls_.num_sets(), call);
    });
    return b_.measurements().back().microseconds;
  }

  double Estimate(const MoeKernelConfig& config) {
    double us = 0.0;
    WithTable(config, [&](const std::function<Status(int)>& call) {
      us = b_.Estimate(calls_.num_sets(), call);
    });
    return us;
  }

  // Has run(call) call the layer with these sizes, and looks at its results.
  template <class Run>
  void WithTable(const MoeKernelConfig& config, const Run& run) {
    MoeKernelRow row;  // for calls of any size
    row.config = config;
    MoeKernelFile file;
    RowsOf(&file, format_.dtype) = {row};
    const MoeKernelTable table = file.table();
    for (auto& set : calls_.sets) set.moe.kernels = &table;
    run([&](int i) { return Moe(calls_.sets[i].moe, b_.stream()); });
    CheckBits(config);
  }

  // No choice may change a result.
  void CheckBits(const MoeKernelConfig& config) {
    const TensorView& out = calls_.sets[0].moe.out;
    std::vector<char> bytes(static_cast<size_t>(NumElements(out)) *
                            DTypeSize(out.dtype));
    bench::CheckOk(CopyMemory(bytes.data(), Device(), out.data, out.device,
                              bytes.size(), Stream()));
    bench::CheckOk(Synchronize(out.device, Stream()));
    if (bits_.empty()) bits_ = bytes;
    if (bits_ == bytes) return;
    Exit(1, StrCat(what_.shape, ", ", what_.tokens, " tokens: gate_up ",
                   Describe(config.gate_up), ", down ", Describe(config.down),
                   ", tiles of ", config.mma_tile_rows,
                   " give other bits than the sizes built in"));
  }

  bench::Bench& b_;
  bench::Tensors tensors_;
  bench::MoeFormat format_;
  bench::MoeCalls calls_;
  bench::Case what_;
  MoeKernelConfig base_;
  MoeMeasurement result_;
  std::vector<char> bits_;  // of the first set's result
};

std::string Today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::strftime(text, sizeof(text), "%Y-%m-%d", std::gmtime(&now));
  return text;
}

// Measures one shape after the other, and tells in the file's source how far it
// came before the time was over.
class Measurer {
 public:
  Measurer(bench::Bench* b, MoeGpu gpu, double seconds)
      : b_(*b), gpu_(gpu), end_(bench::Seconds() + seconds) {
    tokens_ = b->Tokens(
        {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384}, {});
    std::sort(tokens_.begin(), tokens_.end());
    file_.device = b->info().name;
    file_.source = "tools/tune, " + Today() + ":";
  }

  MoeKernelFile Run() {
    for (DType dtype : b_.DTypes({DType::kBFloat16, DType::kFloat8E4M3})) {
      for (const testing::ModelShape& shape : b_.Shapes()) {
        bench::MoeFormat format;
        format.dtype = dtype;
        Measure(shape, format);
      }
    }
    const Status status = CheckMoeKernelTable("measured", file_.table());
    if (!status.ok()) Exit(1, status.message());
    return file_;
  }

 private:
  bool TimeIsOver() const { return bench::Seconds() > end_; }

  void Measure(const testing::ModelShape& shape,
               const bench::MoeFormat& format) {
    const std::string name = StrCat(shape.name, " ", DTypeName(format.dtype));
    if (TimeIsOver()) return LeftOut(name);
    bench::Tensors tensors(b_.device());
    std::vector<bench::MoeWeights> layers(
        b_.NumSets(bench::MoeExpertBytes(shape, format) * shape.top_k));
    for (bench::MoeWeights& layer : layers) {
      layer = bench::MakeMoeWeights(&tensors, shape, format);
    }
    std::vector<MoeMeasurement> measured;
    int64_t last = 0;
    for (int64_t tokens : tokens_) {
      if (TimeIsOver()) {
        LeftOut(StrCat(name, " from ", tokens, " tokens on"));
        break;
      }
      measured.push_back(
          Search(&b_, gpu_, shape, format, tokens, layers).Run());
      last = tokens;
    }
    if (measured.empty()) return;
    std::vector<MoeKernelRow>& rows = RowsOf(&file_, format.dtype);
    rows = MergeMoeKernelRows(
        rows, MoeKernelRowsFrom(gpu_, format.dtype, shape.hidden,
                                shape.intermediate, measured));
    file_.source += StrCat(separator_, name);
    if (last != tokens_.back()) {
      file_.source += StrCat(" up to ", last, " tokens");
    }
    separator_ = ", ";
  }

  static void LeftOut(const std::string& what) {
    std::fprintf(stderr, "tune: no time for %s\n", what.c_str());
  }

  bench::Bench& b_;
  MoeGpu gpu_;
  double end_;
  std::vector<int64_t> tokens_;
  MoeKernelFile file_;
  const char* separator_ = " ";
};

void Write(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  file.close();
  if (!file) Exit(1, "cannot write " + path);
}

// The GPU whose table in the header measurements of this device are for.
MoeGpu GpuOf(const std::string& device) {
  const MoeKernelTables tables = BuiltInMoeKernelTables();
  if (device == tables.h100.device) return MoeGpu::kH100;
  if (device == tables.h200.device) return MoeGpu::kH200;
  Exit(1, "the header has no table for " + device);
}

void Save(const MoeKernelFile& file, const Flags& flags) {
  if (!flags.out.empty()) Write(flags.out, FormatMoeKernelFile(file));
  if (flags.header.empty()) return;
  MoeKernelTables tables = BuiltInMoeKernelTables();
  MergeMoeKernelFile(file, &tables.Of(GpuOf(file.device)));
  Write(flags.header, FormatMoeKernelHeader(tables));
}

// --in FILE --header FILE [--out FILE] and nothing else.
bool ConvertsOnly(int argc, char** argv, Flags* flags) {
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--in") == 0) flags->in = argv[i + 1];
    if (std::strcmp(argv[i], "--header") == 0) flags->header = argv[i + 1];
    if (std::strcmp(argv[i], "--out") == 0) flags->out = argv[i + 1];
  }
  return !flags->in.empty();
}

int Main(int argc, char** argv) {
  Flags flags;
  if (ConvertsOnly(argc, argv, &flags)) {
    const StatusOr<MoeKernelFile> file = ReadMoeKernelFile(flags.in);
    if (!file.ok()) Exit(1, file.status().message());
    Save(*file, flags);
    return 0;
  }
  bench::Options options;
  options.limit = true;
  options.fp8 = true;
  options.flags = {{"--out", &flags.out},
                   {"--header", &flags.header},
                   {"--seconds", &flags.seconds}};
  bench::Bench b(argc, argv, "tune", options);
  if (!b.cuda()) Exit(2, "needs a CUDA device");
  if (!flags.header.empty()) GpuOf(b.info().name);  // before any measurement
  const double seconds =
      flags.seconds.empty() ? 1e9 : std::atof(flags.seconds.c_str());
  if (!(seconds > 0.0)) Exit(2, "--seconds: not positive: " + flags.seconds);
  const MoeGpu gpu = MoeGpuOf(b.info().compute_capability, b.memory_bus_bits());
  const MoeKernelFile file = Measurer(&b, gpu, seconds).Run();
  Save(file, flags);
  if (flags.out.empty()) std::fputs(FormatMoeKernelFile(file).c_str(), stdout);
  return b.Finish();
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) { return tenon::Main(argc, argv); }
