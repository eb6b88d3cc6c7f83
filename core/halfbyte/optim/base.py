"""The base of every optimizer: a torch.optim.Optimizer that steps a whole model in a few op calls."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import HalfbyteWarning, InputError
from ..kernel import show
from ..ops.checks import FLOATS
from ..ops.rules import RULES, hash32
from . import checkpoint, compiled, memory, paging, steps
from .bucket import Bucket, Job, Lists, Source, count, require_kernels
from .clip import clip_factor
from .lanes import LANES
from .manager import GlobalOptimManager, Overrides
from .options import Config, parse_betas, resolve
from .plan import Plan
from .state import PAGED_FROM, State, create, fits, refit, share_codebooks, size_of

# A compiled function calls what is marked so as it is: a step is a few opaque op calls, with nothing to fuse.
_eager = torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable would import the compiler

_OWN = (  # attributes that a copy has too
    *("args", "fused_clip", "stochastic_rounding", "capturable"),
    *("is_paged", "paged_budget", "paged_memory", "_told_of_paging"),
)


class Place(NamedTuple):
    """Where a parameter stands: its group, its number in the group, its number among all parameters."""

    group: int
    number: int
    position: int


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers, which differ by the rule that they name.

    args                 object with optim_bits, min_8bit_size, max_unorm and skip_zeros, in place of the arguments
    optim_bits           8 or 32, of the states
    min_8bit_size        a parameter of fewer elements has 32-bit states all the same
    max_unorm            bound on norm(update) / norm(parameter); 0 for none
    is_paged             keep states of 100,000 elements and more in pinned memory of the host, beyond what
                         paged_budget has room for, and update them in pieces that pass through the device.  A step
                         then waits until they are back.  Of parameters on the CPU states stay where they are, with a
                         warning.
    paged_budget         bytes that paged states may take on each device: 128 MiB at most for pieces on their way, the
                         rest for the first states, which stay there
    paged_memory         "pinned"; or "managed": memory that the driver moves between host and device, as bitsandbytes
                         has it, never more of it than the device has free
    fused_clip           bound on the norm of all gradients of a step together, as torch.nn.utils.clip_grad_norm_
                         would set it, but gradients are scaled while they are read and keep their values
    stochastic_rounding  of bfloat16 parameters: round up or down with a chance that makes the mean exact; the bits
                         follow from a parameter's position and the step, so that a resumed run draws the same
    capturable           keep the step as a tensor on the parameter's device, for CUDA graphs; lr may be a tensor too

    Parameters are float32, float16 or bfloat16, on any devices, in any memory format.  lr is a float or a tensor of
    one element.  The arithmetic stands in ops/rules.py.

    Of a DTensor the local shard is stepped, with local states.  Each rank then saves a state_dict of its own:
    torch.distributed.checkpoint takes local tensors for replicated ones, and would keep one rank's.

    Raises InputError for values outside their range.  A step that raises it has changed no parameter.
    """

    rule: ClassVar[str]
    bits: ClassVar[int | None] = None  # where a class's name fixes optim_bits
    paged: ClassVar[bool] = False  # where it fixes is_paged

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: Any,
        eps: float,
        weight_decay: float,
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        *,
        max_unorm: float = 0.0,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        fused_clip: float | None = None,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        paged_budget: int = paging.BUDGET,
        paged_memory: str = "pinned",
    ) -> None:
        if paged_memory not in paging.MEMORIES:
            raise InputError(f"paged_memory must be {' or '.join(paging.MEMORIES)}; got {paged_memory!r}")
        if paged_budget < paging.LEAST:
            raise InputError(f"paged_budget must be at least {paging.LEAST:,} bytes; got {paged_budget:,}")
        if capturable and (is_paged or self.paged):
            raise InputError("capturable and paging exclude each other: a CUDA graph cannot hold a step that waits")
        if fused_clip is not None and not 0 < fused_clip < math.inf:
            raise InputError(f"fused_clip must be None, or finite and above 0; got {fused_clip}")
        self.args = args or SimpleNamespace(
            optim_bits=self.bits or optim_bits, min_8bit_size=min_8bit_size, max_unorm=max_unorm, skip_zeros=False
        )
        self.is_paged = is_paged or self.paged
        self.fused_clip = fused_clip
        self.stochastic_rounding = stochastic_rounding
        self.capturable = capturable
        self.paged_budget = paged_budget
        self.paged_memory = paged_memory
        self._told_of_paging = False
        self._pager = paging.Pager(paged_memory, paged_budget)
        self._plan: Plan | None = None
        self._number = compiled.numbered(self)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if RULES[self.rule].states[1]:
            defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        super().__init__(params, self._read(defaults))

    @property
    def optim_bits(self) -> int:
        """Bits of the states of parameters that are large enough."""
        return int(self.args.optim_bits)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, content: dict[str, Any]) -> None:
        super().__setstate__(content)
        if "_pager" not in self.__dict__:  # a copy's states are paged anew when it steps
            self._pager = paging.Pager(self.paged_memory, self.paged_budget)
        self._plan = None
        self._number = compiled.numbered(self)
        share_codebooks(self.state.values())

    @_eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.  Raises InputError for hyperparameters outside their range, and for a parameter listed twice."""
        if isinstance(param_group, dict):
            read = self._read({**self.defaults, **param_group})
            param_group.update({name: read[name] for name in param_group})
            if not isinstance(param_group["params"], Tensor | set):  # of which torch has its own opinion
                param_group["params"] = list(param_group["params"])
                if len(set(param_group["params"])) < len(param_group["params"]):
                    raise InputError("a parameter group must not list a parameter twice")
        super().add_param_group(param_group)

    def _read(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with its numbers read from strings, checked."""
        config = resolve(self.rule, group, self.args, {})
        return {
            **group,
            "lr": config.lr,
            "betas": parse_betas(group["betas"]),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }

    # -- stepping ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        closure  evaluates the model again and returns the loss

        Raises InputError, before any parameter is changed, for a gradient that is sparse or of another dtype or
        device than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_dynamo_compiling() and self._plain():
            params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
            if params:  # detached, and not under no_grad, which a step that raises would leave switched on
                given = [param.detach() for param in params], [param.grad for param in params]
                torch.ops.halfbyte.step_optimizer(self._number, *given)
        else:
            self.update()
        return loss

    def _plain(self) -> bool:
        """Whether a graph can hold all parameters as they are: no DTensors."""
        return all(type(param) in memory.PLAIN for group in self.param_groups for param in group["params"])

    def places(self) -> Iterator[Place]:
        """Where every parameter stands."""
        position = 0
        for g, group in enumerate(self.param_groups):
            for i in range(len(group["params"])):
                yield Place(g, i, position)
                position += 1

    @_eager
    @torch.no_grad()
    def update(self, places: Iterable[Place] | None = None, given: compiled.Given | None = None) -> None:
        """Step the parameters at some places, or all: everything is looked at before anything is changed.

        given  what to step in place of the parameters that have gradients, and those gradients
        """
        overrides = GlobalOptimManager.get_instance().overrides()
        resolved = self._resolver()
        modes = self.stochastic_rounding, self.capturable, self.is_paged
        plan = None
        if places is None and given is None:
            plan, self._plan = self._plan, None  # a step that fails leaves none
        if plan and plan.renew(self.param_groups, overrides, modes, self.state, resolved):
            self._run(plan.buckets, plan.gradients() if self.fused_clip is not None else [])
        else:
            jobs = self._jobs(self.places() if places is None else places, overrides, resolved, given)
            if not jobs:
                return
            buckets = self._buckets(jobs)
            self._run(buckets, [(job.key, job.grad) for job in jobs])
            plan = None
            managed = self.is_paged and not self._pager.staged  # to be prefetched at each step
            if places is None and given is None and not managed and Plan.serves(overrides, buckets):
                plan = Plan(self.param_groups, overrides, modes, buckets)
        if plan:
            plan.release()
            self._plan = plan

    def _run(self, buckets: list[Bucket], gradients: list[tuple[Tensor, Tensor]]) -> None:
        """Step buckets.  gradients are all pairs of a parameter and its gradient, read where they are clipped."""
        device = buckets[0].kinds[0]
        if not self.capturable and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(f"capturing a step in a CUDA graph needs {type(self).__name__}(..., capturable=True)")
        scale = None if self.fused_clip is None else clip_factor(gradients, self.fused_clip)
        calls = [(bucket, *bucket.arguments(bucket.lists, scale)) for bucket in buckets if bucket.lists.params]
        if len(calls) > 1:
            require_kernels([(name, args) for _, name, args in calls])
        done = [bucket for bucket in buckets if not bucket.lists.params]
        try:
            for bucket, name, args in calls:
                if bucket.paged:
                    self._pager.run(bucket, partial(_update_part, bucket, scale))
                else:
                    bucket.call(name, args)
                bucket.finish()
                done.append(bucket)
        finally:  # what has moved has taken a step, though a later call may fail
            count(done)

    def _resolver(self) -> Callable[[Source], Config]:
        """What gives the configuration of a source, and remembers those of whole groups."""
        of_groups: dict[int, Config] = {}

        def resolved(source: Source) -> Config:
            number, own = source
            if own is not None:
                return resolve(self.rule, self.param_groups[number], self.args, own)
            if number not in of_groups:
                of_groups[number] = resolve(self.rule, self.param_groups[number], self.args, {})
            return of_groups[number]

        return resolved

    def _jobs(
        self,
        places: Iterable[Place],
        overrides: Overrides,
        resolved: Callable[[Source], Config],
        given: compiled.Given | None,
    ) -> list[Job]:
        """What is to be done at some places.  Raises InputError; changes nothing."""
        jobs = []
        for place in places:
            key: Tensor = self.param_groups[place.group]["params"][place.number]
            if key.grad is None:
                continue
            own = overrides.of(key, place.group, place.number) if overrides else None
            source = place.group, own or None
            config = resolved(source)
            param, grad = given[id(key)] if given else (memory.local(key), memory.local_gradient(key))
            if problem := self._problem(param, grad, config, sharded=param.numel() != key.numel()):
                raise InputError(f"parameter {place.number} of group {place.group} {problem}")
            jobs.append(Job(key, param, grad, config, source, place.position))
        return jobs

    def _problem(self, param: Tensor, grad: Tensor, config: Config, sharded: bool) -> str | None:
        if grad.layout is not torch.strided:
            return f"has a sparse gradient, which {type(self).__name__} does not support"
        if param.dtype not in FLOATS:
            return f"must be {', '.join(map(show, FLOATS))}; got {show(param.dtype)}"
        if (param.dtype, param.device, param.shape) != (grad.dtype, grad.device, grad.shape):
            its, ours = (f"{show(one.dtype)} {tuple(one.shape)} on {one.device}" for one in (grad, param))
            return f"must have a gradient of its own dtype, shape and device, {ours}; got {its}"
        if config.max_unorm > 0 and (sharded or (self._pages(param) and self._pager.staged)):
            how = "sharded" if sharded else "paged"
            return f"is {how}, and stepped in parts: max_unorm needs the norm of the whole parameter"
        return None

    def _buckets(self, jobs: list[Job]) -> list[Bucket]:
        """The jobs by what one op call can serve; creates missing states."""
        zeros = steps.Zeros(self.capturable)
        states = [self._state(job, zeros) for job in jobs]
        if self.capturable:
            steps.separate(states, self.state.values())
        buckets: dict[Any, Bucket] = {}
        for job, state in zip(jobs, states, strict=True):
            tables = id(state.get("qmap1")), id(state.get("qmap2"))
            paged = self.is_paged and self._pager.staged and self._pager.holds(state, job.param.device)
            dtypes = job.param.dtype, state["state1"].dtype
            kind = (job.param.device, *dtypes, *tables, steps.identity(state["step"]), paged)
            bucket = buckets.get((job.config, kind))
            if bucket is None:
                bucket = buckets[job.config, kind] = Bucket(self.rule, job, state, paged)
            seeded = self.stochastic_rounding and job.param.dtype is torch.bfloat16
            bucket.add(job, state, hash32(job.position) if seeded else None)
        self._pager.prefetch()
        return list(buckets.values())

    def _state(self, job: Job, zeros: steps.Zeros) -> State:
        rule, param, config = RULES[self.rule], job.param, job.config
        state: State = self.state[job.key]
        quantized = config.optim_bits == 8 and job.key.numel() >= config.min_8bit_size
        if state:
            quantized = state["state1"].dtype is torch.uint8
        home, paged = self._home(self._pager, job.key, param, quantized)
        if not state:
            created = create(rule, param, config.max_unorm > 0, quantized, home)
            state.update(step=zeros.on(param.device), **created)
        elif not fits(state, rule, param, home):
            refit(state, rule, param, home)
        if paged and not self._pager.holds(state, param.device):
            self._pager.adopt(state, param.device)
        return state

    def _pages(self, param: Tensor) -> bool:
        """Whether the states of a parameter are paged, as far as they have no room on the device."""
        if not self.is_paged or (param.numel() < PAGED_FROM and param.device.type != "cpu"):
            return False
        if param.device.type in LANES:
            return param.numel() >= PAGED_FROM
        if not self._told_of_paging:
            what = f"paging to the host does nothing for parameters on {param.device}: their states stay there"
            warnings.warn(what, HalfbyteWarning, stacklevel=2)
            self._told_of_paging = True
        return False

    def _home(self, pager: paging.Pager, key: Tensor, param: Tensor, quantized: bool) -> tuple[torch.device, bool]:
        """Where the states of a parameter live, and whether the pager has them."""
        size = size_of(RULES[self.rule], param.numel(), quantized)
        paged = self._pages(param) and not pager.stays(key, param.device, size)
        return torch.device("cpu") if paged and pager.staged else param.device, paged

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups in bitsandbytes' layout.

        state[i] is {"step": int, "__bnb_optimizer_quant_state__": {"state1": ..., "absmax1": ..., ...}}: the inner
        dictionary keeps FSDP from gathering tensors that do not have the parameter's shape.  Tensors are not copied.
        """
        return checkpoint.wrap(super().state_dict())

    @_eager
    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what state_dict() of this class, or of bitsandbytes' class of the same name, gave.

        move_to_device  move states to the devices of their parameters now; otherwise the next step does

        States keep their dtypes, and 8-bit ones the codebook they were saved with.  Blocks of 2048 elements, of
        bitsandbytes before 0.44, become blocks of 256 with the same values.

        Raises FormatError, before anything is changed, for a state of another shape or another kind of optimizer,
        and for a truncated one.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = checkpoint.read_groups(state_dict, self.param_groups, self.defaults)
        for group in groups:
            resolve(self.rule, group, self.args, {})
        ids = checkpoint.params_by_id(state_dict, self.param_groups)
        content: defaultdict[Any, Any] = defaultdict(dict)
        pager = paging.Pager(self.paged_memory, self.paged_budget)  # the present one ends with the present states
        for key, entry in state_dict["state"].items():
            if (param := ids.get(key)) is None:
                content[key] = copy.deepcopy(entry)
                continue
            where = f"state {key!r}"
            shard = memory.local(param)
            read = checkpoint.read_state(where, entry, RULES[self.rule], shard)
            if move_to_device and read:
                home, paged = self._home(pager, param, shard, read["state1"].dtype is torch.uint8)
                refit(read, RULES[self.rule], shard, home)
                if paged:
                    pager.adopt(read, shard.device)
            if read:
                read["step"] = steps.converted(read["step"], self.capturable, param.device)
            content[param] = read
        steps.share(one for one in content.values() if isinstance(one, dict))
        self._pager = pager
        self.__setstate__({"state": content, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _update_part(bucket: Bucket, scale: Tensor | None, lists: Lists) -> None:
    """Step a part of a bucket."""
    bucket.call(*bucket.arguments(lists, scale))
