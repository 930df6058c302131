"""Small files in the originals' schemas, converted to verl's rows; every error line."""

import csv
import hashlib
import http.server
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iapo import data
from iapo.answer_format import FORMATS
from iapo.data import judge
from iapo.data import read as read_module
from iapo.data.originals import DAPO_SUFFIX
from iapo.tasks import verbose_arithmetic
from iapo.tasks.embedded import TASKS

GSM8K_TRAIN = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
        "in May. How many clips did she sell in all?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {
        "question": "A house costs $1,200,000 less $119,500. What is left?",
        "answer": "Subtract.\n#### 1,080,500",
    },
    {"question": "a  HOUSE costs $1,200,000 less $119,500.\nWhat is left?", "answer": "Again.\n#### 1"},
    {"question": "Two plus two?", "answer": "2+2=4\n#### 4"},
]
GSM8K_TEST = [
    {"question": "two plus  two?", "answer": "#### 4"},
    {"question": "It is 5 below zero. How many degrees?", "answer": "Below zero.\n#### -5"},
]
MATH500 = [
    {
        "problem": f"Compute $\\frac{{{k}}}{{7}}$.",
        "solution": f"We have $\\boxed{{\\frac{{{k}}}{{7}}}}$.",
        "answer": f"\\frac{{{k}}}{{7}}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": f"test/algebra/{k}.json",
    }
    for k in range(1, 11)
]


def dapo_row(question: str, truth: str, index: str = "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079") -> dict:
    content = (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
        + question
        + '\n\nRemember to put your answer on its own line after "Answer:".'
    )
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(paths: dict[str, Path], split: str) -> list[dict]:
    return pq.read_table(paths[split]).to_pylist()


def questions(rows: list[dict]) -> list[str]:
    return [row["prompt"][0]["content"].removesuffix("\n\n" + data.INSTRUCTION) for row in rows]


def gsm8k_directory(path: Path, train=GSM8K_TRAIN, test=GSM8K_TEST, suffix=".jsonl") -> str:
    write(path / f"train-00000-of-00001{suffix}", train)
    write(path / f"test-00000-of-00001{suffix}", test)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_gsm8k_rows_by_hand(tmp_path, capsys, suffix):
    source = gsm8k_directory(tmp_path / "original", suffix=suffix)
    paths = data.prepare("gsm8k", tmp_path / "data", source)
    assert paths == {s: tmp_path / "data" / "gsm8k" / f"{s}.parquet" for s in ("train", "test")}
    assert read(paths, "train") == [
        {
            "data_source": "gsm8k",
            "prompt": [{"role": "user", "content": f"{GSM8K_TRAIN[0]['question']}\n\n{data.INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "72"},
            "extra_info": {"split": "train", "index": 0},
        },
        {
            "data_source": "gsm8k",
            "prompt": [{"role": "user", "content": f"{GSM8K_TRAIN[1]['question']}\n\n{data.INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1080500"},
            "extra_info": {"split": "train", "index": 1},
        },
    ]
    test = read(paths, "test")
    assert questions(test) == ["two plus  two?", "It is 5 below zero. How many degrees?"]
    assert [row["reward_model"]["ground_truth"] for row in test] == ["4", "-5"]
    assert "dropped 1 repeated rows, and 1 train rows that are in test" in capsys.readouterr().out


def test_the_instruction_shows_the_form_that_the_reward_wants():
    assert "<think> ... </think>\n<answer> ... </answer>" in data.INSTRUCTION


def test_the_instruction_is_that_of_the_format(tmp_path):
    source = str(write(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}]))
    paths = data.prepare("minerva", tmp_path, source, format="boxed")
    (row,) = read(paths, "test")
    assert row["prompt"][0]["content"] == f"1+1?\n\n{FORMATS['boxed'].instruction}"
    listed = "must be one of tags, boxed, boxed_no_think."
    assert failure("amc23", tmp_path, source, format="box") == f"format: 'box' {listed}"


def test_verl_reads_the_rows(tmp_path):
    from datasets import load_dataset

    paths = data.prepare("verbose_arithmetic", tmp_path / "data", train_size=3, test_size=2)
    rows = load_dataset("parquet", data_files=str(paths["train"]), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["reward_model"]["ground_truth"] == str(
        sum(verbose_arithmetic.parse_prompt(rows[0]["prompt"][0]["content"]))
    )


def test_math500_is_split_80_20_by_seed_without_overlap(tmp_path):
    source = str(write(tmp_path / "test.jsonl", MATH500))
    paths = data.prepare("math500", tmp_path / "a", source, seed=1)
    train, test = read(paths, "train"), read(paths, "test")
    assert (len(train), len(test)) == (8, 2)
    assert sorted(questions(train) + questions(test)) == sorted(row["problem"] for row in MATH500)
    for row in train + test:
        assert row["reward_model"]["ground_truth"] == MATH500[row["extra_info"]["index"]]["answer"]
        assert questions([row]) == [MATH500[row["extra_info"]["index"]]["problem"]]
    again = data.prepare("math500", tmp_path / "b", source, seed=1)
    assert read(again, "test") == test
    splits = {tuple(questions(read(data.prepare("math500", tmp_path / "c", source, s), "test"))) for s in range(8)}
    assert len(splits) > 1


def test_dapo_questions_lose_the_fixed_sentences_and_repeats(tmp_path, capsys):
    rows = [dapo_row(f"What is $6\\cdot{k}$?", str(6 * k)) for k in range(10)]
    source = str(write(tmp_path / "dapo.parquet", rows * 3))
    paths = data.prepare("dapo_math_17k", tmp_path / "data", source)
    both = read(paths, "train") + read(paths, "test")
    assert sorted(questions(both)) == sorted(f"What is $6\\cdot{k}$?" for k in range(10))
    assert all(row["data_source"] == "dapo_math_17k" and row["ability"] == "math" for row in both)
    truths = {questions([row])[0]: row["reward_model"] for row in both}
    assert truths["What is $6\\cdot7$?"] == {"style": "rule", "ground_truth": "42"}
    assert not any("Answer:" in row["prompt"][0]["content"] for row in both)
    assert "dropped 20 repeated rows" in capsys.readouterr().out


def test_dapo_takes_the_first_7000_distinct_questions(tmp_path):
    rows = [dapo_row(f"What is {k}?", str(k)) for k in range(7003)]
    source = str(write(tmp_path / "dapo.parquet", [rows[0], *rows]))
    paths = data.prepare("dapo_math_17k", tmp_path / "data", source)
    train, test = read(paths, "train"), read(paths, "test")
    assert (len(train), len(test)) == (5600, 1400)
    assert {int(row["reward_model"]["ground_truth"]) for row in train + test} == set(range(7000))


@pytest.mark.parametrize("name", TASKS)
def test_embedded_data_are_distinct_disjoint_and_follow_the_seed(tmp_path, name):
    task = TASKS[name]
    paths = data.prepare(name, tmp_path / "a", train_size=300, test_size=40)
    train, test = read(paths, "train"), read(paths, "test")
    validation = read(paths, "validation")
    rows = train + test + validation
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert (len(train), len(test), len(validation), len(set(prompts))) == (300, 40, 256, 596)
    assert [row["extra_info"]["split"] for row in rows] == ["train"] * 300 + ["test"] * 40 + ["validation"] * 256
    assert len({row["extra_info"]["index"] for row in rows}) == 596
    for row, text in zip(rows, prompts, strict=True):
        assert row["prompt"] == [{"role": "user", "content": text}]
        assert row["reward_model"]["ground_truth"] == task.answer(task.parse_prompt(text))
        assert row["data_source"] == name
    same = data.prepare(name, tmp_path / "b", train_size=300, test_size=40)
    other = data.prepare(name, tmp_path / "c", train_size=300, test_size=40, seed=1)
    assert read(same, "train") == train
    assert questions(read(other, "test")) != questions(test)


def test_the_splits_that_published_numbers_refer_to_stay():
    splits = data.generate("verbose_arithmetic", 4096, 256, 0)
    for split, digest in (
        ("train", "0c8cb45cb481e7b1317b338210cc21e198124c01e6567c9ae5a45035138a734c"),
        ("test", "42dfd164ebb7eadfb4d564ad123f035e504ae5294a32854fcc4120f209197091"),
    ):
        rows = json.dumps([[example.question, example.answer, example.index] for example in splits[split]])
        assert hashlib.sha256(rows.encode()).hexdigest() == digest


def test_a_failed_write_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    paths = data.prepare("verbose_arithmetic", tmp_path, train_size=3, test_size=2)
    before = {split: path.read_bytes() for split, path in paths.items()}
    original, calls = pq.write_table, []

    def fail_on_second(table, path):
        calls.append(path)
        original(table, path)
        if len(calls) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", fail_on_second)
    with pytest.raises(OSError, match="No space left"):
        data.prepare("verbose_arithmetic", tmp_path, train_size=5, test_size=2, seed=9)
    assert {split: path.read_bytes() for split, path in paths.items()} == before
    assert sorted(f.name for f in (tmp_path / "verbose_arithmetic").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


def test_unused_options_warn(tmp_path):
    with pytest.warns(UserWarning, match="source='x' has no effect on verbose_arithmetic."):
        data.prepare("verbose_arithmetic", tmp_path, source="x", train_size=2, test_size=1)
    source = str(write(tmp_path / "math.jsonl", MATH500))
    with pytest.warns(UserWarning, match="train_size=7 has no effect on math500"):
        data.prepare("math500", tmp_path, source, train_size=7)


def failure(name, out_dir, source=None, **options) -> str:
    with pytest.raises(ValueError) as error:
        data.prepare(name, out_dir, None if source is None else str(source), **options)
    assert not (Path(out_dir) / name).exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_negative_seed_is_refused(tmp_path):
    """Python's generator draws with -1 what it draws with 1."""
    for name in ("verbose_arithmetic", "math500"):
        assert failure(name, tmp_path, seed=-1) == "seed: -1 must be a whole number of at least 0."


def test_unknown_name_and_sizes(tmp_path):
    line = failure("gsm9k", tmp_path)
    assert line.startswith("name: 'gsm9k' must be one of gsm8k, math500, dapo_math_17k, svamp, aime24, aime25, amc23,")
    assert line.endswith(
        "verbose_arithmetic, worked_sums, checked_registers; for data of your own give --question and --answer."
    )
    for size in (0, -3, 99_999_999):
        for field in ("train_size", "test_size"):
            expected = f"{field}: {size} must be from 1 to 1000000."
            assert failure("verbose_arithmetic", tmp_path, **{field: size}) == expected


def test_missing_or_unsuitable_files(tmp_path):
    out = tmp_path / "out"
    line = failure("math500", out, tmp_path / "absent.jsonl")
    assert "absent.jsonl" in line and "does not exist; give a file, a directory or a hub id" in line
    assert "must be one file of type" in failure("math500", out, write(tmp_path / "math.txt", MATH500))
    assert "has 0 files of type .parquet, .json, .jsonl, .csv; math500 needs one, give its path." in failure(
        "math500", out, tmp_path
    )
    line = failure("gsm8k", out, write(tmp_path / "both.jsonl", GSM8K_TRAIN))
    assert "both.jsonl' is a file; " in line and "gsm8k needs a directory with one train* and one test* file" in line
    gsm8k_directory(tmp_path / "twice")
    write(tmp_path / "twice" / "test.json", GSM8K_TEST)
    assert "has 2 test* files" in failure("gsm8k", out, tmp_path / "twice")


def test_broken_files(tmp_path):
    out = tmp_path / "out"
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(MATH500[0]) + "\n{oops\n")
    assert "a.jsonl line 2 is not valid JSON" in failure("math500", out, lines)
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps({"rows": MATH500}))
    assert "holds a dict; give a list of rows" in failure("math500", out, whole)
    table = tmp_path / "a.parquet"
    table.write_bytes(b"not a table")
    assert "is no parquet file" in failure("math500", out, table)
    gsm8k_directory(tmp_path / "gsm8k")
    (tmp_path / "gsm8k" / "test-00000-of-00001.jsonl").unlink()
    (tmp_path / "gsm8k" / "test.jsonl").mkdir()
    assert "test.jsonl' can't be read (Is a directory); check it." in failure("gsm8k", out, tmp_path / "gsm8k")


def test_missing_column_names_the_column_and_what_is_there(tmp_path):
    source = write(tmp_path / "math.jsonl", [{"question": "1+1?", "answer": "2"}])
    line = failure("math500", tmp_path / "out", source)
    assert line.endswith(
        "row 0 has no column 'problem' but ['question', 'answer']; give rows with ['problem', 'answer']."
    )
    source = write(tmp_path / "text.jsonl", [MATH500[0], "1+1?"])
    assert "row 1 has no column 'problem' but str" in failure("math500", tmp_path / "out", source)


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("math500", {"problem": "1+1?", "answer": " "}, "answer: has 0 characters, not 1 to 1000"),
        ("math500", {"problem": "1+1?", "answer": None}, "answer: is null"),
        ("math500", {"problem": "1+1?", "answer": math.nan}, "answer: is nan, no finite number"),
        ("math500", {"problem": "1+1?", "answer": []}, "answer: is an empty list"),
        ("math500", {"problem": "1+1?", "answer": " NaN "}, "answer: is 'NaN', no answer"),
        ("math500", {"problem": "1+1?", "answer": True}, "answer: is True, no number or text"),
        ("math500", {"problem": "1+1?", "answer": ["2", False]}, "answer: is False, no number or text"),
        ("math500", {"problem": None, "answer": "2"}, "None is no question or answer"),
        ("math500", {"problem": math.nan, "answer": "2"}, "nan is no question or answer"),
        ("math500", {"problem": True, "answer": "2"}, "True is no question or answer"),
        ("math500", {"problem": "1+1?", "answer": {"value": 2}}, "answer: is a dict"),
        ("math500", {"problem": ["1+1?"], "answer": "2"}, "['1+1?'] is no question or answer"),
        ("math500", {"problem": "1+1?", "answer": "2" * 1001}, "answer: has 1001 characters, not 1 to 1000"),
        ("math500", {"problem": "", "answer": "2"}, "'' is no question or answer"),
        ("dapo_math_17k", {"prompt": [], "reward_model": {}}, "unexpected structure, IndexError"),
        (
            "dapo_math_17k",
            {"prompt": [{"role": "user"}], "reward_model": {}},
            "unexpected structure, KeyError",
        ),
        (
            "dapo_math_17k",
            {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}},
            "prompt: '1+1?' lacks the data set's fixed first and last sentence",
        ),
    ],
)
def test_unparsable_rows_are_named_by_number(tmp_path, name, bad, reason):
    good = {"math500": MATH500[0], "dapo_math_17k": dapo_row("2+2?", "4")}[name]
    source = write(tmp_path / "rows.jsonl", [good, bad])
    line = failure(name, tmp_path / "out", source)
    assert f"row 1 can't be parsed ({reason}" in line
    assert line.endswith("; correct or remove it.")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It is 72.", "answer: 'It is 72.' has no '####'"),
        ("72 ####", "answer: has 0 characters, not 1 to 1000"),
        (72, "unexpected structure"),
    ],
)
def test_unparsable_gsm8k_answers(tmp_path, answer, reason):
    source = gsm8k_directory(tmp_path / "original", train=[GSM8K_TRAIN[0], {"question": "?", "answer": answer}])
    line = failure("gsm8k", tmp_path / "out", source)
    assert "(train), row 1 can't be parsed" in line and reason in line


def test_data_too_small_for_both_splits(tmp_path):
    source = write(tmp_path / "math.jsonl", MATH500[:1])
    assert failure("math500", tmp_path / "out", source).endswith("leaves no rows for test; give a larger one.")
    original = gsm8k_directory(tmp_path / "original", train=GSM8K_TEST, test=GSM8K_TEST)
    assert "leaves no rows for train" in failure("gsm8k", tmp_path / "out", original)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_without_rows_is_named(tmp_path, capsys, suffix):
    source = tmp_path / f"math{suffix}"
    source.touch()
    line = f"source: '{source}' has no rows; give a file that has some."
    assert failure("math500", tmp_path / "out", source) == line
    contents = {".json": "[]", ".jsonl": "\n\n", ".csv": "problem,answer\n"}
    if suffix in contents:
        source.write_text(contents[suffix])
        assert failure("math500", tmp_path / "out", source) == line
    assert capsys.readouterr().out == ""
    train = gsm8k_directory(tmp_path / "gsm8k", train=[]) + "/train-00000-of-00001.jsonl"
    assert failure("gsm8k", tmp_path / "out", tmp_path / "gsm8k") == (
        f"source: '{train}' has no rows; give a file that has some."
    )


def test_a_folder_may_hold_the_one_file(tmp_path):
    expected = read(data.prepare("math500", tmp_path / "a", str(write(tmp_path / "math.jsonl", MATH500))), "test")
    folder = tmp_path / "folder"
    write(folder / "any.jsonl", MATH500)
    (folder / "README.md").touch()
    assert read(data.prepare("math500", tmp_path / "b", str(folder)), "test") == expected
    (folder / "any.jsonl").rename(folder / "test-00000-of-00001.jsonl")
    write(folder / "info.json", [{"splits": "test"}])
    assert read(data.prepare("math500", tmp_path / "c", str(folder)), "test") == expected
    write(folder / "test.json", MATH500)
    assert failure("math500", tmp_path / "d", folder) == (
        f"source: '{folder}' has 3 files of type .parquet, .json, .jsonl, .csv; math500 needs one, give its path."
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers."""
    monkeypatch.setattr("iapo.data.read.hub_problem", lambda endpoint: None)


def test_a_hub_that_fails_gives_one_line(tmp_path, monkeypatch, hub):
    def failing(*args, **options):
        raise ConnectionError("The hub is tired\nwith more lines")

    monkeypatch.setattr("datasets.load_dataset", failing)
    line = failure("math500", tmp_path / "out", "someone/math-v1.5")
    assert line == (
        "source: 'someone/math-v1.5' can't be loaded from the hub (ConnectionError: The hub is tired); "
        "check the id and the network, or give a local copy by --source PATH."
    )


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch, name, free_port, capsys):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{free_port}")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a second try"))
    assert data.main([name, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"can't be loaded from the hub (http://127.0.0.1:{free_port} doesn't answer: " in line
    assert line.endswith("); check the id and the network, or give a local copy by --source PATH.")
    assert not datasets.config.HF_HUB_OFFLINE and not (tmp_path / "out").exists()


def test_any_answer_of_the_hub_will_do():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert read_module.hub_problem(f"http://127.0.0.1:{server.server_port}") is None


def test_the_hub_is_asked_for_the_originals(tmp_path, monkeypatch, hub):
    asked = []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        return {"train": GSM8K_TRAIN, "test": GSM8K_TEST}[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    paths = data.prepare("gsm8k", tmp_path)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert len(read(paths, "train")) == 2


def test_one_split_of_the_hub_may_have_another_name(tmp_path, monkeypatch, hub):
    rows = [{"problem": f"{k}+1?", "answer": str(k + 1)} for k in range(5)]
    splits = {"train": rows}
    monkeypatch.setattr("datasets.load_dataset", lambda hub_id, config: splits)
    assert len(read(data.prepare("aime24", tmp_path, "someone/aime"), "test")) == 5
    splits["dev"] = rows
    line = failure("aime25", tmp_path, "someone/aime")
    assert line == "source: 'someone/aime' has the splits train, dev, not 'test'; give a local file."


# --- SVAMP ---


def svamp_row(number: int, answer: object = None) -> dict:
    return {
        "ID": f"chal-{number}",
        "Body": f"Ann has {number} pens and buys 2 more.",
        "Question": "How many pens does she have?",
        "Equation": f"( {number}.0 + 2.0 )",
        "Answer": float(number + 2) if answer is None else answer,
        "Type": "Addition",
    }


def sides(paths: dict[str, Path]) -> dict[str, set[str]]:
    return {split: set(questions(read(paths, split))) for split in ("train", "test")}


def test_svamp_is_divided_700_300_by_id_alone(tmp_path):
    rows = [svamp_row(number) for number in range(1, 1001)]
    whole = data.prepare("svamp", tmp_path / "a", str(write(tmp_path / "SVAMP.json", rows)))
    assert {split: len(read(whole, split)) for split in whole} == {"train": 700, "test": 300}
    first = read(whole, "train")[0]
    number = first["extra_info"]["index"] + 1
    assert questions([first]) == [f"Ann has {number} pens and buys 2 more. How many pens does she have?"]
    assert first["reward_model"]["ground_truth"] == str(number + 2)
    folder = write(tmp_path / "folder" / "all.jsonl", rows).parent
    assert sides(data.prepare("svamp", tmp_path / "c", str(folder))) == sides(whole)
    part = data.prepare("svamp", tmp_path / "b", str(write(tmp_path / "part.jsonl", rows[900:400:-3])), seed=7)
    assert all(sides(part)[split] < sides(whole)[split] for split in ("train", "test"))


def test_svamp_keeps_the_split_of_the_hub_and_reads_its_text_as_numbers(tmp_path, monkeypatch, hub):
    rows = {"train": [svamp_row(1, "145.0"), svamp_row(2, "0.5")], "test": [svamp_row(3, "7")]}
    monkeypatch.setattr("datasets.load_dataset", lambda hub_id, config, split: rows[split])
    paths = data.prepare("svamp", tmp_path / "hub")
    assert [row["reward_model"]["ground_truth"] for row in read(paths, "train")] == ["145", "0.5"]
    assert [row["reward_model"]["ground_truth"] for row in read(paths, "test")] == ["7"]
    source = tmp_path / "files"
    for split in rows:
        write(source / f"{split}.parquet", rows[split])
    assert sides(data.prepare("svamp", tmp_path / "local", str(source))) == sides(paths)


def test_svamp_needs_an_id(tmp_path):
    row = svamp_row(1)
    line = failure("svamp", tmp_path / "out", write(tmp_path / "a.jsonl", [svamp_row(2), row | {"ID": None}]))
    assert "row 1 can't be parsed (None is no question or answer" in line
    del row["ID"]
    assert "row 0 has no column 'ID'" in failure("svamp", tmp_path / "out", write(tmp_path / "b.jsonl", [row]))


# --- for evaluation alone ---


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("aime24", {"id": 60, "problem": "1+1?", "solution": r"\boxed{204}", "url": "https://a"}, "204"),
        ("aime24", {"id": 60, "problem": "1+1?", "solution": r"So $\boxed{1}$ ...", "answer": "073"}, "73"),
        ("aime24", {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "...", "Answer": 204}, "204"),
        ("aime25", {"problem": "1+1?", "answer": "70", "id": "0"}, "70"),
        ("amc23", {"id": 0, "question": "1+1?", "answer": "27.0", "url": "https://a"}, "27"),
        ("amc23", {"id": 0, "problem": "1+1?", "answer": 27.5, "url": "https://a"}, "27.5"),
        ("amc23", {"question": "1+1?", "answer": ["27.0"]}, "27"),
        ("minerva", {"question": "1+1?", "answer": "4.5e33"}, "4.5e33"),
        ("minerva", {"question": "1+1?", "answer": r"5\mathrm{~cm}"}, r"5\mathrm{~cm}"),
        (
            "minerva",
            {
                "problem": "1+1?",
                "type": "Physics",
                "solution": r"\boxed{1}, so \boxed{\frac{a_{1}}{\{2\}}} m.",
                "idx": 0,
            },
            r"\frac{a_{1}}{\{2\}}",
        ),
    ],
)
def test_test_sets_in_the_forms_of_their_copies(tmp_path, name, row, answer):
    paths = data.prepare(name, tmp_path, str(write(tmp_path / "test.jsonl", [row])))
    assert paths == {"test": tmp_path / name / "test.parquet"}
    assert [file.name for file in (tmp_path / name).iterdir()] == ["test.parquet"]
    assert read(paths, "test") == [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"1+1?\n\n{data.INSTRUCTION}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "test", "index": 0},
        }
    ]


@pytest.mark.parametrize("solution", ["It is 204.", r"It is \boxed{20{4}"])
def test_a_solution_without_a_box_is_refused(tmp_path, solution):
    source = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "solution": solution}])
    assert "row 0 can't be parsed (solution: " in failure("minerva", tmp_path / "out", source)


def test_all_known_forms_are_named(tmp_path):
    line = failure("aime24", tmp_path / "out", write(tmp_path / "a.jsonl", [{"text": "1+1?"}]))
    assert "has no column 'problem' but ['text']; give rows with ['problem', 'answer'], or ['question'," in line


def olympiad_row(question: str, *answers: str, **others) -> dict:
    row = {"id": 1, "question": question, "solution": ["..."], "final_answer": list(answers), "context": None}
    row |= {"image_1": None, "modality": "Text-only", "is_multiple_answer": len(answers) > 1, "unit": None}
    return row | {"answer_type": "Numerical", "error": None, "question_type": "Open-ended"} | others


def test_olympiadbench_has_text_problems_with_all_their_answers(tmp_path, capsys):
    rows = [
        olympiad_row("Find $x$.", r"$\frac{1}{2 n+2}$"),
        olympiad_row("Which?", "$3$", "$7$", context="Let $p$ be a prime."),
        olympiad_row("How long?", "5", unit="cm"),
        olympiad_row("How many?", "6", unit="wombats"),
        olympiad_row("See the picture.", "1", modality="Multimodal"),
        olympiad_row("See it.", "1", image_1={"bytes": "x"}),
        olympiad_row("See <img_3362>.", "1"),
        olympiad_row("Prove it.") | {"final_answer": None},
        olympiad_row("How much?", r"\$5"),
    ]
    paths = data.prepare("olympiadbench", tmp_path, str(write(tmp_path / "a.json", rows)))
    assert [(row["extra_info"]["index"], row["reward_model"]["ground_truth"]) for row in read(paths, "test")] == [
        (0, r"\frac{1}{2 n+2}"),
        (1, "3, 7"),
        (2, "5 cm"),
        (3, "6"),
        (8, r"\$5"),
    ]
    assert questions(read(paths, "test"))[1] == "Let $p$ be a prime.\n\nWhich?"
    assert "left out 4 of 9 rows, which have pictures or no final answer" in capsys.readouterr().out
    text = write(tmp_path / "b.json", [olympiad_row("How many?") | {"final_answer": "12"}])
    assert "unexpected structure, TypeError('final_answer is a str" in failure("olympiadbench", tmp_path / "o", text)


# --- data of the user's own ---

OWN = [{"topic": "sums", "q": f"What is {k} plus {k}?", "a": str(2 * k)} for k in range(10)]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_own_data_by_its_columns(tmp_path, capsys, suffix):
    source = write(tmp_path / f"mine{suffix}", OWN)
    arguments = ["sums", "--source", str(source), "--question", "q", "--answer", "a", "--out", str(tmp_path / "data")]
    assert data.main(arguments) == 0
    paths = {split: tmp_path / "data" / "sums" / f"{split}.parquet" for split in ("train", "test")}
    rows = [read(paths, split) for split in ("train", "test")]
    assert [len(split) for split in rows] == [8, 2]
    for row in rows[0] + rows[1]:
        original = OWN[row["extra_info"]["index"]]
        assert questions([row]) == [original["q"]] and row["data_source"] == "sums"
        assert row["reward_model"]["ground_truth"] == original["a"]
    assert f"sums: train on it with data={tmp_path / 'data' / 'sums'}" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["data/mine", "data/mine/train.parquet", "data/../data/mine"])
def test_own_data_is_never_overwritten(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    halves = {"train": OWN[:5], "test": OWN[5:]}
    originals = [write(tmp_path / f"data/mine/{split}.parquet", rows) for split, rows in halves.items()]
    before = [original.read_bytes() for original in originals]
    arguments = ["mine", "--source", source, "--question", "q", "--answer", "a"]
    assert data.main([*arguments, "--out", "data"]) == 2
    assert capsys.readouterr().err == (
        f"iapo.data: source: {source!r} would be overwritten, because the set is written to data/mine; choose another "
        "--out or name.\n"
    )
    assert [original.read_bytes() for original in originals] == before
    assert data.main([*arguments, "--out", "made"]) == 0


def test_the_command_that_trains_on_own_data_is_quoted_for_a_shell(tmp_path, capsys):
    source = str(write(tmp_path / "mine.jsonl", OWN))
    data.prepare("sums", tmp_path / "my data", source, question="q", answer="a")
    assert capsys.readouterr().out.endswith(f"sums: train on it with 'data={tmp_path}/my data/sums'\n")


def test_own_data_with_several_right_answers_and_splits(tmp_path):
    write(tmp_path / "mine" / "train.jsonl", [{"q": "A root of 4?", "a": [2, "-2"]}, {"q": "A root of 0?", "a": 0}])
    write(tmp_path / "mine" / "test.csv", [{"q": "A root of 1, above 0?", "a": "1"}])
    paths = data.prepare("roots", tmp_path, str(tmp_path / "mine"), question="q", answer="a")
    assert [row["reward_model"]["ground_truth"] for row in read(paths, "train")] == [["2", "-2"], ["0"]]
    assert [row["reward_model"]["ground_truth"] for row in read(paths, "test")] == ["1"]


def test_contradictory_answers_are_listed_with_their_rows(tmp_path, capsys):
    rows = [{"q": f"What is {k}?", "a": k} for k in range(8)]
    rows += [{"q": "what  IS 3?", "a": 7}, {"q": "What is 4?", "a": "4.0"}, {"q": "What is 5?", "a": [6, 5]}]
    source = write(tmp_path / "mine.jsonl", [*rows, {"q": "What is 3?", "a": "three"}])
    data.prepare("mine", tmp_path, str(source), question="q", answer="a")
    dropped, line, *listed, _, _, _, _ = capsys.readouterr().out.splitlines()
    assert dropped == "mine: dropped 4 repeated rows, and 0 train rows that are in test"
    assert line == (
        "mine: 2 of these have another answer than the row that was kept; correct the wrong one of the two:"
    )
    assert listed == ["  row 8: '7', but row 3: '3'", "  row 11: 'three', but row 3: '3'"]
    write(tmp_path / "both" / "train.jsonl", rows[:9])
    write(tmp_path / "both" / "test.jsonl", [{"q": "What is 0?", "a": 1}, {"q": "What is 1?", "a": 1}])
    data.prepare("both", tmp_path, str(tmp_path / "both"), question="q", answer="a")
    dropped, line, *listed, _, _, _, _ = capsys.readouterr().out.splitlines()
    assert dropped == "both: dropped 1 repeated rows, and 2 train rows that are in test"
    assert listed == ["  train, row 8: '7', but train, row 3: '3'", "  train, row 0: '0', but test, row 0: '1'"]


def test_wrong_requests_for_own_data(tmp_path):
    source, out = write(tmp_path / "mine.csv", OWN), tmp_path / "out"
    needs = "missing; data of your own needs --source, --question and --answer."
    assert failure("sums", out, source, question="q") == f"answer: {needs}"
    assert failure("sums", out, source, answer="a") == f"question: {needs}"
    assert failure("sums", out, question="q", answer="a") == f"source: {needs}"
    assert "name: 'gsm8k' has columns of its own; choose another" in failure("gsm8k", out, source, question="q")
    for name in ("../sums", "a/b", ".", ""):
        with pytest.raises(ValueError, match=r"^name: .* it names a folder.$"):
            data.prepare(name, out, str(source), question="q", answer="a")
    line = failure("sums", out, source, question="Q", answer="a")
    assert line == (
        f"source: {source}, row 0 has no column 'Q' but ['topic', 'q', 'a']; name its columns with --question and "
        "--answer."
    )
    line = failure("sums", out, tmp_path / "absent.csv", question="q", answer="a")
    assert "absent.csv' does not exist; give a file" in line


def test_broken_csv_files(tmp_path):
    def refused(content: bytes) -> str:
        (tmp_path / "a.csv").write_bytes(content)
        return failure("sums", tmp_path / "out", tmp_path / "a.csv", question="q", answer="a")

    ragged = "is not valid CSV (it has not as many cells as the first line); correct it."
    assert refused(b"q,a\n1+1?,2\n2+2?,4,5\n").endswith(f"a.csv line 3 {ragged}")
    assert refused(b"q,a\n1+1?\n").endswith(f"a.csv line 2 {ragged}")
    assert "is not valid CSV (" in refused(b'q,a\n"1+1?,2\n')
    assert "is no UTF-8 text (" in refused("q,a\nWie groß?,2\n".encode("latin-1"))
    (tmp_path / "b.csv").write_bytes('\ufeffq,a\n"Zwei,\nplus zwei?",4\nx?,1\ny?,2\n'.encode())
    paths = data.prepare("sums", tmp_path, str(tmp_path / "b.csv"), question="q", answer="a")
    assert "Zwei,\nplus zwei?" in questions(read(paths, "train") + read(paths, "test"))


# --- reference answers that the verifier can't read ---

UNREADABLE = ("np.arcsin(10/13)", "???")


def numbered(*answers: object) -> list[dict]:
    return [{"question": f"Question {k}?", "answer": answer} for k, answer in enumerate(answers)]


def test_unreadable_answers_are_listed_and_dropped_on_request(tmp_path, capsys):
    rows = numbered("1", UNREADABLE[0], r"\frac{1}{2}", r"\text{Evelyn}", UNREADABLE[1], "(1, 2]", [UNREADABLE[0], "2"])
    source = str(write(tmp_path / "a.jsonl", rows))
    assert len(read(data.prepare("minerva", tmp_path, source), "test")) == 7
    _, line, *listed, wrote = capsys.readouterr().out.splitlines()
    assert line == (
        "minerva: the verifier can't read 2 of 7 reference answers, so any other spelling of them is judged wrong; "
        "--drop-unverifiable leaves these rows out:"
    )
    assert listed == ["  test, row 1: 'np.arcsin(10/13)'", "  test, row 4: '???'"] and "wrote 7 rows" in wrote
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    assert "\n".join(["", line, *listed, ""]) in page
    arguments = ["minerva", "--source", source, "--out", str(tmp_path), "--drop-unverifiable"]
    assert data.main(arguments) == 0
    kept = pq.read_table(tmp_path / "minerva" / "test.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in kept] == [0, 2, 3, 5, 6]
    _, line, *again, wrote = capsys.readouterr().out.splitlines()
    assert line == "minerva: dropped 2 of 7 rows, without a reference answer that the verifier can read:"
    assert again == listed and "wrote 5 rows" in wrote


def test_rows_without_an_answer_are_dropped_on_request(tmp_path, capsys):
    answers = [1, None, "2", "", 3, [], UNREADABLE[0], 4, 5]
    rows = [{"q": f"Question {k}?", "a": answer} for k, answer in enumerate(answers)]
    rows.append(rows[1] | {"a": 6})  # the same question, with an answer
    source = str(write(tmp_path / "a.jsonl", rows))
    own = {"question": "q", "answer": "a"}
    line = failure("mine", tmp_path / "out", source, **own)
    assert line == f"source: {source}, row 1 can't be parsed (answer: is null); correct or remove it."
    paths = data.prepare("mine", tmp_path, source, drop_unverifiable=True, **own)
    repeated, line, *listed, unreadable, _, _, _ = capsys.readouterr().out.splitlines()
    assert repeated == "mine: dropped 0 repeated rows, and 0 train rows that are in test"
    assert line == "mine: dropped 4 of 10 rows, without a reference answer that the verifier can read:"
    assert listed == [
        "  row 1, answer: is null",
        "  row 3, answer: has 0 characters, not 1 to 1000",
        "  row 5, answer: is an empty list",
    ]
    assert unreadable.endswith(", row 6: 'np.arcsin(10/13)'")
    kept = read(paths, "train") + read(paths, "test")
    assert sorted(row["extra_info"]["index"] for row in kept) == [0, 2, 4, 7, 8, 9]


@pytest.mark.parametrize(
    "name,null,good",
    [
        ("amc23", {"problem": "1+1?", "solution": None}, {"question": "2+2?", "answer": "4"}),
        ("gsm8k", {"question": "1+1?", "answer": None}, GSM8K_TRAIN[0]),
    ],
)
def test_a_null_in_place_of_a_solution_is_no_answer(tmp_path, capsys, name, null, good):
    source = str(write(tmp_path / "a.jsonl", [null, good]))
    source = gsm8k_directory(tmp_path / "original", train=[null, good]) if name == "gsm8k" else source
    data.prepare(name, tmp_path, source, drop_unverifiable=True)
    assert "row 0, answer: is null\n" in capsys.readouterr().out


def test_readable_answers_get_one_line(tmp_path, capsys):
    data.prepare("minerva", tmp_path, str(write(tmp_path / "a.jsonl", numbered("1", r"\sqrt{2}"))))
    assert "minerva: the verifier can read all 2 reference answers\n" in capsys.readouterr().out


@pytest.mark.parametrize("drop", [False, True])
def test_a_data_set_without_one_readable_answer_is_refused(tmp_path, drop):
    source = write(tmp_path / "a.jsonl", numbered(*UNREADABLE))
    assert failure("minerva", tmp_path / "out", source, drop_unverifiable=drop) == (
        "answer: the verifier can read none of the 2 reference answers of test, the first is 'np.arcsin(10/13)' of "
        "row 0; give numbers, LaTeX or words."
    )


def test_an_answer_that_takes_too_long_cannot_be_read(tmp_path, capsys, monkeypatch):
    async def verdict(answer, gold, timeout_s):
        return "timeout" if gold == "x^{9999999}" else "wrong"

    monkeypatch.setattr("iapo.tasks.verifier.verdict", verdict)
    data.prepare("minerva", tmp_path, str(write(tmp_path / "a.jsonl", numbered("x^{9999999}", "x"))))
    assert "  test, row 0: 'x^{9999999}'" in capsys.readouterr().out


def test_a_long_list_is_cut(tmp_path, capsys, monkeypatch):
    async def verdict(answer, gold, timeout_s):
        return "wrong" if gold == "x" else "unparsable"

    monkeypatch.setattr("iapo.tasks.verifier.verdict", verdict)
    data.prepare("minerva", tmp_path, str(write(tmp_path / "a.jsonl", numbered("x", *["y"] * 130))))
    out = capsys.readouterr().out
    assert out.count("\n  test, row") == 100 and "\n  and 30 more\n" in out


def test_only_the_first_answers_are_tried_before_a_run_unless_none_can_be_read(monkeypatch):
    tried = []

    async def verdict(answer, gold, timeout_s):
        tried.append(gold)
        return "wrong" if gold.startswith("x") else "unparsable"

    monkeypatch.setattr("iapo.tasks.verifier.verdict", verdict)
    assert judge.unreadable_rows(["1", "a", "a", "x", "b"], most=2) == [1, 2]  # b isn't tried
    assert judge.unreadable_rows([["a", "x"], ["a", "b"], "c"], most=3) == [1]
    assert tried == ["a", "x", "a", "x", "b"]
    assert judge.unreadable_rows(["a", "b", "c", "x"], most=2) == [
        0,
        1,
        2,
    ]  # so a file without a readable one is refused
    assert judge.unreadable_rows(["a", "b", "c"], most=2) == [0, 1, 2]
    assert judge.unreadable_rows(["a", "b", "7"], most=1) == [0]
    assert judge.unreadable_rows([1, "2"]) == []


# --- the command ---


def without_packages(*missing: str, command: list[str]) -> subprocess.CompletedProcess:
    """The command where these packages aren't installed."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); from iapo import data; "
    code = f"{hide} sys.exit(data.main({command!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.e2e
def test_a_base_installation_gets_one_line(tmp_path):
    source = str(write(tmp_path / "a.jsonl", numbered("1")))
    command = ["minerva", "--source", source, "--out", str(tmp_path / "out")]
    base = without_packages("pyarrow", "datasets", "pebble", "math_verify", "verl", command=command)
    assert (base.returncode, base.stderr) == (
        2,
        "iapo.data: packages: pyarrow is not installed; set up with bash scripts/setup.sh cpu (or gpu), or run pip "
        "install pyarrow datasets pebble math-verify==0.8.0.\n",
    )
    assert not (tmp_path / "out").exists()
    needs_no_verifier = without_packages("datasets", "pebble", "math_verify", "verl", command=command)
    assert needs_no_verifier.returncode == 0, needs_no_verifier.stderr
    write(tmp_path / "a.jsonl", numbered(r"\sqrt{2}"))
    (line,) = without_packages("pebble", command=command).stderr.splitlines()
    assert line.startswith("iapo.data: packages: pebble is not installed; set up with")
    (line,) = without_packages("datasets", command=["gsm8k", "--out", str(tmp_path)]).stderr.splitlines()
    assert line.startswith("iapo.data: packages: datasets is not installed; set up with")


def test_without_math_verify_there_is_one_line(tmp_path, capsys, monkeypatch):
    from iapo.tasks import verifier

    verifier.close_pool()
    monkeypatch.setattr(verifier.importlib.util, "find_spec", lambda name: None)
    source = str(write(tmp_path / "a.jsonl", numbered(r"\sqrt{2}")))
    assert data.main(["minerva", "--source", source, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iapo.data: packages: math-verify is not installed; set up with bash scripts/setup.sh cpu")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_error_line(tmp_path, capsys):
    sizes = ["--train-size", "3", "--test-size", "2"]
    assert data.main(["verbose_arithmetic", "--out", str(tmp_path), *sizes]) == 0
    assert (tmp_path / "verbose_arithmetic" / "test.parquet").exists()
    assert data.main(["nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iapo.data: name: 'nothing' must be one of gsm8k")


def test_the_command_passes_on_its_options(tmp_path):
    source = str(write(tmp_path / "math500.json", MATH500))
    for seed in (1, 2):
        assert data.main(["math500", "--source", source, "--seed", str(seed), "--out", str(tmp_path / f"{seed}")]) == 0
        expected = data.prepare("math500", tmp_path / "again", source, seed)
        written = pq.read_table(tmp_path / f"{seed}/math500/test.parquet")
        assert written.to_pylist() == read(expected, "test")
    assert data.main(["verbose_arithmetic", "--train-size", "5", "--test-size", "3", "--out", str(tmp_path)]) == 0
    sizes = [len(pq.read_table(tmp_path / f"verbose_arithmetic/{split}.parquet")) for split in ("train", "test")]
    assert sizes == [5, 3]


def test_a_dapo_row_without_one_of_the_fixed_sentences_is_refused(tmp_path):
    row = dapo_row("What is 1?", "1")
    row["prompt"][0]["content"] = row["prompt"][0]["content"].removesuffix(DAPO_SUFFIX)
    source = str(write(tmp_path / "dapo.parquet", [row] * 3))
    with pytest.raises(ValueError, match="lacks the data set's fixed first and last sentence"):
        data.prepare("dapo_math_17k", tmp_path, source)


@pytest.mark.parametrize(
    "options,line",
    [
        (["--out", ""], "--out: '' names no folder; give one, or leave it out."),
        ([], "IAPO_DATA_DIR: '' names no folder; set the variable to one, or unset it."),
    ],
)
def test_no_folder_is_not_the_current_one(tmp_path, monkeypatch, capsys, options, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IAPO_DATA_DIR", "")
    assert data.main(["verbose_arithmetic", *options]) == 2
    assert capsys.readouterr().err == f"iapo.data: {line}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["verbose_arithmetic", "--out", str(tmp_path / "file"), "--train-size", "4", "--test-size", "2"]
    assert data.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"iapo.data: --out: {tmp_path}/file can't be made, ")
