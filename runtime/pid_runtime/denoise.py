"""From noise to the image: for every step, for every tile, for every branch.

A plain decode, of one tile and one branch, is the program's own: its update makes the next state
in the arena. In tiles, with guidance or by a rule that looks back, the program's update gives the
clean image x0 = x - t v of every call instead; these are blended, and the next state is mixed
of them (`Blending`). That is the same picture, as every rule is affine in the velocity and the
weights of tiles, and those of branches, sum to one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pid_runtime.backends.memory import Block, HostMemory, Memory, Tensor, as_array
from pid_runtime.bundle.manifest import Noise
from pid_runtime.bundle.sizes import ITEM_BYTES
from pid_runtime.interpreter import Program
from pid_runtime.request import Branch, Request
from pid_runtime.tiles import Axis

Report = Callable[[], None]
"""Called after every call of the network."""

Floats = NDArray[np.float32]

FLOAT = "float32"

NOISE_VALUES = 1 << 20
"""Of a draw that are made, and used, at once."""


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


@dataclass(frozen=True)
class _Field:
    """Values of a decode's tokens, in memory."""

    block: Block
    whole: Tensor
    """Float32 `[B, rows, columns, P, P, 3]`."""

    @property
    def rows(self) -> int:
        """Of tokens."""
        return self.whole.shape[1]


class Canvas:
    """The state of a decode, and how its steps are made of calls of the program.

    It lies in the program's memory, or on the host.
    """

    def __init__(self, program: Program, request: Request, *, on_host: bool) -> None:
        """`program` is bound to `request.program_sizes`.

        on_host: keep the state on the host, as for memory that cannot blend. Raises what the
        memory raises when there is too little.
        """
        self._program, self._request = program, request
        self._is_near = not on_host
        self._memory: Memory = HostMemory() if on_host else program.memory
        if self._memory.blending is None:
            raise AssertionError("this memory cannot blend")
        self._blending = self._memory.blending
        sizes, tiling = request.sizes, request.tiling
        self._patch = sizes.value("H") // sizes.value("Hs")
        self._per_latent = sizes.value("Hs") // sizes.value("h")
        if tiling is None:
            height, width = sizes.shape(("h", "w"))
            self._rows, self._columns = Axis(height, height, (0,)), Axis(width, width, (0,))
        else:
            self._rows, self._columns = tiling.rows, tiling.columns
        self._mixes = request.schedule.mixes
        self._latent = as_array(request.latent)
        batch, rows, columns = sizes.shape(("B", "Hs", "Ws"))
        token = self._patch, self._patch, 3
        self._row_values = columns * math.prod(token)  # of an image
        tile_rows, tile_columns = map(self._tokens, (self._rows.tile, self._columns.tile))
        at_once = min(rows, max(1, NOISE_VALUES // (batch * self._row_values)))

        def new(rows: int) -> _Field:
            return self._new((batch, rows, columns, *token))

        self._state, self._ring, self._noise = new(rows), new(tile_rows), new(at_once)
        self._before = new(rows) if request.schedule.looks_back else None
        self._tile_shape = batch, tile_rows, tile_columns, *token
        self._aside: Tensor = None if self._is_near else self._new(self._tile_shape).whole
        self._down_weights = [self._kept(each) for each in self._weights(self._rows)]
        across = self._weights(self._columns)
        self._across_weights = [
            [self._kept(each * np.float32(branch.weight)) for each in across]
            for branch in request.branches
        ]

    def denoise(self, report: Report) -> None:
        """Run all steps."""
        program, request = self._program, self._request
        groups, is_one = request.groups, request.tiling is None
        last_branch, last_column = len(request.branches) - 1, len(self._columns.starts) - 1
        _write(program, request, request.schedule.predictions)
        _compute_times(program, request)
        self._memory.fill_zero(self._ring.whole)
        given = self._given_noise(0)
        for begin, count in self._parts(0, self._state.rows):
            self._fill_noise(self._state, begin, given, 0, begin, count)
        for step, row in enumerate(request.schedule.rows):
            given = self._given_noise(step + 1) if self._mixes[step][-1] else None
            for down in range(len(self._rows.starts)):
                for across in range(len(self._columns.starts)):
                    if step == 0 or not is_one:
                        self._take_in_latent(down, across)
                    branch = 0
                    for group in groups:
                        if len(groups) > 1 or step == down == across == 0:
                            self._take_in_captions(group)
                        self._run(down, across, row, step, len(group))
                        for place in range(len(group)):
                            self._add(place, branch, down, across)
                            if across != last_column or branch != last_branch:
                                report()
                            branch += 1
                self._update(step, down, given)
                report()

    @property
    def is_finite(self) -> bool:
        """Whether the state has neither NaN nor infinity."""
        return self._memory.is_finite(self._state.whole)

    def state(self) -> Floats:
        """A copy of the picture's tokens `[B, Hs * Ws, P * P, 3]`, row by row."""
        batch, rows, columns, patch, *_ = self._state.whole.shape
        state = self._memory.read(self._state.whole)
        return state.reshape(batch, rows * columns, patch * patch, 3)

    def image(self) -> Floats:
        """The state as images, float32 `[B, 3, H, W]`, clamped to [-1, 1]."""
        batch, rows, columns, patch, *_ = self._state.whole.shape
        image = np.empty((batch, 3, rows * patch, columns * patch), np.float32)
        for index, row, values in self._state_rows():
            pixels = values.transpose(3, 1, 0, 2)  # (3, P, Ws, P)
            part = image[index, :, row * patch : (row + 1) * patch]
            np.clip(pixels.reshape(part.shape), -1, 1, out=part)
        return image

    def image_bytes(self) -> NDArray[np.uint8]:
        """The state as images, uint8 `[B, H, W, 3]`."""
        batch, rows, columns, patch, *_ = self._state.whole.shape
        image = np.empty((batch, rows * patch, columns * patch, 3), np.uint8)
        for index, row, values in self._state_rows():
            pixels = np.clip(values.transpose(1, 0, 2, 3), -1, 1)  # (P, Ws, P, 3)
            part = image[index, row * patch : (row + 1) * patch]
            part[...] = np.rint((pixels + np.float32(1)) * np.float32(127.5)).reshape(part.shape)
        return image

    def _tokens(self, length: int) -> int:
        return length * self._per_latent

    def _new(self, shape: tuple[int, ...]) -> _Field:
        block = self._memory.allocate(math.prod(shape) * ITEM_BYTES[FLOAT])
        return _Field(block, self._memory.tensor(block, 0, FLOAT, shape))

    def _kept(self, values: Floats) -> Tensor:
        """The same in the state's memory."""
        tensor = self._new(values.shape).whole
        self._memory.write(tensor, values)
        return tensor

    def _part(self, field: _Field, image: int, row: int, rows: int) -> Tensor:
        """Rows of an image, `[rows, columns, P, P, 3]`."""
        offset = (image * field.rows + row) * self._row_values * ITEM_BYTES[FLOAT]
        return self._memory.tensor(field.block, offset, FLOAT, (rows, *field.whole.shape[2:]))

    def _parts(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Rows that are worked on at once: where they begin, and how many they are."""
        most = self._noise.rows
        for row in range(begin, end, most):
            yield row, min(most, end - row)

    def _state_rows(self) -> Iterator[tuple[int, int, Floats]]:
        """Every row of every image on the host: image, row, and values `[Ws, P, P, 3]`."""
        for image in range(len(self._request.seeds)):
            for begin, count in self._parts(0, self._state.rows):
                part = self._part(self._state, image, begin, count)
                for row, values in enumerate(self._memory.read(part), begin):
                    yield image, row, values

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

    def _tile_of(self, place: int) -> Tensor:
        """The program's state as a tile, for one branch of a group."""
        first = place * self._tile_shape[0]
        return self._program.image_part("state", first, self._tile_shape[0], self._tile_shape[1:])

    def _run(self, down: int, across: int, row: int, step: int, group: int) -> None:
        """Let the program's state be the clean images that the network sees in a tile."""
        program, state = self._program, self._state.whole
        top, left = map(self._tokens, (self._rows.starts[down], self._columns.starts[across]))
        if not self._is_near:
            self._blending.take(state, self._aside, top, left)
        for place in range(group):
            if self._is_near:
                self._blending.take(state, self._tile_of(place), top, left)
            else:
                program.memory.write(self._tile_of(place), self._aside)
        program.run("step", row, step, _no_noise)

    def _add(self, place: int, branch: int, down: int, across: int) -> None:
        """Add what the program made of a branch of a group, weighted, to its row of tiles."""
        tile = self._tile_of(place)
        if not self._is_near:
            self._memory.write(self._aside, self._program.memory.read(tile))
            tile = self._aside
        self._blending.add(
            self._ring.whole,
            tile,
            self._down_weights[down],
            self._across_weights[branch][across],
            self._tokens(self._rows.starts[down]),
            self._tokens(self._columns.starts[across]),
        )

    def _update(self, step: int, down: int, given: NDArray[Any] | None) -> None:
        """Make the next state of the rows that no later tile touches."""
        starts, factors = self._rows.starts, self._mixes[step]
        is_last = down + 1 == len(starts)
        end = self._tokens(self._rows.size if is_last else starts[down + 1])
        for row, rows in self._parts(self._tokens(starts[down]), end):
            if factors[-1]:
                self._fill_noise(self._noise, 0, given, step + 1, row, rows)
            self._blending.mix(
                self._state.whole,
                self._ring.whole,
                None if self._before is None else self._before.whole,
                self._noise.whole if factors[-1] else None,
                factors,
                row,
                rows,
            )

    def _given_noise(self, draw: int) -> NDArray[Any] | None:
        given = self._request.noises[draw]
        return None if given is None else as_array(given)

    def _fill_noise(
        self, field: _Field, at: int, given: NDArray[Any] | None, draw: int, row: int, rows: int
    ) -> None:
        """Put rows of a draw's tokens into a field, from its row `at` on."""
        for image, seed in enumerate(self._request.seeds):
            part = self._part(field, image, at, rows)
            if given is None:
                start = row * self._row_values
                self._memory.fill_normal(part, seed, draw, start)
                continue
            pixels = given[image, :, row * self._patch : (row + rows) * self._patch]
            pixels = pixels.reshape(3, rows, self._patch, -1, self._patch)
            tokens = pixels.transpose(1, 3, 2, 4, 0)
            self._memory.write(part, np.ascontiguousarray(tokens))


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


def state_bytes(request: Request) -> int:
    """Of a decode that is not plain, wherever its state lies: states, and a row of tiles."""
    values = image_bytes(request)
    states = 2 if request.schedule.looks_back else 1
    height = request.program_sizes.value("H") / request.sizes.value("H")
    return int(values * ITEM_BYTES[FLOAT] * (states + height))


def image_bytes(request: Request) -> int:
    """Of a decode's image in 8 bits, on the host."""
    return 3 * math.prod(request.sizes.shape(("B", "H", "W")))
