"""Reading a checkpoint file: only what the network needs, and nothing that does not fit it."""

import functools
import logging
import pickle
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.registry import CHECKPOINT_FILE, CHECKPOINTS, REFUSED, Checkpoint

Shape = tuple[int, ...]

_log = logging.getLogger("pid_ref")

_NET = "net."
_TRAINING_PREFIXES = ("net_ema.", "fake_score.", "discriminator.", "repa_loss.")
"""What a training run saves beside the network, wanted by nobody here."""
_TRAINING_HEAD = "lq_proj.lq_aux_rgb_head."
"""A part of the v1.5 network that only its training loss used."""

_SAFETENSORS_FLOATS = {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}
_FLOATS = frozenset(_SAFETENSORS_FLOATS.values())
"""The dtypes weights may have, under torch's names."""

_NO_DECODER = "no PiD decoder"

_LISTED = 10
"""Most tensors of one kind an error message names."""


@functools.cache
def _cached_shapes(config: PidConfig) -> dict[str, Shape]:
    with torch.device("meta"):  # Shapes only: no memory, no initialisation.
        net = PidNet(config)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def state_shapes(config: PidConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a network's state dict, without the `net.` prefix."""
    return dict(_cached_shapes(config))


def looks_like(shapes: Mapping[str, Shape]) -> str:
    """What a state dict's names and shapes say it is, such as "flux, sd3 or qwenimage v1".

    Spaces with equal shapes cannot be told apart and are all named. Says so when it is no PiD
    decoder or one of no released kind.
    """
    first = shapes.get("lq_proj.latent_proj.0.weight", ())
    if len(first) != 4:
        return _NO_DECODER
    width, channels = first[:2]
    gated = any(name.startswith(("lq_proj.pit_head.", "pit_lq_gate.")) for name in shapes)
    version = "v1.5" if gated else "v1"
    kinds = [
        each
        for each in CHECKPOINTS.values()
        if (each.version, _grid_channels(each.config)) == (version, channels)
    ]
    if not kinds:
        return f"a {channels}-channel {version} of no released kind"
    usual = [each for each in kinds if each.config.latent_hidden == width]
    full_size = [each for each in kinds if each.file is None]
    released = dict.fromkeys(each.space.name for each in usual or full_size)
    odd = "" if usual else f" of latent hidden size {width}"
    return f"{_one_of(list(released))} {version}{odd}"


def _grid_channels(config: PidConfig) -> int:
    """Channels of the latent after unpatchifying: what the first convolution takes."""
    return config.latent_channels // config.latent_unpatchify**2


def _one_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def read_checkpoint(path: str | Path, wanted: Checkpoint | PidConfig) -> Mapping[str, torch.Tensor]:
    """The network's weights in a checkpoint file: every name of `state_shapes`, in its order.

    path: an official `.pth`, a safetensors repackaging of one, or a folder that holds
    `model_ema_bf16.pth`. The tensors are views of the mapped file, on the CPU, in the file's own
    dtype (bfloat16, float16 or float32); none is read before it is used. Values are not looked
    at, so NaN passes here.
    wanted: the checkpoint this should be, or only the network it should fit.
    Training leftovers in the file are skipped, with a note to the "pid_ref" logger.
    Raises `PidInputError` for a missing, damaged or foreign file, for one whose folder says it is
    another checkpoint, and for any missing, extra, misshapen or non-float tensor.
    """
    file = checkpoint_file(Path(path))
    _check_name(file, wanted)
    tensors = _open(file)
    keys = _network_keys(file, tensors)
    _check_tensors(file, {name: tensors.kind(key) for name, key in keys.items()}, wanted)
    config = wanted.config if isinstance(wanted, Checkpoint) else wanted
    kind = looks_like(_cached_shapes(config))
    if " or " in kind and isinstance(wanted, Checkpoint):
        _log.info("the tensors in %s fit %s; taken as %s", file, kind, wanted.label)
    return _Renamed(tensors, {name: keys[name] for name in _cached_shapes(config)})


def checkpoint_file(path: Path) -> Path:
    """The file itself, given it or its folder. Raises `PidInputError` when there is none."""
    try:
        folder = path.is_dir()
        file = path / CHECKPOINT_FILE if folder else path
        if file.is_file():
            return file
    except OSError as error:
        raise _unreadable(path, error) from error
    place = f"no {CHECKPOINT_FILE} in the folder {path}" if folder else f"no file at {path}"
    raise PidInputError(
        f"expected a checkpoint, but got {place}; pass the path of a .pth or .safetensors file"
    )


def _unreadable(path: Path, error: OSError) -> PidInputError:
    return PidInputError(
        f"expected a readable checkpoint, but got {error.strerror or error} for {path}; "
        "check the path and its permissions"
    )


def _check_name(file: Path, wanted: Checkpoint | PidConfig) -> None:
    """Refuse a file whose name says it must not be used or is not what was asked for.

    Names count because shapes do not tell flux from sd3, 2k from 2kto4k, nor a 4-step student
    from its teacher.
    """
    # Not resolve(): in the hub's cache the file is a link to a blob without a telling name.
    for name in (file.absolute().parent.name, file.stem):
        if name in REFUSED:
            raise PidInputError(f"expected a usable checkpoint, but got {name}; {REFUSED[name]}")
        if not isinstance(wanted, Checkpoint):
            continue
        found = CHECKPOINTS.get(name, wanted)
        if found.name != wanted.name:
            raise PidInputError(
                f"expected {wanted.label}, but got {found.label} by its name {name}; ask for "
                f"space {found.space.name} and variant {found.variant}, or pass another file"
            )
        if wanted.distilled and "undistilled" in name.lower():
            raise PidInputError(
                f"expected {wanted.label}, a 4-step decoder, but got an undistilled one by its "
                f"name {name}; ask for 2kto4k-undistilled, or pass another file"
            )


class _Torch:
    """The tensors of a mapped `.pth` file by key."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def kind(self, key: str) -> tuple[Shape, str]:
        """Shape and dtype; for anything but a tensor, no shape and the type's name."""
        value = self.tensors[key]
        if not isinstance(value, torch.Tensor):
            return (), type(value).__name__
        return tuple(value.shape), str(value.dtype)

    def get(self, key: str) -> torch.Tensor:
        return self.tensors[key]


class _Safetensors:
    """The tensors of a mapped safetensors file by key."""

    def __init__(self, file: Path) -> None:
        self.handle: Any = safe_open(str(file), framework="pt", device="cpu")

    def keys(self) -> list[str]:
        return list(self.handle.keys())

    def kind(self, key: str) -> tuple[Shape, str]:
        entry = self.handle.get_slice(key)
        dtype: str = entry.get_dtype()
        return tuple(entry.get_shape()), _SAFETENSORS_FLOATS.get(dtype, dtype)

    def get(self, key: str) -> torch.Tensor:
        return self.handle.get_tensor(key)


class _Renamed(Mapping[str, torch.Tensor]):
    """A state dict whose tensors lie in a file under other names."""

    def __init__(self, tensors: _Torch | _Safetensors, keys: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._keys = keys

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors.get(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _open(file: Path) -> _Torch | _Safetensors:
    """Map a file of either format; its first bytes tell which."""
    try:
        with file.open("rb") as stream:
            kind = _format(stream.read(64))
    except OSError as error:
        raise _unreadable(file, error) from error
    if kind == "torch" and file.suffix == ".safetensors":  # torch.load goes by the suffix.
        kind = "a .pth under a .safetensors name"
    found: Any = None
    try:
        if kind == "safetensors":
            return _Safetensors(file)
        if kind == "torch":
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise PidInputError(
            f"expected only tensors in {file}, but got other or damaged contents, which are not "
            "loaded because they could run code; pass the official file"
        ) from error
    except Exception as error:  # A damaged file fails its parser in almost any way.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise PidInputError(
            f"expected a whole checkpoint, but got a damaged, cut short or foreign file {file} "
            f"({reason}); download it again"
        ) from error
    if kind != "torch":
        raise PidInputError(
            f"expected a .pth (zip) or .safetensors checkpoint, but got {kind} in {file}; "
            "pass the weights file itself under its own name"
        )
    if not isinstance(found, dict):
        raise PidInputError(
            f"expected a flat dict of tensors in {file}, but got {type(found).__name__}; "
            "pass the official file or a repackaging of it"
        )
    return _Torch({str(key): value for key, value in cast(Any, found).items()})


def _format(head: bytes) -> str:
    """What a file's first bytes say it is: "torch", "safetensors", or words for something else."""
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if len(head) >= 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < 2**27:
        return "safetensors"
    if not head:
        return "nothing"
    if head.lstrip()[:1] == b"<":
        return "a web page"
    return "something else"


def _network_keys(file: Path, tensors: _Torch | _Safetensors) -> dict[str, str]:
    """The file's key of every network tensor by its name; leftovers of training are left out."""
    keys = tensors.keys()
    prefixed = any(key.startswith(_NET) for key in keys)
    names: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for key in keys:
        # Beside `net.` keys every other prefix is foreign; without them only the known ones are.
        ours = key.startswith(_NET) if prefixed else not key.startswith(_TRAINING_PREFIXES)
        name = key.removeprefix(_NET)
        if not ours:
            skipped[key.partition(".")[0] + "."] += 1
        elif name.startswith(_TRAINING_HEAD):
            skipped[_TRAINING_HEAD] += 1
        else:
            names[name] = key
    if skipped:
        parts = ", ".join(f"{count} of {prefix}*" for prefix, count in sorted(skipped.items()))
        _log.info("skipped tensors that only training needs in %s: %s", file, parts)
    return names


def _check_tensors(
    file: Path, found: Mapping[str, tuple[Shape, str]], wanted: Checkpoint | PidConfig
) -> None:
    """Compare what a file holds with what the network needs, tensor by tensor."""
    config = wanted.config if isinstance(wanted, Checkpoint) else wanted
    shapes = _cached_shapes(config)
    faults: dict[str, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        if name not in found:
            faults["missing"].append(f"{name} {list(shape)}")
            continue
        found_shape, dtype = found[name]
        if found_shape != shape:
            faults["misshapen"].append(f"{name} {list(found_shape)}, expected {list(shape)}")
        if dtype not in _FLOATS:
            faults["not bfloat16, float16 or float32"].append(f"{name} {dtype}")
    for name in found.keys() - shapes.keys():
        faults["extra"].append(f"{name} {list(found[name][0])}")
    if not faults:
        return
    need = looks_like(shapes)
    asked = wanted.label if isinstance(wanted, Checkpoint) else need
    seen = looks_like({name: shape for name, (shape, _) in found.items()})
    if seen == need or (seen == _NO_DECODER and not found.keys().isdisjoint(shapes)):
        trouble = "a file whose tensors differ from it"
        fix = "download it again"
    elif seen == _NO_DECODER:
        trouble = "a file that holds no PiD decoder"
        fix = "pass another file"
    else:
        trouble = f"what looks like {seen}"
        fix = "ask for that space and version, or pass another file"
    raise PidInputError(
        f"expected {asked}, but got {trouble} in {file}; {fix}\n" + "\n".join(_listed(faults))
    )


def _listed(faults: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Lines that name the first tensors of every fault and count the rest."""
    for fault, entries in faults.items():
        entries = sorted(entries)
        yield f"  {len(entries)} {fault}:"
        yield from (f"    {entry}" for entry in entries[:_LISTED])
        if len(entries) > _LISTED:
            yield f"    and {len(entries) - _LISTED} more"
