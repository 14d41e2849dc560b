"""What a frozen vision tower makes of each image: computed once, kept in memory or on disk, projected each time."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from clkit.data.augment import seeded
from clkit.data.columns import sent
from clkit.data.images import Features, Images, Kept, Pixels
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.language.vision import vision_parts
from clkit.rng import private_rng

Where = Literal["memory", "disk"]


class Table(Protocol):
    """Where the images of a stream are read; see :class:`~clkit.language.images.ImageTable`."""

    processor: Any
    known: Tensor | None

    def __len__(self) -> int: ...

    def load(self, number: int, kept: Kept | None = None) -> Pixels:
        """Read an image and return what the model takes of it."""

    def content(self, number: int, kept: Kept | None = None) -> bytes:
        """Return an image as it is stored."""


class Tower:
    """The frozen tower of a model and the projector behind it.

    Args:
        model: A model of transformers, or of peft around one.

    Raises:
        ConfigurationError: If the tower is trained, or there is not one projector.
    """

    def __init__(self, model: Any) -> None:
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parts = vision_parts(model)
        self._tensors = [tensor for part in parts.tower for tensor in (*part._parameters.values(), *_buffers(part))]
        self._parameters = parts.tower_parameters
        if len(parts.projector_roots) != 1:
            raise self._refusal(f"has {len(parts.projector_roots)} projectors behind its tower, and not one")
        self._projector = self._base.get_submodule(parts.projector_roots[0])
        self._versions: list[tuple[int, int]] = []
        self._weights = b""

    def key(self) -> bytes:
        """Return a digest of all that the features of an image depend on, beside the image and its processor.

        Raises:
            ConfigurationError: If the tower is trained.
        """
        if any(parameter.requires_grad for parameter in self._parameters):
            raise ConfigurationError(
                "features are kept of a tower that never changes, but parameters of this one are trained; freeze it "
                "(model.tower=frozen), or use model.features=null."
            )
        tensors = [tensor for tensor in self._tensors if tensor is not None]
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if versions != self._versions:
            self._versions, digest = versions, _digest()
            digest.update(_description(self._base.config))
            for tensor in tensors:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._weights = digest.digest()
        device = tensors[0].device.type
        cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
        return self._weights + f"{device} {tensors[0].dtype} {cast}".encode()

    @torch.no_grad()
    def features(self, pixels: Pixels) -> Features:
        """Run the tower on one image.

        Raises:
            ConfigurationError: If what is kept would not give what the model itself makes of the image.
        """
        device, dtype = self._parameters[0].device, self._parameters[0].dtype
        placed = {n: part.to(device, dtype if part.is_floating_point() else None) for n, part in pixels.items()}
        takes = inspect.signature(self._base.get_image_features).parameters
        inputs: list[tuple[Any, ...]] = []
        hook = self._projector.register_forward_pre_hook(lambda module, args: inputs.append(args))
        try:
            out = self._base.get_image_features(**{name: part for name, part in placed.items() if name in takes})
        finally:
            hook.remove()
        expected = out.pooler_output
        if len(inputs) != 1 or len(inputs[0]) != 1:
            raise self._refusal(f"calls its projector {len(inputs)} times for an image")
        # what is a view would keep all of what it is a view of
        kept = inputs[0][0].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        small = {name: part.cpu() for name, part in pixels.items() if "pixel" not in name}
        found = {"features": kept, "stacked": torch.tensor(isinstance(expected, Tensor)), **small}
        own, model = _rows(self._projected([found])), _rows(expected)
        if own.shape != model.shape or (own - model).abs().max() > 1e-2 * model.abs().max():
            raise self._refusal("changes the order of what its projector makes")
        return found

    def arguments(self, features: Sequence[Features]) -> dict[str, Any]:
        """Return what takes the place of pixels among the arguments of the model's ``forward``.

        The projector is applied as it is now, so that it is trained.

        Args:
            features: Of the images of a batch, in reading order.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        device = self._parameters[0].device
        takes = inspect.signature(self._base.forward).parameters
        small = [name for name in features[0] if name in takes]
        output = BaseModelOutputWithPooling(pooler_output=self._projected(features))
        return {
            **{name: sent(torch.cat([own[name] for own in features]), device) for name in small},
            "mm_encoder_outputs": {"image": output},
        }

    def _projected(self, features: Sequence[Features]) -> Any:
        device = self._parameters[0].device
        inputs = sent(torch.cat([own["features"] for own in features]), device)
        projected = self._projector(inputs)
        inner = self._base.base_model
        if hasattr(inner, "pack_image_features"):
            # tiles become rows without padding, each with a mark at its end
            given = {
                "image_features": projected.split([len(own["features"]) for own in features]),
                "image_sizes": sent(torch.cat([own["image_sizes"] for own in features]), device),
                "vision_feature_select_strategy": self._base.config.vision_feature_select_strategy,
                "image_newline": inner.image_newline,
            }
            return inner.pack_image_features(**given)[0]
        return projected if features[0]["stacked"] else [projected.flatten(0, -2)]

    def _refusal(self, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"The features of {type(self._base).__name__} cannot be kept: it {why}; use model.features=null."
        )


class TowerFeatures:
    """Keeps what a frozen tower makes of images, for training, evaluation and generation.

    An image is run through the tower alone, so that its features do not depend on the batch that it is in. They are
    found again by the content of the image's file, the settings of the processor, weights and settings of the tower,
    device and precision. The projector is not part of it, and may be trained.

    Args:
        where: ``"memory"``: what is too much is dropped at random. ``"disk"``: a file an image, which other runs find
            too; nothing is deleted, and what is too much is computed each time.
        limit: Most bytes.
        dir: Folder of the files.

    Attributes:
        hits: Images of batches whose features were there.
        misses: Those that were computed.
        seconds: That took.
        seconds_avoided: That computing them each time would have taken more.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    def __init__(self, where: Where, *, limit: int = 4 * 2**30, dir: str | Path | None = None) -> None:
        check_choice("features", where, ("memory", "disk"))
        check_whole("features_limit", limit, 1)
        if where == "disk" and dir is None:
            raise ConfigurationError("features='disk' needs a folder; give features_dir.")
        self.where = where
        self._store: _Memory | _Disk = _Memory(limit) if dir is None or where == "memory" else _Disk(Path(dir), limit)
        self._table: Table | None = None
        self._known: Tensor | None = None
        self._contents: dict[int, bytes] = {}
        self._tower: Tower | None = None
        self._of: Any = None
        self.hits = self.misses = 0
        self.seconds = self.seconds_avoided = 0.0

    def watch(self, table: Table) -> None:
        """Keep the features of a table's images from now on.

        Raises:
            ConfigurationError: If the processor makes something else of an image each time.
        """
        if table is self._table and table.known is self._known:
            return
        self._table, self._tower, self._contents = table, None, {}
        self._settings = _processor(table.processor)
        # the loader's workers look whether an image need be read
        self._known = table.known = torch.zeros(len(table), dtype=torch.uint8)
        cast(Any, self._known).share_memory_()
        if len(table):
            found = []
            for seed in (1, 2):
                with seeded(seed):
                    found.append(table.load(0))
            if any(not torch.equal(found[0][name], found[1][name]) for name in found[0]):
                raise ConfigurationError(
                    "The processor changes images at random, so that a tower's features of an image differ each time; "
                    "use a processor without augmentation, or model.features=null."
                )

    def arguments(self, model: Any, table: Table, images: Images) -> dict[str, Any]:
        """Return the arguments of the model's ``forward`` for a batch's images, see :meth:`Tower.arguments`."""
        tower = self._tower_of(model, table)
        of_tower = tower.key()
        return tower.arguments([self._find(number, table, images, of_tower) for number in images.used()])

    def of(self, model: Any, table: Table, number: int) -> Features:
        """Return the features of one image."""
        of_tower = self._tower_of(model, table).key()
        return self._find(number, table, Images(torch.tensor([[number]])), of_tower)

    def _tower_of(self, model: Any, table: Table) -> Tower:
        if table is not self._table:
            self.watch(table)
        if self._tower is None or self._of is not model:
            self._tower, self._of = Tower(model), model
        return self._tower

    def _find(self, number: int, table: Table, images: Images, of_tower: bytes) -> Features:
        kept = images.kept.get(number)
        if kept is not None and "features" in kept:
            return kept
        if number not in self._contents:
            self._contents[number] = _digest(table.content(number, kept), self._settings).digest()
        key = _digest(self._contents[number], of_tower).hexdigest()
        found = self._store.get(key, number)
        if found is None:
            assert self._tower is not None
            pixels = images.pixels.get(number) or table.load(number, kept)
            with _Watch() as watch:
                computed = self._tower.features(pixels)
            found = {**computed, _SECONDS: torch.tensor(watch.seconds, dtype=torch.float64)}
            dropped = self._store.put(key, found, number)
            self.misses += 1
            self.seconds += watch.seconds
            if dropped is not None:
                self._note(dropped, 0)
                self._note([number], 1)
        else:
            self.hits += 1
            self.seconds_avoided += float(found[_SECONDS])
            self._note([number], 1)
        return {name: part for name, part in found.items() if name != _SECONDS}

    def _note(self, numbers: list[int], known: int) -> None:
        assert self._known is not None
        # a table may have grown since
        self._known[[number for number in numbers if number < len(self._known)]] = known

    def report(self) -> dict[str, Any]:
        """Return what it saved, as plain data."""
        return {
            "where": self.where,
            "hits": self.hits,
            "misses": self.misses,
            "bytes": self._store.n_bytes,
            "tower_seconds": self.seconds,
            "tower_seconds_avoided": self.seconds_avoided,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COUNTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])


_SECONDS = "seconds"
_COUNTS = ("hits", "misses", "seconds", "seconds_avoided")


class _Memory:
    """Features in memory; copies of a module share it, and another process starts without."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._forget()

    def _forget(self) -> None:
        self._entries: dict[str, tuple[Features, set[int]]] = {}
        self._keys: list[str] = []
        self._rng = private_rng(0, 50)
        self.n_bytes = 0

    def __deepcopy__(self, memo: Any) -> _Memory:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, key: str, number: int) -> Features | None:
        if key not in self._entries:
            return None
        found, numbers = self._entries[key]
        numbers.add(number)
        return found

    def put(self, key: str, features: Features, number: int) -> list[int] | None:
        """Keep the features of an image, and return the numbers of those dropped for it; ``None`` if there is no room.

        A random one goes: the oldest would always be the next to be read, where there is room for a part of a pass.
        """
        size = _size(features)
        if size > self._limit:
            return None
        dropped: list[int] = []
        while self.n_bytes + size > self._limit:
            at = int(self._rng.integers(len(self._keys)))
            self._keys[at], self._keys[-1] = self._keys[-1], self._keys[at]
            old, numbers = self._entries.pop(self._keys.pop())
            self.n_bytes -= _size(old)
            dropped += numbers
        self._entries[key] = features, {number}
        self._keys.append(key)
        self.n_bytes += size
        return dropped


class _Disk:
    """Features in files, which several processes may write and read at once."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self.n_bytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
        self._is_full = False

    def __deepcopy__(self, memo: Any) -> _Disk:
        return self

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, number: int) -> Features | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self._path(key).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: str, features: Features, number: int) -> list[int] | None:
        from safetensors.torch import save

        content = save(features)
        if self.n_bytes + len(content) > self._limit:
            if not self._is_full:
                rank_zero_warn(
                    f"{self._folder} holds {self.n_bytes:,} bytes of features, and more are not kept; raise "
                    "model.features_limit, or delete the folder."
                )
            self._is_full = True
            return None
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{key}.{os.getpid()}.part")
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self.n_bytes += len(content)
        return []


class _Watch:
    """Measures the time of a block, all that the device is given in it included."""

    seconds = 0.0

    def __enter__(self) -> _Watch:
        self._start = self._now()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds = self._now() - self._start

    def _now(self) -> float:
        if cast(Any, torch.cuda).is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def _buffers(part: Any) -> list[Tensor | None]:
    return list(part._buffers.values())


def _rows(output: Tensor | Sequence[Tensor]) -> Tensor:
    parts = [output] if isinstance(output, Tensor) else output
    return torch.cat([part.flatten(0, -2) for part in parts])


def _size(features: Features) -> int:
    return sum(part.nbytes for part in features.values())


def _digest(*parts: bytes) -> Any:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest


def _processor(processor: Any) -> bytes:
    own = processor.image_processor
    return _description(own) + f"{type(processor).__name__} {type(own).__name__}".encode()


def _description(config: Any) -> bytes:
    """Settings of a model beside those of its language model, or of a processor, with the versions of what runs it."""
    import transformers

    settings = {name: value for name, value in config.to_dict().items() if name not in ("text_config", "_name_or_path")}
    versions = [torch.__version__, transformers.__version__]
    return json.dumps([settings, versions], sort_keys=True, default=str).encode()
