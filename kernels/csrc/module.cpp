// Makes the shared library importable: `import bert_fast._C` loads it, and loading it runs the
// registrations of every op in this directory. The module itself has no contents.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
