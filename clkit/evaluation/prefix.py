"""Evaluating only what can have changed: the outputs of a frozen first part of the network are computed once."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from clkit.data.columns import sent, size_of, take
from clkit.errors import ConfigurationError
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import frozen_statistics

_WORTH = 0.8
_READ_A_VALUE = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}


@dataclass
class Call:
    """One call of a frozen module: what it returned, and whether something later wrote into that."""

    module: nn.Module
    output: Any
    written: bool = False

    def replayed(self) -> Any:
        """Return the output as if it had just been computed."""
        return tree_map_only(Tensor, Tensor.clone, self.output) if self.written else self.output

    def emptied(self) -> Call:
        """Return the call with NaN, which takes no memory, in place of every float."""
        return Call(self.module, tree_map_only(Tensor, _hollow, self.output))


class FrozenPrefix:
    """Replays the frozen first part of a forward on chunks that never change.

    The prefix is every call of a module without trainable parameter that is made before the first operation on one.
    Which of their outputs the rest needs is found by trying, and each chunk's replay is compared with the full forward
    before it is used; where it differs, the cache gives up with a warning. Modules whose buffers change (BatchNorm in
    training mode) end the prefix, and a module with compiled parts, or one that keeps its tower's features, has none.
    What saves less than a fifth of the floating-point operations is not kept. The cache starts anew when
    ``requires_grad`` or a frozen tensor changes.

    Args:
        module: The module, called by the functions given to :meth:`run`.
        limit: Most bytes to keep; above it the cache gives up with a warning.
    """

    def __init__(self, module: nn.Module, limit: int = 2**31) -> None:
        self.module, self.limit = module, limit
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._given_up = _is_compiled(self.module) or _computes_once(self.module)
        self._moving: set[int] = set()
        self._flags = [parameter.requires_grad for parameter in self.module.parameters()]
        self._forget()

    def _forget(self) -> None:
        self._chunks: dict[Hashable, list[Call]] = {}
        self._modules: list[nn.Module] = []
        self._needed: list[int] = []
        self._watched: list[Tensor] = []
        self._versions: list[int] = []
        self._norms = torch.empty(0)
        self._stale: Tensor | None = None
        self._bytes = 0

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that are replayed, in the order of their calls."""
        return self._modules if self._chunks else []

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        return self._bytes

    def begin(self) -> None:
        """Start an evaluation: drop what is kept if the frozen part has changed."""
        if self._flags != [parameter.requires_grad for parameter in self.module.parameters()]:
            self.reset()
        if not self._chunks:
            return
        moved = [t for t, version in zip(self._watched, self._versions, strict=True) if t._version != version]
        if moved:
            self._moving.update(map(id, moved))
            self._forget()
            return
        changed = torch.ne(_norms(self._watched), self._norms).any()
        self._stale = changed if self._stale is None else self._stale | changed

    def check(self) -> None:
        """Make sure of the evaluations so far; waits for the device.

        Raises:
            ConfigurationError: If frozen weights changed in a way that PyTorch does not count (by ``.data``).
        """
        if self._stale is not None and bool(self._stale):
            raise ConfigurationError(
                "Frozen weights were changed in place through .data while their outputs were cached, so some "
                "evaluations are wrong; use StabilityGap(prefix_cache=False)."
            )

    def run(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        """Return ``forward()``, without computing the frozen part where it is known for this key.

        Args:
            key: Stands for the input of ``forward``.
            forward: Calls the module on that input.
        """
        if self._given_up:
            return forward()
        if key in self._chunks:
            with _replay(self._chunks[key]):
                return forward()
        return self._learn(key, forward)

    def _learn(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        calls: list[Call] = []
        with _Recorder(self.module, self._is_live, calls):
            scores = forward()
        if not any(True for call in calls for _ in call.module.parameters()):
            self._given_up = True
            return scores
        modules = [call.module for call in calls]
        if modules != self._modules:
            with FlopCounterMode(display=False) as whole:
                forward()
            with FlopCounterMode(display=False) as rest, _replay(calls):
                forward()
            if rest.get_total_flops() > _WORTH * whole.get_total_flops():
                self._given_up = True
                return scores
            self._needed = self._find_needed(calls, forward)
            self._watch()
        kept = [call if index in self._needed else call.emptied() for index, call in enumerate(calls)]
        self._bytes += sum(_bytes(calls[index].output) for index in self._needed)
        if self._bytes > self.limit:
            self._give_up(
                f"they need more than {self.limit / 2**30:.1f} GiB; raise prefix_cache_limit or use a smaller subset"
            )
        elif self._digest(kept, forward) != self._digest([], forward):
            self._give_up("replaying them does not give the same numbers")
        else:
            self._chunks[key] = kept
        return scores

    def _find_needed(self, calls: list[Call], forward: Callable[[], Tensor]) -> list[int]:
        """Indices of the calls without whose output, all others given, the result differs."""
        self._modules = [call.module for call in calls]
        expected = self._digest(calls, forward)
        needed = []
        for index, call in enumerate(calls):
            without = [*calls[:index], call.emptied(), *calls[index + 1 :]]
            try:
                same = self._digest(without, forward) == expected
            except (RuntimeError, ValueError, TypeError):
                same = False
            if not same:
                needed.append(index)
        return needed

    def _watch(self) -> None:
        self._watched = [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        self._versions = [tensor._version for tensor in self._watched]
        self._norms = _norms(self._watched)

    def _give_up(self, reason: str) -> None:
        rank_zero_warn(f"The outputs of frozen modules are computed anew at each evaluation: {reason}.")
        self._forget()
        self._given_up = True

    def _is_live(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or id(tensor) in self._moving

    def _digest(self, calls: list[Call], forward: Callable[[], Tensor]) -> list[Any]:
        """Replay the calls and condense every output of the modules after the prefix, and the result."""
        found: list[Any] = []
        prefix = {child for module in self._modules for child in module.modules()}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.extend(map(_condense, tree_leaves(output)))

        with ExitStack() as hooks, _replay(calls):
            for module in self.module.modules():
                if module not in prefix:
                    hooks.callback(module.register_forward_hook(keep).remove)
            found.append(_condense(forward()))
        return found


class PrefixTable:
    """The outputs of the frozen prefix on samples that are drawn again and again, row by row.

    Args:
        calls: The prefix's calls on the first chunk of samples.
        outputs: For the calls whose output the rest needs, that output on all samples.
    """

    def __init__(self, calls: list[Call], outputs: dict[int, Any]) -> None:
        self._calls, self._outputs = calls, outputs

    @classmethod
    def build(cls, module: nn.Module, samples: Any, forward: Callable[[Any], Tensor], chunk: int) -> PrefixTable | None:
        """Compute the table, or return ``None`` where no frozen prefix is worth it or replaying it would be wrong.

        Args:
            module: The module; its random numbers and modes are left as they are.
            samples: A batch of all samples.
            forward: Calls the module on a batch of them and returns a scalar or scores.
            chunk: Samples that show what the prefix is, and the largest number of rows of :meth:`rows`.
        """
        if all(parameter.requires_grad for parameter in module.parameters()):
            return None
        size = size_of(samples)
        first = take(samples, slice(chunk))
        others = [take(samples, slice(at, at + 256)) for at in range(chunk, size, 256)]
        prefix = FrozenPrefix(module)
        with isolate_rng(), torch.no_grad():
            with evaluation_mode(module):
                prefix.run(0, lambda: forward(first))
                if not prefix.modules:
                    return None
                tables = [prefix._chunks[0]]
                for batch in others:
                    tables.append([])
                    with _Recorder(module, prefix._is_live, tables[-1]):
                        forward(batch)
            needed = {index: [table[index].output for table in tables] for index in prefix._needed}
            lengths = [size_of(batch) for batch in (first, *others)]
            if any(
                leaf.dim() == 0 or len(leaf) != length
                for outputs in needed.values()
                for output, length in zip(outputs, lengths, strict=True)
                for leaf in tree_leaves(output)
            ):
                return None
            joined = {index: tree_map(lambda *parts: torch.cat(parts), *outputs) for index, outputs in needed.items()}
            found = cls(tables[0], joined)
            some = torch.arange(min(size, chunk)).flip(0)
            with frozen_statistics(module):
                whole = forward(take(samples, some))
                with found.rows(some):
                    replayed = forward(take(samples, some))
        return found if torch.allclose(whole, replayed, rtol=1e-3, atol=1e-5) else None

    def rows(self, index: Tensor) -> AbstractContextManager[None]:
        """Replay the prefix inside the context, for one forward on these rows, ``int64`` ``[n]``."""
        n = len(index)
        calls = [
            Call(call.module, _rows(self._outputs[i], index) if i in self._outputs else _rows(call.output, slice(n)))
            for i, call in enumerate(self._calls)
        ]
        return _replay(calls)


def _rows(batch: Any, index: Tensor | slice) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return tensor[sent(index, tensor.device) if isinstance(index, Tensor) else index]

    return tree_map_only(Tensor, pick, batch)


class _Recorder(TorchFunctionMode):
    """Collects the calls of frozen modules until an operation touches a live tensor."""

    def __init__(self, module: nn.Module, is_live: Callable[[Tensor], bool], calls: list[Call]) -> None:
        super().__init__()
        self._module, self._is_live, self._calls = module, is_live, calls
        self._recording = True
        self._inside: nn.Module | None = None
        self._originals: list[tuple[Call, list[Tensor], list[int]]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        self._frozen = set()
        for module in self._module.modules():
            tensors = [*module.parameters(), *module.buffers()]
            if not any(map(self._is_live, tensors)):
                self._frozen.add(module)
            self._hooks.callback(module.register_forward_pre_hook(self._enter).remove)
            self._hooks.callback(module.register_forward_hook(self._leave, always_call=False).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()
        for call, tensors, versions in self._originals:
            call.written = [tensor._version for tensor in tensors] != versions

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._recording or self._inside is not None:
            return
        if module in self._frozen:
            self._inside = module
        elif next(module.children(), None) is None:
            self._recording = False

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._inside:
            return
        self._inside = None
        if self._recording:
            call = Call(module, tree_map_only(Tensor, Tensor.clone, output))
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self._calls.append(call)
            self._originals.append((call, tensors, [tensor._version for tensor in tensors]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._recording and (isinstance(result, (Tensor, tuple, list)) or func.__name__ in _READ_A_VALUE):
            leaves = tree_leaves((args, kwargs))
            if any(isinstance(leaf, Tensor) and self._is_live(leaf) for leaf in leaves):
                self._recording = False
        return result


@contextmanager
def _replay(calls: Sequence[Call]) -> Iterator[None]:
    queues: dict[nn.Module, deque[Call]] = defaultdict(deque)
    for call in calls:
        queues[call.module].append(call)

    def stub(queue: deque[Call], computed: Callable[..., Any]) -> Callable[..., Any]:
        # a module may be called after the prefix too, as residual blocks do with their one activation
        return lambda *args, **kwargs: queue.popleft().replayed() if queue else computed(*args, **kwargs)

    own = {module: module.__dict__["forward"] for module in queues if "forward" in module.__dict__}
    for module, queue in queues.items():
        module.__dict__["forward"] = stub(queue, module.forward)
    try:
        yield
    finally:
        for module in queues:
            del module.__dict__["forward"]
            if module in own:
                module.__dict__["forward"] = own[module]


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile has a part in the module: what it compiled cannot be replayed in parts."""
    # Lightning's for a compiled LightningModule, PyTorch's for module.compile(), and for torch.compile(module)
    marks = ("_compiler_ctx", "_compiled_call_impl")
    return any("_orig_mod" in part._modules or any(map(part.__dict__.get, marks)) for part in module.modules())


def _computes_once(module: nn.Module) -> bool:
    """Tell whether a frozen part is run for inputs that are new alone: a record of its calls would not hold again."""
    hooks = [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]
    return any(getattr(hook, "computes_once", False) for hook in hooks)


def _hollow(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _condense(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    if value.is_complex():
        value = torch.view_as_real(value)
    wide = value.detach().double()
    return wide.nan_to_num().sum().item(), wide.abs().nan_to_num().sum().item(), wide.isnan().sum().item()


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm([tensor.detach().float() for tensor in tensors]))


def _bytes(output: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
