// The extension as a Python module: its operators as plain functions, for eager calls on ordinary tensors.
// Torch's dispatcher takes 6 to 10 microseconds for a layer's seventeen arguments, more than a small layer's
// work; these functions take one or two. Python's limited C API alone, so one binary still serves every
// version.
//
// A tensor crosses by torch._C._aoti, which turns a Python tensor into a handle of the stable ABI and back,
// as the code that torch.compile writes does it. Where an argument is no plain tensor, a layer's operator is
// called; a stack raises Unfit, as it does for whatever does not fit: then the caller's checks say what is
// wrong.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <string_view>
#include <tuple>
#include <utility>

#include "../layer/program.h"
#include "schemas.h"

namespace rnnkit {
namespace {

// What `bind` was given; it keeps a reference to each for good.
struct PythonObjects {
  PyObject *to_handle = nullptr, *to_tensors = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr, *is_neg = nullptr;
  std::array<PyObject*, 2> operators{};
} python;

// The exceptions rnnkit._C.Unfit and, of a tensor whose memory does not hold its values, rnnkit._C.NotPlain.
PyObject *unfit = nullptr, *not_plain = nullptr;

// Raised in Python already.
struct PythonError {};

template <class T>
constexpr bool is_vector =
    std::is_same_v<T, std::vector<Tensor>> || std::is_same_v<T, std::vector<OptionalTensor>>;

template <class T>
T from_python(PyObject* o) {
  if constexpr (std::is_same_v<T, OptionalTensor>) {
    return o == Py_None ? OptionalTensor() : OptionalTensor(from_python<Tensor>(o));
  } else if constexpr (std::is_same_v<T, Tensor>) {
    PyObject* capsule = PyObject_CallFunctionObjArgs(python.to_handle, o, nullptr);
    if (capsule == nullptr) throw PythonError{};
    void* handle = PyCapsule_GetPointer(capsule, nullptr);
    Py_DecRef(capsule);
    if (handle == nullptr) throw PythonError{};
    return Tensor(static_cast<AtenTensorHandle>(handle));
  } else if constexpr (is_vector<T>) {
    T all;
    const Py_ssize_t count = PyTuple_Size(o);
    all.reserve(static_cast<size_t>(count));
    for (Py_ssize_t k = 0; k < count; ++k)
      all.push_back(from_python<typename T::value_type>(PyTuple_GetItem(o, k)));
    return all;
  } else if constexpr (std::is_same_v<T, std::string_view>) {
    char* bytes = nullptr;
    Py_ssize_t count = 0;
    if (PyBytes_AsStringAndSize(o, &bytes, &count) != 0) throw PythonError{};
    return std::string_view(bytes, static_cast<size_t>(count));
  } else if constexpr (std::is_same_v<T, double>) {
    return PyFloat_AsDouble(o);
  } else {
    const long long value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred() != nullptr) throw PythonError{};
    return static_cast<T>(value);
  }
}

// A list of tensors.
PyObject* to_python(const std::vector<Tensor>& all) {
  PyObject* capsules = PyList_New(static_cast<Py_ssize_t>(all.size()));
  if (capsules == nullptr) throw PythonError{};
  for (size_t k = 0; k < all.size(); ++k) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(all[k].get(), &handle));
    PyList_SetItem(capsules, static_cast<Py_ssize_t>(k), PyCapsule_New(handle, nullptr, nullptr));
  }
  PyObject* made = PyObject_CallFunctionObjArgs(python.to_tensors, capsules, nullptr);
  Py_DecRef(capsules);
  if (made == nullptr) throw PythonError{};
  return made;
}

// The same, with None where there is no tensor.
PyObject* to_python(const std::vector<OptionalTensor>& all) {
  std::vector<Tensor> there;
  there.reserve(all.size());
  for (const OptionalTensor& v : all) {
    if (v.has_value()) there.push_back(*v);
  }
  PyObject* tensors = to_python(there);
  PyObject* made = PyList_New(static_cast<Py_ssize_t>(all.size()));
  if (made == nullptr) {
    Py_DecRef(tensors);
    throw PythonError{};
  }
  Py_ssize_t next = 0;
  for (size_t k = 0; k < all.size(); ++k) {
    PyObject* v = all[k].has_value() ? PyList_GetItem(tensors, next++) : Py_None;
    Py_IncRef(v);
    PyList_SetItem(made, static_cast<Py_ssize_t>(k), v);
  }
  Py_DecRef(tensors);
  return made;
}

// Lets other Python threads run while the engine works.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Whether the memory of a tensor holds its values: in a subclass, and where torch keeps a minus sign back
// until someone looks (the imaginary part of a conjugate), it does not.
bool is_plain_tensor(PyObject* o) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != python.tensor && type != python.parameter) return false;
  PyObject* negative = PyObject_CallFunctionObjArgs(python.is_neg, o, nullptr);
  if (negative == nullptr) PyErr_Clear();
  Py_DecRef(negative);
  return negative == Py_False;
}

// Whether from_python<T> takes `o`.
template <class T>
bool fits(PyObject* o) {
  if constexpr (std::is_same_v<T, OptionalTensor>) {
    return o == Py_None || is_plain_tensor(o);
  } else if constexpr (std::is_same_v<T, Tensor>) {
    return is_plain_tensor(o);
  } else if constexpr (is_vector<T>) {
    if (!PyTuple_Check(o)) return false;
    for (Py_ssize_t k = 0, count = PyTuple_Size(o); k < count; ++k) {
      if (!fits<typename T::value_type>(PyTuple_GetItem(o, k))) return false;
    }
    return true;
  } else if constexpr (std::is_same_v<T, std::string_view>) {
    return PyBytes_Check(o);
  } else if constexpr (std::is_same_v<T, double>) {
    return PyFloat_Check(o);
  } else {
    return PyLong_Check(o);
  }
}

template <class... Args, size_t... k>
bool all_fit(PyObject* const* given, std::index_sequence<k...>) {
  return (fits<std::decay_t<Args>>(given[k]) && ...);
}

template <class Result, class... Args, size_t... k>
PyObject* call(Result (*f)(Args...), PyObject* const* given, std::index_sequence<k...>) {
  std::tuple<std::decay_t<Args>...> args{from_python<std::decay_t<Args>>(given[k])...};
  Result found = [&] {
    const ReleaseGil released;
    // What is not taken by reference is a copy: `args` goes when the GIL is back.
    return f(std::get<k>(args)...);
  }();
  return to_python(found);
}

// Where an argument is no plain tensor: calls operator `number`, or raises NotPlain where that is -1.
template <int number>
PyObject* call_operator(PyObject* const* given, Py_ssize_t count) {
  if constexpr (number < 0) {
    PyErr_SetString(not_plain,
                    "rnnkit: an argument is not of the kind that is expected here, such as a plain tensor");
    return nullptr;
  } else {
    PyObject* all = PyTuple_New(count);
    if (all == nullptr) return nullptr;
    for (Py_ssize_t k = 0; k < count; ++k) {
      Py_IncRef(given[k]);
      PyTuple_SetItem(all, k, given[k]);
    }
    PyObject* found = PyObject_Call(python.operators[number], all, nullptr);
    Py_DecRef(all);
    return found;
  }
}

template <int number, class Result, class... Args>
PyObject* checked(Result (*f)(Args...), PyObject* const* given, Py_ssize_t count) {
  if (count != sizeof...(Args)) {
    return PyErr_Format(PyExc_TypeError, "rnnkit: %zd arguments must be given, got %zd",
                        static_cast<Py_ssize_t>(sizeof...(Args)), count);
  }
  if (!all_fit<Args...>(given, std::index_sequence_for<Args...>{}))
    return call_operator<number>(given, count);
  try {
    return call(f, given, std::index_sequence_for<Args...>{});
  } catch (const PythonError&) {
  } catch (const NoMemory&) {
    return call_operator<number>(given, count);
  } catch (const Unfit& error) {
    PyErr_SetString(unfit, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <int number, auto f>
PyObject* method(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return checked<number>(f, given, count);
}

// bind(to_handle, to_tensors, Tensor, Parameter, Tensor.is_neg, the two operators in the order of the
// methods below)
PyObject* bind(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "rnnkit: 7 arguments must be given, got %zd", count);
  for (Py_ssize_t k = 0; k < count; ++k) Py_IncRef(given[k]);
  python = {given[0], given[1], given[2], given[3], given[4], {given[5], given[6]}};
  Py_IncRef(Py_None);
  return Py_None;
}

// at::hasCallbacks: whether anybody records what torch runs. Python finds its address in torch's library;
// from here the question takes a tenth of what ctypes takes for it.
bool (*has_callbacks)() = nullptr;

PyObject* bind_recording(PyObject*, PyObject* address) {
  void* found = PyLong_AsVoidPtr(address);
  if (found == nullptr) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_ValueError, "rnnkit: the address must not be 0");
    return nullptr;
  }
  has_callbacks = reinterpret_cast<bool (*)()>(found);
  Py_IncRef(Py_None);
  return Py_None;
}

PyObject* recording(PyObject*, PyObject*) {
  return PyBool_FromLong(has_callbacks != nullptr && has_callbacks() ? 1 : 0);
}

template <class F>
PyCFunction function(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

PyMethodDef methods[] = {
    {"bind", function(&bind), METH_FASTCALL, "What the functions need of torch."},
    {"bind_recording", &bind_recording, METH_O, "The address of at::hasCallbacks, for `recording`."},
    {"recording", &recording, METH_NOARGS, "Whether anybody records what torch runs."},
    {"layer_forward", function(&method<0, &cpu_layer_forward>), METH_FASTCALL, "rnnkit::cpu_layer_forward"},
    {"layer_backward", function(&method<1, &cpu_layer_backward>), METH_FASTCALL,
     "rnnkit::cpu_layer_backward"},
    {"stack_forward", function(&method<-1, &cpu_stack_forward>), METH_FASTCALL,
     "cpu_stack_forward of csrc/torch/schemas.h"},
    {"stack_backward", function(&method<-1, &cpu_stack_backward>), METH_FASTCALL, "Its gradients"},
    {"program_forward", function(&method<-1, &program_forward>), METH_FASTCALL,
     "program_forward of csrc/layer/program.h"},
    {"program_backward", function(&method<-1, &program_backward>), METH_FASTCALL, "Its gradients"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "rnnkit's engine for CPUs.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace rnnkit

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* made = PyModule_Create(&rnnkit::module);
  if (made == nullptr) return nullptr;
  rnnkit::unfit = PyErr_NewException("rnnkit._C.Unfit", PyExc_RuntimeError, nullptr);
  if (rnnkit::unfit == nullptr || PyObject_SetAttrString(made, "Unfit", rnnkit::unfit) != 0) return nullptr;
  rnnkit::not_plain = PyErr_NewException("rnnkit._C.NotPlain", rnnkit::unfit, nullptr);
  if (rnnkit::not_plain == nullptr || PyObject_SetAttrString(made, "NotPlain", rnnkit::not_plain) != 0)
    return nullptr;
  return made;
}
