"""The paper's tables: figures counted and judged right, and a report that says what was found."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from linformer import LinformerSelfAttention
from torch import nn

from benchmarks import measure, models
from benchmarks.paper import __main__ as paper
from benchmarks.paper import features, latency, sizes, units, units_over_tokens
from benchmarks.paper.document import document
from benchmarks.registry import LiteralSeparableAttention
from sep_attn import SeparableAttention

pytestmark = pytest.mark.xdist_group("paper")  # its quick run is made once, and takes a while


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("paper")
    assert paper.main(["--out", str(directory), "--quick"]) == 0
    return directory


@pytest.fixture
def result(quick: Path) -> dict:
    return json.loads((quick / "paper.json").read_text())


def test_quick_run_measures_every_part(quick: Path, result: dict) -> None:
    names = {path.name for path in quick.iterdir()}
    pictures = {"paper_latency.png", "paper_tokens.png"}
    assert names == {"paper.json", "paper.md", "paper_latency.csv", "paper_tokens.csv"} | pictures
    contenders = [contender.key for contender in latency.CONTENDERS]
    cases = [(row["part"], row["contender"]) for row in result["latency"]]
    assert cases == [(part, key) for part in latency.PARTS for key in contenders]
    keys = [unit.key for unit in units_over_tokens.UNITS]
    assert [(row["tokens"], row["unit"]) for row in result["figure"]] == [
        (k, key) for k in (64, 256) for key in keys
    ]
    for row in result["latency"] + result["figure"]:
        assert row["milliseconds"] > 0.0 and 0.0 < row["error"] < 1e-5
    assert [profile["unit"] for profile in result["profiles"]] == keys
    assert result["environment"]["linformer"] is not None


def test_models_differ_in_attention_only(result: dict) -> None:
    rows = {row["contender"]: row for row in result["models"]}
    rest = {key: row["gmacs"] - row["attention_gmacs"] for key, row in rows.items()}
    for key in ("linformer", "literal", "sep_attn"):
        assert rest[key] == pytest.approx(rest["multi_head"], rel=1e-6)
    assert rest["v2_patched"] == pytest.approx(rest["v2"], rel=1e-6)
    assert rows["literal"]["parameters_m"] == rows["sep_attn"]["parameters_m"]
    assert rows["literal"]["attention_gmacs"] > rows["sep_attn"]["attention_gmacs"] > 0.0


def test_the_profile_names_what_a_unit_is_made_of(result: dict) -> None:
    profiles = {profile["unit"]: profile for profile in result["profiles"]}
    tops = {key: {row["operator"] for row in p["top"]} for key, p in profiles.items()}
    assert "aten::bmm" in tops["multihead_attention"] and "aten::bmm" in tops["linformer"]
    assert profiles["literal_eager"]["batched_share"] == 0.0
    for profile in result["profiles"]:
        shares = [row["share"] for row in profile["top"]]
        assert shares == sorted(shares, reverse=True) and 0.0 < sum(shares) <= 1.0 + 1e-6


def test_every_feature_map_is_compared(result: dict) -> None:
    (row,) = result["features"]
    assert (row["image"], row["tokens"]) == ("320 x 320", "400, 100, 25")
    assert row["maps"] == 5 and row["patched_layers"] == 9
    assert 0.0 < row["difference"] < 1e-5 and 0.0 < row["error"] < 1e-5


def test_sizes_are_the_papers(result: dict) -> None:
    (row,) = result["sizes"]
    assert row["model"] == "mobilevitv2_050" and row["paper_gflops"] == 0.5
    assert row["parameters_agree"] and row["gmacs_agree"] and row["patched_layers"] == 9
    assert 0.9 < row["patched_gmacs"] / row["gmacs"] < 0.97


def test_multiply_adds_see_attention_on_a_cpu() -> None:
    from timm.layers import Attention

    b, n, d, heads = 2, 6, 16, 4
    counted = sizes.multiply_adds(Attention(d, heads, qkv_bias=True).eval(), torch.zeros(b, n, d))
    assert counted == b * (n * 3 * d * d + 2 * n * n * d + n * d * d)


def test_segmentation_logits_and_hidden_states_are_equal_after_patch() -> None:
    task = features.Task(
        "segmentation",
        "small",
        64,
        lambda: models.hugging_face_segmentation(num_labels=5, width_multiplier=0.5),
        features.TASKS[-1].outputs,
    )
    (row,) = features.measure_task(task, threads=[1], seconds=0.01)
    assert row["maps"] == 6 and row["patched_layers"] == 9
    assert 0.0 < row["difference"] < 1e-5


def timm_attention(dim: int) -> nn.Module:
    from timm.layers import Attention

    return Attention(dim, num_heads=4, qkv_bias=True)


@pytest.mark.parametrize(
    "build",
    [
        timm_attention,
        lambda dim: LinformerSelfAttention(dim, 10, k=3, heads=4),
        LiteralSeparableAttention,
        SeparableAttention,
    ],
    ids=["multi-head", "linformer", "literal", "sep_attn"],
)
@torch.no_grad()
def test_oracles_agree_with_the_units(build: type[nn.Module]) -> None:
    models.import_timm()
    layer = build(16).double().eval()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), units.expected_output(layer, x))


def test_oracle_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no attention unit"):
        units.expected_output(nn.Linear(4, 4), torch.zeros(1, 2, 4))


def one_layer() -> dict[str, nn.Module]:
    layer = nn.Sequential(LiteralSeparableAttention(16)).eval()
    return {latency.MULTI_HEAD: layer, "literal": copy.deepcopy(layer)}


def test_compiled_layers_are_checked_and_timed_beside_eager() -> None:
    rows = latency.measure_case(
        one_layer(),
        torch.randn(2, 8, 16),
        "attention",
        threads=1,
        seconds=0.01,
        compiler=latency.Compiler(until=float("inf")),
    )
    assert [(row["contender"], row["mode"]) for row in rows] == [
        (key, mode) for key in (latency.MULTI_HEAD, "literal") for mode in latency.MODES
    ]
    for row in rows:
        assert row["status"] == "timed" and row["error"] < 1e-5
        assert row["times_faster_than_multi_head"] > 0.0


def test_nothing_is_compiled_when_the_time_is_over() -> None:
    rows = latency.measure_case(
        one_layer(),
        torch.randn(2, 8, 16),
        "model",
        threads=1,
        seconds=0.01,
        compiler=latency.Compiler(until=0.0),
    )
    compiled = [row for row in rows if row["mode"] == "compiled"]
    assert len(compiled) == 2
    for row in compiled:
        assert row["milliseconds"] is None and "no time was left" in row["status"]


def test_a_wrong_compiled_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: nn.Module, **_: object) -> object:
        return lambda *inputs: [1.01 * out for out in module(*inputs)]

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    monkeypatch.setattr(measure, "interleaved", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(measure.WrongResultError, match="compiled"):
        latency.measure_case(
            one_layer(),
            torch.randn(2, 8, 16),
            "attention",
            threads=1,
            seconds=0.01,
            compiler=latency.Compiler(until=float("inf")),
        )


def test_a_wrong_unit_is_refused_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = LinformerSelfAttention.forward
    monkeypatch.setattr(LinformerSelfAttention, "forward", lambda self, x: 1.01 * forward(self, x))
    monkeypatch.setattr(measure, "interleaved", lambda *_, **__: pytest.fail("timed"))
    assert paper.main(["--out", str(tmp_path), "--quick", "--parts", "figure"]) == 1
    assert "refused to time a wrong result" in capsys.readouterr().out
    written = json.loads((tmp_path / "paper.json").read_text())
    assert "Linformer" in written["refused"] and written["figure"] == []


def test_the_report_says_what_was_found(quick: Path, result: dict) -> None:
    text = (quick / "paper.md").read_text()
    assert text == document(result)
    for figure in ("9.90", "10.20", "3.40", "1.40", "320 x 320", "torch.utils.flop_counter"):
        assert figure in text
    assert "agrees with the paper's to its last digit" in text
    assert "Not confirmed: the three times" in text

    other = copy.deepcopy(result)
    other["sizes"][0].update(gmacs=0.6, gmacs_agree=False)
    assert "The authors' own list of models has 1.4 M too" in document(other)
    other["sizes"][0].update(parameters_m=1.6, parameters_agree=False)
    assert "The authors' own list" not in document(other)
    for row in other["latency"]:
        row["times_faster_than_multi_head"] = 4.0
    for row in other["figure"]:
        row["times_sep_attn"] = 0.5 if row["unit"] == "linformer" else 1.0
    changed = document(other)
    assert "0.600 x 10^9 multiply-adds (paper 0.5; this count is +20.0% from it)" in changed
    assert "the paper's ratio is reached or passed" in changed
    assert "it is not the fastest at k = 64, 256" in changed


def test_the_report_says_which_cells_are_empty_and_why(result: dict) -> None:
    eager = result["latency"]
    compiled = [
        {**row, "mode": "compiled", "batch": batch, "status": status, "milliseconds": milliseconds}
        for row in eager
        for batch, status, milliseconds in ((2, "timed", 1.5), (32, "left out: no time", None))
    ]
    other = [{**row, "batch": 32} for row in eager]
    text = document({**result, "latency": [*eager, *other, *compiled]})
    assert text.count("Empty cells: left out: no time.") == len(latency.PARTS)
    assert text.count("batch 32, 1 thread") == 2 * len(latency.PARTS)
