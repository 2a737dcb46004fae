// Whether dictionaries of modules are as they were: what Watch (watch.py) asks before every token. It keeps the objects,
// for Python's collector could not see through this.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

namespace shiftadd {

struct Dictionaries {
    struct Standing {
        PyObject *holder, *name, *object;
    };
    std::vector<Standing> standing;  // `holder` has `object` under `name`, or nothing where that is None
    std::vector<PyObject*> empty;    // have nothing
    std::vector<PyObject*> plain;    // have no `forward`

    bool hold() const {
        for (const Standing& each : standing) {
            PyObject* found = PyDict_GetItemWithError(each.holder, each.name);
            if ((found ? found : Py_None) != each.object) return false;
        }
        return true;
    }

    bool silent(PyObject* forward) const {
        for (PyObject* each : empty)
            if (PyDict_Size(each) != 0) return false;
        for (PyObject* each : plain)
            if (PyDict_Contains(each, forward) != 0) return false;
        return true;
    }
};

// The dictionaries in a tuple, whose owner keeps them. Raises TypeError for anything else.
inline std::vector<PyObject*> borrowed(const nanobind::tuple& objects) {
    std::vector<PyObject*> found;
    for (nanobind::handle each : objects) {
        if (!PyDict_Check(each.ptr())) throw nanobind::type_error("only dictionaries can be watched");
        found.push_back(each.ptr());
    }
    return found;
}

}  // namespace shiftadd
