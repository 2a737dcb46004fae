// The Python bindings of the kernels. The types of tensor.h check the type and memory order of tensor arguments; sizes
// are checked here. An object keeps the tensors alive that it was created from.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "block.h"
#include "codes.h"
#include "dictionaries.h"
#include "engine.h"
#include "gather.h"
#include "moments.h"
#include "pack.h"
#include "pool.h"
#include "settle.h"
#include "stack.h"
#include "tensor.h"
#include "trellis_masks.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace shiftadd;

namespace {

using Floats = Tensor<const float>;

const Kernels& kernels_named(const std::string& name) {
    const Kernels* kernels = name.empty() ? *available_kernels() : find_kernels(name.c_str());
    if (!kernels) throw nb::value_error("this processor or build has no such kernels");
    return *kernels;
}

void check(bool fits, const char* message) {
    if (!fits) throw nb::value_error(message);
}

// The order of the Hadamard matrix is the largest power of two that divides the number of columns.
Rotation rotation(const std::optional<Floats>& signs, int64_t columns) {
    check(!signs || signs->has_shape({columns}), "the signs of a rotation must have one number a column");
    return {values_or_null(signs), columns & -columns};
}

// A matrix with the rotation of its input.
Projection projection(const Layout& layout, const Tensor<const uint32_t>& words,
                      const std::optional<Tensor<const uint8_t>>& scale_codes, const std::optional<Floats>& scales,
                      const std::optional<Floats>& offsets, const Floats& row_scale, const std::optional<Floats>& bias,
                      const std::optional<Floats>& signs) {
    const int64_t groups = layout.blocks() * layout.groups() * kBlockRows;
    const bool valid = words.size == layout.entries() && scale_codes.has_value() != scales.has_value() &&
                       (scales ? scales->size : scale_codes->size) == groups * layout.planes &&
                       (!offsets || offsets->size == groups) && row_scale.size == layout.rows &&
                       (!bias || bias->has_shape({layout.rows}));
    check(valid, "the packed tensors do not fit the layout");
    const Matrix matrix{layout,
                        words.values(),
                        values_or_null(scale_codes),
                        values_or_null(scales),
                        values_or_null(offsets),
                        row_scale.values(),
                        values_or_null(bias)};
    return {matrix, rotation(signs, layout.columns)};
}

// Columns to quantize, with `group_count` groups of levels.
Stretch stretch(bool descend, const Floats& goals, const FloatRows& coupling, const Tensor<const int64_t>& groups,
                int64_t group_count, const Tensor<float>& values, const Tensor<uint8_t>& codes,
                const Tensor<float>& steps) {
    check(goals.axes == 2, "goals must have two axes");
    const int64_t columns = goals.shape[0];
    check(coupling.has_shape({columns, columns}) && groups.has_shape({columns}) && values.has_shape_of(goals) &&
              codes.has_shape_of(goals) && steps.has_shape_of(goals),
          "the tensors do not fit the goals");
    for (int64_t i = 0; i < columns; ++i)
        check(groups.values()[i] >= 0 && groups.values()[i] < group_count, "a column has no such group");
    return {descend,         columns,         goals.shape[1], goals.values(),  coupling.values(), coupling.strides[0],
            groups.values(), values.values(), codes.values(), steps.values()};
}

TrellisCode trellis_code(int bits, const std::vector<int>& masks) {
    check(bits >= 1 && bits <= kMostTrellisBits, "a trellis code has 1 to 4 bits");
    check(!masks.empty() && masks.size() <= kMostTrellisPlanes, "a trellis code has 1 to 6 planes");
    TrellisCode code{bits, static_cast<int>(masks.size()), {}};
    for (size_t plane = 0; plane < masks.size(); ++plane) {
        check(masks[plane] > 0 && masks[plane] < kTrellisStates << bits, "a mask does not fit the register");
        code.masks[plane] = static_cast<uint16_t>(masks[plane]);
    }
    return code;
}

Activations activations(const ActivationTensor& x, const Rotation& rotation) {
    return {x.data, x.type(), x.rows(), rotation};
}

void check_output(const ActivationTensor& x, const ActivationTensor& output, int64_t columns) {
    check(output.type() == x.type() && output.rows() == x.rows() && output.columns() == columns,
          "the output does not fit the input");
}

Hidden hidden_state(const DecoderBlock& block, const ActivationTensor& hidden) {
    check(hidden.columns() == block.columns(), "the hidden states must have the width of the block");
    check(hidden.rows() >= 1 && hidden.rows() <= kTileRows, "the number of rows must be 1 to 8");
    check(hidden.axes == 3 && (hidden.shape[0] == 1 || hidden.shape[1] == 1),
          "the hidden states must be those of one token per sequence, or of one sequence");
    return {hidden.data, hidden.type(), static_cast<int>(hidden.rows()), hidden.shape[1] > 1};
}

int64_t sequences(const Hidden& hidden) { return hidden.consecutive ? 1 : hidden.rows; }
int64_t tokens_of_each(const Hidden& hidden) { return hidden.consecutive ? hidden.rows : 1; }

Positions positions(const DecoderBlock& block, const ActivationTensor& cosines, const ActivationTensor& sines,
                    int rows) {
    check(cosines.type() == sines.type() && cosines.size == sines.size && cosines.columns() == block.head_size &&
              (cosines.rows() == 1 || cosines.rows() == rows),
          "cosines and sines must have the size of a head, for one row or for all");
    return {cosines.data, sines.data, cosines.type(), cosines.rows() > 1 ? block.head_size : 0};
}

// Keys or values [sequences][heads][tokens][size].
Cached cached(const DecoderBlock& block, const StridedActivations& heads, const Hidden& hidden) {
    check(heads.axes == 4 && heads.type() == hidden.type && heads.shape[0] == sequences(hidden) &&
              heads.shape[1] == block.key_heads() && heads.shape[3] == block.head_size,
          "keys and values must have the heads of the block");
    return {heads.data, hidden.consecutive ? 0 : heads.strides[0], heads.strides[1], heads.strides[2]};
}

// New keys or values [sequences][heads][tokens][size].
Fresh fresh(const DecoderBlock& block, const ActivationTensor& heads, const Hidden& hidden) {
    const int64_t size = block.head_size, tokens = tokens_of_each(hidden);
    check(heads.type() == hidden.type && heads.has_shape({sequences(hidden), block.key_heads(), tokens, size}),
          "keys and values must have the heads of the block");
    return {heads.data, hidden.consecutive ? size : block.key_heads() * size, tokens * size};
}

// Buffers [sequences][heads][capacity][size] of the keys and values of all blocks.
struct Caches {
    std::vector<ActivationTensor> keys, values;
};

std::vector<BlockCache> block_caches(const DecoderStack& stack, const Caches& caches, const Hidden& hidden,
                                     int64_t tokens) {
    check(caches.keys.size() == stack.blocks.size() && caches.values.size() == stack.blocks.size(),
          "every block needs keys and values");
    std::vector<BlockCache> result;
    for (size_t i = 0; i < caches.keys.size(); ++i) {
        const ActivationTensor &keys = caches.keys[i], &values = caches.values[i];
        cached(*stack.blocks[i], keys, hidden);
        cached(*stack.blocks[i], values, hidden);
        check(keys.shape[2] == values.shape[2] && tokens >= 0 && tokens + tokens_of_each(hidden) <= keys.shape[2],
              "a cache is full");
        result.push_back({keys.data, values.data, keys.shape[2]});
    }
    return result;
}

}  // namespace

NB_MODULE(_native, m) {
    // Python caches layouts until the interpreter exits; this is not a leak.
    nb::set_leak_warnings(false);
    const nb::call_guard<nb::gil_scoped_release> without_gil;

    nb::class_<Layout>(m, "Layout")
        .def(
            "__init__",
            [](Layout* self, int64_t rows, int64_t columns, int64_t group_columns, int bits, int planes) {
                check(rows >= 1 && columns >= 1 && group_columns >= 1 && bits >= 1 && bits <= 8,
                      "sizes must be positive, and bits 1 to 8");
                check(planes == bits || trellis_masks(bits, planes), "there is no trellis code of so many bits and planes");
                new (self) Layout{rows, columns, group_columns < columns ? group_columns : columns, bits, planes};
            },
            "rows"_a, "columns"_a, "group_columns"_a, "bits"_a, "planes"_a)
        .def_prop_ro("entries", &Layout::entries);

    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* const* set = available_kernels(); *set; ++set) names.emplace_back((*set)->name);
        return names;
    });

    // The masks of the trellis codes that the kernels know: (bits, planes, masks).
    m.def("trellis_codes", [] {
        std::vector<std::tuple<int, int, std::vector<unsigned>>> codes;
        std::apply(
            [&](auto... code) {
                (codes.emplace_back(code.kBits, code.kPlanes,
                                    std::vector<unsigned>(std::begin(code.kMasks), std::end(code.kMasks))),
                 ...);
            },
            TrellisCodes{});
        return codes;
    });

    // The address of GOMP_parallel in the OpenMP runtime that torch uses, see pool.h.
    m.def("use_team", [](uintptr_t address) { Pool::use_team(reinterpret_cast<Team>(address)); });

    m.def("advise_huge_pages",
          [](const Tensor<uint32_t>& memory) { advise_huge_pages(memory.data, memory.size * sizeof(uint32_t)); });

    m.def(
        "pack",
        [](const Layout& layout, const Tensor<const uint8_t>& codes, const Tensor<uint32_t>& words, int threads) {
            check(codes.size == layout.rows * layout.bits * ((layout.columns + 7) / 8) &&
                      words.size == layout.entries(),
                  "the codes or words do not fit the layout");
            Pool::shared().run(layout.stripes(), threads, [&](int64_t stripe) {
                pack_stripe(layout, codes.values(), words.values(), stripe);
            });
        },
        without_gil);

    m.def(
        "unpack",
        [](const Layout& layout, const Tensor<const uint32_t>& words, const Tensor<uint8_t>& codes, int threads) {
            check(codes.size == layout.rows * layout.bits * ((layout.columns + 7) / 8) &&
                      words.size == layout.entries(),
                  "the codes or words do not fit the layout");
            Pool::shared().run(layout.stripes(), threads, [&](int64_t stripe) {
                unpack_stripe(layout, words.values(), codes.values(), stripe);
            });
        },
        without_gil);

    m.def(
        "rotate",
        [](const ActivationTensor& x, const Floats& signs, const ActivationTensor& output, int threads) {
            check_output(x, output, x.columns());
            rotate_rows(**available_kernels(), activations(x, rotation(signs, x.columns())), x.columns(), output.data,
                        threads);
        },
        without_gil);

    nb::class_<Projection>(m, "Projection")
        .def(
            "__init__",
            [](Projection* self, const Layout& layout, const Tensor<const uint32_t>& words,
               const std::optional<Tensor<const uint8_t>>& scale_codes, const std::optional<Floats>& scales,
               const std::optional<Floats>& offsets, const Floats& row_scale, const std::optional<Floats>& bias,
               const std::optional<Floats>& signs) {
                new (self) Projection(projection(layout, words, scale_codes, scales, offsets, row_scale, bias, signs));
            },
            "layout"_a, "words"_a, "scale_codes"_a, "scales"_a, "offsets"_a, "row_scale"_a, "bias"_a, "signs"_a,
            nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
            nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>());

    m.def(
        "linear",
        [](const Projection& self, const ActivationTensor& x, const ActivationTensor& output, bool fast, int method,
           const std::string& kernels, int threads) {
            check(x.columns() == self.matrix.layout.columns, "the input must have the width of the matrix");
            check_output(x, output, self.matrix.layout.rows);
            linear(kernels_named(kernels), self.matrix, activations(x, self.rotation), output.data, fast,
                   static_cast<Method>(method), threads);
        },
        without_gil);

    // The rows `ids` of the matrix, which is for rotated inputs if the projection rotates.
    m.def(
        "gather",
        [](const Projection& self, const Tensor<const int64_t>& ids, const Tensor<float>& output, int threads) {
            const Layout& layout = self.matrix.layout;
            check(output.has_shape({ids.size, layout.columns}), "the output does not fit the rows");
            for (int64_t i = 0; i < ids.size; ++i)
                if (ids.values()[i] < 0 || ids.values()[i] >= layout.rows) throw nb::index_error("there is no such row");
            Pool::shared().run(ids.size, useful_threads(threads, output.size * int64_t{sizeof(float)}), [&](int64_t i) {
                gather_row(self.matrix, ids.values()[i], output.values() + i * layout.columns);
            });
        },
        without_gil);

    m.def(
        "codes_linear",
        [](const Tensor<const int8_t>& codes, const ActivationTensor& scale, const ActivationTensor& x,
           const ActivationTensor& output, int threads) {
            check(codes.axes == 2 && scale.has_shape({codes.shape[0]}) && x.has_shape({x.rows(), codes.shape[1]}),
                  "the codes do not fit the input or their scale");
            check_output(x, output, codes.shape[0]);
            multiply_codes(**available_kernels(),
                           {codes.values(), scale.data, scale.type(), codes.shape[0], codes.shape[1]},
                           activations(x, {nullptr, 1}), output.data, threads);
        },
        without_gil);

    m.def(
        "add_moments",
        [](const ActivationTensor& x, const std::optional<ActivationTensor>& other, const std::optional<Floats>& roots,
           const Tensor<float>& hessian, const std::optional<Tensor<float>>& cross, const std::string& kernels,
           int threads) {
            const int64_t columns = x.columns();
            check(x.axes == 2 && other.has_value() == cross.has_value() &&
                      (!other || (other->type() == x.type() && other->has_shape_of(x))) &&
                      (!roots || roots->has_shape({x.rows()})) && hessian.has_shape({columns, columns}) &&
                      (!cross || cross->has_shape({columns, columns})),
                  "the sums do not fit the activations");
            add_moments(kernels_named(kernels), {x.data, x.type(), x.columns(), values_or_null(roots), 0, x.rows()},
                        other ? other->data : nullptr, hessian.values(), values_or_null(cross), threads);
        },
        "x"_a, "other"_a, "roots"_a, "hessian"_a, "cross"_a, "kernels"_a, "threads"_a, without_gil);

    m.def(
        "settle",
        [](bool descend, const Floats& goals, const FloatRows& coupling, const Floats& levels, const Floats& midpoints,
           const Tensor<const int64_t>& groups, const Tensor<float>& values, const Tensor<uint8_t>& ranks,
           const Tensor<float>& steps, const std::string& kernels, int threads) {
            check(levels.axes == 3 && levels.shape[2] == goals.shape[1] &&
                      midpoints.has_shape({levels.shape[0] - 1, levels.shape[1], levels.shape[2]}),
                  "the levels do not fit the goals");
            const Stretch columns = stretch(descend, goals, coupling, groups, levels.shape[1], values, ranks, steps);
            settle(kernels_named(kernels), columns,
                   LevelTables{levels.values(), midpoints.values(), levels.shape[0], levels.shape[1]}, threads);
        },
        "descend"_a, "goals"_a, "coupling"_a, "levels"_a, "midpoints"_a, "groups"_a, "values"_a, "ranks"_a, "steps"_a,
        "kernels"_a, "threads"_a, without_gil);

    m.def(
        "settle_paths",
        [](bool descend, const Floats& goals, const FloatRows& coupling, const Floats& levels, int bits,
           const std::vector<int>& masks, int64_t stripe, const Tensor<const int64_t>& groups,
           const Tensor<float>& values, const Tensor<uint8_t>& stored, const Tensor<float>& steps,
           const std::string& kernels, int threads) {
            const Paths paths{trellis_code(bits, masks), stripe, levels.values()};
            check(levels.axes == 3 && levels.shape[1] == goals.shape[1] &&
                      levels.shape[2] == int64_t{1} << paths.code.planes,
                  "the levels do not fit the goals or the code");
            check(stripe >= 1, "a stripe has at least one row");
            const Stretch columns = stretch(descend, goals, coupling, groups, levels.shape[0], values, stored, steps);
            settle(kernels_named(kernels), columns, paths, threads);
        },
        "descend"_a, "goals"_a, "coupling"_a, "levels"_a, "bits"_a, "masks"_a, "stripe"_a, "groups"_a, "values"_a,
        "stored"_a, "steps"_a, "kernels"_a, "threads"_a, without_gil);

    nb::class_<DecoderBlock>(m, "DecoderBlock")
        .def(
            "__init__",
            [](DecoderBlock* self, const std::vector<const Projection*>& linears,
               const std::vector<std::optional<Floats>>& norms, bool joint, float epsilon, bool gelu,
               int64_t head_size, float scale, float residual, bool turned) {
                check(linears.size() == 7, "a block needs seven linears");
                check(norms.size() == 6, "a block needs six norms, each of which may be None");
                const float* weights[6];
                for (int i = 0; i < 6; ++i) weights[i] = values_or_null(norms[i]);
                new (self) DecoderBlock{*linears[0],
                                        *linears[1],
                                        *linears[2],
                                        *linears[3],
                                        *linears[4],
                                        *linears[5],
                                        *linears[6],
                                        {weights[0], weights[1], weights[2], weights[3], weights[4], weights[5], joint},
                                        epsilon,
                                        gelu ? Activation::kGeluTanh : Activation::kSilu,
                                        head_size,
                                        scale,
                                        residual,
                                        turned};
            },
            "linears"_a, "norms"_a, "joint"_a, "epsilon"_a, "gelu"_a, "head_size"_a, "scale"_a, "residual"_a,
            "turned"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def(
            "heads",
            [](const DecoderBlock& self, const ActivationTensor& hidden, const ActivationTensor& cosines,
               const ActivationTensor& sines, const Tensor<float>& queries, const ActivationTensor& keys,
               const ActivationTensor& values, bool fast, int threads) {
                const Hidden state = hidden_state(self, hidden);
                check(queries.size == state.rows * self.query_heads() * self.head_size,
                      "queries must have the heads of the block");
                decode_heads({**available_kernels(), fast, threads}, self, state,
                             positions(self, cosines, sines, state.rows), queries.values(), fresh(self, keys, state),
                             fresh(self, values, state));
            },
            without_gil)
        .def(
            "rest",
            [](const DecoderBlock& self, const ActivationTensor& hidden, const Floats& queries,
               const StridedActivations& keys, const StridedActivations& values, const ActivationTensor& output,
               bool fast, int threads) {
                const Hidden state = hidden_state(self, hidden);
                const Cached all_keys = cached(self, keys, state), all_values = cached(self, values, state);
                check(queries.size == state.rows * self.query_heads() * self.head_size,
                      "queries must have the heads of the block");
                const int64_t others = tokens_of_each(state) - 1;
                check(keys.shape[2] == values.shape[2] && keys.shape[2] > others,
                      "keys and values must have the same number of tokens, the new ones included");
                check_output(hidden, output, hidden.columns());
                decode_rest({**available_kernels(), fast, threads}, self, state, queries.values(), all_keys,
                            all_values, keys.shape[2] - others, output.data);
            },
            without_gil);

    nb::class_<Dictionaries>(m, "Dictionaries")
        .def("__init__",
             [](Dictionaries* self, const nb::tuple& holders, const nb::tuple& names, const nb::tuple& objects,
                const nb::tuple& empty, const nb::tuple& plain) {
                 const std::vector<PyObject*> dictionaries = borrowed(holders);
                 check(names.size() == dictionaries.size() && objects.size() == dictionaries.size(),
                       "every place needs a holder, a name and an object");
                 new (self) Dictionaries{{}, borrowed(empty), borrowed(plain)};
                 for (size_t i = 0; i < dictionaries.size(); ++i)
                     self->standing.push_back({dictionaries[i], names[i].ptr(), objects[i].ptr()});
             })
        .def("hold", &Dictionaries::hold)
        .def("silent", [](const Dictionaries& self, const nb::str& forward) { return self.silent(forward.ptr()); });

    nb::class_<Caches>(m, "Caches")
        .def(
            "__init__",
            [](Caches* self, std::vector<ActivationTensor> keys, std::vector<ActivationTensor> values) {
                new (self) Caches{std::move(keys), std::move(values)};
            },
            "keys"_a, "values"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());

    nb::class_<DecoderStack>(m, "DecoderStack")
        .def(
            "__init__",
            [](DecoderStack* self, const std::vector<const DecoderBlock*>& blocks) {
                check(!blocks.empty(), "a stack needs at least one block");
                new (self) DecoderStack{blocks};
            },
            "blocks"_a, nb::keep_alive<1, 2>())
        .def(
            "decode",
            [](const DecoderStack& self, const ActivationTensor& hidden, const ActivationTensor& cosines,
               const ActivationTensor& sines, const Caches& caches, int64_t tokens, const ActivationTensor& output,
               bool fast, int threads) {
                const DecoderBlock& first = *self.blocks.front();
                const Hidden state = hidden_state(first, hidden);
                check_output(hidden, output, hidden.columns());
                decode_stack({**available_kernels(), fast, threads}, self, state,
                             positions(first, cosines, sines, state.rows), block_caches(self, caches, state, tokens),
                             tokens, output.data);
            },
            without_gil);
}
