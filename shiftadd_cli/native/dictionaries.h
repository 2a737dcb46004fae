// Checks that the dictionaries of modules have not changed; Watch (module_watch.py) calls them before every token. It
// owns the objects, because Python's garbage collector cannot see references in here.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

namespace shiftadd {

struct Dictionaries {
    struct Standing {
        PyObject *holder, *name, *object;
    };
    std::vector<Standing> standing;  // `holder` has `object` under `name`, or nothing if that is None
    std::vector<PyObject*> empty;    // must be empty
    std::vector<PyObject*> plain;    // must have no `forward`

    bool hold() const {
        for (const Standing& entry : standing) {
            PyObject* object = PyDict_GetItemWithError(entry.holder, entry.name);
            if ((object ? object : Py_None) != entry.object) return false;
        }
        return true;
    }

    bool silent(PyObject* forward) const {
        for (PyObject* dictionary : empty)
            if (PyDict_Size(dictionary) != 0) return false;
        for (PyObject* dictionary : plain)
            if (PyDict_Contains(dictionary, forward) != 0) return false;
        return true;
    }
};

// The dictionaries in a tuple, borrowed from its owner. Raises TypeError for other objects.
inline std::vector<PyObject*> borrowed(const nanobind::tuple& objects) {
    std::vector<PyObject*> dictionaries;
    for (nanobind::handle object : objects) {
        if (!PyDict_Check(object.ptr())) throw nanobind::type_error("only dictionaries can be watched");
        dictionaries.push_back(object.ptr());
    }
    return dictionaries;
}

}  // namespace shiftadd
