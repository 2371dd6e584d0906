#include "attention.h"

#include <algorithm>

#include "table.h"

namespace {

constexpr int64_t TILE_ROWS = 48;
constexpr int64_t SHARES = 4;  // of a thread: what takes a larger part of all work than one of them is cut into splits

int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Keys [low, high) that `tokens` tokens from `position` on see, one or another.
struct Seen {
  int64_t low, high;
};

Seen seen(int64_t position, int64_t tokens, int64_t window) {
  return {window ? std::max<int64_t>(0, position - window + 1) : 0, position + tokens};
}

int64_t cost(Seen keys, int64_t rows) { return (keys.high - keys.low + 16) * (rows + 4); }

// Calls fn(row, token, tokens, keys) for every tile.
template <class Fn> void each_tile(const AttentionShape& shape, const AttentionRows& rows, int64_t most, Fn fn) {
  for (int64_t r = 0; r < rows.rows; r++)
    for (int64_t token = rows.offset[r]; token < rows.offset[r + 1]; token += most) {
      const int64_t tokens = std::min<int64_t>(most, rows.offset[r + 1] - token);
      fn(r, token, tokens, seen(rows.start[r] + token - rows.offset[r], tokens, shape.window));
    }
}

}  // namespace

int64_t plan_attention(const AttentionShape& shape, const AttentionRows& rows, AttentionPlan& plan, void* memory) {
  const int64_t group = shape.heads / shape.kv_heads, most = std::max<int64_t>(1, TILE_ROWS / group);
  plan.shape = shape, plan.rows = rows;
  plan.tile = most * group;
  const int64_t values = (shape.value_size + 15) / 16 * 16, keys = (shape.key_size + 15) / 16 * 16;
  plan.width = values + 16;
  int64_t all = 0;
  each_tile(shape, rows, most, [&](int64_t, int64_t, int64_t tokens, Seen keys) { all += cost(keys, tokens * group); });
  const int64_t share = shape.threads > 1 ? all * shape.kv_heads / (shape.threads * SHARES) : INT64_MAX;
  int64_t count = 0, merges = 0, floats = 0;
  AttentionTask* tasks = nullptr;
  AttentionMerge* merge = nullptr;
  const auto cut = [&](int64_t row, int64_t token, int64_t tokens, Seen keys) {
    const int64_t low = keys.low / SPLIT, high = (keys.high - 1) / SPLIT + 1;
    AttentionTask task{int32_t(row), int32_t(token), int32_t(tokens), int32_t(low), int32_t(high), 0, -1};
    if (high - low == 1 || cost(keys, tokens * group) <= share) {
      if (tasks) tasks[count] = task;
      count++;
      return;
    }
    const int64_t part = tokens * shape.heads * plan.width;
    if (merge) merge[merges] = {task.row, task.token, task.tokens, task.low, task.high, 0, floats};
    merges++;
    for (int64_t split = low; split < high; split++, floats += part) {
      task.low = int32_t(split), task.high = int32_t(split + 1), task.part = floats;
      if (tasks) tasks[count] = task;
      count++;
    }
  };
  each_tile(shape, rows, most, cut);
  // Queries, a span of keys or values, scores, two partial results, sixteen keys, and a row of zeros.
  plan.thread_bytes = lines(plan.tile * keys * 4) + std::max(keys, values) * 64 * 4 + lines(plan.tile * (SPLIT + 16) * 4) +
                      2 * lines(plan.tile * plan.width * 4) + keys * 16 * 4 + lines(values * 4);
  const int64_t sizes[] = {lines(count * int64_t(sizeof(AttentionTask))), lines(merges * int64_t(sizeof(AttentionMerge))),
                           lines(floats * 4)};
  const int64_t bytes = sizes[0] + sizes[1] + sizes[2] + shape.threads * plan.thread_bytes;
  if (!memory) return bytes;
  char* at = static_cast<char*>(memory);
  plan.tasks = tasks = reinterpret_cast<AttentionTask*>(at);
  plan.merges = merge = reinterpret_cast<AttentionMerge*>(at + sizes[0]);
  plan.parts = reinterpret_cast<float*>(at + sizes[0] + sizes[1]);
  plan.scratch = at + sizes[0] + sizes[1] + sizes[2];
  count = merges = floats = 0;
  each_tile(shape, rows, most, cut);
  plan.count = count, plan.merge_count = merges;
  const auto work = [&](const AttentionTask& task) {
    const int64_t position = rows.start[task.row] + task.token - rows.offset[task.row];
    const Seen keys = seen(position, task.tokens, shape.window);
    const Seen own{std::max(keys.low, task.low * SPLIT), std::min(keys.high, task.high * SPLIT)};
    return cost(own, task.tokens * group);
  };
  std::sort(tasks, tasks + count, [&](const AttentionTask& a, const AttentionTask& b) {
    const int64_t x = work(a), y = work(b);
    return x != y ? x > y : a.token != b.token ? a.token < b.token : a.low < b.low;
  });
  return bytes;
}

extern "C" {

// Returns how many bytes a plan takes, and puts it into `memory`, 64-byte aligned, unless that is null.
int64_t pagefork_attention_plan(const AttentionShape* shape, const AttentionRows* rows, void* memory) {
  AttentionPlan plan;
  const int64_t own = lines(sizeof(AttentionPlan));
  const int64_t bytes = own + plan_attention(*shape, *rows, plan, memory ? static_cast<char*>(memory) + own : nullptr);
  if (memory) *static_cast<AttentionPlan*>(memory) = plan;
  return bytes;
}

void pagefork_attention(const AttentionPlan* plan, const AttentionLayer* layer, int32_t dtype, int32_t threads) {
  kernels().attention.attention(*plan, *layer, dtype, threads);
}
}
