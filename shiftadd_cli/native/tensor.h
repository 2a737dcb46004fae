// Torch tensors as arguments of the extension, with checks of their type and memory order.
//
// The extension is built without torch, so that it works with every version of torch. It reads a tensor through its
// Python attributes, which takes 0.4 µs. DLPack (nb::ndarray) takes 5 µs, and a model whose blocks are not computed in
// one call passes 400 tensors per token.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <type_traits>

#include "kernels.h"

namespace shiftadd {

enum class Dtype { kFloat32, kBFloat16, kInt8, kUInt8, kInt32, kInt64, kOther };

// The memory of a tensor on a CPU with at most eight axes.
struct TensorView {
    static constexpr int kMostAxes = 8;

    void* data = nullptr;
    Dtype dtype = Dtype::kOther;
    int axes = 0;
    int64_t shape[kMostAxes] = {}, strides[kMostAxes] = {};
    int64_t size = 1;
    bool contiguous = true;

    bool has_shape(std::initializer_list<int64_t> expected) const {
        return std::equal(shape, shape + axes, expected.begin(), expected.end());
    }
    bool has_shape_of(const TensorView& other) const {
        return std::equal(shape, shape + axes, other.shape, other.shape + other.axes);
    }

    // Reads `source`. Returns false if it is not such a tensor.
    bool read(PyObject* source);
};

// A contiguous tensor of float, int8_t, uint8_t, uint32_t (torch's int32) or int64_t.
template <class T>
struct Tensor : TensorView {
    T* values() const { return static_cast<T*>(data); }
    bool fits() const {
        using Value = std::remove_const_t<T>;
        const Dtype expected = std::is_same_v<Value, float>      ? Dtype::kFloat32
                               : std::is_same_v<Value, int8_t>   ? Dtype::kInt8
                               : std::is_same_v<Value, uint8_t>  ? Dtype::kUInt8
                               : std::is_same_v<Value, uint32_t> ? Dtype::kInt32
                                                                 : Dtype::kInt64;
        return contiguous && dtype == expected;
    }
};

// A float32 matrix with contiguous rows and any row stride.
struct FloatRows : TensorView {
    const float* values() const { return static_cast<const float*>(data); }
    bool fits() const { return dtype == Dtype::kFloat32 && axes == 2 && (strides[1] == 1 || shape[1] == 1); }
};

// Activations in float32 or bfloat16, contiguous along the last axis and with any other strides.
struct StridedActivations : TensorView {
    Number type() const { return dtype == Dtype::kFloat32 ? Number::kFloat32 : Number::kBFloat16; }
    int64_t columns() const { return axes ? shape[axes - 1] : 1; }
    int64_t rows() const { return columns() ? size / columns() : 0; }
    bool fits() const {
        const bool row = !axes || strides[axes - 1] == 1 || shape[axes - 1] == 1;
        return row && (dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16);
    }
};

// Contiguous activations.
struct ActivationTensor : StridedActivations {
    bool fits() const { return contiguous && StridedActivations::fits(); }
};

// The values of a tensor, or null for None.
template <class T>
T* values_or_null(const std::optional<Tensor<T>>& tensor) {
    return tensor ? tensor->values() : nullptr;
}

inline Dtype dtype_of(PyObject* dtype) {
    static const char* const names[] = {"float32", "bfloat16", "int8", "uint8", "int32", "int64"};
    static PyObject* dtypes[std::size(names)] = {};
    if (!dtypes[0]) {
        PyObject* torch = PyImport_ImportModule("torch");
        for (size_t i = 0; torch && i < std::size(names); ++i) dtypes[i] = PyObject_GetAttrString(torch, names[i]);
        Py_XDECREF(torch);
    }
    return static_cast<Dtype>(std::find(std::begin(dtypes), std::end(dtypes), dtype) - std::begin(dtypes));
}

inline bool TensorView::read(PyObject* source) {
    enum { kIsCpu, kShape, kDtype, kStride, kDataPtr, kCount };
    static PyObject* const names[kCount] = {
        PyUnicode_InternFromString("is_cpu"), PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("dtype"),
        PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("data_ptr")};
    PyObject* values[kCount] = {};
    bool valid = true;
    for (int i = 0; valid && i < kCount; ++i) {
        values[i] = i < kStride ? PyObject_GetAttr(source, names[i]) : PyObject_CallMethodNoArgs(source, names[i]);
        valid = values[i] && (i != kIsCpu || values[i] == Py_True);
    }
    PyObject *lengths = values[kShape], *steps = values[kStride];
    valid = valid && PyTuple_Check(lengths) && PyTuple_Check(steps) && PyTuple_GET_SIZE(lengths) <= kMostAxes &&
            PyTuple_GET_SIZE(lengths) == PyTuple_GET_SIZE(steps);
    if (valid) {
        *this = {};
        data = PyLong_AsVoidPtr(values[kDataPtr]);
        dtype = dtype_of(values[kDtype]);
        axes = static_cast<int>(PyTuple_GET_SIZE(lengths));
        for (int axis = axes; axis-- > 0;) {
            shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(lengths, axis));
            strides[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(steps, axis));
            contiguous = contiguous && (shape[axis] == 1 || strides[axis] == size);
            size *= shape[axis];
        }
        contiguous = contiguous || size == 0;
        valid = !PyErr_Occurred();
    }
    for (PyObject* value : values) Py_XDECREF(value);
    PyErr_Clear();
    return valid;
}

}  // namespace shiftadd

namespace nanobind::detail {

template <class View>
struct tensor_caster {
    NB_TYPE_CASTER(View, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        return value.read(source.ptr()) && value.fits();
    }
};

template <class T>
struct type_caster<shiftadd::Tensor<T>> : tensor_caster<shiftadd::Tensor<T>> {};
template <>
struct type_caster<shiftadd::FloatRows> : tensor_caster<shiftadd::FloatRows> {};
template <>
struct type_caster<shiftadd::StridedActivations> : tensor_caster<shiftadd::StridedActivations> {};
template <>
struct type_caster<shiftadd::ActivationTensor> : tensor_caster<shiftadd::ActivationTensor> {};

}  // namespace nanobind::detail
