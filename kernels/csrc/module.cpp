// Makes the shared library importable: `import bert_fast._C` loads it, and loading it runs the
// registrations of every op in this directory. Its own functions are about Python's objects.
#define PY_SSIZE_T_CLEAN  // of `y#`
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <vector>

// give(address) for the type of each object, and for the keys and values of each dict, before which
// comes their number; until it returns false. Whether it never did.
template <class F>
static bool each_address(PyObject* objects, PyObject* dicts, const F& give) {
  for (Py_ssize_t i = 0, count = PyTuple_Size(objects); i < count; ++i)
    if (!give(reinterpret_cast<uintptr_t>(Py_TYPE(PyTuple_GetItem(objects, i))))) return false;
  for (Py_ssize_t i = 0, count = PyTuple_Size(dicts); i < count; ++i) {
    PyObject *dict = PyTuple_GetItem(dicts, i), *key, *value;
    if (!give(static_cast<uintptr_t>(PyDict_Size(dict)))) return false;
    for (Py_ssize_t next = 0; PyDict_Next(dict, &next, &key, &value);)
      if (!give(reinterpret_cast<uintptr_t>(key)) || !give(reinterpret_cast<uintptr_t>(value)))
        return false;
  }
  return true;
}

static bool are_dicts(PyObject* dicts) {
  for (Py_ssize_t i = 0, count = PyTuple_Size(dicts); i < count; ++i)
    if (!PyDict_Check(PyTuple_GetItem(dicts, i))) {
      PyErr_SetString(PyExc_TypeError, "dicts: expected a tuple of dicts");
      return false;
    }
  return true;
}

// addresses(objects, dicts) -> bytes
static PyObject* addresses(PyObject*, PyObject* args) {
  PyObject *objects, *dicts;
  if (!PyArg_ParseTuple(args, "O!O!", &PyTuple_Type, &objects, &PyTuple_Type, &dicts) ||
      !are_dicts(dicts))
    return nullptr;
  std::vector<uintptr_t> found;
  each_address(objects, dicts, [&](uintptr_t address) {
    found.push_back(address);
    return true;
  });
  const auto bytes = static_cast<Py_ssize_t>(found.size() * sizeof(uintptr_t));
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.data()), bytes);
}

// unchanged(objects, dicts, known) -> bool: whether these are still their addresses.
static PyObject* unchanged(PyObject*, PyObject* args) {
  PyObject *objects, *dicts;
  const char* known;
  Py_ssize_t bytes;
  if (!PyArg_ParseTuple(
          args, "O!O!y#", &PyTuple_Type, &objects, &PyTuple_Type, &dicts, &known, &bytes) ||
      !are_dicts(dicts))
    return nullptr;
  const char *at = known, *end = known + bytes;
  const bool same = each_address(objects, dicts, [&](uintptr_t address) {
    if (at == end || std::memcmp(at, &address, sizeof address) != 0) return false;
    at += sizeof address;
    return true;
  });
  return PyBool_FromLong(same && at == end);
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"addresses", addresses, METH_VARARGS, nullptr},
      {"unchanged", unchanged, METH_VARARGS, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&module);
}
