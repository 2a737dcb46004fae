// Python's view of the kernels. Tensors come as addresses: the extension is built without torch, and so serves every
// version of it. The Python side (ops.py) checks shapes, dtypes and contiguity before it passes any.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "block.h"
#include "codes.h"
#include "dictionaries.h"
#include "engine.h"
#include "moments.h"
#include "pack.h"
#include "pool.h"
#include "settle.h"
#include "stack.h"

namespace nb = nanobind;
using namespace shiftadd;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& kernels_named(const std::string& name) {
    const Kernels* found = name.empty() ? *available_kernels() : find_kernels(name.c_str());
    if (!found) throw nb::value_error("this processor or build has no such kernels");
    return *found;
}

Matrix matrix_at(const Layout& layout, uintptr_t words, uintptr_t scale_codes, uintptr_t scales, uintptr_t offsets,
                 uintptr_t row_scale, uintptr_t bias) {
    return {layout,
            at<const uint32_t>(words),
            at<const uint8_t>(scale_codes),
            at<const float>(scales),
            at<const float>(offsets),
            at<const float>(row_scale),
            at<const float>(bias)};
}

void check_rows(int rows) {
    if (rows < 1 || rows > kTileRows) throw nb::value_error("rows must be 1 to 8");
}

Number number(int type) { return type == 0 ? Number::kFloat32 : Number::kBFloat16; }

}  // namespace

NB_MODULE(_native, m) {
    // Python keeps layouts in a cache until the interpreter is gone; that is no leak.
    nb::set_leak_warnings(false);
    nb::class_<Layout>(m, "Layout")
        .def(
            "__init__",
            [](Layout* self, int64_t rows, int64_t columns, int64_t group_columns, int bits) {
                if (rows < 1 || columns < 1 || group_columns < 1 || bits < 1 || bits > 8)
                    throw nb::value_error("sizes must be positive, and bits 1 to 8");
                new (self) Layout{rows, columns, group_columns < columns ? group_columns : columns, bits};
            },
            nb::arg("rows"), nb::arg("columns"), nb::arg("group_columns"), nb::arg("bits"))
        .def_prop_ro("entries", &Layout::entries)
        .def_prop_ro("blocks", &Layout::blocks)
        .def_prop_ro("groups", &Layout::groups)
        .def_ro("bits", &Layout::bits)
        .def_ro("rows", &Layout::rows);

    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* const* each = available_kernels(); *each; ++each) names.emplace_back((*each)->name);
        return names;
    });

    // The address of GOMP_parallel in the OpenMP runtime that torch uses, see pool.h.
    m.def("use_team", [](uintptr_t address) { Pool::use_team(reinterpret_cast<Team>(address)); });

    m.def("advise_huge_pages", [](uintptr_t memory, size_t bytes) { advise_huge_pages(at<void>(memory), bytes); });

    m.def(
        "pack",
        [](const Layout& layout, uintptr_t codes, uintptr_t words, int threads) {
            Pool::shared().run(layout.stripes(), threads, [&](int64_t stripe) {
                pack_stripe(layout, at<const uint8_t>(codes), at<uint32_t>(words), stripe);
            });
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "unpack",
        [](const Layout& layout, uintptr_t words, uintptr_t codes, int threads) {
            Pool::shared().run(layout.stripes(), threads, [&](int64_t stripe) {
                unpack_stripe(layout, at<const uint32_t>(words), at<uint8_t>(codes), stripe);
            });
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "rotate",
        [](uintptr_t x, int type, int64_t rows, int64_t columns, uintptr_t signs, int64_t order, uintptr_t output,
           int threads) {
            const Activations input{at<const void>(x), number(type), rows, {at<const float>(signs), order}};
            rotate_rows(**available_kernels(), input, columns, at<void>(output), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "linear",
        [](const Layout& layout, uintptr_t words, uintptr_t scale_codes, uintptr_t scales, uintptr_t offsets,
           uintptr_t row_scale, uintptr_t bias, uintptr_t x, int type, int64_t rows, uintptr_t signs, int64_t order,
           uintptr_t output, bool fast, int method, const std::string& kernels, int threads) {
            const Matrix matrix = matrix_at(layout, words, scale_codes, scales, offsets, row_scale, bias);
            const Activations input{at<const void>(x), number(type), rows, {at<const float>(signs), order}};
            linear(kernels_named(kernels), matrix, input, at<void>(output), fast, static_cast<Method>(method), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "codes_linear",
        [](uintptr_t codes, uintptr_t scale, int scale_type, int64_t code_rows, int64_t columns, uintptr_t x, int type,
           int64_t rows, uintptr_t output, int threads) {
            multiply_codes(**available_kernels(),
                           {at<const int8_t>(codes), at<const void>(scale), number(scale_type), code_rows, columns},
                           {at<const void>(x), number(type), rows, {nullptr, 1}}, at<void>(output), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "add_moments",
        [](uintptr_t x, uintptr_t other, int type, int64_t tokens, int64_t columns, uintptr_t roots, uintptr_t hessian,
           uintptr_t cross, const std::string& kernels, int threads) {
            add_moments(kernels_named(kernels), {at<const void>(x), number(type), columns, at<const float>(roots), 0, tokens},
                        at<const void>(other), at<float>(hessian), at<float>(cross), threads);
        },
        nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "settle",
        [](bool descend, int64_t columns, int64_t rows, uintptr_t goals, uintptr_t coupling, int64_t coupling_stride,
           uintptr_t levels, uintptr_t midpoints, int64_t level_count, int64_t group_count, uintptr_t groups,
           uintptr_t values, uintptr_t ranks, uintptr_t steps, const std::string& kernels, int threads) {
            const Stretch stretch{descend, columns, rows, at<const float>(goals), at<const float>(coupling),
                                  coupling_stride, at<const float>(levels), at<const float>(midpoints), level_count,
                                  group_count, at<const int64_t>(groups), at<float>(values), at<uint8_t>(ranks),
                                  at<float>(steps)};
            settle(kernels_named(kernels), stretch, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Projection>(m, "Projection")
        .def("__init__", [](Projection* self, const Layout& layout, uintptr_t words, uintptr_t scale_codes,
                            uintptr_t scales, uintptr_t offsets, uintptr_t row_scale, uintptr_t bias, uintptr_t signs) {
            new (self) Projection{matrix_at(layout, words, scale_codes, scales, offsets, row_scale, bias),
                                  {at<const float>(signs), layout.columns & -layout.columns}};
        });

    nb::class_<DecoderBlock>(m, "DecoderBlock")
        .def("__init__",
             [](DecoderBlock* self, const Projection& query, const Projection& key, const Projection& value,
                const Projection& output, const Projection& gate, const Projection& up, const Projection& down,
                const std::vector<uintptr_t>& norms, bool joint, float epsilon, bool gelu, int64_t head_size,
                float scale, float residual, bool turned) {
                 if (norms.size() != 6) throw nb::value_error("a block has six norms, or zeros for them");
                 new (self) DecoderBlock{query,
                                         key,
                                         value,
                                         output,
                                         gate,
                                         up,
                                         down,
                                         {at<const float>(norms[0]), at<const float>(norms[1]),
                                          at<const float>(norms[2]), at<const float>(norms[3]),
                                          at<const float>(norms[4]), at<const float>(norms[5]), joint},
                                         epsilon,
                                         gelu ? Activation::kGeluTanh : Activation::kSilu,
                                         head_size,
                                         scale,
                                         residual,
                                         turned};
             })
        .def(
            "heads",
            [](const DecoderBlock& self, uintptr_t hidden, int type, int rows, uintptr_t cosines, uintptr_t sines,
               int position_type, int64_t position_stride, uintptr_t queries, uintptr_t keys, uintptr_t values,
               bool fast, int threads) {
                check_rows(rows);
                const int64_t width = self.key_heads() * self.head_size;
                decode_heads({**available_kernels(), fast, threads}, self, {at<const void>(hidden), number(type), rows},
                             {at<const void>(cosines), at<const void>(sines), number(position_type), position_stride},
                             at<float>(queries),
                             {at<void>(keys), width, self.head_size}, {at<void>(values), width, self.head_size});
            },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "rest",
            [](const DecoderBlock& self, uintptr_t hidden, int type, int rows, uintptr_t queries, uintptr_t keys,
               int64_t key_row, int64_t key_head, int64_t key_token, uintptr_t values, int64_t value_row,
               int64_t value_head, int64_t value_token, int64_t tokens, uintptr_t output, bool fast, int threads) {
                check_rows(rows);
                decode_rest({**available_kernels(), fast, threads}, self, {at<const void>(hidden), number(type), rows},
                            at<const float>(queries), {at<const void>(keys), key_row, key_head, key_token},
                            {at<const void>(values), value_row, value_head, value_token}, tokens, at<void>(output));
            },
            nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Dictionaries>(m, "Dictionaries")
        .def("__init__",
             [](Dictionaries* self, const nb::tuple& holders, const nb::tuple& names, const nb::tuple& objects,
                const nb::tuple& empty, const nb::tuple& plain) {
                 const std::vector<PyObject*> found = borrowed(holders);
                 if (names.size() != found.size() || objects.size() != found.size())
                     throw nb::value_error("every place has a holder, a name and an object");
                 new (self) Dictionaries{{}, borrowed(empty), borrowed(plain)};
                 for (size_t i = 0; i < found.size(); ++i)
                     self->standing.push_back({found[i], names[i].ptr(), objects[i].ptr()});
             })
        .def("hold", &Dictionaries::hold)
        .def("silent", [](const Dictionaries& self, const nb::str& forward) { return self.silent(forward.ptr()); });

    // Its blocks must live as long: whoever makes it keeps them.
    nb::class_<DecoderStack>(m, "DecoderStack")
        .def("__init__",
             [](DecoderStack* self, const std::vector<const DecoderBlock*>& blocks) {
                 if (blocks.empty()) throw nb::value_error("a stack has a block at least");
                 new (self) DecoderStack{blocks};
             })
        .def(
            "decode",
            [](const DecoderStack& self, uintptr_t hidden, int type, int rows, uintptr_t cosines, uintptr_t sines,
               int position_type, int64_t position_stride, const std::vector<uintptr_t>& keys,
               const std::vector<uintptr_t>& values, const std::vector<int64_t>& capacities, int64_t tokens,
               uintptr_t output, bool fast, int threads) {
                check_rows(rows);
                const size_t count = self.blocks.size();
                if (keys.size() != count || values.size() != count || capacities.size() != count)
                    throw nb::value_error("every block has keys and values");
                std::vector<BlockCache> caches;
                for (size_t i = 0; i < count; ++i) {
                    if (tokens < 0 || tokens >= capacities[i]) throw nb::value_error("a cache is full");
                    caches.push_back({at<void>(keys[i]), at<void>(values[i]), capacities[i]});
                }
                decode_stack({**available_kernels(), fast, threads}, self, {at<const void>(hidden), number(type), rows},
                             {at<const void>(cosines), at<const void>(sines), number(position_type), position_stride},
                             caches, tokens, at<void>(output));
            },
            nb::call_guard<nb::gil_scoped_release>());
}
