// How one step's attention is cut, and whose partial results are joined: the same for all operations
// with as many heads and the same window.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace duetto {

struct AttentionOrder {
    int32_t num_heads, num_kv_heads, head_dim, window;

    struct Group {  // items whose partial results are joined, one after the other in `items`
        int32_t first, size;
    };
    std::vector<AttentionItem> items;  // the longest first
    std::vector<int32_t> group_of;  // of each item; -1: it writes its output itself
    std::vector<Group> groups;
    // How many items of each group have been done, counted through all layers of the step.
    std::unique_ptr<std::atomic<int32_t>[]> done;

    // Cuts a step. Returns how many places partial results need.
    int64_t cut(const StepView& step, const AttentionArgs& args, int32_t num_threads);

private:
    void find_groups();
};

}  // namespace duetto
