"""bitsandbytes' optimizers in a process of their own: answers pickled requests (name, arguments) on its pipes.

Run by the `oracle` fixture of conftest.py and never imported.  Both ends are our own, so pickle is safe here.
"""

import inspect
import os
import pickle
import sys
import traceback

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its fallbacks compile themselves, which takes a minute and changes nothing
replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print must not end up among the replies

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def signatures():
    """Of each class its parameters in order, as (name, default)."""
    classes = {name: one for name, one in vars(bnb.optim).items() if inspect.isclass(one)}
    classes |= {f"nn.{name}": getattr(bnb.nn, name) for name in ("Embedding", "StableEmbedding")}
    return {
        name: [
            (parameter.name, None if parameter.default is parameter.empty else parameter.default)
            for parameter in list(inspect.signature(one.__init__).parameters.values())[1:]
        ]
        for name, one in classes.items()
    }


def run(name, arguments, params, grads, state=None):
    """Parameters and state_dict after a step with each list of gradients, from a state_dict if one is given."""
    params = [torch.nn.Parameter(param) for param in params]
    optimizer = getattr(bnb.optim, name)(params, **arguments)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params], optimizer.state_dict()


def losses(name, arguments, start, inputs, targets, steps, device="cpu"):
    """Of least squares, before each step."""
    start, inputs, targets = (one.to(device) for one in (start, inputs, targets))
    weight = torch.nn.Parameter(start)
    optimizer = getattr(bnb.optim, name)([weight], **arguments)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (inputs @ weight - targets).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


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
