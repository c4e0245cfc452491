"""`ssl3d pretrain`, `ssl3d proxies`, `ssl3d encoders` as a user types them."""

import pytest
import yaml

from ssl3d import cli
from ssl3d.training.options import presets, request_of


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "--help-all"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for flag in ("--batch-size", "--resume", "--save-at", "--holdout", "--preset", "--resnet18.kind"):
        assert flag in told


def test_without_a_proxy_the_choice_is_told(capsys):
    assert cli.main(["pretrain"]) == 2
    error = capsys.readouterr().err
    assert "--proxy" in error and "sorting" in error and error.count("\n") == 1


def test_an_unknown_proxy_gets_suggestions(capsys):
    assert cli.main(["pretrain", "--proxy", "sortign"]) == 2
    assert "Did you mean sorting" in capsys.readouterr().err


def test_a_broken_proxy_is_named_and_breaks_no_other(tiny_plugins, capsys):
    assert cli.main(["pretrain", "--proxy", "broken"]) == 2
    assert "'broken' of tiny-ssl3d-plugins 1.0" in capsys.readouterr().err
    assert cli.main(["proxies"]) == 1
    told = capsys.readouterr().out
    assert "broken: proxy 'broken'" in told and "does not import" in told
    assert "mean and the spread of a crop" in told and "Nobody: Nothing, 2020" in told
    assert "arXiv:2203.09372" in told


def test_encoders_are_listed_with_their_papers(capsys):
    assert cli.main(["encoders"]) == 0
    told = capsys.readouterr().out
    assert "resnet18\n" in told and "Deep Residual Learning" in told


def test_the_printed_configuration_can_be_used(tiny_plugins, tmp_path, capsys):
    words = ["--proxy", "tiny", "--encoder", "resnet10", "--resnet10.width", "8", "--lr", "0.5"]
    assert cli.main(["pretrain", *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert values["lr"] == 0.5 and values["batch_size"] == 4 and values["resnet10"]["width"] == 8
    path = tmp_path / "c.yaml"
    path.write_text(printed, encoding="utf-8")
    again = request_of(["--config", str(path), "--seed", "7"]).plan
    assert again.as_config() == {**values, "seed": 7}


@pytest.mark.parametrize("name", sorted(presets()))
@pytest.mark.parametrize("proxy", ["sorting", "simclr", "barlow_twins"])
def test_presets_fit_every_built_in_proxy(name, proxy):
    plan = request_of(["--proxy", proxy, "--preset", name]).plan
    text = presets()[name].read_text(encoding="utf-8")
    assert text.startswith("#")
    for key, value in yaml.safe_load(text).items():
        if not isinstance(value, dict):
            assert plan.as_config()[key] == value
        elif key in (proxy, plan.options.encoder):
            assert value.items() <= plan.as_config()[key].items()
    assert (
        request_of(["--proxy", proxy, "--batch-size", "3", "--preset", name]).plan.options.batch_size == 3
    )


def test_there_is_a_gpu_preset_that_states_its_memory():
    assert {"gpu-96", "quick"} <= set(presets())
    assert "GB" in presets()["gpu-96"].read_text(encoding="utf-8").split("\n\n")[0]


def test_an_unknown_preset_is_told(capsys):
    assert cli.main(["pretrain", "--proxy", "sorting", "--preset", "gpu-97"]) == 2
    assert "gpu-96, pseudo3d, quick" in capsys.readouterr().err


def test_a_wrong_init_is_said_before_any_data_are_opened(tmp_path, capsys):
    words = ["--proxy", "sorting", "--init", str(tmp_path / "none"), "--data", str(tmp_path / "nowhere")]
    assert cli.main(["pretrain", *words, "--out", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'none'}: no such run or encoder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
