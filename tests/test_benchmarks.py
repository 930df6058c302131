"""The benchmarks run, and what they compare with is exact; their numbers are in benchmarks/README.md."""

import json
import math
from unittest.mock import Mock

import pytest
import torch

from benchmarks import density, flex_attention, layout, real_traces, roles, step
from benchmarks import exit_entropy as benchmark
from benchmarks.kv_copies import exit_entropy_by_copies
from benchmarks.measure import peak_mib, table
from iapo.advantage import masked_zscore
from iapo.information import exit_entropy, exit_entropy_naive
from iapo.probe.packing import Completion
from tests.conftest import make_batch


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_the_competitor_equals_the_naive_reference(models, chunk_size):
    ids, everything, response_mask = make_batch([5], [13])
    expected = exit_entropy_naive(models["llama"], ids, everything, response_mask, [5, 11, 7])[0]
    result = exit_entropy_by_copies(models["llama"], ids[0, :5], ids[0, 5:], torch.tensor([5, 11, 7]), chunk_size)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flex_attention_equals_the_naive_reference(models, monkeypatch, family, stride):
    """By torch's own uncompiled reference. A kernel takes half a minute to compile; `--flex` checks it."""
    called = Mock(wraps=torch.nn.attention.flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "flex_attention", called)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    batch = make_batch([5, 9, 2], [13, 30, 1])
    expected = exit_entropy_naive(models[family], *batch, [5, 11, 7], stride=stride)
    with flex_attention.by_flex_attention():
        result = exit_entropy(models[family], *batch, [5, 11, 7], stride=stride, max_tokens=50)
    assert called.called
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_the_plain_forward_has_as_many_tokens_as_it_says(models):
    tokens = []
    handle = models["qwen2"].register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append((kwargs["input_ids"].numel(), kwargs["logits_to_keep"])),
        with_kwargs=True,
    )
    benchmark.plain(models["qwen2"], 50, 20, 15, "cpu", rows=1)
    benchmark.plain(models["qwen2"], 50, 20, 15, "cpu", rows=3)
    handle.remove()
    assert tokens == [(20, 6), (20, 6), (10, 3), (40, 6), (10, 3)]  # logits per sequence


def test_the_benchmark_prints_a_table_per_length(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    benchmark.main(["--lengths", "16", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    checked = ["ours", "ours in several forwards", "ours on the keys of a plain forward", "KV copies"]
    assert [line.split(":")[0] for line in lines[2:6]] == checked
    assert lines[7] == "small, T = 16, B = 1, P = 6:"
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[11:]}
    names = [benchmark.FLOOR, benchmark.PROBE_FLOOR, benchmark.WITH_CACHE, "ours, full", "ours, stride 8"]
    assert [*list(rows)[:-2], list(rows)[-1]] == [*names, "ours, boundaries", benchmark.ON_KEYS, "naive"]
    assert list(rows)[-2].startswith("per-position KV copies, ")
    assert rows[benchmark.FLOOR][1] == rows[benchmark.PROBE_FLOOR][2] == rows[benchmark.WITH_CACHE][5] == "1.00"
    assert all(float(row[5]) > 0 for row in rows.values())


def test_the_pass_takes_no_more_memory_than_a_plain_forward_that_keeps_its_keys():
    model = benchmark.make_model("small", "cpu")
    functions = benchmark.methods(model, 1024, 1, 6, "cpu", 16)
    names = "ours, full", "ours, stride 8", benchmark.WITH_CACHE
    full, sparse, plain = (peak_mib(functions[name], "cpu") for name in names)
    assert full < 1.2 * plain and sparse < 1.2 * plain


def test_peak_memory_by_hand():
    def two_of_which_one_is_freed():
        torch.ones(2**18)  # 1 MiB
        kept = torch.ones(2**19)
        return kept + 1

    assert peak_mib(two_of_which_one_is_freed, "cpu") == pytest.approx(4, abs=0.01)
    assert peak_mib(lambda: None, "cpu") == 0


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_sparser_probes_keep_the_rate_and_lose_the_term(capsys):
    density.main(["--prompts", "4", "--group", "2"])
    rows = {name: numbers for name, *numbers in map(cells, capsys.readouterr().out.splitlines()[3:11])}
    assert [float(x) for x in rows["every position"]] == [1.0] * 4
    for name in ("stride 2", "stride 16", "boundaries, gap 64"):
        probes, _, term, rate = map(float, rows[name])
        assert probes < 1 and -1 <= term < 1 and rate > 0.999


def tables(text: str) -> list[dict[str, list[float]]]:
    """The Markdown tables of a text: numbers by the first cell."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if line.startswith("|-"):
            found.append({})
        elif cells and found and not cells[1][0].isalpha():
            found[-1][cells[0]] = [float(cell) for cell in cells[1:]]
    return found


def test_roles_by_hand():
    tokens = ["<think>", *"1+2=3;", " wait", " again:", *"1+2=3;", " hmm", " so", ";", *"3+40=43;", *"43+", *"5=4"]
    expected = ["opening marker"]
    expected += ["operands"] * 4 + ["result", "';' after it"] + ["repeated addition"] * 8 + ["filler words"] * 3
    expected += ["operands"] * 5 + ["result"] * 2 + ["';' after it"] + ["operands"] * 5 + ["result"]
    assert roles.roles(tokens) == expected
    assert roles.roles([*"1+2;", *"3+"]) == ["filler words"] * 6  # no additions
    assert set(roles.roles(tokens)) == set(roles.ROLES)
    assert list(roles.choices(tokens, expected).values()) == ["repeats it", "continues"]
    assert roles.choices([*"1+2=3;", " so"], ["';' after it"] * 7)[6] == "writes filler"


def test_digits_of_results_by_hand():
    tokens = ["<think>", *"9+9=18;", " wait", *"18+5=33;", *"7+5=2", ";", *"1+2=", "</think>"]
    equals = [place for place, token in enumerate(tokens) if token == "="]
    assert roles.digits(tokens) == {
        equals[0] + 1: True, equals[0] + 2: True, equals[1] + 1: False, equals[2] + 1: False
    }  # fmt: skip
    assert roles.digits([]) == {}
    chosen = roles.choices(tokens[:-1], roles.roles(tokens[:-1]))
    assert set(roles.explored(tokens, chosen, correct=False).values()) == set(roles.EXPLORED[1:3])
    named = roles.explored(tokens, chosen, correct=True)
    assert named == {
        equals[0] + 1: "right digit, right answer",
        equals[0] + 2: "right digit, right answer",
        tokens.index(" wait"): "repeats it, right answer",
        tokens.index("2") + 2: "continues, right answer",
    }


def test_the_rate_is_a_price_on_length_where_all_traces_tell_the_same():
    lengths, correct, groups = [2, 4, 8, 3], [True, True, True, False], list("aaab")
    h = [torch.tensor([0.5, 0.7, end]) for end in (0.0, 0.0, 0.0, 0.1)]
    rate, shortness = roles.rate_and_shortness(h, lengths, correct, groups)
    torch.testing.assert_close(rate, shortness)
    torch.testing.assert_close(rate[:3], masked_zscore(torch.tensor([1 / 2, 1 / 4, 1 / 8]), torch.ones(3)))
    h[0] = torch.tensor([0.5, 0.7, 0.4])  # a guess: 0.05 nats per token, as the third has 0.0625
    rate, shortness = roles.rate_and_shortness(h, lengths, correct, groups)
    assert rate[1] > rate[2] > rate[0] and shortness[0] > shortness[1] > shortness[2]


def test_the_roles_of_a_model_make_a_table_and_a_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    picture = tmp_path / "roles.png"
    assert roles.main(["--prompts", "2", "--group", "4", "--picture", str(picture)]) == 0
    output = capsys.readouterr().out
    by_role, by_choice, by_token = tables(output)
    assert 0.5 < float(output.split()[-1]) <= 1  # of the information rate with 1 / tokens
    assert sum(row[0] for row in by_role.values()) == pytest.approx(1, abs=0.01)
    assert sum(row[3] for row in by_role.values()) == pytest.approx(1, abs=0.01)  # of the information
    assert abs(by_role["filler words"][1]) < 0.05 < by_role["result"][1]
    assert set(by_choice) <= set(roles.CHOICES) and set(by_token) <= set(roles.EXPLORED)
    _, probability, term = by_token["right digit, right answer"]  # what is likely gains in a right answer
    assert probability > 0.95 and term > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for option, path in (("--model", tmp_path), ("--picture", tmp_path / "none/p.png")):
        assert roles.main([option, str(path)]) == 2
        assert option in capsys.readouterr().err


def test_next_token_entropy_falls_where_no_filler_begins(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert roles.main(["--prompts", "4", "--group", "4", "--score", "next_token_entropy"]) == 0
    _, by_choice, _ = tables(capsys.readouterr().out)
    # After an addition three tokens may follow, after a further number one, after a filler word many.
    assert by_choice["writes filler"][1] < 0 < min(by_choice["continues"][1], by_choice["repeats it"][1])


def test_the_roles_of_a_runs_completions_are_counted(capsys, tmp_path):
    outputs = ["<think>1+2=3;3+4=7;</think>\n<answer>7</answer>", "<think>1+2=3; wait again:1+2=3; so;</think>\n"]
    (tmp_path / "validation").mkdir()
    sample = {"input": "1+2=", "acc": 1, "response_length": 9, "truncated": 0}
    lines = "".join(json.dumps(sample | {"output": output}) + "\n" for output in outputs)
    (tmp_path / "validation" / "30.jsonl").write_text(lines)
    assert roles.main(["--runs", str(tmp_path)]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert row == [tmp_path.name, "2", "1.00", "6.00", "1.50", "1.50", "4.00", "1.00"]
    assert roles.main(["--runs", str(tmp_path / "missing")]) == 2
    assert "--runs" in capsys.readouterr().err
    for text in ('{"output"', "{}", "[]", json.dumps(sample), ""):
        (tmp_path / "validation" / "30.jsonl").write_text(text)
        assert roles.main(["--runs", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"benchmarks.roles: --runs: {tmp_path}") and len(error.splitlines()) == 1


def test_the_share_of_a_step_is_the_median_of_verls_timers(capsys, monkeypatch):
    steps = [
        {"timing_s/step": s, "timing_s/exit_entropy": e, "timing_s/gen": 4.0} for s, e in ((10, 1), (8, 2), (5, 1))
    ]
    monkeypatch.setattr(
        step, "run", lambda overrides, count, folder, checkout=None: steps if "variant=iapo" in overrides else steps[:1]
    )
    step.main(["--rows"])
    names = [cells(line)[0] for line in capsys.readouterr().out.splitlines()[3:]]
    assert names[0] == "grpo" and names[-1] == "grpo, again" and {"dapo", "iapo_rate+dapo"} < set(names)
    step.main([])
    rows = {name: numbers for name, *numbers in map(cells, capsys.readouterr().out.splitlines()[3:])}
    assert list(rows) == list(step.VARIANTS)
    # Steps of 10, 8 and 5 seconds; shares of 10%, 25% and 20%.
    assert rows["iapo, boundaries"][:2] == ["8.00", "4.00"] and rows["iapo, boundaries"][5:8] == [
        "1.00",
        "0.80",
        "20.0%",
    ]


def test_builds_and_trl_are_compared_by_the_ratios_of_medians(capsys, monkeypatch, tmp_path):
    seconds = {"grpo": {True: [2, 3], False: [6, 9]}, "iapo_rate": {True: [4], False: [8]}}
    started = []

    def run(overrides, count, folder, checkout):
        name, ours = overrides[0].removeprefix("variant="), checkout == step.ROOT
        started.append((name, ours, count, overrides[1:]))
        return [{"timing_s/step": s} for s in seconds[name][ours]]

    def run_trl(steps, prompts, venv, **work):
        assert prompts.is_file() and venv == tmp_path / "venv" and not work
        found = {"seconds": [99.0, 1.0, 2.0, 3.0][:steps], "settings": {"dtype": "float32"}, "versions": {"trl": "1"}}
        return found | {"median_seconds_of_parts": {"loss": 0.5}, "mean_completion_tokens": 54.0}

    (tmp_path / "iapo").mkdir()
    (tmp_path / "iapo/train.py").touch()
    monkeypatch.setattr(step, "run", run)
    monkeypatch.setattr(step.trl_step, "run_trl", run_trl)
    arguments = ["--against", str(tmp_path), "--trl", "--venv", str(tmp_path / "venv"), "--steps", "4", "a.b=1"]
    step.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "grpo: 0.33 of the other",
        "grpo: 1.25 of TRL's 2.00 s",
        "iapo_rate: 0.50 of the other",
        "iapo_rate: 2.00 of TRL's 2.00 s",
        "TRL: loss 0.5, completion tokens 54.0, dtype float32, trl 1",
    ):
        assert line in lines
    turn = [(name, ours, 4, ["a.b=1"]) for name in ("grpo", "iapo_rate") for ours in (True, False)]
    assert started == turn * 2
    with pytest.raises(SystemExit):
        step.main(["--against", str(tmp_path / "nothing")])
    assert "holds no iapo/train.py" in capsys.readouterr().err


def test_a_real_model_is_the_same_task_for_both(tmp_path):
    options = step.argparse.Namespace(real=[tmp_path / "model", tmp_path / "gsm8k"])
    overrides, prompts, trl_options = step.task_of(options, tmp_path)
    assert f"actor_rollout_ref.model.path={tmp_path}/model" in overrides and f"data={tmp_path}/gsm8k" in overrides
    assert (prompts, trl_options) == (
        tmp_path / "gsm8k/train.parquet",
        {"model_dir": tmp_path / "model", "work": "small-real"},
    )


def test_a_table_by_hand():
    assert table(["name", "x"], [["a", "1"], ["long name", "22"]]).splitlines() == [
        "| name      |  x |",
        "|-----------|---:|",
        "| a         |  1 |",
        "| long name | 22 |",
    ]


@pytest.mark.parametrize("text", [" ", "\n", "$", "\\(", "-", " ..."])
def test_a_text_without_letters_and_digits_is_layout(text):
    assert layout.is_layout(text) and not layout.begins_with_digit(text)


@pytest.mark.parametrize("text,digit", [("4", True), (" 12", True), (" The", False), ("</", False), ("", False)])
def test_what_is_no_layout(text, digit):
    assert not layout.is_layout(text) and layout.begins_with_digit(text) == digit


def test_reading_through_layout_by_hand():
    """Five tokens: a blank, "$", "4", "5", "the"; after the blank 4 is three times as likely as 5."""
    p_JV = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.2]])
    is_layout, is_digit = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 1, 0]).bool()

    def nats(*weights):
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)

    assert layout.entropy_within(p_JV, is_digit).item() == pytest.approx(nats(2, 1))
    assert layout.entropy_within(p_JV, ~is_layout).item() == pytest.approx(nats(2, 1, 2))
    mixed = layout.through(p_JV, torch.tensor([[0]]), torch.tensor([[[0.0, 0.0, 0.75, 0.25, 0.0]]]))
    assert mixed.tolist() == [pytest.approx([0.4, 0.1, 0.5, 0.2, 0.2])]  # 0.2 + 0.4 * 0.75, 0.1 + 0.4 * 0.25
    assert layout.entropy_within(mixed, is_digit).item() == pytest.approx(nats(5, 2))
    assert layout.entropy_within(mixed, ~is_layout).item() == pytest.approx(nats(5, 2, 2))


def test_distributions_after_suffixes_are_those_of_plain_forwards(models):
    prompt, response = torch.arange(1, 6), torch.arange(10, 19)
    completions = [
        Completion(prompt, response, torch.tensor([0, 4, 9]), suffixes=torch.tensor(suffixes))
        for suffixes in ([[7, 8]] * 3, [[7, 8, 30], [7, 8, 31], [7, 8, 32]])
    ]
    for completion, p_JV in zip(completions, layout.next_tokens(models["qwen2"], completions), strict=True):
        for t, suffix, p_V in zip(completion.positions, completion.suffixes, p_JV, strict=True):
            with torch.no_grad():
                plain = models["qwen2"](torch.cat([prompt, response[:t], suffix])[None]).logits[0, -1]
            torch.testing.assert_close(p_V, plain.double().softmax(-1), atol=1e-5, rtol=1e-4)


def test_tokens_of_results_by_hand():
    texts = ["<think>", "24", "/", "2", " =", " $", "1", ",", "2", "00", " is", " = ", "7", ".", "5", ".", "=x"]
    result, other = "another result", "other"
    expected = [other] * 6 + ["the answer as a result"] * 4 + [other] * 2 + [result] * 3 + [other] * 2
    assert real_traces.kinds(texts, "1200") == expected
    assert real_traces.kinds(["=1", "2"], "12") == ["the answer as a result"] * 2
    assert real_traces.kinds(["no result"], "12") == ["other"]


def test_falls_by_kind_by_hand():
    hs = {"entropy": [torch.tensor([3.0, 2.0, 2.5]), torch.tensor([1.0, 0.0])]}
    first, *others = real_traces.falls(hs, ["the answer as a result", "other", "the answer as a result"])
    assert first == ["the answer as a result", "66.7%", "+1.000", "+1.00"]
    assert others == [["another result", "0.0%", "-", "+0.00"], ["other", "33.3%", "-0.500", "-0.25"]]


def test_what_the_tokens_of_the_embedded_task_tell(capsys):
    """Falls by kind sum to that of the traces, and results of additions have most of the surprisal's."""
    real_traces.main([str(density.TINY), "--traces", "4"])
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    total = next(float(row[2]) - float(row[3]) for row in rows if row[:2] == ["surprisal", "ids"])
    found = {row[0]: row[1:] for row in rows if row[0] in real_traces.KINDS}
    assert list(found) == list(real_traces.KINDS)
    assert sum(float(row[-1]) for row in found.values()) == pytest.approx(total, abs=0.05)
    assert float(found["other"][-1]) < 0.5 * total


def test_the_forms_on_the_embedded_model_make_a_table(capsys):
    """Its first token is a digit, so the forms agree with the paper's at the end of a trace."""
    real_traces.main([str(density.TINY), "--layout", "--traces", "3"])
    rows = {cells(line)[0]: cells(line)[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    start, end, falls, *quarters, _ = rows["first token (paper)"]
    assert falls == "3 of 3" and sum(map(float, quarters)) == pytest.approx(float(start) - float(end), abs=0.03)
    for form in ("no layout", "a digit", "first no layout", "first digit"):
        assert float(rows[form][1]) == pytest.approx(float(end), abs=0.02)
    assert rows["surprisal"][-1] == "1.00"
