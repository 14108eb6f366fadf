"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples every time, however slow the machine; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("suite")

VOCAB = 512
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def write_tokenizer(folder: Path, text: str) -> None:
    """Writes a byte-level BPE tokenizer of `VOCAB` tokens trained on `text`, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that returns a llama with random weights as transformers writes it, tokenizer included.

    Its keywords are those of `LlamaConfig` over small defaults, `dtype`, and `shard`, the size of a shard. Equal
    keywords give the same folder: copy it to change it (`tiny_copy`).
    """
    made: dict[str, Path] = {}

    def build(*, dtype: str = "bfloat16", shard: str = "1GB", **config: Any) -> Path:
        key = repr((dtype, shard, sorted(config.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / "Tiny"
            _write(made[key], dtype, shard, config)
        return made[key]

    return build


def _write(folder: Path, dtype: str, shard: str, config: dict[str, Any]) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from quantize.calib_data import read_text

    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(defaults | config))).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, max_length=256)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, read_text("default", limit=20_000))


@pytest.fixture
def cli() -> Callable[..., Any]:
    """A function that runs a command in this process; its result has `exit_code`, `stdout` and `stderr`."""
    from click.testing import CliRunner

    from quantize.cli import root

    return lambda *words: CliRunner().invoke(root, [str(word) for word in words])


@pytest.fixture
def tiny_copy(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """As `tiny_llama`, but every call returns a folder of its own in `tmp_path`, to be changed at will."""

    def copy(name: str = "Model", **config: Any) -> Path:
        return Path(shutil.copytree(tiny_llama(**config), tmp_path / name))

    return copy
