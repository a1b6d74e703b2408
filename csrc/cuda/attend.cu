#include "attend_kernels.cuh"
#include "launch.h"
#include "tuning.h"

namespace lkv::cuda {
namespace {

constexpr int kProductionBlock = 128;
constexpr int64_t kPieceRows = 256;  // below which a piece costs more than it saves
constexpr int64_t kUnits = 1024;     // enough to fill any device, as the plan must not depend on it

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int block_of(const Tuning& tuning) {
  return with_block<kProductionBlock>(tuning, [&]<int kBlock> { return kBlock; });
}

int64_t segments(const AttendParams& p) {
  return p.batch * p.heads;
}

AttendPlan make_plan(const AttendParams& p, void* scratch, const Tuning& tuning) {
  const int64_t tiles = divide_up(p.group * p.queries, kQueries), slices = divide_up(p.dim_v, kSlice);
  const int64_t most = std::max<int64_t>(1, kUnits / std::max<int64_t>(1, segments(p) * tiles * slices));
  const int64_t rows =
      tuning.pieces > 0 ? divide_up(p.longest, tuning.pieces) : std::max(kPieceRows, divide_up(p.longest, most));
  const int64_t piece_rows = std::max<int64_t>(1, divide_up(rows, block_of(tuning))) * block_of(tuning);
  const int64_t pieces = std::max<int64_t>(1, divide_up(p.longest, piece_rows));
  return {tiles, slices, pieces, piece_rows, static_cast<AttendPartial*>(scratch)};
}

template <ScoreType type, int kBlock, bool kMixed>
Status run(const AttendParams& p, const AttendPlan& plan, Stream stream) {
  constexpr size_t shared = sizeof(AttendShared<type, kBlock>);
  static_assert(shared <= kDefaultShared);
  const int64_t units = plan.unit(segments(p), 0, 0, 0), outputs = segments(p) * p.group * p.queries * plan.slices;
  if (std::max(units, outputs) > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const Grid grid = {.blocks = units, .block = kBlock, .shared = shared};
  const Status status = launch(attend_kernel<type, kBlock, kMixed>, grid, stream, p, plan);
  if (status != cudaSuccess || plan.pieces == 1) return status;
  const Grid merge = {.blocks = outputs, .block = kBlock};
  return with_type(p.type,
                   [&]<ScoreType out> { return launch(attend_merge_kernel<out, kBlock>, merge, stream, p, plan); });
}

}  // namespace

size_t attend_scratch(const AttendParams& p, const Tuning& tuning) {
  const AttendPlan plan = make_plan(p, nullptr, tuning);
  return plan.pieces == 1 ? 0 : plan.unit(segments(p), 0, 0, 0) * sizeof(AttendPartial);
}

size_t attend_scratch(const AttendParams& p) {
  return attend_scratch(p, {});
}

Status attend(const AttendParams& p, void* scratch, Stream stream, const Tuning& tuning) {
  const AttendPlan plan = make_plan(p, scratch, tuning);
  return with_block<kProductionBlock>(tuning, [&]<int kBlock> {
    if (p.k_type != p.type || p.v_type != p.type) return run<ScoreType::f32, kBlock, true>(p, plan, stream);
    return with_type(p.type, [&]<ScoreType type> { return run<type, kBlock, false>(p, plan, stream); });
  });
}

Status attend(const AttendParams& p, void* scratch, Stream stream) {
  return attend(p, scratch, stream, {});
}

}  // namespace lkv::cuda
