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
    require(input.num_ops >= 0, "num_ops must be at least 0");
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
    check_looks(input);
    if (!uses_kv_) return;
    require(kv != nullptr, "this plan needs a KV arena");
    check_kv(input, kv);
}

void Plan::check_looks(const StepInput& input) const {
    if (input.num_looks == 0) return;
    for (int64_t i = 0; i < input.num_looks; ++i) {
        const auto& [first, last, begin, end] = input.looks[i];
        if (first < 0 || first > last || last > input.view.num_requests)
            refuse("looks[" + to_string(i) + "] is of requests " + to_string(first) + " to " +
                   to_string(last) + ": there are " + to_string(input.view.num_requests));
        if (begin < 0 || begin > end)
            refuse("looks[" + to_string(i) + "] is at positions " + to_string(begin) + " to " +
                   to_string(end) + ": must be at least 0, and not fall");
    }
    for (const Op& op : ops_)  // who looks reads queries while others write what attention gives
        if (const auto* attention = std::get_if<Attention>(&op.what))
            require(attention->q.buffer != attention->out.buffer,
                    "looks: attention's q and out must be different buffers");
}

void Plan::check_kv(const StepInput& input, const KvArena* kv) const {
    if (&kv->kernels() != &kernels_)
        refuse(std::string("the KV arena was made for ") + kv->kernels().name +
               ", this plan is for " + kernels_.name);
    for (const Op& op : ops_) {
        if (const auto* write = std::get_if<WriteKv>(&op.what)) {
            const KvLayer& layer = kv->layer(write->layer);
            same_width("write_kv", "k", write->k.width,
                       int64_t{layer.num_kv_heads} * layer.head_dim);
        } else if (const auto* attention = std::get_if<Attention>(&op.what)) {
            const KvLayer& layer = kv->layer(attention->layer);
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
