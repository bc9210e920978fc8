"""Reading a checkpoint file: only what the network needs, and nothing that does not fit it."""

import functools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from pid_ref.config import PidConfig
from pid_ref.errors import PidInputError
from pid_ref.network import PidNet
from pid_ref.quantised_files import dequantised
from pid_ref.registry import (
    CHECKPOINT_FILE,
    CHECKPOINTS,
    REFUSED,
    Checkpoint,
    spaces_in_name,
)
from pid_ref.tensor_files import Shape, Tensors, open_tensors, unreadable

_log = logging.getLogger("pid_ref")

_NET = "net."
_FIRST = "lq_proj.latent_proj.0.weight"
"""A tensor of every PiD decoder, whose key shows under which prefix a file keeps the network."""
_TRAINING_PREFIXES = ("net_ema.", "fake_score.", "discriminator.", "repa_loss.")
"""What a training run saves beside the network, wanted by nobody here."""
_TRAINING_HEAD = "lq_proj.lq_aux_rgb_head."
"""A part of the v1.5 network that only its training loss used."""

_FLOATS = frozenset(("torch.bfloat16", "torch.float16", "torch.float32"))
"""The dtypes weights may have, under torch's names."""

_SPLIT = re.compile(r"(pixel_blocks\.\d+\.adaLN_modulation)_(msa|mlp)(?:\.0)?\.(weight|bias)")
"""One half of a modulation that some repackagings store in two."""

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
    `model_ema_bf16.pth`. The tensors are on the CPU: views of the mapped file, in its own dtype
    (bfloat16, float16 or float32), or float32 made of quantised ones; none is read before it is
    used.
    wanted: the checkpoint this should be, or only the network it should fit.
    force_space: take a file whose name speaks of another latent space.
    A prefix of all names is taken off, modulations stored in two parts are joined, quantised
    weights of the formats in `quantised_files` are made floats, and training leftovers are
    skipped, with a note to the "pid_ref" logger.
    Raises `PidInputError` for a missing, damaged or foreign file, for one of another quantised
    format or whose name or folder says it is another checkpoint, for any missing, extra,
    misshapen or non-float tensor, and, when a tensor is read, for NaN or infinity in it.
    """
    file = checkpoint_file(Path(path))
    _check_name(file, wanted)
    if isinstance(wanted, Checkpoint) and not force_space:
        _check_space(file, wanted)
    tensors = open_tensors(file)
    prefix = _prefix(file, tensors.keys())
    tensors = dequantised(file, tensors, prefix)
    config = wanted.config if isinstance(wanted, Checkpoint) else wanted
    keys = _join_parts(_network_keys(file, tensors, prefix), tensors)
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
        raise unreadable(path, error) from error
    place = f"no {CHECKPOINT_FILE} in the folder {path}" if folder else f"no file at {path}"
    raise PidInputError(
        f"expected a checkpoint, but got {place}; pass the path of a .pth or .safetensors file"
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


class _Renamed(Mapping[str, torch.Tensor]):
    """A state dict whose tensors lie in a file under other names, or in two parts."""

    def __init__(
        self,
        file: Path,
        tensors: Tensors,
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


def _network_keys(file: Path, tensors: Tensors, prefix: str) -> dict[str, str]:
    """The file's key of every network tensor by its name; leftovers of training are left out."""
    keys = tensors.keys()
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
        _log.info("skipped tensors that are none of the network's in %s: %s", file, parts)
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


def _join_parts(keys: Mapping[str, str], tensors: Tensors) -> dict[str, tuple[str, ...]]:
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


def _kind(tensors: Tensors, parts: tuple[str, ...]) -> tuple[Shape, str]:
    """Shape and dtype of a tensor whose equal parts are stacked."""
    shape, dtype = tensors.kind(parts[0])
    return ((len(parts) * shape[0], *shape[1:]) if len(parts) > 1 else shape), dtype


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
