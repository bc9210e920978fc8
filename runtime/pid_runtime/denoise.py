"""From noise to the image: for every step, for every tile, for every branch.

A plain decode, of one tile and one branch, is the program's own: its update makes the next state
in the arena. In tiles, with guidance or by a rule that looks back, the program's update gives the
clean image x0 = x - t v of every call instead; these are blended, and the next state is mixed
of them on the host. That is the same picture, as every rule is affine in the velocity and the
weights of tiles, and those of branches, sum to one.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import as_array
from pid_runtime.bundle.manifest import Noise
from pid_runtime.interpreter import Program
from pid_runtime.noise import standard_normal
from pid_runtime.request import Branch, Request
from pid_runtime.tiles import Axis

Report = Callable[[], None]
"""Called after every call of the network."""

Floats = NDArray[np.float32]


def denoise_in_arena(program: Program, request: Request, report: Report) -> None:
    """A plain decode: the last state is in the program's buffer "state"."""
    schedule = request.schedule
    updates = schedule.updates

    def fill(bound: Program, instruction: Noise, draw: int) -> None:
        if draw and updates[draw - 1, 2] == 0:  # not used, but must not hold a NaN
            bound.memory.fill_zero(bound.buffer(instruction.target))
        elif request.noises[draw] is not None:
            bound.load_noise(instruction, request.noises[draw])
        else:
            bound.fill_noise(instruction, request.seeds, draw)

    _write(program, request, updates)
    _write_captions(program, request.branches)
    program.memory.write(program.buffer("latent"), request.latent)
    program.run("prologue", noise=lambda bound, instruction, _: fill(bound, instruction, 0))
    _compute_times(program, request)
    for step, row in enumerate(schedule.rows):
        program.run(
            "step", row, step, lambda bound, instruction, k: fill(bound, instruction, k + 1)
        )
        report()


class Canvas:
    """The state of a decode on the host, and how its steps are made of calls of the program."""

    def __init__(self, program: Program, request: Request) -> None:
        """`program` is bound to `request.program_sizes`."""
        self._program, self._request = program, request
        sizes, tiling = request.sizes, request.tiling
        self._patch = sizes.value("H") // sizes.value("Hs")
        self._per_latent = sizes.value("Hs") // sizes.value("h")
        shape = (*sizes.shape(("B", "Hs", "Ws")), self._patch, self._patch, 3)
        self.state: Floats = np.empty(shape, np.float32)
        """`[B, Hs, Ws, P, P, 3]`: the picture's tokens, row by row those of the next step."""
        looks_back = request.schedule.looks_back
        self._before: Floats | None = np.empty(shape, np.float32) if looks_back else None
        self._mixes = request.schedule.mixes
        self._latent = as_array(request.latent)
        if tiling is None:
            height, width = sizes.shape(("h", "w"))
            self._rows, self._columns = Axis(height, height, (0,)), Axis(width, width, (0,))
        else:
            self._rows, self._columns = tiling.rows, tiling.columns
        self._down_weights = self._weights(self._rows)
        self._across_weights = self._weights(self._columns)

    def denoise(self, report: Report) -> None:
        """Run all steps."""
        program, request = self._program, self._request
        groups, is_one = request.groups, request.tiling is None
        last = len(self._columns.starts) - 1, request.branches[-1]
        _write(program, request, request.schedule.predictions)
        _compute_times(program, request)
        for row, values in enumerate(self._noise(0)):
            self.state[:, row] = values
        for step, row in enumerate(request.schedule.rows):
            strip, noise = self._new_strip(), self._noise(step + 1)
            for down in range(len(self._rows.starts)):
                for across in range(len(self._columns.starts)):
                    if step == 0 or not is_one:
                        self._take_in_latent(down, across)
                    for group in groups:
                        if len(groups) > 1 or step == down == across == 0:
                            self._take_in_captions(group)
                        cleans = np.split(self._run(down, across, row, step), len(group))
                        for branch, clean in zip(group, cleans, strict=True):
                            self._add(strip, clean, branch.weight, down, across)
                            if across != last[0] or branch is not last[1]:
                                report()
                self._update(step, strip, down, noise)
                report()

    def image(self) -> Floats:
        """The state as images, float32 `[B, 3, H, W]`, clamped to [-1, 1]."""
        batch, rows, columns, patch, _, _ = self.state.shape
        image = np.empty((batch, 3, rows * patch, columns * patch), np.float32)
        for row in range(rows):
            pixels = self.state[:, row].transpose(0, 4, 2, 1, 3)  # (B, 3, P, Ws, P)
            part = image[:, :, row * patch : (row + 1) * patch]
            np.clip(pixels.reshape(part.shape), -1, 1, out=part)
        return image

    def image_bytes(self) -> NDArray[np.uint8]:
        """The state as images, uint8 `[B, H, W, 3]`."""
        batch, rows, columns, patch, _, _ = self.state.shape
        image = np.empty((batch, rows * patch, columns * patch, 3), np.uint8)
        for row in range(rows):
            pixels = np.clip(self.state[:, row].transpose(0, 2, 1, 3, 4), -1, 1)  # (B, P, Ws, P, 3)
            part = image[:, row * patch : (row + 1) * patch]
            part[...] = np.rint((pixels + np.float32(1)) * np.float32(127.5)).reshape(part.shape)
        return image

    def _tokens(self, length: int) -> int:
        return length * self._per_latent

    def _new_strip(self) -> Floats:
        """Where a row of tiles is blended: zeros, of the tiles' height and the picture's width."""
        batch, _, *others = self.state.shape
        return np.zeros((batch, self._tokens(self._rows.tile), *others), np.float32)

    def _weights(self, axis: Axis) -> list[Floats]:
        """Of every tile along an axis, `[tokens, P]`."""
        scale = self._per_latent * self._patch
        return [
            axis.weights(index, scale).reshape(-1, self._patch) for index in range(len(axis.starts))
        ]

    def _take_in_latent(self, down: int, across: int) -> None:
        """The part of the latent under a tile."""
        top, left = self._rows.starts[down], self._columns.starts[across]
        part = self._latent[:, :, top : top + self._rows.tile, left : left + self._columns.tile]
        _write_for_group(self._program, "latent", part)
        self._program.refresh("latent")

    def _take_in_captions(self, group: Sequence[Branch]) -> None:
        _write_captions(self._program, group)
        self._program.refresh("caption")

    def _run(self, down: int, across: int, row: int, step: int) -> Floats:
        """The clean images that the network sees in a tile, `[B, hs, ws, P, P, 3]`.

        Those of the next branch of the group follow.
        """
        top, left = (
            self._tokens(self._rows.starts[down]),
            self._tokens(self._columns.starts[across]),
        )
        height, width = self._tokens(self._rows.tile), self._tokens(self._columns.tile)
        part = self.state[:, top : top + height, left : left + width]
        program = self._program
        _write_for_group(program, "state", part)
        program.run("step", row, step, _no_noise)
        return program.memory.read(program.buffer("state")).reshape(-1, *part.shape[1:])

    def _add(self, strip: Floats, clean: Floats, weight: float, down: int, across: int) -> None:
        """Add a tile's clean image, weighted, to its row of tiles."""
        horizontal = self._across_weights[across] * np.float32(weight)
        clean *= self._down_weights[down][:, None, :, None, None]
        clean *= horizontal[None, :, None, :, None]
        left = self._tokens(self._columns.starts[across])
        strip[:, :, left : left + clean.shape[2]] += clean

    def _update(self, step: int, strip: Floats, down: int, fresh: Iterator[Floats]) -> None:
        """Make the next state of the rows that no later tile touches; fresh: their noise."""
        starts = self._rows.starts
        is_last = down + 1 == len(starts)
        begin = self._tokens(starts[down])
        end = self._tokens(self._rows.size if is_last else starts[down + 1])
        state, clean, before, noise = self._mixes[step]
        for row in range(begin, end):
            values = strip[:, row - begin]
            mixed = state * self.state[:, row] + clean * values
            if self._before is not None:
                if before:
                    mixed += before * self._before[:, row]
                self._before[:, row] = values
            if noise:
                mixed += noise * next(fresh)
            self.state[:, row] = mixed
        done = end - begin
        strip[:, : strip.shape[1] - done] = strip[:, done:]
        strip[:, strip.shape[1] - done :] = 0

    def _noise(self, draw: int) -> Iterator[Floats]:
        """The rows of tokens of a draw, `[B, Ws, P, P, 3]`, one after another."""
        _, rows, columns, patch, _, _ = self.state.shape
        count = columns * patch * patch * 3
        given = self._request.noises[draw]
        image = None if given is None else as_array(given)
        for row in range(rows):
            if image is None:
                drawn = [
                    standard_normal(seed, draw, count, start=row * count)
                    for seed in self._request.seeds
                ]
                yield np.stack(drawn).reshape(-1, columns, patch, patch, 3)
            else:
                part = image[:, :, row * patch : (row + 1) * patch]
                pixels = part.reshape(len(part), 3, patch, columns, patch)
                yield pixels.transpose(0, 3, 2, 4, 1)


def _no_noise(bound: Program, instruction: Noise, _draw: int) -> None:
    """Its factor is zero, but it must not hold a NaN."""
    bound.memory.fill_zero(bound.buffer(instruction.target))


def _compute_times(program: Program, request: Request) -> None:
    if request.schedule.moments is not None:
        for row in request.schedule.rows:
            program.run("timestep", row=row, step=row)


def _write(program: Program, request: Request, updates: Floats) -> None:
    """Put what is the same for every tile and branch into the arena."""
    memory, rows = program.memory, request.sizes.value("N")
    _write_for_group(program, "sigma", request.sigmas)
    memory.write(program.buffer("update"), _padded(updates, rows))
    if request.schedule.moments is not None:
        memory.write(program.buffer("timestep"), _padded(request.schedule.moments, rows))


def _write_for_group(program: Program, name: str, values: Floats) -> None:
    """Write what is the same for every branch of a group, `[B, ..]`."""
    values = np.ascontiguousarray(values)
    for first in range(0, program.sizes.value("B"), len(values)):
        program.memory.write(program.image_part(name, first, len(values)), values)


def _write_captions(program: Program, group: Sequence[Branch]) -> None:
    """Write the captions of branches, each of which may be one for all its images."""
    batch = program.sizes.value("B") // len(group)
    for index, branch in enumerate(group):
        count = branch.caption.shape[0]
        for image in range(index * batch, (index + 1) * batch, count):
            part = program.image_part("caption", image, count)
            program.memory.write(part, branch.caption)


def _padded(values: Floats, rows: int) -> Floats:
    """The same with zero rows below, as many as the buffer has."""
    full = np.zeros((rows, *values.shape[1:]), np.float32)
    full[: len(values)] = values
    return full


def kept_bytes(request: Request) -> int:
    """Bytes on the host of a decode that is not plain: states, a row of tiles, and the image."""
    values = 3 * math.prod(request.sizes.shape(("B", "H", "W")))
    states = 2 if request.schedule.looks_back else 1
    height = request.program_sizes.value("H") / request.sizes.value("H")
    return int(values * (4 * (states + height) + 1))
