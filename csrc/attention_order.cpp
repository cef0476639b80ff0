#include "attention_order.h"

namespace duetto {

int64_t AttentionOrder::cut(const StepView& step, const AttentionArgs& args, int32_t num_threads) {
    items.resize(plan_attention(step, args, num_threads, nullptr));
    plan_attention(step, args, num_threads, items.data());
    find_groups();
    return num_partial_places(items.data(), static_cast<int64_t>(items.size()));
}

void AttentionOrder::find_groups() {
    groups.clear();
    group_of.assign(items.size(), -1);
    for (size_t i = 0; i < items.size(); ++i) {
        const AttentionItem& item = items[i];
        if (item.partial < 0) continue;
        const bool joins_last =
            i > 0 && group_of[i - 1] >= 0 && items[i - 1].request == item.request &&
            items[i - 1].kv_head == item.kv_head && items[i - 1].row_begin == item.row_begin;
        if (joins_last)
            ++groups.back().size;
        else
            groups.push_back({static_cast<int32_t>(i), 1});
        group_of[i] = static_cast<int32_t>(groups.size()) - 1;
    }
    done = std::make_unique<std::atomic<int32_t>[]>(groups.size());
}

}  // namespace duetto
