#include "plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "refuse.h"
#include "walk.h"

namespace duetto {

namespace {

using std::to_string;

constexpr int64_t kMostColumns = int64_t{1} << 31;

}  // namespace

// -- building -----------------------------------------------------------------------------------------

int64_t Plan::buffer(int64_t width) {
    if (width < 1 || width > kMostColumns) refuse("a buffer of " + to_string(width) + " columns");
    buffers_.push_back({.width = width, .memory = nullptr});
    return static_cast<int64_t>(buffers_.size()) - 1;
}

void Plan::check(const char* name, const Ref& ref) const {
    if (ref.buffer < 0 || ref.buffer >= static_cast<int64_t>(buffers_.size()))
        refuse(std::string(name) + ": there is no buffer " + to_string(ref.buffer));
    const int64_t width = buffers_[ref.buffer].width;
    if (ref.start < 0 || ref.width < 1 || ref.start > width || ref.width > width - ref.start)
        refuse(std::string(name) + ": columns " + to_string(ref.start) + " and " +
               to_string(ref.width) + " wide are not in a buffer of " + to_string(width));
}

void Plan::use(const char* name, const Ref& ref) {
    check(name, ref);
    if (!selected_) buffers_[ref.buffer].all_rows = true;
}

int64_t Plan::append(Op op) {
    ops_.push_back(std::move(op));
    return num_ops() - 1;
}

int64_t Plan::rope_spec(std::vector<float> inv_freq, double scale) {
    require(!inv_freq.empty(), "rope_spec: no frequencies");
    ropes_.push_back({std::move(inv_freq), scale, {}, {}});
    return static_cast<int64_t>(ropes_.size()) - 1;
}

int64_t Plan::embed(Ref out, const PackedWeight& weight, float scale, int64_t first,
                    int64_t vocabulary) {
    require(!selected_, "embed: comes before select_rows");
    use("embed: out", out);
    same_width("embed", "out", out.width, weight.k);
    require(first >= 0 && first <= vocabulary && weight.n <= vocabulary - first,
            "embed: the weight has tokens that the vocabulary has not");
    smallest_vocabulary_ = std::min(smallest_vocabulary_, vocabulary);
    return append({Embed{out, weight, scale, first}, selected_});
}

int64_t Plan::rms_norm(Ref x, Ref out, Norm norm, int64_t group) {
    use("rms_norm: x", x);
    use("rms_norm: out", out);
    same_width("rms_norm", "out", out.width, x.width);
    require(group >= 1 && x.width % group == 0,
            "rms_norm: the width is not a multiple of the group");
    return append({RmsNorm{x, out, norm, group}, selected_});
}

int64_t Plan::linear(Ref x, Ref out, const PackedWeight& weight, const float* bias, bool accumulate,
                     std::optional<Norm> norm, std::optional<Activation> gated_act) {
    use("linear: x", x);
    use("linear: out", out);
    same_width("linear", "x", x.width, gated_act ? 2 * weight.k : weight.k);
    same_width("linear", "out", out.width, weight.n);
    require(!(norm && gated_act), "linear: norm and gated_act exclude each other");
    if (x.buffer == out.buffer && x.start < out.start + out.width && out.start < x.start + x.width)
        refuse("linear: x and out overlap");
    const auto row_bytes = static_cast<int64_t>(kernels_.prepared_row_bytes(&weight));
    return append(
        {Linear{x, out, weight, bias, accumulate, norm, gated_act, row_bytes}, selected_});
}

int64_t Plan::rope(Ref x, int64_t head_dim, int64_t spec) {
    require(!selected_, "rope: comes before select_rows");
    use("rope: x", x);
    require(spec >= 0 && spec < static_cast<int64_t>(ropes_.size()), "rope: there is no such spec");
    require(head_dim >= 1 && x.width % head_dim == 0,
            "rope: the width is not a multiple of head_dim");
    require(2 * static_cast<int64_t>(ropes_[spec].inv_freq.size()) <= head_dim,
            "rope: more frequencies than half of head_dim");
    return append({Rope{x, head_dim, spec}, selected_});
}

int64_t Plan::write_kv(Ref k, Ref v, int64_t layer) {
    require(!selected_, "write_kv: comes before select_rows");
    use("write_kv: k", k);
    use("write_kv: v", v);
    same_width("write_kv", "v", v.width, k.width);
    require(k.buffer == v.buffer, "write_kv: k and v must be columns of one buffer");
    require(layer >= 0, "write_kv: layers count from 0");
    uses_kv_ = true;
    return append({WriteKv{k, v, layer}, selected_});
}

int64_t Plan::attention(Attention op) {
    require(!selected_, "attention: comes before select_rows");
    use("attention: q", op.q);
    use("attention: out", op.out);
    require(op.layer >= 0, "attention: layers count from 0");
    require(op.num_heads >= 1 && op.num_kv_heads >= 1 && op.num_heads % op.num_kv_heads == 0,
            "attention: num_heads is not a multiple of num_kv_heads");
    same_width("attention", "q", op.q.width, int64_t{op.num_heads} * op.head_dim);
    same_width("attention", "out", op.out.width, op.q.width);
    require(op.window >= 0 && op.softcap >= 0,
            "attention: window and softcap are at least 0 (none)");
    uses_kv_ = true;
    const auto same = [&](const AttentionOrder& o) {
        return o.num_heads == op.num_heads && o.num_kv_heads == op.num_kv_heads &&
               o.head_dim == op.head_dim && o.window == op.window;
    };
    op.order = std::find_if(orders_.begin(), orders_.end(), same) - orders_.begin();
    if (op.order == orders_.size()) {
        AttentionOrder& order = orders_.emplace_back();
        order.num_heads = op.num_heads;
        order.num_kv_heads = op.num_kv_heads;
        order.head_dim = op.head_dim;
        order.window = op.window;
    }
    return append({op, selected_});
}

int64_t Plan::gated_act(Ref x, Ref out, Activation kind) {
    use("gated_act: x", x);
    use("gated_act: out", out);
    same_width("gated_act", "x", x.width, 2 * out.width);
    return append({GatedAct{x, out, kind}, selected_});
}

int64_t Plan::add(Ref x, Ref y, Ref out) {
    use("add: x", x);
    use("add: y", y);
    use("add: out", out);
    same_width("add", "x", x.width, out.width);
    same_width("add", "y", y.width, out.width);
    return append({Add{x, y, out}, selected_});
}

int64_t Plan::select_rows(Ref x, Ref out) {
    require(!selected_, "select_rows: a plan selects once");
    use("select_rows: x", x);
    selected_ = true;
    use("select_rows: out", out);
    same_width("select_rows", "out", out.width, x.width);
    require(x.buffer != out.buffer, "select_rows: x and out must be different buffers");
    return append({SelectRows{x, out}, selected_});
}

int64_t Plan::soft_cap(Ref x, float cap) {
    use("soft_cap: x", x);
    require(cap > 0, "soft_cap: the cap must be positive");
    return append({SoftCap{x, cap}, selected_});
}

int64_t Plan::all_reduce(Ref x) {
    require(group_ != nullptr, "all_reduce: this plan is no rank's");
    use("all_reduce: x", x);
    return append({AllReduce{x}, selected_});
}

int64_t Plan::all_gather(Ref out, std::vector<int64_t> starts) {
    require(group_ != nullptr, "all_gather: this plan is no rank's");
    use("all_gather: out", out);
    const int ranks = group_->ranks();
    require(static_cast<int>(starts.size()) == ranks + 1 && starts[0] == 0 &&
                starts[ranks] == out.width,
            "all_gather: starts must be one more than ranks, from 0 to the width of out");
    int64_t widest = 0;
    for (int rank = 0; rank < ranks; ++rank) {
        require(starts[rank] <= starts[rank + 1], "all_gather: starts must not fall");
        widest = std::max(widest, starts[rank + 1] - starts[rank]);
    }
    return append({AllGather{out, std::move(starts), widest}, selected_});
}

// -- room ---------------------------------------------------------------------------------------------

void Plan::hold_rows(Buffer& buffer, int64_t rows) {
    rows = std::max<int64_t>(rows, 1);  // a step may want no logits
    if (rows <= buffer.capacity) return;
    // Few sizes, so that a growing batch does not move everything at every step.
    const auto capacity =
        rows <= 256 ? std::bit_ceil(static_cast<uint64_t>(rows)) : (rows + 255) / 256 * 256;
    // Rows that are a multiple of 4 KiB apart share one set of the cache. What Python reads is not
    // padded: nothing else is contiguous there.
    const int64_t padded = (buffer.width + 15) / 16 * 16;
    buffer.leading = !buffer.all_rows ? buffer.width : padded % 1024 == 0 ? padded + 16 : padded;
    buffer.memory.reset();
    buffer.memory = std::make_shared<Arena>(capacity * buffer.leading * sizeof(float));
    buffer.capacity = static_cast<int64_t>(capacity);
}

// Memory that somebody outside still reads is left to him.
void Plan::let_go(Buffer& buffer) {
    if (buffer.memory.use_count() > 1) buffer.capacity = 0;
}

void Plan::make_room(const StepInput& input, const KvArena* kv) {
    rows_ = input.view.num_tokens;
    selected_rows_ = input.num_logit_rows;
    for (Buffer& buffer : buffers_) hold_rows(buffer, buffer.all_rows ? rows_ : selected_rows_);
    for (RopeSpec& rope : ropes_) {
        rope.cos.resize(rows_ * rope.inv_freq.size());
        rope.sin.resize(rope.cos.size());
    }
    size_t scratch = 0, prepared = 0;
    for (const Op& op : ops_) {
        if (const auto* linear = std::get_if<Linear>(&op.what)) {
            const int64_t rows = op.after_select ? selected_rows_ : rows_;
            const size_t row = Walk::scratch_row_bytes(linear->weight.k);
            const bool alone = prepares_alone(*linear, rows);
            scratch = std::max(scratch, row + (alone ? rows * linear->row_bytes : 0));
            if (!alone) prepared = std::max<size_t>(prepared, rows * linear->row_bytes);
        } else if (const auto* attention = std::get_if<Attention>(&op.what)) {
            const AttentionArgs args = attention_args(*attention, *kv);
            scratch = std::max(scratch, kernels_.attention_scratch_bytes(&args));
        }
    }
    scratch = (scratch + 127) / 128 * 128;  // no two threads share a line, or a pair of them
    const size_t wanted = scratch * pool_.num_threads();
    if (wanted > scratch_.num_bytes()) scratch_ = Arena(wanted);
    scratch_bytes_ = scratch;
    if (prepared > prepared_.num_bytes()) prepared_ = Arena(prepared);
    if (counters_.size() != ops_.size()) counters_ = std::vector<Counter>(ops_.size());
    for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
    failed_at_.store(INT64_MAX, std::memory_order_relaxed);
    times_.assign(ops_.size() + 1, 0.0);
}

AttentionArgs Plan::attention_args(const Attention& op, const KvArena& kv) const {
    return {at(op.q),     leading(op.q), at(op.out), leading(op.out), kv.layers()[op.layer],
            op.num_heads, op.scale,      op.window,  op.softcap};
}

void Plan::cut_attention(const StepInput& input, const KvArena* kv) {
    std::vector<bool> is_cut(orders_.size(), false);
    int64_t floats = 0;
    for (const Op& op : ops_) {
        const auto* attention = std::get_if<Attention>(&op.what);
        if (attention == nullptr || is_cut[attention->order]) continue;
        is_cut[attention->order] = true;
        const AttentionArgs args = attention_args(*attention, *kv);
        const int64_t places = orders_[attention->order].cut(input.view, args, pool_.num_threads());
        floats = std::max(floats, places * kernels_.attention_partial_floats(&args));
    }
    const size_t bytes = floats * sizeof(float);
    if (bytes > partials_.num_bytes()) partials_ = Arena(bytes);
}

void Plan::cut_looks(const StepInput& input) {
    constexpr int32_t kRows = 16;  // queries that share each widened tile of keys
    look_tiles_.clear();
    int64_t place = 0;
    for (const Look* look = input.looks; look < input.looks + input.num_looks; ++look) {
        for (int32_t request = look->first; request < look->last; ++request)
            for (int32_t row = input.view.query_starts[request],
                         last = input.view.query_starts[request + 1];
                 row < last; row += kRows)
                look_tiles_.push_back(
                    {{request, 0, row, std::min(row + kRows, last), look->begin, look->end},
                     place});
        place += look->end - look->begin + 1;
    }
    look_sums_.assign(place * pool_.num_threads(), 0);
}

void Plan::sum_looks(const StepInput& input) {
    if (input.num_looks == 0) return;
    const size_t places = look_sums_.size() / pool_.num_threads();
    std::fill_n(input.looked, places, 0);
    for (size_t i = 0; i < look_sums_.size(); ++i) input.looked[i % places] += look_sums_[i];
    look_sums_ = {};
}

float* Plan::at(const Ref& ref) const {
    return reinterpret_cast<float*>(buffers_[ref.buffer].memory->data()) + ref.start;
}

int64_t Plan::num_bytes() const {
    const std::lock_guard<std::mutex> turn(turn_);
    size_t bytes = prepared_.num_bytes() + partials_.num_bytes() + scratch_.num_bytes();
    for (const Buffer& buffer : buffers_)
        if (buffer.memory) bytes += buffer.memory->num_bytes();
    return static_cast<int64_t>(bytes);
}

// -- running ------------------------------------------------------------------------------------------

Result Plan::run(const StepInput& input, const KvArena* kv, Ref result) {
    const std::lock_guard<std::mutex> turn(turn_);
    const auto start = Walk::Clock::now();
    check("logits", result);
    check_step(input, kv);
    Buffer& out = buffers_[result.buffer];
    let_go(out);
    make_room(input, kv);
    cut_attention(input, kv);
    cut_looks(input);
    layers_done_.store(((layers_done_.load() >> 32) + 1) << 32);
    pool_.run([&](int thread) { Walk(*this, input, kv, thread).all(); });
    if (failed_at_.load(std::memory_order_relaxed) != INT64_MAX)
        throw GroupEnded(group_->group().why_ended());
    sum_looks(input);
    const double inside = std::accumulate(times_.begin(), times_.end(), 0.0);
    times_.back() = std::chrono::duration<double>(Walk::Clock::now() - start).count() - inside;
    const int64_t rows = out.all_rows ? rows_ : selected_rows_;
    return {out.memory, at(result), rows, result.width, out.leading};
}

std::pair<int64_t, int64_t> Plan::layers_done() const {
    const uint64_t both = layers_done_.load();
    return {static_cast<int64_t>(both >> 32), static_cast<int64_t>(both & UINT32_MAX)};
}

std::vector<double> Plan::times() const {
    const std::lock_guard<std::mutex> turn(turn_);
    return times_;
}

void Plan::write(Ref ref, const float* values, int64_t rows) {
    const std::lock_guard<std::mutex> turn(turn_);
    check("write", ref);
    let_go(buffers_[ref.buffer]);
    hold_rows(buffers_[ref.buffer], rows);
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(at(ref) + row * leading(ref), values + row * ref.width,
                    ref.width * sizeof(float));
}

std::vector<float> Plan::read(Ref ref, int64_t* rows) const {
    const std::lock_guard<std::mutex> turn(turn_);
    check("read", ref);
    const Buffer& buffer = buffers_[ref.buffer];
    *rows = buffer.memory == nullptr ? 0 : buffer.all_rows ? rows_ : selected_rows_;
    std::vector<float> values(*rows * ref.width);
    for (int64_t row = 0; row < *rows; ++row)
        std::memcpy(values.data() + row * ref.width, at(ref) + row * leading(ref),
                    ref.width * sizeof(float));
    return values;
}

}  // namespace duetto
