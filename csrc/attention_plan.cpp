// Cuts a step's attention into parts for several threads. Knows no instruction set: what a part
// costs is counted in multiply-adds and in KV that must be read.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace duetto {
namespace {

constexpr int64_t kItemsPerThread = 4;    // enough to even out what the estimate gets wrong
constexpr int64_t kRowsPerItem = 192;  // (query, head) pairs that share each widened tile of KV
constexpr int64_t kNumbersPerItem = 192 * 128;  // of theirs, so that they stay in a core's cache
constexpr int64_t kFewestRows = 12;  // below, widening KV costs as much as using it
constexpr int64_t kMostQueriesSplit = 8;  // longer runs of queries are cut into rows, not splits

// Consecutive queries of one request for one KV head, and the positions that they see.
struct Group {
    int32_t request, kv_head, row_begin, row_end;
    int32_t first, end;  // positions
    int64_t cost;
};

int64_t cost_of(const AttentionArgs& args, int64_t queries, int64_t keys) {
    const int64_t group = args.num_heads / args.kv.num_kv_heads, reading = 4;
    return (queries * group + reading) * keys * 2 * args.kv.head_dim / 1024 + 1;
}

Group make_group(const StepView& step, const AttentionArgs& args, int64_t request, int64_t head,
                 int64_t begin, int64_t end) {
    int32_t first = step.positions[begin], last = first;
    for (int64_t row = begin; row < end; ++row) {
        first = std::min(first, step.positions[row]);
        last = std::max(last, step.positions[row]);
    }
    const int32_t seen = args.window > 0 ? std::max(0, first + 1 - args.window) : 0;
    const int64_t keys = (last + 1 - seen) - (last - first) / 2;  // half of their own triangle
    return {(int32_t)request,
            (int32_t)head,
            (int32_t)begin,
            (int32_t)end,
            seen,
            last + 1,
            cost_of(args, end - begin, keys)};
}

// Queries per item: many share KV that is widened once, few keep every thread busy.
int64_t queries_per_item(const StepView& step, const AttentionArgs& args, int64_t num_threads) {
    const int64_t group = args.num_heads / args.kv.num_kv_heads;
    const int64_t wanted = num_threads * kItemsPerThread;
    const int64_t even = step.num_tokens * args.kv.num_kv_heads / wanted;
    const int64_t rows = std::min(kRowsPerItem, kNumbersPerItem / args.kv.head_dim);
    const int64_t fewest = (kFewestRows + group - 1) / group;
    const int64_t most = std::max<int64_t>(1, rows / group);
    return num_threads == 1 ? most : std::min(most, std::max(fewest, even));
}

void append_items(const Group& group, bool cut, const AttentionArgs& args, int32_t& places,
                  std::vector<AttentionItem>& items) {
    const int32_t begin = group.first / kSplit, end = (group.end + kSplit - 1) / kSplit;
    const int32_t queries = group.row_end - group.row_begin;
    auto append = [&](int32_t split_begin, int32_t split_end, int32_t partial, int64_t cost) {
        items.push_back({group.request, group.kv_head, group.row_begin, group.row_end, split_begin,
                         split_end, partial, (int32_t)std::min<int64_t>(cost, INT32_MAX)});
    };
    if (!cut || end - begin == 1) return append(begin, end, -1, group.cost);
    for (int32_t split = begin; split < end; ++split, places += queries) {
        const int32_t from = std::max(group.first, split * kSplit);
        const int32_t to = std::min(group.end, (split + 1) * kSplit);
        append(split, split + 1, places, cost_of(args, queries, to - from));
    }
}

}  // namespace

int64_t plan_attention(const StepView& step, const AttentionArgs& args, int32_t num_threads,
                       AttentionItem* items) {
    const int64_t queries = queries_per_item(step, args, num_threads);
    std::vector<Group> groups;
    int64_t total = 0;
    for (int64_t request = 0; request < step.num_requests; ++request)
        for (int64_t head = 0; head < args.kv.num_kv_heads; ++head)
            for (int64_t row = step.query_starts[request], last = step.query_starts[request + 1];
                 row < last; row += queries) {
                const int64_t end = std::min(row + queries, last);
                groups.push_back(make_group(step, args, request, head, row, end));
                total += groups.back().cost;
            }
    std::stable_sort(groups.begin(), groups.end(),
                     [](const Group& a, const Group& b) { return a.cost > b.cost; });
    std::vector<AttentionItem> planned;
    int32_t places = 0;
    for (const Group& group : groups) {
        // A group that is more than its share of the work is cut at its splits.
        const bool large = num_threads > 1 && group.cost * num_threads * kItemsPerThread > total;
        const bool few = group.row_end - group.row_begin <= kMostQueriesSplit;
        append_items(group, large && few, args, places, planned);
    }
    if (items) std::copy(planned.begin(), planned.end(), items);
    return (int64_t)planned.size();
}

int64_t num_partial_places(const AttentionItem* items, int64_t num_items) {
    int64_t places = 0;
    for (int64_t i = 0; i < num_items; ++i)
        if (items[i].partial >= 0)
            places =
                std::max<int64_t>(places, items[i].partial + items[i].row_end - items[i].row_begin);
    return places;
}

}  // namespace duetto
