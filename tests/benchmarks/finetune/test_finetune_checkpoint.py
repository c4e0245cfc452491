"""Training goes on from a checkpoint whose bytes and parts are those that were written, or says why not."""

import errno
import resource

import pytest
import torch

from ssl3d.errors import TransientError, UsageError
from ssl3d_benchmarks.finetune import checkpoint
from ssl3d_benchmarks.finetune.checkpoint import Trial


@pytest.fixture
def kept(tmp_path):
    model, optimizer = network()
    trial = Trial(0.1, total=9, step=4)
    path = tmp_path / "lr-0.1.pt"
    checkpoint.save(path, trial, model, optimizer)
    return path, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def network():
    model = torch.nn.Linear(40, 40)
    return model, torch.optim.AdamW(model.parameters())


def resume(path):
    (model, optimizer), trial, said = network(), Trial(0.1, total=9), []
    checkpoint.resume(path, trial, model, optimizer, "job", said.append)
    return model.state_dict(), trial.step, " ".join(said)


def test_it_goes_on_from_what_was_written(kept):
    path, state = kept
    found, step, said = resume(path)
    assert step == 4 and "goes on at step 4 of 9" in said
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_noticed_or_without_effect(kept, seed):
    path, state = kept
    content = bytearray(path.read_bytes())
    place = int(torch.randint(len(content), (), generator=torch.Generator().manual_seed(seed)))
    content[place] ^= 1 << seed % 8
    path.write_bytes(content)
    found, step, said = resume(path)
    if step == 4:
        assert all(torch.equal(found[name], state[name]) for name in state)
    else:
        assert step == 0 and f"{path} is damaged" in said


def test_a_file_that_cannot_be_read_just_now_is_not_taken_for_damaged(kept, monkeypatch):
    def full(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", full)
    with pytest.raises(OSError, match="Too many open files"):
        resume(kept[0])


@pytest.mark.parametrize("part", ["trial", "model", "optimizer"])
@pytest.mark.parametrize("value", [None, 7, {}, [1]])
def test_whole_bytes_with_wrong_parts_are_one_line(kept, part, value):
    path, _ = kept
    state = torch.load(path, weights_only=True)
    torch.save({**state, part: value}, path)
    with pytest.raises(UsageError, match=f"{path}: is no checkpoint of job") as caught:
        resume(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("trial", "step", "4"),
        ("trial", "step", -1),
        ("trial", "step", 10),
        ("trial", "losses", None),
        ("trial", "losses", ["x"]),
        ("trial", "curve", [3]),
        ("trial", "best", {"step": 1, "score": "x"}),
        ("trial", "weights", {"weight": torch.zeros(40, 40)}),
        ("trial", "average", {"weight": torch.zeros(2), "bias": torch.zeros(40)}),
        ("trial", "nothing", 1),
        ("optimizer", "param_groups", []),
        ("optimizer", "state", {0: {"exp_avg": torch.zeros(3)}}),
    ],
)
def test_whole_bytes_with_a_wrong_value_inside_a_part_are_one_line(kept, part, key, value):
    path, _ = kept
    state = torch.load(path, weights_only=True)
    state[part][key] = value
    torch.save(state, path)
    with pytest.raises(UsageError, match=f"{path}: is no checkpoint of job") as caught:
        resume(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("room", [0, 64, 3000])
def test_a_disk_that_fills_is_one_line_and_the_older_checkpoint_stays(kept, room):
    path, _ = kept
    before, (model, optimizer) = path.read_bytes(), network()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most[1]))
    try:
        with pytest.raises(TransientError, match=f"cannot write {path}: File too large"):
            checkpoint.save(path, Trial(0.1, total=9, step=5), model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
