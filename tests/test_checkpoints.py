"""Which checkpoints are whole, which one a run resumes from, and which are too many; on files as verl writes them."""

import shutil

import pytest
import torch

from iapo.checkpoints import FILES, TRACKER, problem, remove_surplus, resume, steps

PARTS = list(FILES)


def save(folder, step, ranks=1, tracker=True):
    path = folder / f"global_step_{step}"
    (path / "actor").mkdir(parents=True)
    for rank in range(ranks):
        for part in FILES.values():
            torch.save({"x": torch.ones(100)}, path / f"actor/{part}_world_size_{ranks}_rank_{rank}.pt")
    torch.save({}, path / "data.pt")
    if tracker:
        (folder / TRACKER).write_text(str(step))
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("part", ["model", "optim", "extra_state"])
def test_a_step_without_a_file_of_every_rank_is_not_whole(tmp_path, part):
    path = save(tmp_path, 4, ranks=2)
    assert problem(path, PARTS, 2) is None
    file = path / f"actor/{part}_world_size_2_rank_1.pt"
    cut(file)
    assert problem(path, PARTS, 2) == f"{file} is cut short"
    file.unlink()
    assert problem(path, PARTS, 2) == f"{file} is missing"
    assert problem(path, PARTS, 1).endswith("model_world_size_1_rank_0.pt is missing")  # of another number of ranks
    without = [name for name in PARTS if FILES[name] != part]
    assert problem(path, without, 2) is None  # which this run doesn't load


def test_a_step_without_actor_or_data_is_not_whole(tmp_path):
    path = save(tmp_path, 4)
    (path / "data.pt").unlink()
    assert problem(path, PARTS, 1).endswith("data.pt is missing")
    shutil.rmtree(path / "actor")
    assert problem(path, PARTS, 1).endswith("actor/model_world_size_1_rank_0.pt is missing")


def test_a_run_resumes_from_the_newest_whole_step(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / TRACKER).write_text("10")
    assert steps(tmp_path) == [2, 9, 10] and resume(tmp_path, PARTS, 1) == (10, [])
    cut(tmp_path / "global_step_10/actor/optim_world_size_1_rank_0.pt")
    step, problems = resume(tmp_path, PARTS, 1)
    assert step == 9 and len(problems) == 1 and "optim" in problems[0]
    (tmp_path / TRACKER).write_text("11")
    assert resume(tmp_path, PARTS, 1) == (9, [f"{TRACKER} names step 11, which isn't there", problems[0]])
    (tmp_path / TRACKER).write_bytes(b"\xff")
    assert resume(tmp_path, PARTS, 1) == (9, [f"{TRACKER} holds '\ufffd' and no step", problems[0]])
    (tmp_path / TRACKER).write_text("10")
    (tmp_path / "global_step_9/data.pt").unlink()
    step, problems = resume(tmp_path, PARTS, 1)
    assert step == 2 and len(problems) == 2
    shutil.rmtree(tmp_path / "global_step_2")
    assert resume(tmp_path, PARTS, 1).step is None


def test_a_step_after_the_trackers_was_never_finished(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 4, tracker=False)
    assert resume(tmp_path, PARTS, 1) == (2, [])


def test_surplus_steps_are_removed_whichever_process_wrote_them(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    assert remove_surplus(tmp_path, 8, 2, PARTS, 1) == [2, 4] and steps(tmp_path) == [6, 8]
    assert remove_surplus(tmp_path, 8, 2, PARTS, 1) == []


def test_whole_steps_are_counted_and_later_ones_left_alone(tmp_path):
    for step in (2, 4, 6, 30):
        save(tmp_path, step)
    cut(tmp_path / "global_step_4/data.pt")
    cut(tmp_path / "global_step_30/data.pt")  # the run resumed before it and is now at 6
    assert remove_surplus(tmp_path, 6, 2, PARTS, 1) == [] and steps(tmp_path) == [2, 4, 6, 30]
    save(tmp_path, 8)
    assert remove_surplus(tmp_path, 8, 2, PARTS, 1) == [2, 4] and steps(tmp_path) == [6, 8, 30]
    (tmp_path / "global_step_3").mkdir()  # what verl leaves of a step that it removed
    assert remove_surplus(tmp_path, 8, 2, PARTS, 1) == [3]


def test_no_limit_keeps_all_as_in_verl(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    for keep in (-1, 0):
        assert remove_surplus(tmp_path, 30, keep, PARTS, 1) == []
    assert steps(tmp_path) == [10, 20, 30]


def test_the_step_that_a_run_came_from_stays(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert remove_surplus(tmp_path, 6, 1, PARTS, 1, spare=[2]) == [4] and steps(tmp_path) == [2, 6]


def test_a_file_without_its_beginning_and_broken_states_are_no_whole_step(tmp_path):
    path = save(tmp_path, 4)
    (path / "methods.json").write_text("{}")
    assert problem(path, [*PARTS, "hf_model"], 1) is None  # what verl doesn't load needs no file
    (path / "methods.json").write_text('{"gfpo": ')
    assert problem(path, PARTS, 1).endswith("methods.json is cut short")
    (path / "methods.json").unlink()
    file = path / "actor/model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[file.stat().st_size // 2 :])
    assert problem(path, PARTS, 1) == f"{file} is cut short"
    assert problem(path, PARTS, 0) is None  # the ranks' files may be on other machines
