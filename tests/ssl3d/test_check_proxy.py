"""check_proxy passes a good proxy and names what is wrong with every bad one."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from ssl3d.data.open import open_data
from ssl3d.encoder import Encoder
from ssl3d.errors import DataError
from ssl3d.proxy import Proxy, StepOutput
from ssl3d.testing import check_proxy


class Tiny(Encoder):
    """Two convolutions."""

    channels = (8,)
    strides = ((2, 2, 2),)
    embed_dim = 8

    def __init__(self, depth=3):
        super().__init__()
        self.config = None
        self.one = nn.Conv3d(1, 8, (depth, 3, 3), 2, (depth // 2, 1, 1))
        self.two = nn.Conv3d(8, 8, (depth, 3, 3), 1, (depth // 2, 1, 1))

    def forward(self, x):
        return [self.two(self.one(x).relu()).relu()]


class Noise:
    """A volume of smooth noise, its brightness its own."""

    shape, spacing, orientation = (1, 12, 12, 12), (1.0, 1.0, 1.0), "SAR"
    dataset = "noise"

    def __init__(self, index):
        self.index, self.id, self.subject = index, f"v{index}", f"s{index}"
        rng = np.random.default_rng(index)
        self.voxels = torch.from_numpy(rng.normal(rng.normal(), 1, self.shape).astype(np.float32))

    def read(self, start, size):
        (z, y, x), (d, h, w) = start, size
        return self.voxels[:, z : z + d, y : y + h, x : x + w].clone()


VOLUMES = [Noise(n) for n in range(6)]


@dataclass
class GoodConfig:
    """Options.

    Attributes:
        side: Side of the crop.
    """

    side: int = 8


class Good(Proxy):
    """The network must work out how bright the crop was before it was shifted."""

    Config = GoodConfig
    paper = "Nobody: A proxy for tests"
    main = "error"

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.head = nn.Linear(encoder.embed_dim, 1)

    @classmethod
    def draw(cls, config, volume, rng):
        start = rng.integers(0, 13 - config.side, 3).tolist()
        return {"crop": volume.read(start, (config.side,) * 3)}

    def forward(self, batch, rng):
        crop = batch["crop"]
        shown = crop + 0.1 * rng.normal(*crop.shape[1:])
        error = self.head(self.encoder.embed(shown)).squeeze(1).float() - crop.mean(dim=(1, 2, 3, 4))
        loss = error.square().mean()
        return StepOutput(loss, {"error": error.detach().abs().mean()}, self.picture)

    def picture(self):
        from matplotlib.figure import Figure

        return Figure()


def check(cls, encoder=Tiny, **options):
    check_proxy(cls, encoder=encoder, data=VOLUMES, steps=40, lr=5e-3, **options)


def broken(**members):
    """A proxy as Good, but for these members."""
    return type("Broken", (Good,), {"__doc__": "Broken.", "__module__": __name__, **members})


def changed(**output):
    """`forward` of Good, with parts of its output replaced by functions of (output, self, batch)."""

    def forward(self, batch, rng):
        good = Good.forward(self, batch, rng)
        return good._replace(**{name: make(good, self, batch) for name, make in output.items()})

    return {"forward": forward}


def drawn(make):
    """`draw` of Good, its result changed by make(example, config, volume, rng)."""

    def draw(cls, config, volume, rng):
        return make(Good.draw(config, volume, rng), config, volume, rng)

    return {"draw": classmethod(draw)}


def test_a_good_proxy_passes():
    check(Good)


def test_the_global_random_state_is_given_back():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check(Good)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


# What it says about itself ---------------------------------------------------------------------------


@dataclass
class Undocumented:
    """Options."""

    side: int = 8


@dataclass
class Plain(GoodConfig):
    """Options."""

    limit: ClassVar[int] = 3
    strength = 2


@dataclass
class NoDefault:
    """Options.

    Attributes:
        side: Side.
    """

    side: int


@dataclass
class Unpicklable(GoodConfig):
    """Options.

    Attributes:
        rule: A function.
    """

    rule: object = field(default_factory=lambda: lambda x: x)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"paper": " "}, "paper is empty"),
        ({"main": ""}, "main does not name a metric"),
        ({"__doc__": None}, "has no docstring"),
        ({"Config": Undocumented}, "options without help: side"),
        ({"Config": Plain}, "strength of its Config has no type annotation, so is no option"),
        ({"Config": NoDefault}, r"Config\(\) fails"),
        ({"Config": Unpicklable}, "does not pickle"),
        ({"Config": dict}, "Config is not a dataclass"),
        ({"recipe": None}, "recipe is not a mapping"),
        ({"recipe": {"learning_rate": 1}}, "recipe names learning_rate, no option of ssl3d pretrain"),
        ({"draw": lambda self, config, volume, rng: {}}, "draw is not a classmethod"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_what_a_class_must_say(members, message):
    with pytest.raises(AssertionError, match=message):
        check(broken(**members))


def test_something_else_is_no_proxy():
    with pytest.raises(AssertionError, match="not a subclass"):
        check(dict)
    with pytest.raises(AssertionError, match="forward not written"):
        check(type("Half", (Proxy,), {"draw": Good.draw}))


# Drawing ---------------------------------------------------------------------------------------------


def with_noise(source):
    def make(example, config, volume, rng):
        return {"crop": example["crop"] + source(example["crop"].shape)}

    return drawn(make)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (with_noise(lambda shape: torch.randn(shape)), "global random state of torch"),
        (
            with_noise(lambda shape: torch.from_numpy(np.random.randn(*shape)).float()),
            "global random state of numpy",
        ),
        (with_noise(lambda shape: random.random()), "global random state of python"),
        (
            with_noise(lambda shape: float(np.random.default_rng().normal())),
            "another 'crop' for the same volume and the same rng",
        ),
        (drawn(lambda e, *_: {"crop": e["crop"].numpy()}), "gives a ndarray for 'crop', not a tensor"),
        (drawn(lambda e, *_: e["crop"]), "gives a tensor of shape .*, not a dict"),
        (drawn(lambda e, *_: e | {"index": torch.tensor(0)}), "'index', which the toolkit adds itself"),
        (drawn(lambda e, *_: {"crop": e["crop"] / 0}), "'crop' is not finite"),
        (
            drawn(lambda e, c, v, rng: {"crop": e["crop"][..., : int(rng.integers(2, 8))]}),
            "they do not stack",
        ),
    ],
    ids=["torch", "numpy", "python", "unseeded", "ndarray", "tensor", "index", "nan", "sizes"],
)
def test_what_draw_must_not_do(members, message):
    with pytest.raises(AssertionError, match=message):
        check(broken(**members))


def test_a_proxy_that_no_volume_suits():
    def refuse(example, config, volume, rng):
        raise DataError(f"{volume.id}: too dark")

    with pytest.raises(AssertionError, match="refuses every one of 6 volumes: v0: too dark"):
        check(broken(**drawn(refuse)))


def test_labels_read_without_a_word():
    phantoms = open_data(["phantoms:6"])

    @classmethod
    def draw(cls, config, volume, rng):
        return Good.draw(config, volume, rng) | {"label": torch.tensor(hash(volume.label) % 7)}

    with pytest.raises(AssertionError, match=r"Broken: draw reads a volume's label, .* uses_labels = True"):
        check_proxy(broken(draw=draw), encoder=Tiny, data=phantoms)
    check_proxy(broken(draw=draw, uses_labels=True), encoder=Tiny, data=phantoms, fall=-1)
    assert phantoms[0].label is not None


def test_volumes_that_do_not_suit_are_passed_over():
    def refuse(example, config, volume, rng):
        if volume.index == 2:
            raise DataError("too dark")
        return example

    check(broken(**drawn(refuse)))


# One step --------------------------------------------------------------------------------------------


def constant_that_moves_weights(good, self, batch):
    """A loss of 1 whose gradient moves every weight at random."""
    return 1 + good.loss - good.loss.detach()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (changed(loss=lambda good, self, batch: good.loss.repeat(3)), "not a scalar tensor"),
        (changed(loss=lambda good, self, batch: good.loss.item()), "the loss is a float"),
        (changed(loss=lambda good, self, batch: good.loss * float("nan")), "the loss is nan"),
        (changed(loss=lambda good, self, batch: good.loss.detach()), "does not depend on any trainable"),
        (changed(metrics=lambda good, self, batch: {}), "main is 'error', but the metrics are"),
        (changed(metrics=lambda good, self, batch: {"error": good.loss}), "'error' keeps the graph alive"),
        (changed(metrics=lambda good, self, batch: {"error": 1.0}), "metric 'error' is a float"),
        (
            changed(metrics=lambda g, s, batch: {"error": batch["crop"].mean(0)}),
            "'error' is a tensor of shape",
        ),
        (changed(picture=lambda good, self, batch: "a picture"), "picture is a str"),
        (changed(picture=lambda good, self, batch: lambda: None), "not a matplotlib Figure"),
        (
            changed(loss=lambda good, self, batch: good.loss + torch.rand(())),
            "uses the global random state",
        ),
        (
            changed(loss=lambda good, self, batch: good.loss + np.random.default_rng().random()),
            "another loss for the same batch and rng",
        ),
        (changed(loss=constant_that_moves_weights), "the loss does not fall: 1 before, 1 after 40 steps"),
        (changed(loss=lambda good, self, batch: -good.loss), None),
    ],
    ids=[
        "vector",
        "float",
        "nan",
        "detached",
        "no main",
        "graph",
        "metric float",
        "metric vector",
        "str",
        "no figure",
        "global rng",
        "unseeded rng",
        "constant",
        "falls without end",
    ],
)
def test_what_forward_must_give(members, message):
    if message is None:  # a falling loss is all that is asked
        return check(broken(**members))
    with pytest.raises(AssertionError, match=message):
        check(broken(**members))


def test_a_rising_loss_is_caught():
    def forward(self, batch, rng):
        good = Good.forward(self, batch, rng)
        return good._replace(loss=2 * good.loss.detach() - good.loss)

    with pytest.raises(AssertionError, match="the loss does not fall"):
        check(broken(forward=forward))


def test_a_tuple_is_no_step_output():
    with pytest.raises(AssertionError, match="gives a tuple, not a StepOutput"):
        check(broken(forward=lambda self, batch, rng: tuple(Good.forward(self, batch, rng))))


def test_a_batch_written_into():
    def forward(self, batch, rng):
        batch["crop"] += 1
        return Good.forward(self, batch, rng)

    with pytest.raises(AssertionError, match=r"changes its batch \(\['crop'\]\)"):
        check(broken(forward=forward))


def test_a_dead_head():
    def make(self, config, encoder):
        Good.__init__(self, config, encoder)
        self.spare = nn.Linear(3, 3)

    with pytest.raises(AssertionError, match=r"no gradient reaches spare.weight"):
        check(broken(__init__=make))


def test_an_encoder_cut_off():
    def forward(self, batch, rng):
        with torch.no_grad():
            embedded = self.encoder.embed(batch["crop"])
        error = self.head(embedded).squeeze(1) - batch["crop"].mean(dim=(1, 2, 3, 4))
        return StepOutput(error.square().mean(), {"error": error.detach().abs().mean()})

    with pytest.raises(AssertionError, match=r"no gradient reaches encoder.one.weight"):
        check(broken(forward=forward))


def test_a_frozen_encoder():
    def make(self, config, encoder):
        Good.__init__(self, config, encoder)
        encoder.requires_grad_(False)

    with pytest.raises(AssertionError, match="no parameter of the encoder is trainable"):
        check(broken(__init__=make))


def test_taps_that_slices_of_depth_1_never_reach():
    flat = drawn(lambda e, *_: {"crop": e["crop"][:, :1]})
    with pytest.raises(AssertionError, match=r"no gradient reaches encoder.one.weight\[:, :, 0, :, :\]"):
        check(broken(**flat))
    check(broken(**flat), encoder=lambda: Tiny(depth=1))


def test_another_encoder_than_the_one_given():
    def make(self, config, encoder):
        Good.__init__(self, config, Tiny())

    with pytest.raises(AssertionError, match=r"self\.encoder is not the encoder it was given"):
        check(broken(__init__=make))


def test_eval_mode_and_a_part_of_a_batch():
    def forward(self, batch, rng):
        good = Good.forward(self, batch, rng)
        return good if self.training else good._replace(metrics={})

    with pytest.raises(AssertionError, match="main is 'error'"):
        check(broken(forward=forward))

    def whole(self, batch, rng):
        noise = torch.randn(rng.total, 1, 8, 8, 8, generator=rng.generator)
        return Good.forward(self, batch | {"crop": batch["crop"] + noise}, rng)

    with pytest.raises(RuntimeError, match="size"):
        check(broken(forward=whole))


def test_a_layer_made_in_forward():
    def forward(self, batch, rng):
        if "late" not in dict(self.named_children()):
            self.late = nn.Linear(8, 1)
        return Good.forward(self, batch, rng)

    with pytest.raises(
        AssertionError, match=r"forward makes late.bias, late.weight, .* in __init__ or setup"
    ):
        check(broken(forward=forward))


def test_held_out_subjects_that_leave_something_behind():
    def make(self, config, encoder):
        Good.__init__(self, config, encoder)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch, rng):
        self.seen += 1
        return Good.forward(self, batch, rng)

    with pytest.raises(AssertionError, match=r"forward in eval mode changes seen: .* ask self.training"):
        check(broken(__init__=make, forward=forward))

    def careful(self, batch, rng):
        return forward(self, batch, rng) if self.training else Good.forward(self, batch, rng)

    check(broken(__init__=make, forward=careful))


def test_half_precision():
    def forward(self, batch, rng):
        good = Good.forward(self, batch, rng)
        half = self.encoder.embed(batch["crop"]).dtype != torch.float32
        return good._replace(loss=good.loss / (0.0 if half else 1.0))

    with pytest.raises(AssertionError, match="under bfloat16 autocast"):
        check(broken(forward=forward))


# Keeping ---------------------------------------------------------------------------------------------


def averaging(register):
    """A proxy that subtracts a running mean, kept as `register` keeps it."""

    def make(self, config, encoder):
        Good.__init__(self, config, encoder)
        register(self, torch.zeros(()))

    def forward(self, batch, rng):
        good = Good.forward(self, batch, rng)
        return good._replace(loss=good.loss + 0.1 * self.mean)

    def after_step(self, step, total):
        self.mean = self.mean + 0.01

    return {"__init__": make, "forward": forward, "after_step": after_step}


def test_state_outside_the_state_dict():
    check(broken(**averaging(lambda self, value: self.register_buffer("mean", value))))
    with pytest.raises(AssertionError, match="neither a parameter nor a buffer"):
        check(broken(**averaging(lambda self, value: setattr(self, "mean", value))))


def test_a_state_dict_that_does_not_load():
    def after_step(self, step, total):
        self.head.register_buffer("late", torch.zeros(2))

    with pytest.raises(AssertionError, match="state dict does not load into a new one"):
        check(broken(after_step=after_step))


def test_an_unknown_name_gets_suggestions():
    from ssl3d.errors import PluginError

    with pytest.raises(PluginError, match="Did you mean sorting"):
        check_proxy("sortin")
