"""What a study plans within its hours, and what it says that it can show, by cases worked by hand."""

import dataclasses

import pytest

from ssl3d.api import DataError, UsageError, open_data
from ssl3d_benchmarks.study.look import look
from ssl3d_benchmarks.study.plan import (
    ArmCost,
    Costs,
    Design,
    Power,
    RunCost,
    Time,
    choose,
    designs,
    fixed_seconds,
    last_designs,
    step_seconds,
    trainings,
)
from ssl3d_benchmarks.study.recipes import crop_for, recipes_for

# b costs twice the time and the FLOPs of a: at equal FLOPs it takes half of the steps, and as long.
COSTS = Costs(
    {"a": RunCost(1.0, 10), "b": RunCost(2.0, 20)}, ArmCost(0.5, 2.0), None, 10.0, (8, 2, 5), 5, 4
)
LEAN = Design(1, 1, (), 1)


def test_the_seconds_of_a_design_are_those_counted_by_hand():
    design = Design(2, 3, (0.1,), 2)
    # Two recipes and scratch, with 3 seeds, on 3 subsets, in 5 folds.
    assert trainings(design, COSTS) == (135, 0)
    # 6 pretrainings, their 6 scores and that of scratch, 10 s each; 4 x 2 + 5 volumes a training, 2 s each.
    assert fixed_seconds(design, COSTS) == 13 * 10 + 135 * 13 * 2
    assert step_seconds(design, COSTS) == (3 * (1 + 1), 135 * 0.5)


def test_an_imagenet_network_is_trained_from_scratch_too():
    costs = dataclasses.replace(COSTS, imagenet=ArmCost(1.0, 3.0))
    assert trainings(LEAN, costs) == (10, 10)
    assert fixed_seconds(LEAN, costs) == 4 * 10 + 10 * 13 * 2 + 10 * 13 * 3
    assert step_seconds(LEAN, costs) == (1, 10 * 0.5 + 10 * 1.0)


def test_time_is_shared_out_and_what_is_over_goes_to_pretraining():
    # 290 s whatever the steps, 1 s a step of pretraining, 5 s a step of the ten fine-tunings.
    plan = choose([LEAN], COSTS, Time(1.0), 200)
    assert (plan.pretrain_steps, plan.finetune_steps) == (3060 - 290 - 1000, 200)
    assert plan.seconds == 3060 == 3600 * 0.85
    plan = choose([LEAN], COSTS, Time(0.5), 200)  # 1240 of the 2000 s wanted
    assert (plan.pretrain_steps, plan.finetune_steps) == (620, 124)


def test_the_richest_design_that_gets_half_of_its_steps_is_taken():
    rich = Design(2, 3, (0.1,), 2)  # 3640 s, and 6000 + 13500 s for all steps
    half = (3640 + (6000 + 13500) / 2) / 0.85 / 3600
    assert choose([rich, LEAN], COSTS, Time(half + 0.01), 200).design == rich
    assert choose([rich, LEAN], COSTS, Time(half - 0.01), 200).design == LEAN


def test_steps_that_are_given_are_kept():
    plan = choose([LEAN], COSTS, Time(1.0), 200, pretraining=30, tuning=20)
    assert (plan.pretrain_steps, plan.finetune_steps, plan.seconds) == (30, 20, 290 + 30 + 100)


@pytest.mark.parametrize(
    "time, needed",
    # 290 + 100 + 500 s are 0.291 hours with the reserve of 15 %.
    [(Time(0.2), "0.30"), (Time(0.2, spent=72), "0.32"), (Time(0.1, workers=2), "0.15")],
)
def test_too_few_hours_are_one_line_that_says_how_many(time, needed):
    with pytest.raises(UsageError, match=rf"--hours 0.\d are too few.*give --hours {needed}$") as caught:
        choose([LEAN], COSTS, time, 200)
    assert "\n" not in str(caught.value)
    choose([LEAN], COSTS, Time(float(needed), time.workers, time.spent), 200)


def test_what_is_given_up_last_is_given_up_only_where_nothing_else_fits():
    costs = dataclasses.replace(COSTS, imagenet=ArmCost(0.5, 2.0), share=0.15)
    full, both = Design(1, 1, (0.1,), 1), [Design(1, 1, (), 1), Design(1, 1, (), 1, False)]
    assert last_designs((0.1, 0.4), 0, asked=True) == both
    assert last_designs((0.1,), 2, asked=False) == [
        Design(1, 2, (0.1,), 1, False), Design(1, 2, (), 1, False)
    ]  # fmt: skip
    # 100 steps: 4 starts of 10 s, 26 + 50 s for each of 40, 20 or 10 networks, 100 s of pretraining.
    for design, seconds in zip([full, *both], (3180, 1660, 30 + 100 + 760), strict=True):
        just = seconds / 0.85 / 3600
        assert choose([full], costs, Time(just + 1e-6), 200, last=both).design == design
    assert (trainings(both[1], costs), fixed_seconds(both[1], costs)) == ((10, 0), 30 + 260)
    told = "10 networks fine-tuned by 100 steps of 0.5 s; .* timing had 15% of one core"
    with pytest.raises(UsageError, match=told):
        choose([full], costs, Time(0.2), 200, last=both)


def test_designs_grow_leaner_and_keep_the_seeds_asked_for():
    every = designs(2, (0.1, 0.4))
    assert every[0] == Design(2, 3, (0.1, 0.4), 3)
    assert every[-1] == Design(1, 1, (0.1,), 1)
    costs = [fixed_seconds(design, COSTS) for design in every]
    assert costs == sorted(costs, reverse=True)
    assert {design.seeds for design in designs(2, (), seeds=4)} == {4}


def test_the_smallest_gain_is_that_of_student_t_by_hand():
    power = Power(0.05, 0.01, 1)
    # An error of .05 / 5; t(.975) + t(.8) at 24 degrees are 2.0639 + 0.8569.
    assert power.smallest(25, 1, 1) == pytest.approx(0.0292, abs=1e-4)
    # Variances 1e-4 and 2e-4 / 3 at 24 and 4 degrees, together 18.2: an error of .01291 times 2.961.
    assert power.smallest(25, 3, 1) == pytest.approx(0.0382, abs=1e-4)
    assert power.smallest(25, 3, 3) > power.smallest(25, 3, 1)
    assert Power(0.05, 0.01, 2).smallest(25, 3, 1) > power.smallest(25, 3, 1)  # Holm's first of two


def test_the_subjects_needed_are_the_fewest_that_show_the_gain():
    power = Power(0.05, 0.01, 1)
    subjects, seeds = power.needed(0.03, 1)
    assert seeds == 1
    assert power.smallest(subjects, 1, 1) <= 0.03 < power.smallest(subjects - 1, 1, 1)
    # Three seeds alone leave an error of .0082, which no number of subjects mends.
    assert power.smallest(100_000, 3, 1) > 0.02
    subjects, seeds = power.needed(0.02, 3)
    assert seeds > 3 and power.smallest(subjects, seeds, 1) <= 0.02
    assert power.needed(1e-6, 3) is None


def test_phantoms_are_all_labelled_so_test_subjects_are_kept_apart():
    seen = look(open_data(["phantoms:12"]), "auto", None, "phantoms:12")
    assert (seen.target, seen.task, seen.folds, seen.unlabelled) == ("masks", "segmentation", 0, 0)
    assert seen.tested < seen.labelled
    with pytest.raises(DataError, match="--folds 3 tests every subject"):
        look(open_data(["phantoms:12"]), "auto", 3, "phantoms:12")


def test_crops_fit_the_volumes():
    from dataclasses import replace

    seen = look(open_data(["phantoms:12"]), "auto", None, "phantoms:12")
    assert crop_for(replace(seen, shape=(35, 50, 36)), (32, 32, 32)) == (32, 32, 32)
    assert crop_for(replace(seen, shape=(20, 50, 36)), (32, 32, 32)) == (16, 32, 32)
    thick = replace(seen, shape=(10, 200, 200), spacing=(10.0, 1.5, 1.5))
    assert (crop_for(thick, (32, 32, 32)), recipes_for(thick).names[0]) == ((8, 64, 64), "simclr")
    image = replace(seen, shape=(1, 28, 28), spacing=(1.0, 1.0, 1.0))
    assert (crop_for(image, (32, 32, 32)), recipes_for(image).names) == ((1, 24, 24), ("simclr", "swav"))
    assert recipes_for(seen).names[0] == "context_restoration"
    assert recipes_for(seen, ["mae"]).names == ("mae",)


def test_the_end_of_a_study_tells_of_a_row_that_needs_no_network():
    from pathlib import Path

    from ssl3d_benchmarks.study.text import ending

    models = [(Path("tuned/models/a"), "a: auc 0.587")]
    plain = ending(["Yes."], models, ["scans"], Path("index.html"), "Methods")
    told = ending(["Yes."], models, ["scans"], Path("index.html"), "Methods", easy="shape features 0.894")
    assert "without one is ahead" not in plain and "is ahead (shape features 0.894)" in told
    assert "ssl3d predict tuned/models/a --data SCANS" in told
