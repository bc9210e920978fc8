"""What a report says in sentences."""

from dataclasses import replace

from pid_bench.cases import Case
from pid_bench.report import Environment, Measured, Report, Row
from pid_bench.summary import summary

HERE = Environment("a GPU", "Linux", "", {}, "")


def row(backend: str, *times: float, pipeline: str = "pid", reduced: str = "") -> Row:
    case = Case(pipeline, backend, "flux", "2k", 256, 128, "fp32", "cuda", 0, 4, 14, "random")
    status = "ok" if times else "oom"
    return Row("measured", case, (64, 32), reduced, status, "", "e0", measured=Measured(times))


def said(*rows: Row) -> list[str]:
    return summary(Report({"e0": HERE}, rows))


def test_what_was_fastest_by_how_much_and_on_what() -> None:
    (text,) = said(row("eager", 200.0), row("torch", 100.0), row("compile", 12_345.0))
    assert text == (
        "On a GPU, from a latent to 256x128 px in fp32: fastest was pid (torch) with 100 ms; "
        "pid (eager) took 200 ms, 2 times as long; pid (compile) took 12,345 ms, 123 times as "
        "long. The networks are whole, and times are medians. The weights are random, which "
        "changes the image but not the time."
    )


def test_one_contender_was_not_the_fastest() -> None:
    (text,) = said(row("eager", 200.0))
    assert "pid (eager) took 200 ms, and there is nothing to compare it with." in text
    assert "fastest" not in text


def test_what_lies_within_the_noise_is_said_to() -> None:
    (text,) = said(row("eager", 90.0, 100.0, 110.0), row("torch", 92.0, 101.0, 111.0))
    assert "1.01 times as long (no more than the noise)." in text


def test_part_of_a_network_is_not_set_against_a_whole_one() -> None:
    part, cascade = said(
        row("eager", 5.0, reduced="1 of 14 patch blocks"),
        row("eager", 50.0, pipeline="vae+rrdbnet"),
    )
    assert "Only 1 of 14 patch blocks ran: a whole decode takes longer." in part
    assert "nothing to compare" in part and "nothing to compare" in cascade


def test_failures_and_other_pipelines_are_said() -> None:
    (text,) = said(
        row("eager", 5.0), row("torch"), replace(row("eager", 9.0, pipeline="vae+lanczos"))
    )
    assert "No time of pid (torch): the note says why." in text
    assert "Times say nothing of how good the images are." in text


def test_rows_that_differ_in_steps_alone_are_told_apart() -> None:
    four = row("eager", 5.0)
    (text,) = said(four, replace(four, case=replace(four.case, steps=1)))
    assert "pid (eager, 2k, 4 steps, random weights)" in text and "2k, 1 steps" in text


def test_nothing_was_run() -> None:
    assert said() == ["Nothing was run: work, parameters and bytes are counted from the graphs."]
