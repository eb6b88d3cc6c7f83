"""The real bitsandbytes in a process of its own: answers pickled requests (name, arguments) on its pipes.

Run by the `oracle` fixture of conftest.py and never imported.  Both ends are our own, so pickle is safe here.
"""

import importlib
import inspect
import os
import pickle
import pkgutil
import sys
import traceback

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its fallbacks compile themselves, which takes a minute and changes nothing
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print must not end up among the replies

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def signatures(module):
    """Of each public function and class that a module defines, or a package shows, its parameters and defaults."""
    found = {}
    there = importlib.import_module(module)
    for name, one in vars(there).items():
        home = str(getattr(one, "__module__", ""))
        if name.startswith("_") or not home.startswith("bitsandbytes"):
            continue
        if home != module and not hasattr(there, "__path__"):
            continue
        if inspect.isfunction(one):
            found[name] = parameters(one)
        elif inspect.isclass(one):
            made = one.__new__ if "__new__" in vars(one) and "__init__" not in vars(one) else one.__init__
            found[name] = parameters(made)[1:]
    return found


def modules():
    """Its modules, without the parts of those packages that are its inside, and without shared libraries."""
    inside = ("bitsandbytes.backends.", "bitsandbytes.diagnostics.")
    every = [one.name for one in pkgutil.walk_packages(bnb.__path__, "bitsandbytes.")]
    return [one for one in every if not one.startswith((*inside, "bitsandbytes.lib")) and "__main__" not in one]


def parameters(function):
    return [
        (one.name, "" if one.default is one.empty else repr(one.default))
        for one in inspect.signature(function).parameters.values()
    ]


def schemas():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")]
    return sorted(str(torch._C._get_schema(*name.partition(".")[::2])) for name in names)


def call(name, args=(), kwargs=None):
    """A function of functional; of a state in the result its dictionary."""
    result = getattr(F, name)(*args, **(kwargs or {}))
    plain = [one.as_dict() if isinstance(one, F.QuantState) else one for one in as_tuple(result)]
    return plain[0] if len(plain) == 1 else tuple(plain)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def op(name, args):
    return getattr(torch.ops.bitsandbytes, name)(*args)


def update(name, args, kwargs):
    """The tensors among the arguments after an update in place."""
    getattr(F, name)(*args, **kwargs)
    return [one for one in (*args, *kwargs.values()) if torch.is_tensor(one)]


def matmul_4bit(x, packed, entries, transposed, bias, grad):
    state = F.QuantState.from_dict(dict(entries), device="cpu")
    x = x.requires_grad_(grad is not None)
    y = bnb.matmul_4bit(x, packed.t() if transposed else packed, state, bias=bias)
    if grad is None:
        return y, None
    y.backward(grad)
    return y.detach(), x.grad


def matmul(x, weight, bias, threshold, has_fp16_weights):
    state = bnb.MatmulLtState()
    state.has_fp16_weights = has_fp16_weights
    state.is_training = False  # their CPU multiplies floats in training
    return bnb.matmul(x, weight, state=state, threshold=threshold, bias=bias)


def find_outlier_dims(weight, **options):
    return bnb.utils.find_outlier_dims(weight, **options)


def main():
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = (True, globals()[name](*args, **kwargs))
        except Exception:
            reply = (False, traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main()
