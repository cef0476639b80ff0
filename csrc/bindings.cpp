// The only file that knows Python: checks what arrays look like, keeps them alive, releases the GIL.
// What each function promises is written in src/duetto/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>

#include "arena.h"
#include "checksum.h"
#include "cpu_features.h"
#include "dispatch.h"
#include "group.h"
#include "kv_arena.h"
#include "pack.h"
#include "plan.h"
#include "pool.h"
#include "probe.h"
#include "refuse.h"
#include "ring.h"
#include "rows.h"
#include "sampler.h"
#include "weight.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace duetto {

namespace {

using nb::arg;
using Release = nb::gil_scoped_release;
using std::to_string;
using RefTuple = std::tuple<int64_t, int64_t, int64_t>;

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Places = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReadOnlyBytes = Vector<uint8_t>;
using LookTuple = std::tuple<int32_t, int32_t, int32_t, int32_t>;  // as Look
using NormTuple =
    std::tuple<Vector<float>, double, double>;  // (no fp32: most eps are none exactly)

// -- names of formats -----------------------------------------------------------------------------------

template <class Enum, size_t N>
Enum from_name(const char* what, const std::string& name, const char* const (&names)[N]) {
    for (size_t i = 0; i < N; ++i)
        if (name == names[i]) return static_cast<Enum>(i);
    std::string known;
    for (const char* each : names) known += (known.empty() ? "" : ", ") + std::string(each);
    refuse(std::string(what) + " '" + name + "': must be one of " + known);
}

constexpr const char* kWeightFormats[] = {"f32", "bf16", "int8", "int4", "bf12"};
constexpr const char* kKvFormats[] = {"f32", "f16", "bf16", "int8"};
constexpr const char* kActivations[] = {"silu", "gelu_tanh"};

WeightFormat weight_format(const std::string& name) {
    return from_name<WeightFormat>("weight format", name, kWeightFormats);
}
KvFormat kv_format(const std::string& name) {
    return from_name<KvFormat>("KV format", name, kKvFormats);
}
Activation activation(const std::string& name) {
    return from_name<Activation>("activation", name, kActivations);
}

// -- weights --------------------------------------------------------------------------------------------

PackedBytes checked_bytes(WeightFormat format, int64_t group, int64_t n, int64_t k) {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (n < 1 || k < 1 || n >= kMost || k >= kMost)
        refuse("a weight of " + to_string(n) + " by " + to_string(k));
    const bool is_quantized = format == WeightFormat::int8 || format == WeightFormat::int4;
    if (group < 0 || group >= kMost || group % 8 != 0 || (group != 0 && !is_quantized))
        refuse("group " + to_string(group) + ": must be 0, or for int8 and int4 a multiple of 8");
    return packed_bytes(format, n, k, static_cast<int32_t>(group));
}

template <class Array>
void check_packed(const char* what, const Array& array, size_t wanted) {
    if (array.size() != wanted)
        refuse(std::string(what) + " has " + to_string(array.size()) + " bytes: must have " +
               to_string(wanted));
    if (reinterpret_cast<uintptr_t>(array.data()) % 64 != 0)
        refuse(std::string(what) + " must be aligned to 64 bytes");
}

// Holds its arrays; everyone who uses the packed weight holds the Weight.
class Weight {
public:
    Weight(const std::string& format, int64_t group, int64_t n, int64_t k, ReadOnlyBytes data,
           std::optional<ReadOnlyBytes> scales)
        : data_(std::move(data)), scales_(std::move(scales)) {
        const WeightFormat f = weight_format(format);
        const PackedBytes bytes = checked_bytes(f, group, n, k);
        check_packed("data", data_, bytes.data);
        if (scales_) check_packed("scales", *scales_, bytes.scales);
        if (!scales_ && bytes.scales > 0) refuse(format + " weights need scales");
        const auto* scale_words =
            bytes.scales > 0 ? reinterpret_cast<const uint16_t*>(scales_->data()) : nullptr;
        packed = {f, static_cast<int32_t>(group), n, k, pad8(k), data_.data(), scale_words};
        num_bytes = static_cast<int64_t>(bytes.data + bytes.scales);
        if (f == WeightFormat::bf12 && !is_whole(packed))
            refuse(
                "a bf12 weight's exceptions do not lie in their tiles: it was not packed by pack()");
    }

    auto unpack(const std::string& isa) const {
        const Kernels& kernels = choose_kernels(isa);
        auto* values = new std::vector<float>(packed.n * packed.k);
        nb::capsule owner(values,
                          [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
        {
            const Release release;
            for (int64_t row = 0; row < packed.n; ++row)
                kernels.unpack_row(&packed, row, values->data() + row * packed.k);
        }
        const size_t n = packed.n, k = packed.k;
        return nb::ndarray<nb::numpy, float>(values->data(), {n, k}, owner);
    }

    PackedWeight packed;
    int64_t num_bytes;

private:
    ReadOnlyBytes data_;
    std::optional<ReadOnlyBytes> scales_;
};

// `k` is set if it is negative.
SourceRows source_rows(nb::handle item, int64_t& k) {
    nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu> array;
    if (!nb::try_cast(item, array))
        throw nb::type_error("pack: a source is not a two-dimensional array");
    SourceType type;
    if (array.dtype() == nb::dtype<float>())
        type = SourceType::f32;
    else if (array.dtype() == nb::dtype<uint16_t>())
        type = SourceType::bf16;
    else if (array.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
             array.dtype().bits == 16)
        type = SourceType::f16;
    else
        throw nb::type_error(
            "pack: a source must be float32, float16, or uint16 (the bits of bf16)");
    const auto rows = static_cast<int64_t>(array.shape(0)),
               columns = static_cast<int64_t>(array.shape(1));
    if (k < 0) k = columns;
    if (columns != k || rows < 1 || array.stride(1) != 1)
        refuse("pack: a source is " + to_string(rows) + " by " + to_string(columns) +
               ": must have " + to_string(k) + " columns without gaps between them");
    return {array.data(), type, rows, array.stride(0)};
}

std::optional<int64_t> pack_weight(const std::string& format, int64_t group, nb::sequence sources,
                                   Bytes data, std::optional<Bytes> scales, Pool& pool) {
    const WeightFormat f = weight_format(format);
    if (nb::len(sources) == 0) refuse("pack: no sources");
    std::vector<SourceRows> rows;
    int64_t n = 0, k = -1;  // the first source says how many columns
    for (nb::handle item : sources) n += rows.emplace_back(source_rows(item, k)).rows;
    const PackedBytes bytes = checked_bytes(f, group, n, k);
    check_packed("data", data, bytes.data);
    if (scales) check_packed("scales", *scales, bytes.scales);
    if (!scales && bytes.scales > 0) refuse(format + " weights need scales");
    auto* scale_words = scales ? reinterpret_cast<uint16_t*>(scales->data()) : nullptr;
    const PackedWeight shape{f,          static_cast<int32_t>(group), n, k, pad8(k), data.data(),
                             scale_words};

    const Release release;
    std::atomic<int64_t> next{0}, not_finite{INT64_MAX};
    std::atomic<bool> not_coded{false};
    pool.run([&](int) {
        for (int64_t tile; (tile = next.fetch_add(1)) < num_tiles(n);) {
            const int64_t row = pack_tiles(shape, rows.data(), static_cast<int64_t>(rows.size()),
                                           tile, tile + 1, data.data(), scale_words);
            if (row == -1) continue;
            if (row == kNotCoded) not_coded = true;
            next.store(num_tiles(n));  // the tiles before this one have been taken
            for (int64_t found = not_finite.load();
                 row >= 0 && row < found && !not_finite.compare_exchange_weak(found, row);) {
            }
        }
    });
    if (not_finite != INT64_MAX) return not_finite.load();
    if (not_coded) throw std::overflow_error("pack: bf12 has no room for all exceptions");
    return std::nullopt;
}

// -- KV -------------------------------------------------------------------------------------------------

using TurnPair = std::pair<Matrix<float>, Matrix<float>>;  // cos, sin

void move_kv(const KvArena& kv, Pool& pool, Vector<int32_t> from, Vector<int32_t> to,
             const std::vector<std::optional<TurnPair>>& turns) {
    if (from.size() != to.size())
        refuse(to_string(from.size()) + " slots to move from and " + to_string(to.size()) +
               " to move to");
    std::vector<KvTurn> each;
    for (const auto& turn : turns) {
        if (!turn) {
            each.push_back({0, nullptr, nullptr});
            continue;
        }
        const auto& [cos, sin] = *turn;
        if (cos.shape(0) != from.size() || sin.shape(0) != from.size() ||
            cos.shape(1) != sin.shape(1))
            refuse("cos and sin must have a row for each token, and be of one shape");
        each.push_back({static_cast<int64_t>(cos.shape(1)), cos.data(), sin.data()});
    }
    const Release release;
    kv.move(pool, from.data(), to.data(), static_cast<int64_t>(from.size()), each);
}

auto read_kv(const KvArena& kv, Pool& pool, int64_t layer, Vector<int32_t> slots) {
    const KvLayer& l = kv.layer(layer);
    const size_t count = slots.size(), heads = l.num_kv_heads, dim = l.head_dim;
    const auto empty = [&](float*& data) {
        data = new float[count * heads * dim];
        nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
        return nb::ndarray<nb::numpy, float>(data, {count, heads, dim}, owner);
    };
    float *keys, *values;
    auto arrays = std::pair(empty(keys), empty(values));
    const Release release;
    kv.read(pool, layer, slots.data(), static_cast<int64_t>(count), keys, values);
    return arrays;
}

// -- plan -----------------------------------------------------------------------------------------------

Ref as_ref(const RefTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

std::vector<Look> as_looks(const std::vector<LookTuple>& looks,
                           const std::optional<Places>& looked) {
    std::vector<Look> all;
    int64_t places = 0;
    for (const auto& [first, last, begin, end] : looks) {
        all.push_back({first, last, begin, end});
        places += int64_t{end} - begin + 1;
    }
    if (const size_t size = looked ? looked->size() : 0; static_cast<int64_t>(size) != places)
        refuse("looked has " + to_string(size) + " places: must have " + to_string(places));
    return all;
}

const float* weights_of(const char* what, const Vector<float>& array, int64_t wanted) {
    if (static_cast<int64_t>(array.size()) != wanted)
        refuse(std::string(what) + " has " + to_string(array.size()) + " numbers: must have " +
               to_string(wanted));
    return array.data();
}

// A plan, and all that must live as long.
struct PyPlan {
    PyPlan(nb::object pool_object, const std::string& isa, nb::object member)
        : plan(nb::cast<Pool&>(pool_object), choose_kernels(isa),
               member.is_none() ? nullptr : nb::cast<Member*>(member)) {
        kept.append(pool_object);
        kept.append(member);
    }

    int64_t embed(RefTuple out, nb::object weight, float scale, int64_t first,
                  std::optional<int64_t> vocabulary) {
        kept.append(weight);
        const PackedWeight& packed = nb::cast<Weight&>(weight).packed;
        return plan.embed(as_ref(out), packed, scale, first, vocabulary.value_or(packed.n));
    }

    int64_t rms_norm(RefTuple x, RefTuple out, Vector<float> weight, float eps, int64_t group,
                     float offset) {
        arrays.push_back(weight);
        return plan.rms_norm(as_ref(x), as_ref(out),
                             {weights_of("rms_norm: weight", weight, group), eps, offset}, group);
    }

    int64_t linear(RefTuple x, RefTuple out, nb::object weight, std::optional<Vector<float>> bias,
                   bool accumulate, std::optional<NormTuple> norm,
                   std::optional<std::string> gated_act) {
        const PackedWeight& packed = nb::cast<Weight&>(weight).packed;
        kept.append(weight);
        const float* bias_data = nullptr;
        if (bias) {
            bias_data = weights_of("linear: bias", *bias, packed.n);
            arrays.push_back(*bias);
        }
        std::optional<Norm> first;
        if (norm) {
            const auto& [norm_weight, eps, offset] = *norm;
            first = {weights_of("linear: norm", norm_weight, packed.k), (float)eps, (float)offset};
            arrays.push_back(norm_weight);
        }
        std::optional<Activation> act;
        if (gated_act) act = activation(*gated_act);
        return plan.linear(as_ref(x), as_ref(out), packed, bias_data, accumulate, first, act);
    }

    int64_t attention(RefTuple q, RefTuple out, int64_t layer, int32_t num_heads,
                      int32_t num_kv_heads, int32_t head_dim, float scale, int32_t window,
                      float softcap) {
        return plan.attention({as_ref(q), as_ref(out), layer, num_heads, num_kv_heads, head_dim,
                               scale, window, softcap, 0});
    }

    auto run(Vector<int32_t> token_ids, Vector<int32_t> positions, Vector<int32_t> slots,
             Vector<int32_t> query_starts, Vector<int32_t> context_lens,
             Matrix<int32_t> block_tables, Vector<int32_t> logit_rows, KvArena* kv, RefTuple logits,
             std::optional<int64_t> num_ops, const std::vector<LookTuple>& looks,
             std::optional<Places> looked) {
        const size_t tokens = token_ids.size(), requests = context_lens.size();
        if (positions.size() != tokens || slots.size() != tokens)
            refuse("token_ids, positions and slots must be equally long");
        if (query_starts.size() != requests + 1 || block_tables.shape(0) != requests)
            refuse(
                "query_starts must have one entry more than context_lens, and block_tables as many");
        const std::vector<Look> told = as_looks(looks, looked);
        const StepInput input{
            {static_cast<int64_t>(tokens), static_cast<int64_t>(requests),
             static_cast<int64_t>(block_tables.shape(1)), positions.data(), slots.data(),
             query_starts.data(), context_lens.data(), block_tables.data()},
            token_ids.data(),
            logit_rows.data(),
            static_cast<int64_t>(logit_rows.size()),
            num_ops.value_or(INT64_MAX),
            told.data(),
            static_cast<int64_t>(told.size()),
            looked ? looked->data() : nullptr};
        Result result;
        {
            const Release release;
            result = plan.run(input, kv, as_ref(logits));
        }
        auto* memory = new std::shared_ptr<Arena>(std::move(result.memory));
        nb::capsule owner(memory,
                          [](void* p) noexcept { delete static_cast<std::shared_ptr<Arena>*>(p); });
        const size_t rows = result.rows, width = result.width;
        return nb::ndarray<nb::numpy, float>(const_cast<float*>(result.data), {rows, width}, owner,
                                             {result.leading, 1});
    }

    void write(RefTuple ref, Matrix<float> values) {
        if (static_cast<int64_t>(values.shape(1)) != std::get<2>(ref))
            refuse("write: values are " + to_string(values.shape(1)) + " columns wide, not " +
                   to_string(std::get<2>(ref)));
        plan.write(as_ref(ref), values.data(), static_cast<int64_t>(values.shape(0)));
    }

    auto read(RefTuple ref) const {
        int64_t rows = 0;
        auto* values = new std::vector<float>(plan.read(as_ref(ref), &rows));
        nb::capsule owner(values,
                          [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
        const size_t height = rows, width = std::get<2>(ref);
        return nb::ndarray<nb::numpy, float>(values->data(), {height, width}, owner);
    }

    Plan plan;
    nb::list kept;
    std::vector<Vector<float>> arrays;
};

std::vector<std::string> names_of_sets(bool only_those_that_run) {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets())
        if (!only_those_that_run || set.missing.empty()) names.emplace_back(set.kernels->name);
    return names;
}

std::vector<std::string> missing_features(const std::string& isa) {
    for (const InstructionSet& set : instruction_sets())
        if (isa == set.kernels->name) return set.missing;
    refuse("this build has no instruction set called '" + isa + "'");
}

int64_t block_bytes(const std::string& format, int64_t block_size, int64_t num_kv_heads,
                    int64_t head_dim, const std::string& isa) {
    return kv_block_bytes(choose_kernels(isa), kv_format(format), block_size, num_kv_heads,
                          head_dim);
}

// -- sampling --

const Kernels& sampling_kernels(const std::optional<std::string>& isa) {
    if (isa) return choose_kernels(*isa);
    static const Kernels& fastest = choose_kernels("");
    return fastest;
}

int64_t finite_argmax(Vector<float> row, std::optional<std::string> isa) {
    const Kernels& kernels = sampling_kernels(isa);
    const Release release;
    return kernels.finite_argmax(row.data(), static_cast<int64_t>(row.size()));
}

int64_t draw_logits(Vector<float> row, int64_t best, double temperature, uint64_t key,
                    std::optional<std::string> isa) {
    const auto size = static_cast<int64_t>(row.size());
    if (best < 0 || best >= size) refuse("draw_row: best is no index of the row");
    if (!(temperature > 0)) refuse("draw_row: temperature must be greater than 0");
    const Kernels& kernels = sampling_kernels(isa);
    const Release release;
    return draw_row(kernels, row.data(), size, best, temperature, key);
}

int64_t draw_candidates(Vector<double> scaled, std::optional<Vector<int64_t>> ids, uint64_t key) {
    if (scaled.size() == 0 || (ids && ids->size() != scaled.size()))
        refuse("draw_scaled: needs one candidate or more, and as many ids");
    const Release release;
    return draw_scaled(scaled.data(), ids ? ids->data() : nullptr,
                       static_cast<int64_t>(scaled.size()), key);
}

int64_t draw(Vector<float> row, const std::tuple<double, int64_t>& first,
             std::optional<Vector<int64_t>> changed_ids, std::optional<Vector<double>> changed,
             const Filters& filters, uint64_t key, std::optional<std::string> isa) {
    const auto size = static_cast<int64_t>(row.size());
    const auto [logit, id] = first;
    if (size > kMostWeighed) refuse("draw_filtered: more than 2^23 logits");
    if (id < 0 || id >= size || !std::isfinite(logit))
        refuse("draw_filtered: first must be (its finite logit, an index of the row)");
    if (changed_ids.has_value() != changed.has_value() ||
        (changed && changed->size() != changed_ids->size()))
        refuse("draw_filtered: needs as many changed_ids as changed");
    if (!(filters.temperature > 0) || !(filters.top_p > 0) || !(filters.lowest <= logit))
        refuse(
            "draw_filtered: temperature and top_p must be > 0, lowest at most the first's logit");
    std::vector<Ranked> list(changed ? changed->size() : 0);
    for (size_t i = 0; i < list.size(); ++i) {
        list[i] = {changed->data()[i], changed_ids->data()[i]};
        if (list[i].id < 0 || list[i].id >= size)
            refuse("draw_filtered: changed_ids must be indices of the row");
    }
    const Kernels& kernels = sampling_kernels(isa);
    const Release release;
    const auto count = static_cast<int64_t>(list.size());
    return draw_filtered(kernels, {row.data(), size, list.data(), count, {logit, id}}, filters,
                         key);
}

// -- links --

using RowArrays = std::vector<nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, uint8_t>>;
using SentArrays = std::vector<nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>>;

template <class Arrays>
RowStream row_stream(const Arrays& arrays, const Vector<int32_t>& blocks) {
    std::vector<RowArray> rows;
    for (const auto& array : arrays) {
        if (array.itemsize() != 1) refuse("rows: arrays must be bytes");
        rows.push_back(
            {static_cast<uint8_t*>(const_cast<void*>(static_cast<const void*>(array.data()))),
             static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1))});
    }
    return RowStream(std::move(rows), blocks.data(), static_cast<int64_t>(blocks.size()));
}

void check_start(const RowStream& rows, int64_t start, int64_t count) {
    if (start < 0 || count < 0 || start > rows.num_bytes() || count > rows.num_bytes() - start)
        refuse("rows: " + to_string(count) + " bytes from " + to_string(start) + " are not in " +
               to_string(rows.num_bytes()));
}

// A word that another thread sets to end what waits.
const std::atomic<uint32_t>& stop_word(const Vector<uint32_t>& stop) {
    if (stop.size() != 1) refuse("stop must be one number");
    return *reinterpret_cast<const std::atomic<uint32_t>*>(stop.data());
}

int64_t send_rows(int fd, const SentArrays& arrays, Vector<int32_t> blocks, int64_t start,
                  int64_t limit) {
    const RowStream rows = row_stream(arrays, blocks);
    check_start(rows, start, 0);
    const Release release;
    return rows.send(fd, start, limit);
}

int64_t receive_rows(int fd, const RowArrays& arrays, Vector<int32_t> blocks, int64_t start,
                     int64_t limit) {
    const RowStream rows = row_stream(arrays, blocks);
    check_start(rows, start, 0);
    const Release release;
    return rows.receive(fd, start, limit);
}

int64_t put_rows(Bytes ring, const SentArrays& arrays, Vector<int32_t> blocks, int64_t start,
                 double patience_s, Vector<uint32_t> stop) {
    const RowStream rows = row_stream(arrays, blocks);
    check_start(rows, start, 0);
    Ring own(ring.data(), static_cast<int64_t>(ring.size()));
    const std::atomic<uint32_t>& word = stop_word(stop);
    const Release release;
    return own.put(rows, start, patience_s, word);
}

int64_t take_rows(Bytes ring, const RowArrays& arrays, Vector<int32_t> blocks, int64_t start,
                  double patience_s, Vector<uint32_t> stop) {
    const RowStream rows = row_stream(arrays, blocks);
    check_start(rows, start, 0);
    Ring own(ring.data(), static_cast<int64_t>(ring.size()));
    const std::atomic<uint32_t>& word = stop_word(stop);
    const Release release;
    return own.take(&rows, start, rows.num_bytes() - start, patience_s, word);
}

int64_t drop_rows(Bytes ring, int64_t count, double patience_s, Vector<uint32_t> stop) {
    Ring own(ring.data(), static_cast<int64_t>(ring.size()));
    const std::atomic<uint32_t>& word = stop_word(stop);
    const Release release;
    return own.take(nullptr, 0, count, patience_s, word);
}

void copy_rows(const SentArrays& arrays, Vector<int32_t> blocks, const RowArrays& to_arrays,
               Vector<int32_t> to_blocks) {
    const RowStream from = row_stream(arrays, blocks), to = row_stream(to_arrays, to_blocks);
    if (from.num_bytes() != to.num_bytes())
        refuse("rows: " + to_string(from.num_bytes()) + " bytes do not fit into " +
               to_string(to.num_bytes()));
    const Release release;
    from.copy_to(to);
}

// -- the module -----------------------------------------------------------------------------------------

void bind_machine(nb::module_& m) {
    m.def("cpu_features", &cpu_features);
    m.def("isas", [] { return names_of_sets(true); });
    m.def("built_isas", [] { return names_of_sets(false); });
    m.def("missing_features", &missing_features, "isa"_a);
    m.def(
        "choose_isa",
        [](std::optional<std::string> name) { return choose_kernels(name.value_or("")).name; },
        "name"_a = nb::none());
    m.def("available_threads", &available_threads);
    m.def(
        "checksum",
        [](const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>& array) {
            const Release release;
            return xxh64(static_cast<const uint8_t*>(array.data()), array.nbytes());
        },
        "array"_a);

    nb::class_<Pool>(m, "Pool")
        .def(
            "__init__",
            [](Pool* self, int num_threads) {
                new (self) Pool(num_threads == 0 ? available_threads() : num_threads);
            },
            "num_threads"_a = 0)
        .def_prop_ro("num_threads", &Pool::num_threads)
        .def("barrier_ns", &barrier_ns, "rounds"_a = 10000, nb::call_guard<Release>());

    nb::class_<Arena>(m, "Arena")
        .def(nb::init<size_t>(), "num_bytes"_a)
        .def_prop_ro("num_bytes", &Arena::num_bytes)
        .def_prop_ro(
            "array",
            [](Arena& arena) {
                return nb::ndarray<nb::numpy, uint8_t>(arena.data(), {arena.num_bytes()},
                                                       nb::handle());
            },
            nb::rv_policy::reference_internal);

    m.def(
        "read_bandwidth",
        [](Pool& pool, size_t num_bytes, int repeats) {
            return read_bandwidth(pool, num_bytes, repeats);
        },
        "pool"_a, "num_bytes"_a = size_t{1} << 28, "repeats"_a = 8, nb::call_guard<Release>());
    m.def("fp32_peak", &fp32_peak, "pool"_a, "isa"_a, nb::call_guard<Release>());
    m.def("int8_peak", &int8_peak, "pool"_a, "isa"_a, nb::call_guard<Release>());
    m.def("bf16_peak", &bf16_peak, "pool"_a, "isa"_a, nb::call_guard<Release>());
}

void bind_weights(nb::module_& m) {
    m.def(
        "packed_bytes",
        [](const std::string& format, int64_t group, int64_t n, int64_t k) {
            const PackedBytes bytes = checked_bytes(weight_format(format), group, n, k);
            return std::pair(bytes.data, bytes.scales);
        },
        "format"_a, "group"_a, "n"_a, "k"_a);
    m.def("pack", &pack_weight, "format"_a, "group"_a, "sources"_a, arg("data").noconvert(),
          arg("scales").noconvert().none(), "pool"_a);

    nb::class_<Weight>(m, "Weight")
        .def(nb::init<const std::string&, int64_t, int64_t, int64_t, ReadOnlyBytes,
                      std::optional<ReadOnlyBytes>>(),
             "format"_a, "group"_a, "n"_a, "k"_a, arg("data").noconvert(),
             arg("scales").noconvert() = nb::none())
        .def_prop_ro(
            "format",
            [](const Weight& w) { return kWeightFormats[static_cast<int>(w.packed.format)]; })
        .def_prop_ro("group", [](const Weight& w) { return w.packed.group; })
        .def_prop_ro("n", [](const Weight& w) { return w.packed.n; })
        .def_prop_ro("k", [](const Weight& w) { return w.packed.k; })
        .def_ro("num_bytes", &Weight::num_bytes)
        .def("unpack", &Weight::unpack, "isa"_a);

    m.def("kv_block_bytes", &block_bytes, "format"_a, "block_size"_a, "num_kv_heads"_a,
          "head_dim"_a, "isa"_a);
    nb::class_<KvArena>(m, "KvArena")
        .def(
            "__init__",
            [](KvArena* self, int64_t num_blocks, int64_t block_size,
               const std::vector<std::pair<int64_t, int64_t>>& layers, const std::string& format,
               const std::string& isa) {
                new (self)
                    KvArena(choose_kernels(isa), kv_format(format), num_blocks, block_size, layers);
            },
            "num_blocks"_a, "block_size"_a, "layers"_a, "format"_a, "isa"_a)
        .def_prop_ro("num_blocks", &KvArena::num_blocks)
        .def_prop_ro("block_size", &KvArena::block_size)
        .def_prop_ro("num_layers", [](const KvArena& kv) { return kv.layers().size(); })
        .def_prop_ro("format",
                     [](const KvArena& kv) { return kKvFormats[static_cast<int>(kv.format())]; })
        .def_prop_ro("num_bytes", &KvArena::num_bytes)
        .def("move", &move_kv, "pool"_a, arg("from_slots").noconvert(), arg("to_slots").noconvert(),
             "turns"_a)
        .def("read", &read_kv, "pool"_a, "layer"_a, arg("slots").noconvert())
        .def(
            "blocks",
            [](const KvArena& kv, int64_t layer) {
                const KvLayer& l = kv.layer(layer);
                const size_t rows = kv.num_blocks(), bytes = l.block_bytes;
                return nb::ndarray<nb::numpy, uint8_t>(l.data, {rows, bytes}, nb::handle());
            },
            "layer"_a, nb::rv_policy::reference_internal);
}

// The arrays are of one dimension or more; which ones does not matter.
using Numbers = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void bind_group(nb::module_& m) {
    nb::exception<GroupEnded>(m, "GroupEnded", PyExc_RuntimeError);
    nb::class_<Group>(m, "Group")
        .def(nb::new_([](int ranks, int64_t slot_numbers, double timeout_s) {
                 return Group::make(ranks, slot_numbers, timeout_s);
             }),
             "ranks"_a, "slot_numbers"_a = int64_t{1} << 18, "timeout_s"_a = 30.0)
        .def_static("open", &Group::open, "descriptor"_a)
        .def_prop_ro("descriptor", &Group::descriptor)
        .def_prop_ro("ranks", &Group::ranks)
        .def_prop_ro("slot_numbers", &Group::slot_numbers)
        .def_prop_ro("why_ended",
                     [](const Group& group) -> std::optional<std::string> {
                         if (!group.has_ended()) return std::nullopt;
                         return group.why_ended();
                     })
        .def("end", [](Group& group) { group.end(); });
    nb::class_<Member>(m, "Member")
        .def(nb::init<std::shared_ptr<Group>, int>(), "group"_a, "rank"_a)
        .def_prop_ro("rank", &Member::rank)
        .def_prop_ro("ranks", &Member::ranks)
        .def_prop_ro("group", &Member::shared)
        .def(
            "sum",
            [](Member& member, Numbers x) {
                const Release release;
                member.sum(x.data(), static_cast<int64_t>(x.size()));
            },
            arg("x").noconvert())
        .def(
            "gather",
            [](Member& member, Vector<float> x) {
                const size_t ranks = member.ranks(), count = x.size();
                auto* all = new float[ranks * count];
                nb::capsule owner(all, [](void* p) noexcept { delete[] static_cast<float*>(p); });
                nb::ndarray<nb::numpy, float> out(all, {ranks, count}, owner);
                const Release release;
                member.gather(x.data(), static_cast<int64_t>(count), all);
                return out;
            },
            arg("x").noconvert());
}

void bind_links(nb::module_& m) {
    const auto rows = [](const char* name) { return arg(name).noconvert(); };
    m.def("copy_rows", &copy_rows, rows("arrays"), rows("blocks"), rows("to_arrays"),
          rows("to_blocks"));
    m.def("send_rows", &send_rows, "fd"_a, rows("arrays"), rows("blocks"), "start"_a, "limit"_a);
    m.def("receive_rows", &receive_rows, "fd"_a, rows("arrays"), rows("blocks"), "start"_a,
          "limit"_a);
    m.def("put_rows", &put_rows, rows("ring"), rows("arrays"), rows("blocks"), "start"_a,
          "patience_s"_a, rows("stop"));
    m.def("take_rows", &take_rows, rows("ring"), rows("arrays"), rows("blocks"), "start"_a,
          "patience_s"_a, rows("stop"));
    m.def("drop_rows", &drop_rows, rows("ring"), "count"_a, "patience_s"_a, rows("stop"));
}

void bind_sampling(nb::module_& m) {
    m.def("finite_argmax", &finite_argmax, arg("row").noconvert(), "isa"_a = nb::none());
    m.def("draw_row", &draw_logits, arg("row").noconvert(), "best"_a, "temperature"_a, "key"_a,
          "isa"_a = nb::none());
    m.def("draw_scaled", &draw_candidates, arg("scaled").noconvert(), arg("ids").noconvert().none(),
          "key"_a);
    m.def(
        "draw_filtered",
        [](Vector<float> row, const std::tuple<double, int64_t>& first,
           std::optional<Vector<int64_t>> changed_ids, std::optional<Vector<double>> changed,
           double temperature, int64_t top_k, double lowest, double top_p, uint64_t key,
           std::optional<std::string> isa) {
            return draw(row, first, changed_ids, changed, {temperature, top_k, lowest, top_p}, key,
                        isa);
        },
        arg("row").noconvert(), "first"_a, arg("changed_ids").noconvert().none(),
        arg("changed").noconvert().none(), "temperature"_a, "top_k"_a, "lowest"_a, "top_p"_a,
        "key"_a, "isa"_a = nb::none());
    m.def("philox", &philox, "counter"_a, "key_low"_a, "key_high"_a);
    m.def("gumbel_noise", &gumbel_noise, "key"_a, "token_id"_a);
}

void bind_plan(nb::module_& m) {
    nb::class_<PyPlan>(m, "Plan")
        .def(nb::init<nb::object, const std::string&, nb::object>(), "pool"_a, "isa"_a,
             "member"_a = nb::none())
        .def_prop_ro("isa", [](const PyPlan& p) { return p.plan.kernels().name; })
        .def_prop_ro("num_ops", [](const PyPlan& p) { return p.plan.num_ops(); })
        .def_prop_ro("num_bytes", [](const PyPlan& p) { return p.plan.num_bytes(); })
        .def(
            "buffer", [](PyPlan& p, int64_t width) { return p.plan.buffer(width); }, "width"_a)
        .def("embed", &PyPlan::embed, "out"_a, "weight"_a, "scale"_a = 1.0f, "first"_a = 0,
             "vocabulary"_a = nb::none())
        .def("rms_norm", &PyPlan::rms_norm, "x"_a, "out"_a, arg("weight").noconvert(), "eps"_a,
             "group"_a, "offset"_a = 0.0f)
        .def("linear", &PyPlan::linear, "x"_a, "out"_a, "weight"_a,
             arg("bias").noconvert() = nb::none(), "accumulate"_a = false,
             arg("norm").noconvert() = nb::none(), "gated_act"_a = nb::none())
        .def(
            "rope_spec",
            [](PyPlan& p, Vector<float> inv_freq, double scale) {
                return p.plan.rope_spec({inv_freq.data(), inv_freq.data() + inv_freq.size()},
                                        scale);
            },
            arg("inv_freq").noconvert(), "scale"_a = 1.0)
        .def(
            "rope",
            [](PyPlan& p, RefTuple x, int64_t head_dim, int64_t spec) {
                return p.plan.rope(as_ref(x), head_dim, spec);
            },
            "x"_a, "head_dim"_a, "spec"_a)
        .def(
            "write_kv",
            [](PyPlan& p, RefTuple k, RefTuple v, int64_t layer) {
                return p.plan.write_kv(as_ref(k), as_ref(v), layer);
            },
            "k"_a, "v"_a, "layer"_a)
        .def("attention", &PyPlan::attention, "q"_a, "out"_a, "layer"_a, "num_heads"_a,
             "num_kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a = 0, "softcap"_a = 0.0f)
        .def(
            "gated_act",
            [](PyPlan& p, RefTuple x, RefTuple out, const std::string& kind) {
                return p.plan.gated_act(as_ref(x), as_ref(out), activation(kind));
            },
            "x"_a, "out"_a, "kind"_a)
        .def(
            "add",
            [](PyPlan& p, RefTuple x, RefTuple y, RefTuple out) {
                return p.plan.add(as_ref(x), as_ref(y), as_ref(out));
            },
            "x"_a, "y"_a, "out"_a)
        .def(
            "select_rows",
            [](PyPlan& p, RefTuple x, RefTuple out) {
                return p.plan.select_rows(as_ref(x), as_ref(out));
            },
            "x"_a, "out"_a)
        .def(
            "soft_cap",
            [](PyPlan& p, RefTuple x, float cap) { return p.plan.soft_cap(as_ref(x), cap); }, "x"_a,
            "cap"_a)
        .def(
            "all_reduce", [](PyPlan& p, RefTuple x) { return p.plan.all_reduce(as_ref(x)); }, "x"_a)
        .def(
            "all_gather",
            [](PyPlan& p, RefTuple out, std::vector<int64_t> starts) {
                return p.plan.all_gather(as_ref(out), std::move(starts));
            },
            "out"_a, "starts"_a)
        .def("run", &PyPlan::run, arg("token_ids").noconvert(), arg("positions").noconvert(),
             arg("slots").noconvert(), arg("query_starts").noconvert(),
             arg("context_lens").noconvert(), arg("block_tables").noconvert(),
             arg("logit_rows").noconvert(), arg("kv").none(), "logits"_a, "num_ops"_a = nb::none(),
             "looks"_a = std::vector<LookTuple>(), arg("looked").noconvert() = nb::none())
        .def_prop_ro("layers_done", [](const PyPlan& p) { return p.plan.layers_done(); })
        .def("times", [](const PyPlan& p) { return p.plan.times(); })
        .def("write", &PyPlan::write, "ref"_a, arg("values").noconvert())
        .def("read", &PyPlan::read, "ref"_a);
}

}  // namespace

}  // namespace duetto

NB_MODULE(_native, m) {
    m.doc() = "Duetto's native kernels.";
    nb::set_leak_warnings(false);  // a process that ends does not first take apart what it holds
    duetto::bind_machine(m);
    duetto::bind_weights(m);
    duetto::bind_links(m);
    duetto::bind_sampling(m);
    duetto::bind_group(m);
    duetto::bind_plan(m);
}
