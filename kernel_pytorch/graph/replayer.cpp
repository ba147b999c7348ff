// The replay of one recorded call with every check around it, in C++: what graphed_call.py does in Python for all calls, for those that are
// like the last one. What it does not know it does not answer: `run` returns NotImplemented and Python looks.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/clone.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Event.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

// An owned reference.
class Ref {
 public:
  Ref() = default;
  static Ref to(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  static Ref taking(PyObject* object) { return Ref(object); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// What Python raised, on its way through C++.
struct Raised {};

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw Raised();
  return object;
}

PyObject* item(PyObject* sequence, Py_ssize_t index) {
  return checked(PyTuple_Check(sequence) ? PyTuple_GetItem(sequence, index) : PyList_GetItem(sequence, index));
}

Py_ssize_t length(PyObject* sequence) {
  const Py_ssize_t size = PyObject_Size(sequence);
  if (size < 0) throw Raised();
  return size;
}

int64_t number(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

// An address: data_ptr() has 64 bits, of which the first may be set.
uintptr_t address(PyObject* object) {
  const uintptr_t value = static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(object));
  if (value == static_cast<uintptr_t>(-1) && PyErr_Occurred()) throw Raised();
  return value;
}

uintptr_t address(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()); }

// Equal for equal values of one type, as inputs.value_key tells them: 1 is not True, 0.0 is not -0.0, a NaN is itself.
bool same_value(PyObject* actual, PyObject* expected) {
  if (actual == expected) return true;
  if (Py_TYPE(actual) != Py_TYPE(expected)) return false;
  if (PyFloat_CheckExact(actual)) {
    const double first = PyFloat_AS_DOUBLE(actual), second = PyFloat_AS_DOUBLE(expected);
    return std::memcmp(&first, &second, sizeof(double)) == 0;
  }
  if (PyComplex_CheckExact(actual)) {
    const Py_complex first = PyComplex_AsCComplex(actual), second = PyComplex_AsCComplex(expected);
    return std::memcmp(&first, &second, sizeof(Py_complex)) == 0;
  }
  const int equal = PyObject_RichCompareBool(actual, expected, Py_EQ);
  if (equal < 0) throw Raised();
  return equal == 1;
}

// The shape of a call's arguments, or of what it returns. Described from Python as ("tensor",), ("value", v), ("tuple", items),
// ("list", items) or ("dict", keys, items).
struct Node {
  enum class Kind { tensor, value, tuple, list, dict };
  Kind kind = Kind::tensor;
  Ref value;
  std::vector<Ref> keys;
  std::vector<Node> items;

  static Node parse(PyObject* described) {
    const char* name = PyUnicode_AsUTF8(item(described, 0));
    if (name == nullptr) throw Raised();
    const std::string kind = name;
    Node node;
    if (kind == "tensor") return node;
    if (kind == "value") {
      node.kind = Kind::value;
      node.value = Ref::to(item(described, 1));
      return node;
    }
    node.kind = kind == "tuple" ? Kind::tuple : kind == "list" ? Kind::list : Kind::dict;
    const bool keyed = node.kind == Kind::dict;
    PyObject* items = item(described, keyed ? 2 : 1);
    for (Py_ssize_t i = 0; i < length(items); ++i) {
      if (keyed) node.keys.push_back(Ref::to(item(item(described, 1), i)));
      node.items.push_back(parse(item(items, i)));
    }
    return node;
  }

  size_t num_tensors() const {
    size_t found = kind == Kind::tensor ? 1 : 0;
    for (const Node& node : items) found += node.num_tensors();
    return found;
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(value.get());
    for (const Ref& key : keys) Py_VISIT(key.get());
    for (const Node& node : items) {
      if (const int stop = node.visit(visit, arg)) return stop;
    }
    return 0;
  }
};

struct Meta {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  at::Device device;
  // Without those that tell whether gradients are recorded: no replay does.
  c10::DispatchKeySet keys;

  static c10::DispatchKeySet keys_of(const at::Tensor& tensor) { return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView; }

  explicit Meta(const at::Tensor& tensor)
      : sizes(tensor.sizes().vec()), strides(tensor.strides().vec()), dtype(tensor.scalar_type()), device(tensor.device()), keys(keys_of(tensor)) {}

  bool fits(const at::Tensor& tensor) const {
    // The keys first: a tensor of another layout may have no strides, a nested one not even a size.
    return keys_of(tensor) == keys && tensor.sizes() == sizes && tensor.strides() == strides && tensor.scalar_type() == dtype &&
        tensor.device() == device;
  }
};

// What must be where it was: an item of a dict or a list, by identity.
struct Slot {
  Ref container, key, value;
  Py_ssize_t index = -1;

  bool holds() const {
    if (index >= 0) {
      return index < PyList_GET_SIZE(container.get()) && PyList_GET_ITEM(container.get(), index) == value.get();
    }
    PyObject* found = PyDict_GetItemWithError(container.get(), key.get());
    if (found == nullptr && PyErr_Occurred()) throw Raised();
    return found == value.get();
  }
};

// The submodules of a module: their order may decide what runs, as in nn.Sequential.
struct Children {
  Ref container;
  std::vector<Ref> keys, values;

  bool hold() const {
    if (PyDict_GET_SIZE(container.get()) != static_cast<Py_ssize_t>(values.size())) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(container.get(), &position, &key, &value); ++i) {
      // By identity: a name that is another object, if an equal one, is for Python to look at.
      if (value != values[i].get() || key != keys[i].get()) return false;
    }
    return true;
  }
};

// A function of torch's that tells what kernels a call runs, and what it told.
struct Mode {
  Ref read, then;
  std::vector<Ref> args;
  std::vector<PyObject*> given;

  bool holds() const {
    const Ref now = Ref::taking(checked(PyObject_Vectorcall(read.get(), given.data(), given.size(), nullptr)));
    return same_value(now.get(), then.get());
  }
};

// Tensors that are not the graph's own are held as Python holds them: another owner of what is behind them would keep
// torch.utils.swap_tensors from them, and Python from collecting what they hold.
struct Fixed {
  Ref tensor;
  uintptr_t at;
};

// Of a list or a dict, to which nothing may be added.
struct Size {
  Ref container;
  Py_ssize_t then;

  bool holds() const {
    return (PyList_Check(container.get()) ? PyList_GET_SIZE(container.get()) : PyDict_GET_SIZE(container.get())) == then;
  }
};

// Whether a parameter is trained.
struct Trained {
  Ref tensor;
  bool then;
};

struct Output {
  enum class Kind { clone, same, argument, view };
  Kind kind = Kind::same;
  // A tensor, of a clone.
  Ref object;
  size_t index = 0;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
};

std::vector<int64_t> numbers(PyObject* sequence) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < length(sequence); ++i) found.push_back(number(item(sequence, i)));
  return found;
}

const at::Tensor& tensor_of(PyObject* object) {
  if (!THPVariable_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "a tensor was expected");
    throw Raised();
  }
  return THPVariable_Unpack(object);
}

bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw Raised();
  return value == 1;
}

// Other threads run Python meanwhile, as in torch's own calls: the device may wait for one of them, and this one for the device.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Arguments on the host, which placement.HostArguments sends to the device in one block when one of them has another value. Python sends
// too: the blocks, which of them was sent last, and the events that tell that the device has read one are the same.
struct Host {
  // Of each argument: its number, and where it lies in a block.
  std::vector<std::pair<size_t, size_t>> places;
  std::vector<at::Tensor> blocks;
  at::Tensor device, sent;
  // One a block, or none where nothing runs ahead.
  std::vector<Ref> marks;

  // Where the block that was sent last has the same bits, nothing is left to do.
  template <typename At>
  bool was_sent(int64_t last, const At& at) const {
    if (last < 0 || last >= static_cast<int64_t>(blocks.size())) return false;
    const char* block = static_cast<const char*>(blocks[last].const_data_ptr());
    for (const auto& [index, start] : places) {
      const at::Tensor& tensor = at(index);
      if (tensor.nbytes() != 0 && std::memcmp(block + start, tensor.const_data_ptr(), tensor.nbytes()) != 0) return false;
    }
    return true;
  }

  template <typename At>
  void send(const At& at) const {
    if (places.empty()) return;
    int64_t& last = *sent.mutable_data_ptr<int64_t>();
    if (was_sent(last, at)) return;
    // Negative, where it is not known what the device has: the block that follows is the same.
    const int64_t number = static_cast<int64_t>(blocks.size());
    const size_t next = static_cast<size_t>(((last + 1) % number + number) % number);
    const WithoutGil without;
    if (!marks.empty()) event(next).synchronize();
    last = static_cast<int64_t>(next) - number;
    char* block = static_cast<char*>(blocks[next].mutable_data_ptr());
    for (const auto& [index, start] : places) {
      const at::Tensor& tensor = at(index);
      if (tensor.nbytes() != 0) std::memcpy(block + start, tensor.const_data_ptr(), tensor.nbytes());
    }
    at::Tensor into = device;
    into.copy_(blocks[next], true);
    if (!marks.empty()) event(next).record(c10::impl::VirtualGuardImpl(device.device().type()).getStream(device.device()));
    last = static_cast<int64_t>(next);
  }

  c10::Event& event(size_t index) const { return reinterpret_cast<THPEvent*>(marks[index].get())->event; }

  static Host parse(PyObject* row) {
    Host host;
    for (Py_ssize_t i = 0; i < length(item(row, 0)); ++i) {
      PyObject* place = item(item(row, 0), i);
      host.places.emplace_back(static_cast<size_t>(number(item(place, 0))), static_cast<size_t>(number(item(place, 1))));
    }
    for (Py_ssize_t i = 0; i < length(item(row, 1)); ++i) host.blocks.push_back(tensor_of(item(item(row, 1), i)));
    host.device = tensor_of(item(row, 2));
    host.sent = tensor_of(item(row, 3));
    TORCH_CHECK_VALUE(host.sent.scalar_type() == at::kLong && host.sent.is_cpu() && host.sent.numel() == 1, "sent is not a number on the host");
    TORCH_CHECK_VALUE(!host.blocks.empty(), "there is no block to send");
    for (Py_ssize_t i = 0; i < length(item(row, 4)); ++i) {
      PyObject* mark = item(item(row, 4), i);
      if (!THPEvent_Check(mark)) {
        PyErr_SetString(PyExc_TypeError, "an event was expected");
        throw Raised();
      }
      host.marks.push_back(Ref::to(mark));
    }
    TORCH_CHECK_VALUE(host.marks.empty() || host.marks.size() == host.blocks.size(), "each block has an event, or none has");
    return host;
  }
};

// The tensors of the call that is being answered, held: other threads may change the caller's lists meanwhile.
using Leaves = std::vector<Ref>;

struct Replay {
  Ref tensor_types;
  Node args, kwargs, result;
  std::vector<Meta> metas;
  std::vector<std::pair<size_t, uintptr_t>> in_place;
  std::vector<size_t> copied;
  std::vector<at::Tensor> buffers;
  Host host;
  std::vector<Mode> modes;
  std::vector<Slot> code, others;
  std::vector<Children> children;
  std::vector<Fixed> addresses;
  std::vector<Ref> empty;
  std::vector<Size> sizes;
  std::vector<Trained> trained;
  bool code_first = true, tensors_first = true;
  Ref play, unflatten;
  std::vector<Output> outputs;
  std::optional<at::Device> device;
  // int64 [1]: the number of the stream that the last replay was in the order of, whoever made it.
  at::Tensor last_stream;

  bool match(const Node& node, PyObject* object, Leaves& leaves) const {
    switch (node.kind) {
      case Node::Kind::tensor: {
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        if (type != PyTuple_GET_ITEM(tensor_types.get(), 0) && type != PyTuple_GET_ITEM(tensor_types.get(), 1)) return false;
        leaves.push_back(Ref::to(object));
        return true;
      }
      case Node::Kind::value:
        return same_value(object, node.value.get());
      case Node::Kind::tuple:
      case Node::Kind::list: {
        const bool tuple = node.kind == Node::Kind::tuple;
        if (tuple ? !PyTuple_CheckExact(object) : !PyList_CheckExact(object)) return false;
        const Py_ssize_t size = static_cast<Py_ssize_t>(node.items.size());
        if ((tuple ? PyTuple_GET_SIZE(object) : PyList_GET_SIZE(object)) != size) return false;
        for (Py_ssize_t i = 0; i < size; ++i) {
          if (!match(node.items[i], tuple ? PyTuple_GET_ITEM(object, i) : PyList_GET_ITEM(object, i), leaves)) return false;
        }
        return true;
      }
      case Node::Kind::dict: {
        if (!PyDict_CheckExact(object) || PyDict_GET_SIZE(object) != static_cast<Py_ssize_t>(node.items.size())) return false;
        PyObject *key, *value;
        Py_ssize_t position = 0;
        // In their order, as Python's form of a call has them.
        for (size_t i = 0; PyDict_Next(object, &position, &key, &value); ++i) {
          if (!same_value(key, node.keys[i].get()) || !match(node.items[i], value, leaves)) return false;
        }
        return true;
      }
    }
    return false;
  }

  bool alike(const Leaves& leaves) const {
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (!metas[i].fits(THPVariable_Unpack(leaves[i].get()))) return false;
    }
    for (const auto& [index, at] : in_place) {
      if (address(THPVariable_Unpack(leaves[index].get())) != at) return false;
    }
    return true;
  }

  bool same_code() const {
    for (const Children& of_module : children) {
      if (!of_module.hold()) return false;
    }
    for (const Slot& slot : code) {
      if (!slot.holds()) return false;
    }
    return true;
  }

  bool same_tensors() const {
    for (const Slot& slot : others) {
      if (!slot.holds()) return false;
    }
    for (const Fixed& fixed : addresses) {
      if (address(THPVariable_Unpack(fixed.tensor.get())) != fixed.at) return false;
    }
    for (const Ref& hooks : empty) {
      if (PyDict_GET_SIZE(hooks.get()) != 0) return false;
    }
    for (const Size& size : sizes) {
      if (!size.holds()) return false;
    }
    for (const Trained& parameter : trained) {
      if (THPVariable_Unpack(parameter.tensor.get()).requires_grad() != parameter.then) return false;
    }
    return true;
  }

  bool same_modes() const {
    for (const Mode& mode : modes) {
      if (!mode.holds()) return false;
    }
    return true;
  }

  // Replays before it are done in the order of this stream; another one must wait for them first.
  bool same_stream() const {
    return !device || c10::impl::VirtualGuardImpl(device->type()).getStream(*device).id() == *last_stream.const_data_ptr<int64_t>();
  }

  PyObject* assemble(const Node& node, std::vector<Ref>& parts, size_t& next) const {
    if (node.kind == Node::Kind::tensor) return parts[next++].release();
    const Py_ssize_t size = static_cast<Py_ssize_t>(node.items.size());
    if (node.kind == Node::Kind::tuple || node.kind == Node::Kind::list) {
      const bool tuple = node.kind == Node::Kind::tuple;
      Ref made = Ref::taking(checked(tuple ? PyTuple_New(size) : PyList_New(size)));
      for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* part = assemble(node.items[i], parts, next);
        if (tuple) {
          PyTuple_SET_ITEM(made.get(), i, part);
        } else {
          PyList_SET_ITEM(made.get(), i, part);
        }
      }
      return made.release();
    }
    Ref made = Ref::taking(checked(PyDict_New()));
    for (Py_ssize_t i = 0; i < size; ++i) {
      const Ref part = Ref::taking(assemble(node.items[i], parts, next));
      if (PyDict_SetItem(made.get(), node.keys[i].get(), part.get()) < 0) throw Raised();
    }
    return made.release();
  }

  PyObject* assembled(const Leaves& leaves) const {
    std::vector<at::Tensor> made(outputs.size());
    {
      const WithoutGil without;
      for (size_t i = 0; i < outputs.size(); ++i) {
        const Output& source = outputs[i];
        if (source.kind == Output::Kind::clone) {
          made[i] = THPVariable_Unpack(source.object.get()).clone();
        } else if (source.kind == Output::Kind::view) {
          const at::Tensor& tensor = THPVariable_Unpack(leaves[source.index].get());
          made[i] = tensor.as_strided(source.sizes, source.strides, tensor.storage_offset() + source.offset);
        }
      }
    }
    std::vector<Ref> parts;
    parts.reserve(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (made[i].defined()) {
        parts.push_back(Ref::taking(checked(THPVariable_Wrap(std::move(made[i])))));
      } else {
        parts.push_back(Ref::to(outputs[i].kind == Output::Kind::same ? outputs[i].object.get() : leaves[outputs[i].index].get()));
      }
    }
    if (!unflatten) {
      size_t next = 0;
      return assemble(result, parts, next);
    }
    Ref list = Ref::taking(checked(PyList_New(static_cast<Py_ssize_t>(parts.size()))));
    for (size_t i = 0; i < parts.size(); ++i) PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), parts[i].release());
    return checked(PyObject_CallOneArg(unflatten.get(), list.get()));
  }

  void fill(const Leaves& leaves) const {
    if (copied.empty()) return;
    const WithoutGil without;
    if (copied.size() == 1) {
      at::Tensor into = buffers[0];
      into.copy_(THPVariable_Unpack(leaves[copied[0]].get()));
      return;
    }
    std::vector<at::Tensor> from;
    from.reserve(copied.size());
    for (const size_t index : copied) from.push_back(THPVariable_Unpack(leaves[index].get()));
    at::_foreach_copy_(buffers, from);
  }

  // A new reference, or null when the call is not answered: nothing was launched then, or what was does no harm. Python that runs
  // meanwhile may call anything here again: what belongs to one call is kept in it.
  PyObject* run(PyObject* given_args, PyObject* given_kwargs) const {
    Leaves leaves;
    leaves.reserve(metas.size());
    if (!match(args, given_args, leaves) || !match(kwargs, given_kwargs, leaves) || !alike(leaves) || !same_stream() || !same_modes()) {
      return nullptr;
    }
    // The device copies inputs in, into memory of the graph's own, while the model is looked at.
    fill(leaves);
    host.send([&](size_t index) -> const at::Tensor& { return THPVariable_Unpack(leaves[index].get()); });
    if (code_first && !same_code()) return nullptr;
    if (tensors_first && !same_tensors()) return nullptr;
    Ref::taking(checked(PyObject_CallNoArgs(play.get())));
    Ref made = Ref::taking(assembled(leaves));
    if (!code_first && !same_code()) return nullptr;
    if (!tensors_first && !same_tensors()) return nullptr;
    return made.release();
  }

  // Numbers of arguments are indices of `leaves`.
  void check() const {
    const size_t num_leaves = args.num_tensors() + kwargs.num_tensors();
    TORCH_CHECK_VALUE(metas.size() == num_leaves, metas.size(), " tensors are given, the arguments have ", num_leaves);
    for (const auto& [index, at] : in_place) TORCH_CHECK_INDEX(index < num_leaves, "in_place: there is no argument ", index);
    for (const size_t index : copied) TORCH_CHECK_INDEX(index < num_leaves, "copies: there is no argument ", index);
    for (const auto& [index, start] : host.places) {
      TORCH_CHECK_INDEX(index < num_leaves, "host: there is no argument ", index);
      const Meta& meta = metas[index];
      const size_t size = c10::multiply_integers(meta.sizes) * c10::elementSize(meta.dtype);
      for (const at::Tensor& block : host.blocks) {
        TORCH_CHECK_VALUE(meta.device.is_cpu() && start + size <= block.nbytes(), "host: argument ", index, " does not lie in its block");
      }
    }
    for (const Output& source : outputs) {
      const bool given = source.kind == Output::Kind::argument || source.kind == Output::Kind::view;
      TORCH_CHECK_INDEX(!given || source.index < num_leaves, "outputs: there is no argument ", source.index);
    }
    TORCH_CHECK_VALUE(unflatten || result.num_tensors() == outputs.size(), "result has not as many places as there are outputs");
  }

  int visit(visitproc visit, void* arg) const {
    for (const Node* node : {&args, &kwargs, &result}) {
      if (const int stop = node->visit(visit, arg)) return stop;
    }
    for (const Ref* ref : {&tensor_types, &play, &unflatten}) Py_VISIT(ref->get());
    for (const auto* slots : {&code, &others}) {
      for (const Slot& slot : *slots) {
        Py_VISIT(slot.container.get());
        Py_VISIT(slot.key.get());
        Py_VISIT(slot.value.get());
      }
    }
    for (const Children& of_module : children) {
      Py_VISIT(of_module.container.get());
      for (const auto* refs : {&of_module.keys, &of_module.values}) {
        for (const Ref& ref : *refs) Py_VISIT(ref.get());
      }
    }
    for (const Mode& mode : modes) {
      Py_VISIT(mode.read.get());
      Py_VISIT(mode.then.get());
      for (const Ref& given : mode.args) Py_VISIT(given.get());
    }
    for (const Fixed& fixed : addresses) Py_VISIT(fixed.tensor.get());
    for (const Size& size : sizes) Py_VISIT(size.container.get());
    for (const Trained& parameter : trained) Py_VISIT(parameter.tensor.get());
    for (const Ref& hooks : empty) Py_VISIT(hooks.get());
    for (const Output& source : outputs) Py_VISIT(source.object.get());
    for (const Ref& mark : host.marks) Py_VISIT(mark.get());
    return 0;
  }
};

std::vector<Slot> slots(PyObject* described) {
  std::vector<Slot> found;
  for (Py_ssize_t i = 0; i < length(described); ++i) {
    PyObject* row = item(described, i);
    Slot slot{Ref::to(item(row, 0)), Ref::to(item(row, 1)), Ref::to(item(row, 2))};
    if (PyList_Check(slot.container.get())) {
      slot.index = static_cast<Py_ssize_t>(number(slot.key.get()));
    } else if (!PyDict_Check(slot.container.get())) {
      PyErr_SetString(PyExc_TypeError, "a slot is an item of a dict or a list");
      throw Raised();
    }
    found.push_back(std::move(slot));
  }
  return found;
}

Output parse_output(PyObject* row) {
  const char* name = PyUnicode_AsUTF8(item(row, 0));
  if (name == nullptr) throw Raised();
  const std::string kind = name;
  Output source;
  if (kind == "clone") {
    source.kind = Output::Kind::clone;
    tensor_of(item(row, 1));
    source.object = Ref::to(item(row, 1));
  } else if (kind == "same") {
    source.kind = Output::Kind::same;
    source.object = Ref::to(item(row, 1));
  } else {
    source.kind = kind == "argument" ? Output::Kind::argument : Output::Kind::view;
    source.index = static_cast<size_t>(number(item(row, 1)));
    if (source.kind == Output::Kind::view) {
      source.sizes = numbers(item(row, 2));
      source.strides = numbers(item(row, 3));
      source.offset = number(item(row, 4));
    }
  }
  return source;
}

// Null until it is configured, and once it is closed. A call that is under way goes on with the one that it began with.
struct Object {
  PyObject_HEAD
  std::shared_ptr<const Replay> replay;
};

std::shared_ptr<const Replay>& of(PyObject* self) { return reinterpret_cast<Object*>(self)->replay; }

PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) new (&of(self)) std::shared_ptr<const Replay>();
  return self;
}

// configure(name=value, ...): Python builds it up by name.
PyObject* configure(PyObject* self, PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  try {
    const auto made = std::make_shared<Replay>();
    Replay& replay = *made;
    const auto value = [&](const char* name) {
      PyObject* found = given == nullptr ? nullptr : PyDict_GetItemString(given, name);
      if (found == nullptr) {
        PyErr_Format(PyExc_TypeError, "Replayer.configure: %s is missing", name);
        throw Raised();
      }
      return found;
    };
    replay.tensor_types = Ref::to(value("tensor_types"));
    replay.args = Node::parse(value("args"));
    replay.kwargs = Node::parse(value("kwargs"));
    PyObject* tensors = value("tensors");
    for (Py_ssize_t i = 0; i < length(tensors); ++i) replay.metas.emplace_back(tensor_of(item(tensors, i)));
    PyObject* in_place = value("in_place");
    for (Py_ssize_t i = 0; i < length(in_place); ++i) {
      PyObject* row = item(in_place, i);
      replay.in_place.emplace_back(static_cast<size_t>(number(item(row, 0))), address(item(row, 1)));
    }
    PyObject* copies = value("copies");
    for (Py_ssize_t i = 0; i < length(copies); ++i) {
      PyObject* row = item(copies, i);
      replay.copied.push_back(static_cast<size_t>(number(item(row, 0))));
      replay.buffers.push_back(tensor_of(item(row, 1)));
    }
    if (PyObject* given_host = value("host"); given_host != Py_None) replay.host = Host::parse(given_host);
    PyObject* modes = value("modes");
    for (Py_ssize_t i = 0; i < length(modes); ++i) {
      PyObject* row = item(modes, i);
      Mode mode{Ref::to(item(row, 0)), Ref::to(item(row, 2))};
      for (Py_ssize_t j = 0; j < length(item(row, 1)); ++j) {
        mode.given.push_back(item(item(row, 1), j));
        mode.args.push_back(Ref::to(mode.given.back()));
      }
      replay.modes.push_back(std::move(mode));
    }
    replay.code = slots(value("code"));
    PyObject* children = value("children");
    for (Py_ssize_t i = 0; i < length(children); ++i) {
      PyObject *row = item(children, i), *keys = item(row, 1), *values = item(row, 2);
      if (!PyDict_Check(item(row, 0)) || length(keys) != length(values)) {
        PyErr_SetString(PyExc_TypeError, "submodules are in dicts");
        throw Raised();
      }
      Children of_module{Ref::to(item(row, 0))};
      for (Py_ssize_t j = 0; j < length(values); ++j) {
        of_module.keys.push_back(Ref::to(item(keys, j)));
        of_module.values.push_back(Ref::to(item(values, j)));
      }
      replay.children.push_back(std::move(of_module));
    }
    replay.others = slots(value("others"));
    PyObject* addresses = value("addresses");
    for (Py_ssize_t i = 0; i < length(addresses); ++i) {
      PyObject* row = item(addresses, i);
      tensor_of(item(row, 0));
      replay.addresses.push_back({Ref::to(item(row, 0)), address(item(row, 1))});
    }
    PyObject* hooks = value("empty");
    for (Py_ssize_t i = 0; i < length(hooks); ++i) {
      if (!PyDict_Check(item(hooks, i))) {
        PyErr_SetString(PyExc_TypeError, "hooks are dicts");
        throw Raised();
      }
      replay.empty.push_back(Ref::to(item(hooks, i)));
    }
    PyObject* sizes = value("sizes");
    for (Py_ssize_t i = 0; i < length(sizes); ++i) {
      PyObject* row = item(sizes, i);
      if (!PyDict_Check(item(row, 0)) && !PyList_Check(item(row, 0))) {
        PyErr_SetString(PyExc_TypeError, "a size is of a dict or a list");
        throw Raised();
      }
      replay.sizes.push_back({Ref::to(item(row, 0)), static_cast<Py_ssize_t>(number(item(row, 1)))});
    }
    PyObject* trained = value("trained");
    for (Py_ssize_t i = 0; i < length(trained); ++i) {
      PyObject* row = item(trained, i);
      tensor_of(item(row, 0));
      replay.trained.push_back({Ref::to(item(row, 0)), truth(item(row, 1))});
    }
    replay.code_first = truth(value("code_first"));
    replay.tensors_first = truth(value("tensors_first"));
    replay.play = Ref::to(value("play"));
    PyObject* sources = value("outputs");
    for (Py_ssize_t i = 0; i < length(sources); ++i) replay.outputs.push_back(parse_output(item(sources, i)));
    PyObject* unflatten = value("unflatten");
    if (unflatten == Py_None) {
      replay.result = Node::parse(value("result"));
    } else {
      replay.unflatten = Ref::to(unflatten);
    }
    PyObject* device = value("device");
    if (device != Py_None) {
      replay.device = tensor_of(device).device();
      replay.last_stream = tensor_of(value("last_stream"));
      TORCH_CHECK(replay.last_stream.scalar_type() == at::kLong && replay.last_stream.is_cpu() && replay.last_stream.numel() == 1);
    }
    replay.check();
    // Let go of last, once nothing points to it: that may call Python.
    const std::shared_ptr<const Replay> old = std::exchange(of(self), made);
    Py_RETURN_NONE;
  } catch (const Raised&) {
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

PyObject* run(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "Replayer.run takes args and kwargs");
    return nullptr;
  }
  try {
    const std::shared_ptr<const Replay> replay = of(self);
    PyObject* result = replay ? replay->run(given[0], given[1]) : nullptr;
    return result != nullptr ? result : Ref::to(Py_NotImplemented).release();
  } catch (const Raised&) {
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

PyObject* close(PyObject* self, PyObject*) {
  const std::shared_ptr<const Replay> old = std::exchange(of(self), nullptr);
  Py_RETURN_NONE;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return of(self) ? of(self)->visit(visit, arg) : 0;
}

int clear(PyObject* self) {
  const std::shared_ptr<const Replay> old = std::exchange(of(self), nullptr);
  return 0;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  std::destroy_at(&of(self));
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"configure", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(configure)), METH_VARARGS | METH_KEYWORDS, "Takes what a call must be like, by name."},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL, "run(args, kwargs) -> the result, or NotImplemented."},
    {"close", close, METH_NOARGS, "Lets go of everything; run answers nothing from then on."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot type_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_methods, methods},
    {0, nullptr}};

PyType_Spec spec = {"kernel_pytorch_replayer.Replayer", sizeof(Object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, type_slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernel_pytorch_replayer", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_kernel_pytorch_replayer() {
  Ref module = Ref::taking(PyModule_Create(&definition));
  if (!module) return nullptr;
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr || PyModule_AddObject(module.get(), "Replayer", type) < 0) {
    Py_XDECREF(type);
    return nullptr;
  }
  return module.release();
}
