"""Reading a checkpoint file: only what the network needs, and nothing that does not fit it."""

import functools
import json
import logging
import pickle
import re
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
from pid_ref.registry import (
    CHECKPOINT_FILE,
    CHECKPOINTS,
    REFUSED,
    Checkpoint,
    spaces_in_name,
)

Shape = tuple[int, ...]

_log = logging.getLogger("pid_ref")

_NET = "net."
_FIRST = "lq_proj.latent_proj.0.weight"
"""A tensor of every PiD decoder, whose key shows under which prefix a file keeps the network."""
_WRAPPERS = ("state_dict", "model")
"""Keys under which a `.pth` may hold the dict of tensors."""
_TRAINING_PREFIXES = ("net_ema.", "fake_score.", "discriminator.", "repa_loss.")
"""What a training run saves beside the network, wanted by nobody here."""
_TRAINING_HEAD = "lq_proj.lq_aux_rgb_head."
"""A part of the v1.5 network that only its training loss used."""

_SAFETENSORS_FLOATS = {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}
_FLOATS = frozenset(_SAFETENSORS_FLOATS.values())
"""The dtypes weights may have, under torch's names."""

_SPLIT = re.compile(r"(pixel_blocks\.\d+\.adaLN_modulation)_(msa|mlp)(?:\.0)?\.(weight|bias)")
"""One half of a modulation that some repackagings store in two."""

_QUANTISED_DTYPES = ("I8", "U8", "F8_", "torch.int8", "torch.uint8", "torch.float8")
_QUANTISED_KEYS = (".weight_scale", ".scale_weight", ".comfy_quant", "scaled_fp8")

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
    first = shapes.get(_FIRST, ())
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
    released = dict.fromkeys(each.space.name for each in usual or full_size or kinds)
    odd = "" if usual else f" of latent hidden size {width}"
    return f"{_one_of(list(released))} {version}{odd}"


def _grid_channels(config: PidConfig) -> int:
    """Channels of the latent after unpatchifying: what the first convolution takes."""
    return config.latent_channels // config.latent_unpatchify**2


def _one_of(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def read_checkpoint(
    path: str | Path, wanted: Checkpoint | PidConfig, *, force_space: bool = False
) -> Mapping[str, torch.Tensor]:
    """The network's weights in a checkpoint file: every name of `state_shapes`, in its order.

    path: an official `.pth`, a safetensors repackaging of one, or a folder that holds
    `model_ema_bf16.pth`. The tensors are views of the mapped file, on the CPU, in the file's own
    dtype (bfloat16, float16 or float32); none is read before it is used.
    wanted: the checkpoint this should be, or only the network it should fit.
    force_space: take a file whose name speaks of another latent space.
    A prefix of all names is taken off, modulations stored in two parts are joined, and training
    leftovers are skipped, with a note to the "pid_ref" logger.
    Raises `PidInputError` for a missing, damaged, quantised or foreign file, for one whose name
    or folder says it is another checkpoint, for any missing, extra, misshapen or non-float
    tensor, and, when a tensor is read, for NaN or infinity in it.
    """
    file = checkpoint_file(Path(path))
    _check_name(file, wanted)
    if isinstance(wanted, Checkpoint) and not force_space:
        _check_space(file, wanted)
    tensors = _open(file)
    _check_unquantised(file, tensors)
    config = wanted.config if isinstance(wanted, Checkpoint) else wanted
    keys = _join_parts(_network_keys(file, tensors), tensors)
    _check_tensors(file, {name: _kind(tensors, parts) for name, parts in keys.items()}, wanted)
    kind = looks_like(_cached_shapes(config))
    if " or " in kind and isinstance(wanted, Checkpoint):
        _log.info("the tensors in %s fit %s; taken as %s", file, kind, wanted.label)
    return _Renamed(file, tensors, {name: keys[name] for name in _cached_shapes(config)}, config)


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


def _check_space(file: Path, wanted: Checkpoint) -> None:
    """Refuse a repackaging whose name speaks only of other spaces than the one asked for."""
    named = spaces_in_name(file.stem)
    if named and wanted.space not in named:
        names = _one_of([space.name for space in named])
        raise PidInputError(
            f"expected {wanted.label}, but got a file for {names} by its name {file.name}; ask for "
            "that space, pass another file, or add --force-space if the name is wrong"
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
    """A state dict whose tensors lie in a file under other names, or in two parts."""

    def __init__(
        self,
        file: Path,
        tensors: _Torch | _Safetensors,
        keys: Mapping[str, tuple[str, ...]],
        config: PidConfig,
    ) -> None:
        self._file = file
        self._tensors = tensors
        self._keys = keys
        self._pixels = config.patch_size**2

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [self._tensors.get(key) for key in self._keys[name]]
        value = parts[0]
        if len(parts) > 1:  # Rows are (pixel, shift / scale / gate of attention then MLP, channel).
            rows = [part.unflatten(0, (self._pixels, 3, -1)) for part in parts]
            value = torch.cat(rows, dim=1).flatten(0, 2)
        if not torch.isfinite(value).all():
            raise PidInputError(
                f"expected finite weights, but got NaN or infinity in {self._keys[name][0]} of "
                f"{self._file}; pass a file that was saved or converted without this fault"
            )
        return value

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
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), dict):
            _log.info("the tensors of %s are those of its %r", file, wrapper)
            found = found[wrapper]
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
    prefix = _prefix(file, keys)
    names: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for key in keys:
        # Beside prefixed keys every other is foreign; without a prefix only the known ones are.
        ours = key.startswith(prefix) if prefix else not key.startswith(_TRAINING_PREFIXES)
        name = key.removeprefix(prefix)
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


def _prefix(file: Path, keys: list[str]) -> str:
    """What stands in front of every name of the network, "" for nothing."""
    if any(key.startswith(_NET) for key in keys):
        return _NET
    found = {key.removesuffix(_FIRST) for key in keys if key.endswith(_FIRST)}
    found = {prefix for prefix in found if not prefix.startswith(_TRAINING_PREFIXES)}
    if "" in found or not found:
        return ""
    if len(found) > 1:
        raise PidInputError(
            f"expected one network in {file}, but got {len(found)}, under "
            f"{', '.join(sorted(found))}; save the one to use alone"
        )
    prefix = found.pop()
    _log.info("the names of the tensors in %s begin with %s, which is taken off", file, prefix)
    return prefix


def _join_parts(
    keys: Mapping[str, str], tensors: _Torch | _Safetensors
) -> dict[str, tuple[str, ...]]:
    """The file's keys of every network tensor: two where both equal parts of one are there."""
    joined: dict[str, tuple[str, ...]] = {name: (key,) for name, key in keys.items()}
    for name in keys:
        found = _SPLIT.fullmatch(name)
        if found is None or found[2] != "msa":
            continue
        other = name.replace("_msa", "_mlp")
        if other in keys and tensors.kind(keys[name]) == tensors.kind(keys[other]):
            joined[f"{found[1]}.0.{found[3]}"] = (keys[name], keys[other])
            del joined[name], joined[other]
    return joined


def _kind(tensors: _Torch | _Safetensors, parts: tuple[str, ...]) -> tuple[Shape, str]:
    """Shape and dtype of a tensor whose equal parts are stacked."""
    shape, dtype = tensors.kind(parts[0])
    return ((len(parts) * shape[0], *shape[1:]) if len(parts) > 1 else shape), dtype


def _check_unquantised(file: Path, tensors: _Torch | _Safetensors) -> None:
    """Refuse weights of 8 bits or fewer, naming their format as far as the file says it."""
    keys = tensors.keys()
    marks = [key for key in keys if key.endswith(_QUANTISED_KEYS)]
    dtypes = sorted(
        {
            dtype
            for key in keys
            if key not in marks and (dtype := tensors.kind(key)[1]).startswith(_QUANTISED_DTYPES)
        }
    )
    if not marks and not dtypes:
        return
    formats = sorted({_comfy_format(tensors.get(key)) for key in marks if "comfy_quant" in key})
    found = " of ".join(
        ", ".join(parts)
        for parts in (
            [dtype.removeprefix("torch.") for dtype in dtypes],
            [f"ComfyUI's {name}" for name in formats],
        )
        if parts
    )
    raise PidInputError(
        f"expected weights in bfloat16, float16 or float32, but got quantised ones "
        f"({found or 'with scales beside them'}) in {file}; pass the bf16 file they were made of"
    )


def _comfy_format(mark: torch.Tensor) -> str:
    """The format that a `comfy_quant` tensor, the bytes of a JSON text, names."""
    try:
        return str(json.loads(bytes(mark.tolist()))["format"])[:40]
    except (ValueError, KeyError, TypeError):
        return "format without a name"


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
        fix = "pass the official file, or one that keeps all its tensors"
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
