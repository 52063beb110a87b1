"""The benchmark: rows on the miniature's shapes, records that survive a cut, the table of all records."""

import json
from dataclasses import replace

import pytest
import torch

from mifo.acceleration.gated_gelu import gated_gelu
from mifo.acceleration.group_norm import group_norm_silu
from mifo.acceleration.kernels import computed_by, own
from mifo.acceleration.settings import PerformanceSettings
from mifo.acceleration.weight_gradients import WeightGradientsBeside
from mifo.benchmark.instead import plan
from mifo.benchmark.measuring import Measurement, measured, tera_operations
from mifo.benchmark.records import Circumstances, write_record, write_table
from mifo.benchmark.rows import ROWS, Bench, processes
from mifo.benchmark.settings import BenchmarkSettings
from mifo.benchmark.shapes import SHAPES, random_instances, random_model, row_of_boxes
from mifo.commands.benchmark import benchmark, profile_and_changes
from mifo.config.compose import compose, settings_of
from mifo.config.identity import told_code
from mifo.errors import MifoError
from mifo.method.losses.settings import PenaltySettings, TermSettings
from mifo.method.regions.boxes import check_boxes
from mifo.training.settings import LearningSettings, adamw_8bit

CPU = torch.device("cpu")


def settings(folder, *rows, profile="default"):
    return settings_of(
        compose(
            "benchmark",
            [
                f"paths.output={folder}",
                *("device=cpu", "benchmark.shapes=miniature", f"benchmark.rows=[{','.join(rows)}]"),
                *("benchmark.steps=2", "benchmark.warmup=1", "benchmark.repeats=1", "benchmark.instances=2"),
                *("learning.prior.pictures=1", f"performance={profile}"),
            ],
        )
    )


def test_steps_are_timed_and_a_row_that_fails_stops_nothing(tmp_path, monkeypatch):
    seen = []

    def broken(bench):
        # what was measured before is on disk already
        (file,) = (tmp_path / "benchmark").glob("*.json")
        seen.append(list(json.loads(file.read_text())["rows"]))
        raise RuntimeError("out of memory\nlong story")

    monkeypatch.setitem(ROWS, "picture", broken)
    record = json.loads(benchmark(settings(tmp_path, "stage2_step", "picture")).read_text())
    assert seen == [["stage2_step"]]
    step = record["rows"]["stage2_step"]
    assert 0 < step["fastest"] <= step["seconds"] <= step["slowest"] and step["samples"] == 2
    assert step["tflop"] > 0 and step["peak_gib"] > 0 and step["share_of_peak"] > 0
    assert record["rows"]["picture"]["notes"] == {"failed": "out of memory"}
    assert record["commit"] == told_code()
    assert record["profile"] == "default" and record["versions"]["torch"] == torch.__version__
    assert "| stage2_step | default |" in (tmp_path / "benchmark" / "README.md").read_text()


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(MifoError, match=r"benchmark\.rows=pictures is not known"):
        benchmark(settings(tmp_path, "pictures"))


@pytest.mark.parametrize("name", ["auto", "default", "max_speed", "low_vram", "reference"])
def test_rows_under_changed_keys_are_not_the_profiles_own(tmp_path, name):
    performance = settings(tmp_path, profile=name).performance
    assert profile_and_changes(performance) == name
    changed = replace(performance, threads=2, compile=True)
    assert profile_and_changes(changed) == f"{name}, threads=2, compile=True"
    assert profile_and_changes(replace(changed, name="mine")) == "mine"


def test_the_table_keeps_the_newest_of_each_row(tmp_path):
    for date, seconds, rows in (("2026-11-01", 1.0, "ab"), ("2026-11-02", 0.02, "b")):
        taken = Circumstances("GPU", "default", "sd21", date, "c0ffee", {"torch": "2"})
        write_record(tmp_path / f"{date}.json", taken, {name: measured([seconds], 1.0) for name in rows})
    table = write_table(tmp_path).read_text()
    assert "| a | default | 1.00 s |" in table and "| b | default | 20.0 ms |" in table
    assert "| b | default | 1.00 s |" not in table


def test_each_machine_tells_its_own_versions(tmp_path):
    for machine, date, version in (("GPU", "2026-11-01", "2.11"), ("CPU", "2026-11-02", "2.14")):
        taken = Circumstances(machine, "default", "sd21", date, "c0ffee", {"torch": version})
        write_record(tmp_path / f"{machine}.json", taken, {"a": measured([1.0], 1.0)})
    sections = {text[:3]: text for text in write_table(tmp_path).read_text().split("## ")}
    assert "torch 2.11" in sections["GPU"] and "torch 2.14" not in sections["GPU"]
    assert "torch 2.14" in sections["CPU"]


def test_the_largest_peak_of_low_vram_stands_against_its_mark(tmp_path):
    taken = Circumstances("GPU", "low_vram", "sd21", "2026-11-01", "c0ffee", {"torch": "2"})
    peaks = {"stage1_step": 4.0, "stage2_step": 7.5, "picture": 5.0, "three_pictures": 9.0}
    write_record(tmp_path / "a.json", taken, {row: measured([1.0], peak) for row, peak in peaks.items()})
    table = write_table(tmp_path).read_text()
    assert "largest peak of low_vram: 7.5 GiB, mark 8 GiB" in table
    assert table.count("| 8 GiB |") == 3


def test_fine_tuning_with_8_bit_states_checkpoints_and_captures_nothing(tmp_path, monkeypatch):
    seen = []

    def learn(model, instances, learning, *args, performance, callbacks, **options):
        stage = learning.finetuning
        seen.append((model.dtype, stage.trainable, stage.optimizer, performance.gradient_checkpointing))
        assert not performance.cuda_graphs
        raise RuntimeError("enough")

    monkeypatch.setattr("mifo.benchmark.rows.learn", learn)
    for profile in ("max_speed", "low_vram"):
        bench = settings(tmp_path / profile, "stage2_8bit", profile=profile)
        with pytest.raises(MifoError, match="no row could be measured"):
            benchmark(bench)
    assert seen == [(torch.float32, "full", adamw_8bit(), True)] * 2


def test_word_maps_cost_what_steps_take_longer_with_them(monkeypatch):
    seen = []

    def step(bench):
        seen.append(len(bench.penalty.terms))
        return Measurement(seconds=1.2 if bench.penalty.terms else 1.0)

    for name in ("stage1_step", "stage2_step"):
        monkeypatch.setattr(f"mifo.benchmark.rows.{name}", step)
    penalty = PenaltySettings({"reward": TermSettings("reward", 1.0)})
    bench = Bench(BenchmarkSettings(), PerformanceSettings(), CPU, "float32", LearningSettings(), penalty)
    step.__name__ = "stage1_step"
    assert ROWS["maps"](bench).notes["stage1_step, share of maps"] == pytest.approx(0.2)
    assert seen == [1, 0, 1, 0] * 2


def test_a_row_is_measured_before_and_after_those_with_something_in_an_accelerations_place():
    planned = plan(["stage2_step", "picture", "demo"], ["gated_gelu:torch", "adamw_8bit:adamw"])
    assert list(planned) == [
        "stage2_step with all ideas",
        "stage2_step without gated_gelu:torch",
        "stage2_step without adamw_8bit:adamw",
        "stage2_step with all ideas, again",
        "picture with all ideas",
        "picture without gated_gelu:torch",
        "picture with all ideas, again",
        "demo",
    ]


def test_what_takes_an_accelerations_place_is_in_force_for_its_row_alone(tmp_path, monkeypatch):
    seen = []

    def row(bench):
        stage = bench.learning.finetuning
        seen.append((own("group_norm"), bench.performance.channels_last, stage.optimizer == adamw_8bit()))
        return measured([2.0 if own("group_norm") else 3.0], 1.0)

    monkeypatch.setitem(ROWS, "stage2_step", row)
    wanted = settings(tmp_path, "stage2_step", profile="max_speed")
    wanted.benchmark.instead = ["group_norm:torch", "channels_last:no", "adamw_8bit:adamw"]
    file = benchmark(wanted)
    usual = (True, True, True)
    assert seen == [usual, (False, True, True), (True, False, True), (True, True, False), usual]
    table = (file.parent / "README.md").read_text()
    assert (
        "| group_norm:torch | stage2_step | max_speed | 2.00 s / 2.00 s | 3.00 s | +1.00 s (+50%) |" in table
    )
    wanted.benchmark.instead = ["group_norm"]
    with pytest.raises(MifoError, match=r"benchmark\.instead=group_norm is not known"):
        benchmark(wanted)


def test_what_computes_in_a_kernels_place_computes_the_same():
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    weight, bias = torch.randn(16), torch.randn(16)

    def passed():
        y = group_norm_silu(x, weight, bias, 4, 1e-5, True)
        y = gated_gelu(y.permute(0, 2, 3, 1))
        return y, *torch.autograd.grad(y.sum(), x)

    usual = passed()
    with computed_by({"group_norm": "compiler", "gated_gelu": "compiler"}), WeightGradientsBeside(CPU):
        compiled = passed()
    for one, other in zip(usual, compiled, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_second_process_finds_what_the_first_compiled(tmp_path, monkeypatch):
    """With a program in Python's place, which learns more slowly where it compiled nothing yet."""
    taken = Circumstances.now(CPU, "default", "sd21", told_code())
    for name, seconds in (("cold", 50.0), ("warm", 30.0)):
        learned = Measurement(seconds, seconds, seconds, 1, 1.0, notes={"saving": 2.0})
        write_record(tmp_path / f"{name}.json", taken, {"both_stages": learned})
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n'
        '[ "$3" = benchmark ] || { echo "not $3"; exit 1; }\n'
        'for each; do case $each in benchmark.folder=*) records="${each#*=}";; esac; done; mkdir "$records"\n'
        f'cd {tmp_path}; if [ -d "$TRITON_CACHE_DIR" ]; then cp warm.json "$records"\n'
        'else mkdir "$TRITON_CACHE_DIR"; cp cold.json "$records"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    optimizer = "optimizer@learning.finetuning.optimizer=adamw"
    typed = [
        "performance=default",
        "performance.compile=true",
        "penalty=dice",
        optimizer,
        "benchmark.steps=3",
    ]
    bench = Bench(BenchmarkSettings(), PerformanceSettings(), CPU, "float32", None, None, typed)
    row = processes(bench)
    assert row.seconds == 32 and row.notes["first process, no kernel compiled before"] == 52
    with pytest.raises(MifoError, match="a run failed in the benchmark: not run"):
        ROWS["demo"](bench)
    *both, demo = (tmp_path / "told").read_text().splitlines()
    assert all({*typed[:4]} <= {*each.split()} and typed[4] not in each for each in both)
    assert all(each.count("performance=default") == 1 for each in (*both, demo))
    assert {*typed} & {*demo.split()} == {*typed[:2]}


def test_median_spread_and_operations():
    row = measured([3.0, 1.0, 2.0], 0.5)
    assert row == Measurement(2.0, 1.0, 3.0, 3, 0.5)
    a = torch.ones(10, 20)
    assert tera_operations(lambda: a @ a.T) == pytest.approx(2 * 10 * 10 * 20 / 1e12)


@pytest.mark.parametrize(
    ("shapes", "millions"),
    [
        ("sd21", [866, 84, 340]),
        ("sdxl", [2567, 84, 123, 695]),
        ("flux2_klein", [3876, 84, 4022]),
        ("z_image", [6155, 84, 4022]),
    ],
)
def test_models_have_the_published_sizes(shapes, millions):
    with torch.device("meta"):
        parts = SHAPES[shapes].parts()
    assert [
        round(sum(each.numel() for each in part.parameters()) / 1e6) for part in parts.values()
    ] == millions


def test_miniature_shapes_and_instances():
    model = random_model("miniature", CPU, "float32", side=64)
    assert model.image_size == 64 and model.latent_shape == (4, 16, 16)
    instances = random_instances(3, 64)
    assert torch.equal(instances.masks.sum(0), torch.ones(64, 64))
    check_boxes({str(i): box for i, box in enumerate(row_of_boxes(8))}, 16)
    with pytest.raises(MifoError, match=r"benchmark\.shapes=sd4"):
        random_model("sd4", CPU, "float32")
