// Every number of a step is looked at before any thread starts: bad input must not become a write into
// another request's KV.
#include <string>

#include "plan.h"
#include "refuse.h"

namespace duetto {

using std::to_string;

void Plan::check_step(const StepInput& input, const KvArena* kv) const {
    const StepView& view = input.view;
    require(view.num_tokens >= 1, "an empty step");
    require(view.query_starts[0] == 0 && view.query_starts[view.num_requests] == view.num_tokens,
            "query_starts must begin with 0 and end with the number of tokens");
    for (int64_t r = 0; r < view.num_requests; ++r)
        require(view.query_starts[r] <= view.query_starts[r + 1], "query_starts must not fall");
    for (int64_t t = 0; t < view.num_tokens; ++t)
        if (input.token_ids[t] < 0 || input.token_ids[t] >= smallest_vocabulary_)
            refuse("token_ids[" + to_string(t) + "] is " + to_string(input.token_ids[t]) +
                   ": must be at least 0 and below " + to_string(smallest_vocabulary_));
    for (int64_t i = 0, before = -1; i < input.num_logit_rows; before = input.logit_rows[i++])
        if (input.logit_rows[i] <= before || input.logit_rows[i] >= view.num_tokens)
            refuse("logit_rows[" + to_string(i) + "] is " + to_string(input.logit_rows[i]) +
                   ": rows must rise, and be below " + to_string(view.num_tokens));
    for (int64_t t = 0; t < view.num_tokens; ++t)
        if (view.positions[t] < 0) refuse("positions[" + to_string(t) + "] is negative");
    if (!uses_kv_) return;
    require(kv != nullptr, "this plan needs a KV arena");
    check_kv(input, kv);
}

void Plan::check_kv(const StepInput& input, const KvArena* kv) const {
    if (&kv->kernels() != &kernels_)
        refuse(std::string("the KV arena was made for ") + kv->kernels().name +
               ", this plan is for " + kernels_.name);
    const auto layer_of = [&](int64_t layer) -> const KvLayer& {
        if (layer >= static_cast<int64_t>(kv->layers().size()))
            refuse("the KV arena has no layer " + to_string(layer));
        return kv->layers()[layer];
    };
    for (const Op& op : ops_) {
        if (const auto* write = std::get_if<WriteKv>(&op.what)) {
            const KvLayer& layer = layer_of(write->layer);
            same_width("write_kv", "k", write->k.width,
                       int64_t{layer.num_kv_heads} * layer.head_dim);
        } else if (const auto* attention = std::get_if<Attention>(&op.what)) {
            const KvLayer& layer = layer_of(attention->layer);
            if (layer.num_kv_heads != attention->num_kv_heads ||
                layer.head_dim != attention->head_dim)
                refuse("attention: layer " + to_string(attention->layer) + " of the KV arena has " +
                       to_string(layer.num_kv_heads) + " heads of " + to_string(layer.head_dim));
        }
    }
    const StepView& view = input.view;
    for (int64_t t = 0; t < view.num_tokens; ++t)
        if (view.slots[t] < 0 || view.slots[t] >= kv->num_blocks() * kv->block_size())
            refuse("slots[" + to_string(t) + "] is " + to_string(view.slots[t]) + ": there are " +
                   to_string(kv->num_blocks() * kv->block_size()));
    for (int64_t r = 0; r < view.num_requests; ++r) {
        const int64_t length = view.context_lens[r];
        const int64_t num_blocks = (length + kv->block_size() - 1) / kv->block_size();
        if (length < 0 || num_blocks > view.max_blocks)
            refuse("context_lens[" + to_string(r) + "] is " + to_string(length) +
                   ": its block table has room for " +
                   to_string(view.max_blocks * kv->block_size()));
        for (int64_t t = view.query_starts[r]; t < view.query_starts[r + 1]; ++t)
            if (view.positions[t] >= length)
                refuse("positions[" + to_string(t) + "] is " + to_string(view.positions[t]) +
                       ": beyond its request's context_lens, " + to_string(length));
        const int32_t* blocks = view.block_tables + r * view.max_blocks;
        for (int64_t b = 0; b < num_blocks; ++b)
            if (blocks[b] < 0 || blocks[b] >= kv->num_blocks())
                refuse("block_tables[" + to_string(r) + ", " + to_string(b) + "] is " +
                       to_string(blocks[b]) + ": there are " + to_string(kv->num_blocks()));
    }
}

}  // namespace duetto
