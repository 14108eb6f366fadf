"""Bad input ends in one line that names file and tensor, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Cli = Callable[..., Any]
Tiny = Callable[..., Path]
INDEX = "model.safetensors.index.json"
RTN = ("--method", "rtn", "--bits", "4", "--group-size", "32")
SHARDED = {"shard": "100KB"}


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command, checks how it is refused, and returns what was said.

    Its first argument is the exit code; `names` must stand in the error's line. Nothing in `tmp_path` may have
    come or gone, unless `left` names a path that may.
    """

    def check(code: int, *words: object, names: tuple[object, ...] = (), out: Path | None = None) -> str:
        out = out or tmp_path / "Out"
        before = listing(tmp_path)
        result = cli(*words, "--out", out)
        said: str = result.stderr
        assert result.exit_code == code, said
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, said
        assert "Traceback" not in said
        for name in names:
            assert str(name) in errors[0], said
        assert result.stdout == ""
        assert listing(tmp_path) == before
        return said

    return check


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    """Rewrites the tensors of a file after `edit` changed them in place."""
    tensors = load_file(model / file)
    edit(tensors)
    save_file(tensors, model / file, metadata={"format": "pt"})


def configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def shards(model: Path) -> list[Path]:
    found = sorted(model.glob("model-*.safetensors"))
    assert len(found) > 1
    return found


# The model


def test_missing_shard(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy(**SHARDED)
    lost = shards(model)[1]
    lost.unlink()
    refused(3, "run", model, *RTN, names=(model, lost.name, "tensors"))


def test_missing_shard_without_index(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy(**SHARDED)
    shards(model)[0].unlink()
    (model / INDEX).unlink()
    refused(3, "run", model, *RTN, names=(model,))


def test_truncated_shard(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy(**SHARDED)
    short = shards(model)[0]
    last = list(load_file(short))[-1]
    os.truncate(short, short.stat().st_size - 10)
    said = refused(3, "run", model, *RTN, names=(short, "truncated"))
    assert last in said or "tensor '" in said


def test_shard_cut_inside_its_header(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    os.truncate(model / "model.safetensors", 100)
    refused(3, "run", model, *RTN, names=(model / "model.safetensors",))


def test_git_lfs_pointer(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 281336\n"
    (model / "model.safetensors").write_text(pointer)
    said = refused(3, "run", model, *RTN, names=(model / "model.safetensors", "git-lfs pointer"))
    assert "git lfs pull" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_weight(refused: Callable[..., str], tiny_copy: Tiny, name: str, value: float) -> None:
    model = tiny_copy()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    change(model, spoil)
    said = refused(3, "run", model, *RTN, names=(model / "model.safetensors", name, "1 NaN or Inf"))
    assert "--allow-nan" in said


def test_nan_weight_under_calibration(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    name = "model.layers.1.mlp.up_proj.weight"
    change(model, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))
    few = ("--calib-samples", 2, "--calib-length", 32, "--eval", "none", "--group-size", 32)
    refused(3, "run", model, "--method", "awq", *few, names=(model, name))


@pytest.mark.parametrize("changes", [{"model_type": "llamma"}, {"architectures": ["LlammaForCausalLM"]}])
def test_unknown_architecture(refused: Callable[..., str], tiny_copy: Tiny, changes: dict[str, Any]) -> None:
    model = tiny_copy()
    configure(model, **changes)
    refused(3, "run", model, *RTN, names=(model, "unknown architecture", "lam"))


def test_lora_folder_alone(refused: Callable[..., str], tmp_path: Path) -> None:
    lora = tmp_path / "Lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, lora / "adapter_model.safetensors")
    said = refused(3, "run", lora, *RTN, names=(lora, "LoRA"))
    assert f"org/base --adapter {lora}" in said


def test_config_without_weights(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    (model / "model.safetensors").unlink()
    refused(3, "run", model, *RTN, names=(model, "no weights"))


def test_weights_without_config(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    (model / "config.json").unlink()
    refused(3, "run", model, *RTN, names=(model, "config.json"))


def test_broken_config(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    (model / "config.json").write_text('{"model_type": "llama", ')
    refused(3, "run", model, *RTN, names=(model / "config.json", "JSON"))


def test_no_such_model(refused: Callable[..., str], tmp_path: Path) -> None:
    refused(3, "run", tmp_path / "nothing", *RTN, names=(tmp_path / "nothing",))


def test_a_folder_without_any_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "Empty").mkdir()
    refused(3, "run", tmp_path / "Empty", *RTN, names=(tmp_path / "Empty",))


def test_missing_tensor(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    name = "model.layers.1.mlp.up_proj.weight"
    change(model, lambda tensors: tensors.pop(name))
    refused(3, "run", model, *RTN, names=(model, name))


def test_unknown_tensor(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    change(model, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(4, 4)}))
    said = refused(3, "run", model, *RTN, names=(model, "model.layers.0.extra.weight"))
    assert "--set" in said


def test_tensor_of_another_shape(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    configure(model, intermediate_size=96)
    refused(3, "run", model, *RTN, names=(model, "mlp.", "config.json"))


def test_missing_head_while_untied(refused: Callable[..., str], cli: Cli, tiny_copy: Tiny, tmp_path: Path) -> None:
    model = tiny_copy()
    change(model, lambda tensors: tensors.pop("lm_head.weight"))
    said = refused(3, "run", model, *RTN, names=(model, "lm_head.weight"))
    assert "--assume-tied" in said
    out = tmp_path / "Out"
    assert cli("run", model, *RTN, "--assume-tied", "--out", out).exit_code == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_single_file_of_another_name_works(cli: Cli, tiny_copy: Tiny, tiny_llama: Tiny, tmp_path: Path) -> None:
    model = tiny_copy()
    (model / "model.safetensors").rename(model / "llama.safetensors")
    result = cli("run", model, *RTN, "--out", tmp_path / "Out")
    assert result.exit_code == 0, result.stderr
    assert cli("run", tiny_llama(), *RTN, "--out", tmp_path / "Same").exit_code == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("Out", "Same"))
    assert one == other


def test_awq_output_again_without_requantize(
    refused: Callable[..., str], cli: Cli, tiny_llama: Tiny, tmp_path: Path
) -> None:
    once = tmp_path / "Once"
    assert cli("run", tiny_llama(), *RTN, "--out", once).exit_code == 0
    said = refused(3, "run", once, *RTN, names=(once, "int4-g32"))
    assert "--requantize" in said
    result = cli("run", once, *RTN, "--requantize", "--out", tmp_path / "Twice", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["base"].endswith("Once, dequantized from INT4-G32")


# Text


CALIBRATED = ("--method", "awq", "--group-size", "32", "--calib-samples", "4", "--calib-length", "32")


def test_empty_calibration_file(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("\n")
    refused(3, "run", tiny_llama(), *CALIBRATED, "--calib", text, "--eval", "none", names=(text, "no text"))


def test_too_little_calibration_text(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A few words only.")
    said = refused(3, "run", tiny_llama(), *CALIBRATED, "--calib", text, "--eval", "none", names=(text, "of 4 rows"))
    assert "--calib-length" in said


def test_missing_calibration_file(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "nothing.txt"
    refused(3, "run", tiny_llama(), *CALIBRATED, "--calib", text, "--eval", "none", names=(text,))


def test_missing_evaluation_text_is_found_before_the_work(
    refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.pipeline import Job

    monkeypatch.setattr(Job, "_fill", lambda *_: pytest.fail("the work began"))
    text = tmp_path / "nothing.txt"
    refused(3, "run", tiny_llama(), *RTN, "--eval", text, names=(text,))


def test_no_calibration_for_a_method_that_needs_it(refused: Callable[..., str], tiny_llama: Tiny) -> None:
    refused(2, "run", tiny_llama(), *CALIBRATED, "--calib", "none", names=("awq",))


def test_evaluation_text_too_short(cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A few words only.")
    result = cli("eval", tiny_llama(), "--text", text)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: {text}: ")
    assert "--context" in result.stderr


# The output


def test_output_exists(refused: Callable[..., str], cli: Cli, tiny_llama: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "Out"
    assert cli("run", tiny_llama(), *RTN, "--out", out).exit_code == 0
    said = refused(2, "run", tiny_llama(), *RTN, names=(out, "exists"))
    assert "--overwrite" in said
    sixteen = ("--method", "rtn", "--group-size", "16")
    assert cli("run", tiny_llama(), *sixteen, "--out", out, "--overwrite").exit_code == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["Out"]


def test_what_is_no_model_is_never_replaced(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "Papers"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(2, "run", tiny_llama(), *RTN, "--overwrite", out=out, names=(out,))


def test_the_current_folder_is_never_replaced(
    refused: Callable[..., str], tiny_copy: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_copy()
    monkeypatch.chdir(model)
    refused(2, "run", "--overwrite", *RTN, out=Path(), names=("the same",))


def test_output_is_the_input(refused: Callable[..., str], tiny_copy: Tiny) -> None:
    model = tiny_copy()
    refused(2, "run", model, *RTN, "--overwrite", out=model, names=(model, "the same"))


def test_output_is_the_input_through_a_link(refused: Callable[..., str], tiny_copy: Tiny, tmp_path: Path) -> None:
    model, link = tiny_copy(), tmp_path / "link"
    link.symlink_to(model)
    refused(2, "run", model, *RTN, "--overwrite", out=link, names=(link, "the same"))
    refused(2, "run", link, *RTN, "--overwrite", out=model, names=(model, "the same"))


def test_output_holds_the_input(refused: Callable[..., str], tiny_copy: Tiny, tmp_path: Path) -> None:
    model = tiny_copy("Outer/Model")
    (tmp_path / "Outer" / "config.json").write_text("{}")
    refused(2, "run", model, *RTN, "--overwrite", out=tmp_path / "Outer", names=("lies inside",))


def test_output_holds_the_calibration_text(refused: Callable[..., str], tiny_llama: Tiny, tiny_copy: Tiny) -> None:
    out = tiny_copy("Old")
    (out / "calib.txt").write_text("words " * 1000)
    words = (*CALIBRATED, "--calib", out / "calib.txt", "--eval", "none", "--overwrite")
    refused(2, "run", tiny_llama(), *words, out=out, names=(out / "calib.txt",))


def test_output_in_a_folder_that_is_a_file(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(3, "run", tiny_llama(), *RTN, out=tmp_path / "file" / "Out", names=(tmp_path / "file",))


def test_no_space_by_the_disk_usage(
    refused: Callable[..., str], tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1000, used=900, free=100))
    said = refused(4, "run", tiny_llama(), *RTN, names=("needs", "free"))
    assert "--out" in said


def test_no_space_when_reserving(
    refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(4, "run", tiny_llama(), *RTN, names=(tmp_path / "Out", "No space"))


def test_no_space_after_bytes_were_written(
    cli: Cli, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def full(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    out, partial = tmp_path / "Out", tmp_path / "Out.partial"
    monkeypatch.setattr(os, "pwrite", full)
    result = cli("run", tiny_llama(), *RTN, "--out", out)
    assert result.exit_code == 4
    assert f"{partial}: No space left on device" in result.stderr.splitlines()[-3]
    assert f"to continue: quantize run {tiny_llama()}" in result.stderr
    assert partial.is_dir()
    assert not out.exists()
    monkeypatch.undo()
    assert cli("run", tiny_llama(), *RTN, "--out", out).exit_code == 0
    assert not partial.exists()


def test_an_unfinished_run_with_other_settings(
    cli: Cli, tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.methods.rtn import RTN as Method

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "Out"
    monkeypatch.setattr(Method, "quantize", interrupted)
    assert cli("run", tiny_llama(), *RTN, "--out", out).exit_code == 130
    monkeypatch.undo()
    other = ("--method", "rtn", "--group-size", "16", "--out", out)
    result = cli("run", tiny_llama(), *other)
    assert result.exit_code == 3
    assert "--restart" in result.stderr
    assert (tmp_path / "Out.partial").is_dir()
    assert cli("run", tiny_llama(), *other, "--restart").exit_code == 0
    assert not (tmp_path / "Out.partial").exists()


def test_a_foreign_folder_in_the_way_is_left_alone(
    refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path
) -> None:
    foreign = tmp_path / "Out.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    refused(2, "run", tiny_llama(), *RTN, names=(foreign,))
    refused(2, "run", tiny_llama(), *RTN, "--restart", names=(foreign,))


# The command


@pytest.mark.parametrize("pattern", ["model.layers.7.*", "re:no.*such", "*.up_project"])
def test_pattern_that_matches_nothing(refused: Callable[..., str], tiny_llama: Tiny, pattern: str) -> None:
    refused(2, "run", tiny_llama(), *RTN, "--set", f"{pattern}=keep", names=("--set", pattern, "matches no tensor"))


def test_pattern_of_a_recipe_that_matches_nothing(
    refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- match: '*.up_project'\n  scheme: keep\n")
    refused(2, "run", tiny_llama(), *RTN, "--recipe", recipe, names=(recipe, "*.up_project", "matches no tensor"))


@pytest.mark.parametrize(
    ("rule", "said"), [("no equals sign", "is no rule"), ("*=int4", "no scheme"), ("re:(=keep", "re:(")]
)
def test_rule_that_is_none(refused: Callable[..., str], tiny_llama: Tiny, rule: str, said: str) -> None:
    refused(2, "run", tiny_llama(), *RTN, "--set", rule, names=(said,))


def test_recipe_that_is_none(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- pattern: x\n  scheme: keep\n")
    refused(3, "run", tiny_llama(), *RTN, "--recipe", recipe, names=(recipe, "match"))
    refused(3, "run", tiny_llama(), *RTN, "--recipe", tmp_path / "nothing", names=(tmp_path / "nothing",))


def test_unknown_method_names_the_nearest(refused: Callable[..., str], tiny_llama: Tiny) -> None:
    said = refused(2, "run", tiny_llama(), "--method", "awk", names=("awk",))
    assert "did you mean 'awq'?" in said


@pytest.mark.parametrize("command", ["run", "convert"])
def test_unknown_format_names_the_nearest(refused: Callable[..., str], tiny_llama: Tiny, command: str) -> None:
    method = RTN if command == "run" else ()
    said = refused(2, command, tiny_llama(), *method, "--format", "guff", names=("guff",))
    assert "did you mean 'gguf'?" in said


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--method", "rtn", "--format", "hf"), "awq"),
        (("--method", "rtn", "--format", "exl2"), "awq"),
        (("--method", "rtn", "--bits", "3", "--format", "awq"), "gptq"),
        (("--method", "rtn", "--bits", "5", "--format", "gptq"), "compressed-tensors"),
        (("--method", "exl2"), "awq"),
    ],
)
def test_combination_that_no_format_holds(
    refused: Callable[..., str], tiny_llama: Tiny, words: tuple[str, ...], hint: str
) -> None:
    assert hint in refused(3, "run", tiny_llama(), *words).splitlines()[-1]


@pytest.mark.parametrize("words", [("--bits", "9"), ("--bits", "0"), ("--group-size", "0"), ("--group-size", "7")])
def test_numbers_that_make_no_scheme(refused: Callable[..., str], tiny_llama: Tiny, words: tuple[str, ...]) -> None:
    refused(2, "run", tiny_llama(), "--method", "rtn", *words, names=(words[1],))


def test_adapter_of_another_model(refused: Callable[..., str], tiny_llama: Tiny, tmp_path: Path) -> None:
    lora = tmp_path / "Lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    halves = {f"base_model.model.model.other.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")}
    save_file(halves, lora / "adapter_model.safetensors")
    refused(3, "run", tiny_llama(), *RTN, "--adapter", lora, names=(lora, "model.other.weight"))
    refused(3, "run", tiny_llama(), *RTN, "--adapter", tmp_path / "nothing", names=(tmp_path / "nothing",))
